"""docs/own_ensemble.md, done by somebody who has an ensemble; and logits that others computed."""

import json
import re
import shutil

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import save_file
from scipy.special import softmax
from sklearn.metrics import log_loss

from ensdistill import InputError
from ensdistill.given_logits import take_over
from ensdistill.images import read_images
from ensdistill.predictions import read_attributes, read_prediction
from ensdistill.weights import read_header
from tests.builders import encode, make, write_tree
from tests.plain_network import normalised, trained
from tests.project import RECIPE, REPOSITORY, TINY, Project

PAGE = (REPOSITORY / "docs/own_ensemble.md").read_text()
K = 10


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


# --- logits alone ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "images.h5"
    make(path, source="digits", train=50, validation=30, test=40)
    return path


@pytest.fixture
def given(images, tmp_path):
    """A function that writes a file, changed at will, and takes it over."""

    def call(change=lambda file: None, members=None, classes=None):
        source, output = tmp_path / "given.h5", tmp_path / "out.h5"
        rng = np.random.default_rng(0)
        with h5py.File(source, "w") as file:
            for split in ("val", "test"):
                labels = read_images(images, split)[1]
                shape = (len(labels), *([members] if members else []), K)
                file[f"{split}/logits"] = rng.normal(size=shape).astype(np.float32)
                file[f"{split}/labels"] = labels
            change(file)
        known = {"images": images, "described": images, "classes": classes}
        take_over(str(source), output, **known, origin={"study": "mine"})
        return source, output

    return call


@pytest.mark.parametrize("members", [None, 3])
def test_logits_are_taken_over_as_they_are(given, members):
    source, output = given(members=members)
    with h5py.File(source) as file:
        for split in ("val", "test"):
            prediction, labels = read_prediction(output, split)
            expected = file[f"{split}/logits"][:]
            expected = expected if members else expected[:, None]
            np.testing.assert_array_equal(prediction.logits, expected)
            np.testing.assert_array_equal(labels, file[f"{split}/labels"][:])
    attributes = read_attributes(output)
    assert json.loads(attributes["given"]) == {"path": str(source)}
    assert "parameters" not in attributes


def test_what_the_logits_mean_and_their_columns_are_said_by_the_user(given):
    def dirichlet(file):
        file.attrs.update({"prediction": "dirichlet", "concentration_offset": 1, "parameters": 7})

    classes = [*map(str, range(K))][::-1]
    source, output = given(dirichlet, classes=classes)
    prediction, _ = read_prediction(output, "test")
    with h5py.File(source) as file:
        logits = file["test/logits"][:][:, None, ::-1]
    alpha = np.exp(logits.astype(float)) + 1
    np.testing.assert_allclose(prediction.probs(), (alpha / alpha.sum(2, keepdims=True))[:, 0])
    assert read_attributes(output)["parameters"] == 7


def put(name, value):
    def change(file):
        del file[name]
        file[name] = value(file) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file: file.pop("val/labels"), "has no /val/labels, which "),
        (lambda file: file.pop("test"), "has no /test/logits, which "),
        (put("test/logits", np.zeros((39, K), np.float32)), "/test has 39 logits and labels (40,)"),
        (put("test/labels", np.zeros(39, int)), "/test has 40 logits and labels (39,), and "),
        (put("test/logits", np.zeros((40, 9), np.float32)), "have 9 columns for 10 classes"),
        (put("test/logits", np.zeros((40, K), int)), "int64 (40, 1, 10) are no logits"),
        (put("test/logits", np.zeros(40, np.float32)), "float32 (40,) are no logits"),
        (put("test/logits", np.full((40, K), np.nan)), "some of /test/logits are not finite"),
        (lambda file: file.attrs.update(prediction="gauss"), "unknown prediction 'gauss'; known"),
        (lambda file: file.attrs.update(parameters="many"), "attribute 'parameters' is no number"),
    ],
)
def test_what_is_wrong_with_logits_is_said_in_a_sentence(given, tmp_path, change, said):
    with pytest.raises(InputError) as caught:
        given(change)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'given.h5'}: ")
    assert said in message
    assert "\n" not in message
    assert not (tmp_path / "out.h5").exists()


