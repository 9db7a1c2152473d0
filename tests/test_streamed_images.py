"""Own images that are too many to be kept: pixels written in a stream, or the files themselves."""

import io
import json
import shutil
import tarfile
import tracemalloc
from collections import namedtuple
from itertools import pairwise

import h5py
import numpy as np
import pytest
from PIL import Image

from ensdistill import InputError, images, shift, sources
from ensdistill.folders import ImageFolder
from ensdistill.images import read_description, read_images
from ensdistill.pictures import centre, decode, mode_of, pixels
from ensdistill.shift import write_shifted
from ensdistill.sources import folder
from ensdistill.stored_images import StoredImages
from tests.builders import encode, fails, make, noise, write_tar, write_tree, write_zip

SPLITS = ("train", "val", "held_out", "test")
PACKERS = {
    "folder": lambda root, files: write_tree(root / "own", files),
    "tar": lambda root, files: write_tar(root / "own.tar", files),
    "tar.gz": lambda root, files: write_tar(root / "own.tar.gz", files, "w:gz"),
    "zip": lambda root, files: write_zip(root / "own.zip", files),
}


@pytest.fixture
def streamed(monkeypatch):
    """No picture is kept."""
    monkeypatch.setattr(sources, "KEPT", 0)
    monkeypatch.setattr(shift, "KEPT", 0)


@pytest.fixture
def encoded(streamed, monkeypatch):
    """No pixel is stored."""
    monkeypatch.setattr(images, "MOST_PIXELS", 0)


def own(height=12, width=9, colours=3, ending="png"):
    """Files of a tree in an order that is not the sorted one, and the pixels of each."""
    known = {
        f"{split}/{label}/{i}.{ending}": noise(
            height, width, *([colours] if colours > 1 else []), seed=1000 * k + 10 * i + (n > 9)
        )
        for k, label in enumerate("cab")
        for split, n in (("test", 4), ("train", 10))
        for i in reversed(range(n))
    }
    return {name: encode(picture, ending) for name, picture in known.items()}, known


def as_stored(picture):
    return picture[None] if picture.ndim == 2 else picture.transpose(2, 0, 1)


def content(path):
    """Pixels, labels and the description of images.h5."""
    with h5py.File(path) as file:
        known = {key: json.loads(file.attrs[key]) for key in ("mean", "std", "classes", "files")}
        known["sha256"] = file.attrs["sha256"]
    return {split: read_images(path, split) for split in SPLITS}, known


OPTIONS = {"validation": 6, "held_out": 5, "train": 12, "test": 9}


# --- pixels in a stream ----------------------------------------------------------------------


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("packing", PACKERS)
def test_every_image_is_at_its_place_whatever_the_order_of_reading(
    tmp_path, streamed, packing, colours
):
    files, known = own(colours=colours)
    path = tmp_path / "images.h5"
    make(path, path=PACKERS[packing](tmp_path, files), **OPTIONS)
    names = {as_stored(picture).tobytes(): name for name, picture in known.items()}
    splits, said = content(path)
    seen = []
    for split, (stored, labels) in splits.items():
        found = [names[image.tobytes()] for image in stored]
        assert ["abc".index(name.split("/")[1]) for name in found] == labels.tolist()
        assert {name.split("/")[0] for name in found} == {"test" if split == "test" else "train"}
        assert found == sorted(found)
        seen += found
    assert len(seen) == len(set(seen)) == 6 + 5 + 12 + 9
    values = splits["train"][0] / 255
    np.testing.assert_allclose(said["mean"], values.mean((0, 2, 3)), rtol=1e-12)
    np.testing.assert_allclose(said["std"], values.std((0, 2, 3)), rtol=1e-12)


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("size", [None, 7])
def test_a_stream_holds_what_memory_would(tmp_path, monkeypatch, packing, size):
    files, _ = own()
    path = PACKERS[packing](tmp_path, files)
    found = []
    for kept, most in ((2**28, 0), (0, 2**35), (0, 0)):  # in memory, streamed, encoded
        monkeypatch.setattr(sources, "KEPT", kept)
        monkeypatch.setattr(images, "MOST_PIXELS", most)
        make(tmp_path / "images.h5", path=path, size=size, **OPTIONS)
        found.append(content(tmp_path / "images.h5"))
    for splits, known in found[1:]:
        assert known == found[0][1]
        for split, (stored, labels) in splits.items():
            np.testing.assert_array_equal(stored, found[0][0][split][0])
            np.testing.assert_array_equal(labels, found[0][0][split][1])


