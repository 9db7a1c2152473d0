"""The kinds of files that are read, sound samples of them, and what reads them."""

import hashlib
import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import h5py
import numpy as np
import onnx
import torch
import yaml
from PIL import Image
from snakemake.common.configfile import load_configfile

from ensdistill import InputError, asking, deployment, given_logits
from ensdistill.config_errors import check_files
from ensdistill.files import read_csv
from ensdistill.hdf5 import write_hdf5
from ensdistill.images import read_description, read_images
from ensdistill.own_data import known_state, remember
from ensdistill.page.figures import embedded
from ensdistill.pictures import decode, mode_of, pixels, size_of
from ensdistill.predictions import read_attributes, read_prediction, splits_of
from ensdistill.sources import folder
from ensdistill.state import TrainingState
from ensdistill.state_dicts import read_stored
from ensdistill.students import build_student
from ensdistill.studies import read_configuration
from ensdistill.weights import load_student, read_header, save_student
from tests import mutations as by
from tests.builders import encode, good_tree, noise, photographs, write_tar, write_tree, write_zip
from tests.fuzzing import Kind
from tests.stores import png, store_files
from tests.test_image_tables import as_csv, as_parquet, as_saved, rows

K = 3


def digest(*arrays):
    return [(it.shape, str(it.dtype), hashlib.sha256(it.tobytes()).hexdigest()) for it in arrays]


# --- pictures --------------------------------------------------------------------------------


def picture(name, pixels, **options):
    def make(folder):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        path.write_bytes(encode(pixels, path.suffix[1:], **options))
        return path

    return make


def read_picture(path):
    data, name = path.read_bytes(), str(path)
    found = pixels(data, resize=8, crop=6, mode="RGB", name=name)
    assert (found.shape, found.dtype) == ((3, 6, 6), np.uint8)
    decoded = decode(name, data)
    assert mode_of(name, data) == decoded.mode
    assert size_of(name, data) == decoded.size[::-1]
    return digest(found)