def test_logits_of_other_images_are_refused(given, images):
    labels = read_images(images, "val")[1]
    order = np.roll(np.arange(len(labels)), 1)
    place = int((labels[order] != labels).argmax())
    with pytest.raises(InputError) as caught:
        given(put("val/labels", labels[order]))
    message = f"the image at {place} has label {labels[place]}, not {labels[order][place]}"
    assert message in str(caught.value)


def test_a_damaged_file_of_the_user_stays_where_it_is(given, images, tmp_path):
    path = tmp_path / "bad.h5"
    path.write_bytes(b"no HDF5")
    known = {"images": images, "described": images, "classes": None, "origin": {}}
    with pytest.raises(InputError) as caught:
        take_over(path, tmp_path / "out.h5", **known)
    assert type(caught.value) is InputError  # as a DamagedFile the job would move it away


# --- the page, followed to the letter --------------------------------------------------------


def folder_of_digits(root):
    """A digit's folder is named by a letter, so that folders have another order than digits."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = (digits.images / 16 * 255).round().astype(np.uint8)
    files = {}
    for place, (image, digit) in enumerate(zip(pixels, digits.target, strict=True)):
        split = "train" if place < 500 else "test" if place < 600 else None
        if split:
            files[f"{split}/{'jihgfedcba'[digit]}/{place}.png"] = encode(image)
    write_tree(root, files)


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A project in which the page's study has run."""
    project = Project.new(tmp_path_factory.mktemp("own"))
    folder_of_digits(project.folder / "images")
    config = yaml.safe_load(blocks("yaml")[0])
    tiny = ("corruptions", "out_of_distribution", "analyses", "student_seeds", "distillation")
    study = {**config["studies"]["mine"], **{key: TINY[key] for key in tiny}}
    study |= {"architecture": {"name": "resnet8", "width": 4}, "teacher": RECIPE, "student": RECIPE}
    study["images"]["train"] = 200
    study["teachers"][2]["architecture"] = {"name": "wrn10x1", "width": 4}
    config["studies"]["mine"] = study
    project.configure(config)
    project.run("results/mine/images.h5")
    theirs, path = project.folder / "theirs", project.folder / "results/mine/images.h5"
    theirs.mkdir()
    train = read_images(path, "train")
    networks = [trained(*train, seed=seed, epochs=10) for seed in range(4)]
    states = [network.state_dict() for network in networks]
    torch.save({f"module.{key}": it for key, it in states[0].items()}, theirs / "0.pt")
    beside = {"swa_n": torch.ones(1)}
    save_file(
        {f"net.{key}": it for key, it in states[1].items()} | beside, theirs / "1.safetensors"
    )
    torch.save({"state_dict": states[2]}, theirs / "mine.pt")
    code = blocks("python")[0].replace('"results', f'"{project.folder}/results')
    for seed in (0, 1):
        here = code.replace('"theirs/other0', f'"{theirs}/other{seed}')
        exec(here, {"network": lambda x: networks[3](2 * x - 1)})
    project.networks = networks
    project.refused = project.snakemake("teachers")
    prefixes = {"net.": "", "swa_n": None}
    project.change("studies", "mine", "teachers", 1, "prefixes", value=prefixes)
    project.run()
    return project


def mine(project, name):
    return project.folder / "results/mine" / name


def test_keys_that_no_prefix_explains_are_told_and_left_out_by_null(own):
    assert own.refused.returncode == 1
    said = re.search(r"teacher mine 1: error: (.*)", own.refused.stderr)[1]
    assert said == "theirs/1.safetensors: its weights fit no resnet8: unexpected: 'swa_n'"
    for seed in (0, 1):
        header = read_header(mine(own, f"teachers/{seed}/weights.safetensors"))
        assert header["adopted"]["path"].startswith("theirs/")
    assert "adopted" not in read_header(mine(own, "teachers/2/weights.safetensors"))
    assert own.planned() == set()


def logits_of(network, path, split):
    with torch.no_grad():
        return network(normalised(read_images(path, split)[0])).numpy()