def test_one_colour_image_is_found_before_any_is_written(tmp_path, streamed):
    files, known = own(colours=1)
    files["train/b/3.png"] = encode(noise(12, 9, 3))
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "own", files), **OPTIONS)
    test, _ = read_images(tmp_path / "images.h5", "test")
    assert test.shape == (9, 3, 12, 9)
    grey = {picture.tobytes() for picture in known.values()}
    assert all(image[channel].tobytes() in grey for image in test for channel in range(3))


def test_streamed_pixels_lie_image_by_image_with_checksums(tmp_path, streamed, monkeypatch):
    path, files = tmp_path / "images.h5", own(12, 9)[0]
    monkeypatch.setattr("ensdistill.hdf5.CHUNK", 1000)
    make(path, path=write_tree(tmp_path / "own", files), **OPTIONS)
    with h5py.File(path) as file:
        stored = file["train/images"]
        assert stored.chunks == (3, 3, 12, 9)  # 324 bytes each
        assert stored.fletcher32
        place = stored.id.get_chunk_info(0)
    whole = bytearray(path.read_bytes())
    whole[place.byte_offset + 100] ^= 1
    path.write_bytes(whole)
    with pytest.raises(InputError, match=r"images\.h5: damaged"):
        read_images(path, "train")


def test_memory_grows_with_neither_images_nor_files(tmp_path, streamed, monkeypatch):
    blank = np.zeros((100, 100, 3), np.uint8)
    files = {}
    for k in range(2):
        for i in range(150):
            blank[0, 0] = k, i, 0
            files[f"{'train' if i < 140 else 'test'}/{k}/{i}.png"] = encode(blank)
    path = write_zip(tmp_path / "own.zip", files)
    make(tmp_path / "images.h5", path=path, validation=10)  # imports what it needs
    for most in (2**35, 0):
        monkeypatch.setattr(images, "MOST_PIXELS", most)
        tracemalloc.start()
        make(tmp_path / "images.h5", path=path, validation=10)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 270 * blank.nbytes / 4


# --- files instead of pixels -----------------------------------------------------------------


def test_files_are_stored_as_they_are(tmp_path, encoded):
    files, _ = own(20, 16, ending="jpg")
    path = tmp_path / "images.h5"
    make(path, path=write_tree(tmp_path / "own", files), size=8, resize=11, **OPTIONS)
    seen = set()
    with h5py.File(path) as file:
        for split in SPLITS:
            assert set(file[split]) == {"files", "offsets", "labels"}
            stored, offsets = file[f"{split}/files"], file[f"{split}/offsets"][:]
            crop = {} if split in ("train", "held_out") else {"crop": 8}
            assert dict(stored.attrs) == {"resize": 11, "mode": "RGB", **crop}
            assert stored.fletcher32
            assert len(offsets) == len(file[f"{split}/labels"]) + 1
            found = [stored[start:end].tobytes() for start, end in pairwise(offsets)]
            seen |= set(found)
            side = crop.get("crop", 11)
            assert StoredImages(path, split).shape == (len(found), 3, side, side)
            assert read_images(path, split)[0].shape == (len(found), 3, 8, 8)
    assert len(seen) == 32
    assert seen <= set(files.values())
    assert read_description(path)["shape"] == (3, 8, 8)


@pytest.mark.parametrize(("free", "as_files"), [(2 * 2400, False), (2 * 2400 - 1, True)])
def test_pixels_that_would_fill_half_of_the_disk_are_not_stored(
    tmp_path, streamed, monkeypatch, caplog, free, as_files
):
    """32 images of 3 × 5 × 5."""
    usage = namedtuple("usage", "free")(free)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    caplog.set_level("INFO")
    path = write_tree(tmp_path / "own", own()[0])
    make(tmp_path / "deep/images.h5", path=path, size=5, **OPTIONS)
    with h5py.File(tmp_path / "deep/images.h5") as file:
        assert ("files" in file["train"]) == as_files
    assert f"images.h5: holds {'files, not pixels' if as_files else 'pixels'}: all" in caplog.text