PHOTOGRAPH = Image.fromarray(photographs(3, 20, 24, count=1)[0].transpose(1, 2, 0))
GREY_16 = Image.fromarray((noise(12, 10).astype(np.uint16) << 8) + 7)
PICTURES = {
    "png": ("x.png", PHOTOGRAPH, {}, [by.png_chunk]),
    "png palette": ("x.png", PHOTOGRAPH.quantize(16), {"transparency": 3}, [by.png_chunk]),
    "png 16 bits": ("x.png", GREY_16, {}, [by.png_chunk]),
    "jpeg": (
        "x.jpg",
        PHOTOGRAPH,
        {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6" + bytes(6)},
        [by.jpeg_segment],
    ),
    "jpeg progressive": ("x.jpg", PHOTOGRAPH, {"progressive": True}, [by.jpeg_segment]),
    "jpeg cmyk": ("x.jpg", PHOTOGRAPH.convert("CMYK"), {}, [by.jpeg_segment]),
    "tiff 16 bits": ("x.tif", GREY_16, {}, [by.tiff_entry]),
    "tiff lzw": ("x.tif", PHOTOGRAPH, {"compression": "tiff_lzw"}, [by.tiff_entry]),
    "tiff jpeg": ("x.tif", PHOTOGRAPH, {"compression": "jpeg"}, [by.tiff_entry]),
    "gif": ("x.gif", PHOTOGRAPH.quantize(16), {}, []),
    "webp": ("x.webp", PHOTOGRAPH, {}, []),
    "bmp": ("x.bmp", PHOTOGRAPH, {}, []),
    "pgm 16 bits": ("x.ppm", GREY_16, {}, []),
    "jpeg 2000": ("x.jp2", PHOTOGRAPH, {}, []),
    "avif": ("x.avif", PHOTOGRAPH, {}, []),
}


def read_figure(path):
    uri, width, height = embedded(path)
    assert uri.startswith("data:image/webp;base64,")
    assert width > 0 < height
    return uri


# --- own images ------------------------------------------------------------------------------


def read_own(path):
    data = folder(path=str(path), size=8)
    for images, labels in (data.train, data.test):
        assert (images.dtype, images.ndim, images.shape[2:]) == (np.uint8, 4, (8, 8))
        assert labels.shape == (len(images),)
        assert set(labels.tolist()) <= {*range(len(data.classes))}
    return digest(data.train[0], data.train[1], data.test[0], data.test[1]), data.classes


def archive(name, write, *options):
    return lambda folder: Path(write(folder / name, good_tree(), *options))


def table(write):
    known = rows(12, split=lambda n: ["train", "test"][n % 2], group=lambda n: f"P{n}")
    return lambda folder: Path(write(folder, known))


def saved(folder):
    return Path(table(as_saved)(folder), "train/data-00000-of-00001.arrow")


def read_saved(path):
    return read_own(next(it for it in path.parents if it.name == "saved"))


def record(folder):
    write_tree(folder / "tree", good_tree())
    known = known_state(folder / "own.json", str(folder / "tree"), labelled=True)
    remember(folder / "own.json", known, "a" * 64)
    remember(folder / "own.json", "b" * 64, "c" * 64)
    return folder / "own.json"


def read_record(path):
    """Whatever stands there, it is a matter of what is made anew."""
    found = known_state(path, str(path.with_name("tree")), labelled=True)
    assert isinstance(found, str)
    return None


# --- HDF5 ------------------------------------------------------------------------------------

FACTS = {
    "classes": json.dumps(["a", "b", "ü"]),
    "mean": "[0.5, 0.4, 0.3]",
    "std": "[0.3, 0.2, 0.1]",
}


def images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    splits = {}
    for seed, split in enumerate(("train", "val", "test")):
        splits |= {
            f"{split}/images": noise(5, 3, 6, 6, seed=seed),
            f"{split}/labels": np.arange(5) % K,
        }
    write_hdf5(folder / "images.h5", splits, FACTS)
    return folder / "images.h5"


def images_as_files(folder):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "images.h5"
    known = {"resize": 8, "crop": 6, "mode": "RGB"}
    with h5py.File(path, "w") as file:
        for seed, split in enumerate(("train", "val", "test")):
            encoded = [png(it) for it in noise(5, 3, 9, 7, seed=seed)]
            store_files(file, split, encoded, np.arange(5) % K, **known)
        file.attrs.update(FACTS | {"evaluation": json.dumps(known)})
    return path


def read_images_file(path):
    known, found = read_description(path), []
    assert len(known["shape"]) == 3
    assert len(known["mean"]) == len(known["std"]) == known["shape"][0]
    assert all(isinstance(it, str) for it in known["classes"])
    for split in ("train", "val", "test"):
        pictures, labels = read_images(path, split)
        assert (pictures.dtype, pictures.ndim, labels.dtype) == (np.uint8, 4, np.int64)
        assert pictures.shape[1:] == known["shape"]
        assert labels.shape == (len(pictures),)
        found += digest(pictures, labels)
    return known, found


def logits(folder, **known):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("val", "test"):
        arrays[f"{split}/logits"] = rng.normal(0, 2, (5, 2, K)).astype(np.float32)
        arrays[f"{split}/labels"] = np.arange(5) % K
    write_hdf5(folder / "logits.h5", arrays, {"parameters": 5, "digest": "d", **known})
    return folder / "logits.h5"


def dirichlet(folder):
    return logits(folder, prediction="dirichlet", concentration_offset=1.0)


def read_logits(path):
    read_attributes(path)
    found = []
    for split in splits_of(path):
        prediction, labels = read_prediction(path, split)
        probs = prediction.probs()
        assert probs.shape == (len(labels), prediction.shape[2])
        np.testing.assert_allclose(probs.sum(1), 1, atol=1e-6)
        for other in (prediction.entropy(), prediction.doubt(), prediction.mutual_information()):
            assert np.isfinite(other).all()
            assert other.shape == labels.shape
        known = deployment.calibrated(prediction, labels)
        found += digest(probs, labels, np.array([known["temperature"]]))
    return found


def given(folder):
    images(folder)
    return logits(folder)


def read_given(path):
    output, known = path.with_name("taken.h5"), path.with_name("images.h5")
    options = {"images": known, "described": known, "classes": None, "origin": {}}
    given_logits.take_over(path, output, **options)
    return read_logits(output)


# --- networks --------------------------------------------------------------------------------

ARCHITECTURE = {"name": "resnet8", "num_classes": K, "in_channels": 3, "width": 2}
ARCHITECTURE |= {"mean": [0.5] * 3, "std": [0.25] * 3}
DEPLOYED = deployment.Deployment(["a", "b", "ü"], 3, (8, 8), 8, 8, 2, temperature=1.5, scores=[0.1])


@cache
def student():
    torch.manual_seed(0)
    return build_student("batch_ensemble", ARCHITECTURE, members=2)


def weights(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.png").write_bytes(png(noise(3, 8, 8)))
    known = {"study": "s", "method": "kd", "replicate": 0, "digest": "d" * 64, "torch": "2"}
    known |= {"prediction": "mixture", "deployment": DEPLOYED.in_header()}
    save_student(folder / "weights.safetensors", student(), known)
    return folder / "weights.safetensors"


def read_weights(path):
    load_student(path), read_header(path)
    return ask(path)


def ask(path):
    """What a student says of a picture, as `ensdistill predict` asks it."""
    predictor, skipped = deployment.open_student(path), {}
    found = asking.image_files([path.with_name("x.png")], skipped)
    said = []
    for pictures, answers in asking.answered(predictor, found):
        assert answers is not None, pictures[0].error
        known = predictor.deployment
        assert answers.probabilities.shape == (1, len(known.classes))
        np.testing.assert_allclose(answers.probabilities.sum(1), 1, atol=1e-5)
        said += digest(answers.probabilities)
    return said


def onnx_student(folder):
    """Softmax of a convolution's mean, as an exported student says it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "x.png").write_bytes(png(noise(3, 8, 8)))
    node, known = onnx.helper.make_node, replace(DEPLOYED, members=1)
    shapes = {"probabilities": ["B", K], "member_probabilities": ["B", 1, K], "entropy": ["B"]}
    shapes |= {"mutual_information": ["B"]}
    numbers = {"weight": np.random.default_rng(0).normal(size=(K, 3, 3, 3)).astype(np.float32)}
    numbers |= {"one": np.array([1]), "zero": np.float32([0])}
    value = partial(onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT)
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["images", "weight"], ["maps"], pads=[1, 1, 1, 1]),
            node("ReduceMean", ["maps"], ["logits"], axes=[2, 3], keepdims=0),
            node("Softmax", ["logits"], ["probabilities"]),
            node("Unsqueeze", ["probabilities", "one"], ["member_probabilities"]),
            node("Log", ["probabilities"], ["logs"]),
            node("Mul", ["probabilities", "logs"], ["terms"]),
            node("ReduceSum", ["terms", "one"], ["negative"], keepdims=0),
            node("Neg", ["negative"], ["entropy"]),
            node("Mul", ["entropy", "zero"], ["mutual_information"]),
        ],
        "student",
        [value("images", shape=["B", 3, "H", "W"])],
        [value(name, shape=shape) for name, shape in shapes.items()],
        [onnx.numpy_helper.from_array(it, name) for name, it in numbers.items()],
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9
    )
    onnx.helper.set_model_props(model, {"ensdistill": known.to_json()})
    onnx.save(model, folder / "student.onnx")
    return folder / "student.onnx"


def onnx_part(rng, data):
    """A field of a model, which is sound but for that."""
    model = onnx.load_from_string(data)
    graph, kind = model.graph, rng.integers(7)
    node = graph.node[rng.integers(len(graph.node))]
    number, size = (
        graph.initializer[rng.integers(len(graph.initializer))],
        by.SIZES[rng.integers(8)],
    )
    if kind < 2:
        said = model.metadata_props[0]
        said.value = by.json_text(rng, said.value).decode()
    elif kind == 2:
        node.op_type = str(rng.choice(["Log", "Conv", "MatMul", "Reshape", "Expand", "Loop", ""]))
    elif kind == 3 and number.dims:
        number.dims[rng.integers(len(number.dims))] = size
    elif kind == 4:
        number.raw_data = by.mutated(rng, number.raw_data)
    elif kind == 5:
        node.input[rng.integers(len(node.input))] = str(rng.choice(["", "images", "one", "zero"]))
    else:
        whole = [*graph.input, *graph.output]
        shape = whole[rng.integers(len(whole))].type.tensor_type.shape
        shape.dim[rng.integers(len(shape.dim))].dim_value = size
    return model.SerializeToString()


def stored(name):
    def make(folder):
        folder.mkdir(parents=True, exist_ok=True)
        state = student().network.state_dict()
        if name.endswith("safetensors"):
            return weights(folder).rename(folder / name)
        torch.save({"state_dict": state, "classes": ["a", "b", "c"], "epoch": 3}, folder / name)
        return folder / name

    return make


def read_state_dict(path):
    found = read_stored(path)
    assert all(isinstance(it, torch.Tensor) for it in found.tensors.values())
    assert found.classes is None or all(isinstance(it, str) for it in found.classes)
    return {
        key: digest(it.numpy(force=True))
        for key, it in found.tensors.items()
        if it.dtype != torch.bfloat16
    }


def state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    known = {"epoch": 3, "weights": {"a": torch.arange(6.0)}, "history": [{"loss": 0.5}]}
    TrainingState(folder / "state.pt", "f").save(known)
    return folder / "state.pt"


def read_state(path):
    found = TrainingState(path, "f").load()
    if path.with_name("state.pt.damaged").exists():
        raise InputError("state.pt was set aside")
    assert found is None or isinstance(found, dict)
    return repr(found)


# --- texts -----------------------------------------------------------------------------------

CSV = 'system,name,nll,n\nDE-1,é,0.1,3\n"a, b",NA,1e-3,4\nKD,1,,5\n'


def results(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.csv").write_text(CSV, encoding="utf-8")
    return folder / "scores.csv"


def read_results(path):
    frame = read_csv(path)
    return frame.to_csv()


CONFIG = """
run: [tiny]
studies:
  tiny: &tiny
    images: {source: folder, path: own.zip, size: 8, columns: {label: class}}
    architecture: {name: resnet8, width: 4}
    members: 2
    pool: 3
    teacher: {epochs: 7, batch_size: 64, learning_rate: 1e-1}
    distillation: {temperature: 2.0, eta: 13/255}
    out_of_distribution: [{images: 50}, {name: few, images: 10}]
    published: {source: x, scores: {DE-1: {nll: 1.0}}}
    methods:
      be: {label: BE, objective: labels, paper: be}
      kd: {label: KD, perturbation: {name: ods, eta: 1/255}, recipe: {epochs: 9}}
  other:
    <<: *tiny
    pool: 4
"""


def config(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(CONFIG)
    return folder / "config.yaml"


def read_config(path):
    """As Snakemake and the Snakefile do."""
    check_files([path])
    return read_configuration(load_configfile(path)).model_dump_json()


def yaml_tree(rng, data):
    tree = by.change_tree(rng, yaml.safe_load(data))
    return yaml.safe_dump(tree, allow_unicode=True).encode()


KINDS = {
    **{
        name: Kind(picture(file, pixels, **options), read_picture, known)
        for name, (file, pixels, options, known) in PICTURES.items()
    },
    "figure": Kind(picture("x.png", PHOTOGRAPH), read_figure, [by.png_chunk]),
    "zip": Kind(archive("x.zip", write_zip), read_own, [by.zip_member]),
    "tar": Kind(archive("x.tar", write_tar), read_own, [by.tar_header]),
    "tar.gz": Kind(archive("x.tar.gz", write_tar, "w:gz"), read_own, [by.gzipped]),
    "tar.xz": Kind(archive("x.tar.xz", write_tar, "w:xz"), read_own),
    "tar.bz2": Kind(archive("x.tar.bz2", write_tar, "w:bz2"), read_own),
    "csv": Kind(table(as_csv), read_own),
    "parquet": Kind(table(as_parquet), read_own),
    "saved": Kind(saved, read_saved, named=["saved"]),
    "record": Kind(record, read_record, [by.json_text]),
    "images.h5": Kind(images, read_images_file, [by.hdf5_part]),
    "images.h5 of files": Kind(images_as_files, read_images_file, [by.hdf5_part]),
    "logits.h5": Kind(logits, read_logits, [by.hdf5_part]),
    "logits.h5 dirichlet": Kind(dirichlet, read_logits, [by.hdf5_part]),
    "given logits": Kind(given, read_given, [by.hdf5_part]),
    "weights": Kind(weights, read_weights, [by.safetensors_header], ["the student's"]),
    "onnx": Kind(onnx_student, ask, [onnx_part], ["the student's"]),
    "safetensors": Kind(stored("x.safetensors"), read_state_dict, [by.safetensors_header]),
    "state dict": Kind(stored("x.pth"), read_state_dict, [by.zip_member]),
    "state": Kind(state, read_state, [by.zip_member]),
    "results": Kind(results, read_results),
    "config": Kind(config, read_config, [yaml_tree]),
}
"""By name; see `Kind`."""