def test_rows_costs_and_findings_of_others_stand_beside_ours(own):
    images = mine(own, "images.h5")
    labels = read_images(images, "test")[1]
    table = pd.read_csv(mine(own, "tables/results.csv")).set_index("system")
    students = ["KD", "KD+ODS", "My method", "Other method"]
    assert [*table.index] == ["DE-1", "DE-2", "DE-3", *students]
    logits = {label: logits_of(own.networks[n], images, "test") for label, n in (
        ("My method", 2), ("Other method", 3)
    )}  # fmt: skip
    for label, values in logits.items():
        nll = log_loss(labels, softmax(values.astype(float), axis=1), labels=range(K))
        assert table.loc[label, "nll"] == pytest.approx(nll, rel=1e-4)
    assert table.loc["Other method", "n"] == 2
    assert table.loc["Other method", ["parameters", "macs", "ms_1"]].isna().all()
    assert table.loc["My method", "parameters"] == sum(
        it.numel() for it in own.networks[2].parameters()
    )
    costs = pd.read_csv(mine(own, "metrics/costs.csv")).set_index("system")
    scores = pd.read_csv(mine(own, "metrics/scores.csv"))
    for size in (1, 2, 3):  # two ResNets, and a WRN with fewer weights
        own_sizes = scores.loc[scores.system == f"DE-{size}", "parameters"]
        assert costs.loc[f"DE-{size}", "parameters"] == pytest.approx(own_sizes.mean())
        assert costs.loc[f"DE-{size}", "passes"] == pytest.approx(size)
    assert scores.loc[scores.system == "DE-1", "parameters"].nunique() == 2
    assert "Other method" not in costs.index
    assert np.isnan(costs.loc["My method", "training_macs"])
    assert np.isfinite(costs.loc[["KD", "KD+ODS"], "training_macs"]).all()
    findings = pd.read_csv(mine(own, "findings.csv"))
    beside = findings[findings["question"].str.startswith("How near do the methods that are")]
    assert [*beside["system"]] == ["My method", "Other method"]
    nll = table["nll"]
    expected = (nll["DE-1"] - nll["My method"]) / (nll["DE-1"] - nll["DE-2"])
    assert beside["estimate"].iloc[0] == pytest.approx(expected)


def test_what_is_not_known_of_others_is_left_out_and_said(own):
    for name, known in (
        ("corruptions", True),
        ("out_of_distribution", True),
        ("jacobians", True),
        ("reliability", False),
        ("selective", False),
    ):
        table = pd.read_csv(mine(own, f"metrics/{name}.csv"))
        systems = {*table.get("system", table.get("name"))}
        assert "My method" in systems
        assert ("Other method" not in systems) == known
    curves = pd.read_csv(mine(own, "metrics/learning_curves.csv"))
    assert curves.groupby("system")["replicate"].nunique()["teacher"] == 1
    page = mine(own, "index.html").read_text()
    assert page.count("logits on these images are unknown: Other method.") == 2
    assert page.count("logits alone are known: Other method.") == 1
    assert "2 of 3 teachers were trained elsewhere" in page
    assert "3 trained, 2 of them elsewhere" in page
    assert "resnet8, wrn10x1 networks on a folder of images" in page
    markdown = mine(own, "tables/results.md").read_text()
    assert re.search(r"^\| Other method \| 2 \|.*\| – \| – \| – \|$", markdown, re.MULTILINE)


def test_a_changed_file_reruns_what_is_made_of_it(own, tmp_path):
    own = own.copy(tmp_path / "changed")
    theirs = own.folder / "theirs"
    before = (theirs / "mine.pt").read_bytes()
    shutil.copy(theirs / "0.pt", theirs / "mine.pt")
    planned = own.planned()
    made = {"judged mine mine 0", "logits mine judged/mine/0", "costs mine", "scores mine"}
    assert made <= planned
    kept = ("teacher", "student", "logits mine teachers", "logits mine students")
    assert not any(job.startswith(kept) for job in planned)
    (theirs / "mine.pt").write_bytes(before)
    shutil.copy(theirs / "mine.pt", theirs / "0.pt")
    planned = own.planned()
    assert {"teacher mine 0", "student mine kd 0", "logits mine students/kd/0"} <= planned
    assert not {"teacher mine 1", "teacher mine 2", "logits mine teachers/1"} & planned


def test_a_file_that_is_not_there_is_named_before_anything_runs(own, tmp_path):
    own = own.copy(tmp_path / "changed")
    own.change("studies", "mine", "teachers", 0, "weights", value="theirs/nosuch.pt")
    done = own.snakemake("--dry-run")
    assert done.returncode != 0
    assert "config.yaml: theirs/nosuch.pt does not exist" in done.stderr + done.stdout