# --- sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 2**28])
@pytest.mark.parametrize(("resize", "size"), [(8, 8), (10, 6), (11, 6)])
def test_training_images_are_kept_larger_than_the_centres_of_the_others(
    tmp_path, monkeypatch, kept, resize, size
):
    """Checked on pictures whose pixels are their coordinates, so that a centre is what it says."""
    monkeypatch.setattr(sources, "KEPT", kept)
    rows, columns = np.mgrid[:resize, :resize]
    files = {}
    for i in range(24):
        picture = np.stack([20 * rows, 20 * columns, np.full_like(rows, i)], -1).astype(np.uint8)
        files[f"{'train' if i < 16 else 'test'}/{'ab'[i % 2]}/{i:02}.png"] = encode(picture)
    path = tmp_path / "images.h5"
    options = {"validation": 4, "held_out": 4, "size": size, "resize": resize}
    make(path, path=write_tree(tmp_path / "own", files), **options)
    with h5py.File(path) as file:
        said = {"resize": resize, "crop": size, "interpolation": "bicubic"}
        assert json.loads(file.attrs["evaluation"]) == said
        shapes = {split: file[split]["images"].shape[1:] for split in SPLITS}
        test, train = file["test/images"][:], file["train/images"][:]
    assert shapes["train"] == shapes["held_out"] == (3, resize, resize)
    assert shapes["val"] == shapes["test"] == (3, size, size)
    assert read_description(path)["shape"] == (3, size, size)
    first = (resize - size) // 2
    assert (test[:, 0, :, 0] // 20 == np.arange(first, first + size)).all()
    assert (test[:, 1, 0] // 20 == np.arange(first, first + size)).all()
    assert (train[:, 0, :, 0] // 20 == np.arange(resize)).all()


@pytest.mark.parametrize("shape", [(40, 24, 3), (24, 40, 3), (17, 17, 3)])
def test_pixels_are_pillows_shorter_side_and_centre(shape):
    """By resizing the whole picture and cutting afterwards, as a photograph would be."""
    ramp = np.linspace(40, 200, shape[0])[:, None, None] * np.ones(shape)
    ramp[..., 1] = np.linspace(40, 200, shape[1])
    picture = Image.fromarray(ramp.round().astype(np.uint8))
    short = min(picture.size)
    resized = picture.resize(
        [side * 12 // short for side in picture.size], Image.Resampling.BICUBIC
    )
    left, top = (side // 2 - 4 for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + 8, top + 8))).transpose(2, 0, 1)
    found = pixels(encode(picture), resize=12, crop=8, mode="RGB")
    np.testing.assert_allclose(found.astype(int), expected, atol=8)  # a pixel is 13 wide
    assert found.shape == (3, 8, 8)
    grey = pixels(encode(picture), resize=12, crop=None, mode="L")
    assert grey.shape == (1, 12, 12)


def test_a_centre_is_cut_alike_from_one_image_and_from_many():
    many = noise(3, 2, 7, 7)
    np.testing.assert_array_equal(centre(many, 4), many[..., 1:5, 1:5])
    np.testing.assert_array_equal(centre(many[0], 4), many[0][:, 1:5, 1:5])
    np.testing.assert_array_equal(centre(many, None), many)


# --- what pixels mean ------------------------------------------------------------------------


def test_what_is_transparent_keeps_its_colour():
    colours = np.array([[200, 10, 30], [0, 120, 255]], np.uint8)
    picture = Image.frombytes("P", (2, 1), bytes([0, 1]))
    picture.putpalette(colours.tobytes())
    data = encode(picture, transparency=0)
    assert Image.open(io.BytesIO(data)).info["transparency"] is not None
    np.testing.assert_array_equal(np.asarray(decode("x", data))[0], colours)
    clear = Image.fromarray(np.dstack([np.tile(colours[None], (2, 1, 1)), np.zeros((2, 2))]
                                      ).astype(np.uint8))  # fmt: skip
    np.testing.assert_array_equal(np.asarray(decode("x", encode(clear)))[0], colours)


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"]
ENDINGS = {
    "png": 7,
    "jpg": 4,
    "tif": 8,
    "bmp": 4,
    "gif": 3,
    "webp": 2,
    "ppm": 3,
    "ico": 3,
    "tga": 5,
}
"""And how many modes a format has at least."""


@pytest.mark.parametrize("ending", ENDINGS)
def test_the_header_says_the_mode_that_decoding_gives(ending):
    tried = 0
    for mode in MODES:
        for colour in (noise(16, 16, 3), noise(16, 16)):
            picture = Image.fromarray(colour).convert("L" if mode == "I;16" else mode)
            if mode == "I;16":
                picture = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
            try:
                data = encode(picture, ending)
            except (OSError, ValueError):
                break  # a format without this mode
            assert mode_of("x", data) == decode("x", data).mode, mode
            tried += 0.5
    assert tried >= ENDINGS[ending]


# --- what fails ------------------------------------------------------------------------------


@pytest.mark.parametrize("most", [0, 2**35], ids=["files", "pixels"])
def test_an_image_damaged_behind_its_header_leaves_nothing(tmp_path, streamed, monkeypatch, most):
    monkeypatch.setattr(images, "MOST_PIXELS", most)
    files, _ = own(200, 200)
    files["test/b/3.png"] = files["test/b/3.png"][:-20000]
    path = write_tree(tmp_path / "own", files)
    message = fails(tmp_path / "images.h5", path=path, size=8, **{**OPTIONS, "test": None})
    assert message.startswith(f"{path}/test/b/3.png: not a readable image")


def altered(names):
    def change(self, places, original=ImageFolder._contents):
        for place, data in original(self, places):
            if place.endswith(names.get("gone", "none")):
                continue
            yield place, data + b"x" * place.endswith(names.get("other", "none"))

    return change


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ({"other": "test/b/0.png"}, "own/test/b/0.png: changed while it was read"),
        ({"gone": "test/b/0.png"}, "own: images vanished while they were read"),
    ],
)
def test_images_that_change_between_the_readings_are_refused(
    tmp_path, streamed, monkeypatch, names, expected
):
    path = write_tree(tmp_path / "own", own()[0])
    monkeypatch.setattr(ImageFolder, "_contents", altered(names))
    message = fails(tmp_path / "images.h5", path=path, **{**OPTIONS, "test": None})
    assert message == f"{tmp_path}/{expected}"


def test_a_file_that_is_twice_in_a_tar_is_streamed_once(tmp_path, streamed):
    files, _ = own()
    path = write_tar(tmp_path / "own.tar", files)
    write_tar(tmp_path / "own.tar", {"train/a/0.png": files["train/a/0.png"]}, "a")
    with tarfile.open(path) as archive:
        assert len(archive.getnames()) == len(files) + 1
    data = folder(path=path, size=None)
    plain = folder(path=write_tree(tmp_path / "own", files), size=None)
    np.testing.assert_array_equal(np.asarray(data.train[0]), np.asarray(plain.train[0]))


# --- shifted.h5 ------------------------------------------------------------------------------


def test_shifted_images_are_the_same_in_a_stream(tmp_path, monkeypatch):
    path = write_tree(tmp_path / "own", own(36, 36)[0])
    make(tmp_path / "images.h5", path=path, **OPTIONS)
    mine = {f"{i}.png": encode(noise(50 + i, 40, 3, seed=i)) for i in range(9)}
    others = [{"name": "mine", "source": "folder", "images": None,
               "path": write_zip(tmp_path / "other.zip", mine)}]  # fmt: skip
    found, kinds = [], ["shot_noise", "fog", "elastic_transform", "jpeg_compression"]
    monkeypatch.setattr(shift, "KINDS", kinds)
    for kept, most in ((2**28, 2**35), (0, 2**35), (0, 0)):
        for module in (sources, shift):
            monkeypatch.setattr(module, "KEPT", kept)
        monkeypatch.setattr(images, "MOST_PIXELS", most)
        monkeypatch.setattr("ensdistill.corruptions.TOGETHER", 36 * 36 * 2)
        make(tmp_path / "images.h5", path=path, **OPTIONS)
        write_shifted(
            tmp_path / "shifted.h5",
            tmp_path / "images.h5",
            corruptions={"source": "copies", "images": 7},
            out_of_distribution=others,
            seed=3,
            attributes={},
        )
        with h5py.File(tmp_path / "shifted.h5") as file:
            arrays = {}
            file.visititems(
                lambda name, it, arrays=arrays: (
                    arrays.update({name: it[:]}) if hasattr(it, "shape") else None
                )
            )
        found.append(arrays)
    assert len(found[0]) == 2 * (1 + 4 * 5 + 1)
    for arrays in found[1:]:
        assert arrays.keys() == found[0].keys()
        for name, array in arrays.items():
            np.testing.assert_array_equal(array, found[0][name], err_msg=name)
