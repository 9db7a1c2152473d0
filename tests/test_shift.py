import hashlib
import io
import json

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images
from sklearn.metrics import pairwise_distances

from ensdistill import InputError, shift
from ensdistill.hdf5 import write_hdf5
from ensdistill.images import read_images
from ensdistill.shift import KINDS, SEVERITIES, corrupt, write_shifted
from ensdistill.sources import Dataset
from tests.builders import encode, make, noise, photographs, publish, write_tar, write_tree

COPIES = {"source": "copies", "images": 4}
PHOTOGRAPHS = {"name": "far", "source": "photographs", "path": None, "images": 5}
SHAPES = [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 20)]


def images_file(path, images, labels, **attributes):
    """An images.h5 with just a test split."""
    arrays = {"test/images": images, "test/labels": np.asarray(labels)}
    write_hdf5(path, arrays, {"sha256": "of the source", "source": "folder", **attributes})
    return path


def write(tmp_path, images, *, corruptions=COPIES, others=(PHOTOGRAPHS,), seed=0, **options):
    path = tmp_path / "shifted.h5"
    sections = {"corruptions": corruptions, "out_of_distribution": others}
    write_shifted(path, images, **sections, seed=seed, attributes={"study": "x"}, **options)
    return path


@pytest.fixture
def uncorrupted(monkeypatch):
    """For tests of all but the copies."""
    monkeypatch.setattr(shift, "corrupt", lambda images, *_: images)


# --- shifted.h5 ------------------------------------------------------------------------------


def test_shifted_images_have_their_layout_and_attributes(tmp_path):
    make(tmp_path / "images.h5", source="digits", validation=200, test=100)
    path = write(tmp_path, tmp_path / "images.h5")
    clean, labels = read_images(path, "corrupted/clean/0")
    with h5py.File(path) as file:
        assert set(file) == {"corrupted", "out_of_distribution"}
        assert list(file["out_of_distribution"]) == ["far"]
        assert set(file["corrupted"]) == {"clean", *KINDS}
        for kind in KINDS:
            assert list(file["corrupted"][kind]) == list("12345")
        assert json.loads(file.attrs["kinds"]) == KINDS
        assert file.attrs["study"] == "x"
        checksums = json.loads(file.attrs["sha256"])
    with h5py.File(tmp_path / "images.h5") as file:
        assert checksums["images"] == file.attrs["sha256"]
    assert clean.shape == (4, 1, 8, 8)
    for kind, severity in [("fog", 1), ("glass_blur", 4), ("impulse_noise", 5)]:
        copies, same = read_images(path, f"corrupted/{kind}/{severity}")
        np.testing.assert_array_equal(copies, corrupt(clean, kind, severity))
        np.testing.assert_array_equal(same, labels)
    first = path.read_bytes()
    assert write(tmp_path, tmp_path / "images.h5").read_bytes() == first
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images.h5", "shifted.h5"]


@pytest.mark.parametrize("count", [1, 7, 10, 33, 99, 100, 101, None])
def test_corrupted_are_a_stratified_choice_of_the_test_images(tmp_path, uncorrupted, count):
    labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 3], [50, 30, 15, 5]))
    images = photographs(1, 8, 8, count=1).repeat(100, axis=0)
    images[:, 0, 0, 0] = np.arange(100)  # what tells them apart
    source = images_file(tmp_path / "images.h5", images, labels)

    def chosen(seed):
        path = write(tmp_path, source, corruptions={**COPIES, "images": count}, seed=seed)
        found, same = read_images(path, "corrupted/clean/0")
        indices = found[:, 0, 0, 0].astype(int)
        np.testing.assert_array_equal(same, labels[indices])
        assert (np.diff(indices) > 0).all()
        return indices

    indices, wanted = chosen(0), min(count or 100, 100)
    assert len(indices) == wanted
    assert (
        np.abs(
            np.bincount(labels[indices], minlength=4) - [50, 30, 15, 5] @ np.eye(4) * wanted / 100
        ).max()
        < 1
    )
    np.testing.assert_array_equal(chosen(0), indices)
    assert wanted > 50 or set(chosen(1)) != set(indices)


def test_a_failed_run_leaves_nothing(tmp_path, monkeypatch):
    source = images_file(tmp_path / "images.h5", photographs(1, 8, 8), [0, 1, 0, 1])

    def fail_late(images, kind, severity, seed):
        if kind == "fog":
            raise InputError("late")
        return images

    monkeypatch.setattr(shift, "corrupt", fail_late)
    with pytest.raises(InputError, match="late"):
        write(tmp_path, source)
    assert list(tmp_path.iterdir()) == [source]


# --- official corruptions --------------------------------------------------------------------


def cifar_c(tmp_path, monkeypatch, labels):
    """An archive like CIFAR-10-C's, and what it has by kind (5N, 32, 32, 3)."""
    arrays = {kind: noise(5 * len(labels), 32, 32, 3, seed=i) for i, kind in enumerate(KINDS)}
    files = {}
    for name, array in {**arrays, "labels": np.tile(np.array(labels, np.uint8), 5)}.items():
        buffer = io.BytesIO()
        np.save(buffer, array)
        files[f"CIFAR-10-C/{name}.npy"] = buffer.getvalue()
    path = tmp_path / "CIFAR-10-C.tar"
    write_tar(path, dict(reversed(files.items())))
    return publish(monkeypatch, path, path.read_bytes()), arrays


@pytest.mark.parametrize("count", [2, None])
def test_official_corruptions_are_the_archives_by_severity(tmp_path, monkeypatch, count):
    labels = np.array([3, 1, 1, 3, 2])
    clean = noise(5, 3, 32, 32)
    source = images_file(tmp_path / "images.h5", clean, labels)
    archive, arrays = cifar_c(tmp_path, monkeypatch, labels)
    section = {"source": "official", "images": count}
    path = write(tmp_path, source, corruptions=section, official=[archive])
    found, _ = read_images(path, "corrupted/clean/0")
    chosen = [i for i, image in enumerate(clean) if image.tolist() in found.tolist()]
    assert len(chosen) == len(found) == (count or 5)
    for kind in KINDS:
        for severity in SEVERITIES:
            images, same = read_images(path, f"corrupted/{kind}/{severity}")
            rows = arrays[kind][5 * (severity - 1) : 5 * severity]
            np.testing.assert_array_equal(images, rows[chosen].transpose(0, 3, 1, 2))
            np.testing.assert_array_equal(same, labels[chosen])
    with h5py.File(path) as file:
        checksum = hashlib.sha256((tmp_path / "CIFAR-10-C.tar").read_bytes()).hexdigest()
        assert json.loads(file.attrs["sha256"])["corruptions"] == checksum


@pytest.mark.parametrize("labels", [[3, 1, 1, 3], [3, 1, 1, 2, 3]])
def test_official_corruptions_of_other_images_are_refused(tmp_path, monkeypatch, labels):
    source = images_file(tmp_path / "images.h5", noise(len(labels), 3, 32, 32), labels)
    archive, _ = cifar_c(tmp_path, monkeypatch, [3, 1, 1, 3, 2])
    with pytest.raises(InputError) as caught:
        write(tmp_path, source, corruptions={**COPIES, "source": "official"}, official=[archive])
    assert str(caught.value) == f"{archive}: its labels are not those of the study's test images"
    assert not (tmp_path / "shifted.h5").exists()


def test_a_damaged_archive_of_corruptions_is_refused(tmp_path, monkeypatch):
    source = images_file(tmp_path / "images.h5", noise(2, 3, 32, 32), [0, 1])
    archive, _ = cifar_c(tmp_path, monkeypatch, [0, 1])
    with open(archive, "ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="not the official CIFAR-10-C"):
        write(tmp_path, source, corruptions={**COPIES, "source": "official"}, official=[archive])


# --- out of distribution ---------------------------------------------------------------------


def others(tmp_path, shape, **section):
    """Images out of distribution for a study of images of a shape."""
    source = images_file(tmp_path / "images.h5", photographs(*shape), [0, 1, 0, 1])
    images, labels = read_images(
        write(tmp_path, source, others=[{**PHOTOGRAPHS, **section}]), "out_of_distribution/far"
    )
    assert labels.dtype == np.int64
    assert labels.tolist() == [-1] * len(images)
    assert images.dtype == np.uint8
    assert images.shape[1:] == shape
    return images


@pytest.mark.parametrize("shape", [*SHAPES, (3, 16, 300)])
def test_photographs_are_pieces_of_four_times_the_size(tmp_path, uncorrupted, shape):
    images = others(tmp_path, shape, images=3)
    _, height, width = shape
    mode = "L" if shape[0] == 1 else "RGB"
    scale = min(4, 640 / width)
    kernel = (int(scale * height), int(scale * width))
    for image in images:
        # Found at some place of some photograph: its mean there is the mean of the image.
        sums = []
        for photograph in load_sample_images().images:
            whole = np.asarray(Image.fromarray(photograph).convert(mode), float)
            whole = whole.reshape(*whole.shape[:2], -1).mean(2)
            table = np.pad(whole.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
            down, across = kernel
            areas = table[down:, across:] - table[down:, :-across]
            areas = areas - (table[:-down, across:] - table[:-down, :-across])
            sums.append(np.abs(areas / down / across - image.mean()).min())
        assert min(sums) < 0.1


@pytest.mark.parametrize(("wanted", "count"), [(7, 7), (None, 2000), (5000, 2000)])
def test_as_many_photographs_as_wanted(tmp_path, uncorrupted, wanted, count):
    images = others(tmp_path, (1, 8, 8), images=wanted)
    assert len(images) == count
    distances = pairwise_distances(images.reshape(count, -1).astype(float))
    assert np.median(distances[np.triu_indices(count, 1)]) > 100
    np.testing.assert_array_equal(images[:7], others(tmp_path, (1, 8, 8), images=7))


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (3, 20, 12)])
def test_another_source_is_brought_to_size_and_channels(tmp_path, uncorrupted, shape):
    images = others(tmp_path, shape, source="digits", images=20)
    assert len(images) == 20
    assert (images == images[:, :1]).all()  # grey in every channel
    if shape[1:] == (8, 8):
        digits = np.round(load_digits().images * 255 / 16).astype(np.uint8)
        known = {digit.tobytes() for digit in digits}
        assert len({image[0].tobytes() for image in images} & known) == 20
    assert len(others(tmp_path, shape, source="digits", images=None)) == 1797 // 3


def test_a_folder_of_colour_images_of_all_sizes_becomes_grey_ones_of_one_size(
    tmp_path, uncorrupted
):
    colour = np.full((40, 50, 3), [200, 100, 50], np.uint8)
    files = {f"train/{label}/0.png": encode(noise(9, 9, 3)) for label in "ab"}
    files |= {"test/a/0.png": encode(colour), "test/b/0.png": encode(colour[:30, :20])}
    path = write_tree(tmp_path / "tree", files)
    images = others(tmp_path, (1, 6, 8), source="folder", path=path, images=None)
    luma = 0.299 * 200 + 0.587 * 100 + 0.114 * 50  # ITU-R 601-2
    np.testing.assert_allclose(images, np.full((2, 1, 6, 8), luma), atol=1)


def test_every_set_of_other_images_is_what_it_is_alone(tmp_path, uncorrupted):
    source = images_file(tmp_path / "images.h5", photographs(1, 8, 8), [0, 1, 0, 1])
    own = write_tree(tmp_path / "own", {f"{i}.png": encode(noise(8, 8, seed=i)) for i in range(3)})
    sections = [
        {**PHOTOGRAPHS, "name": "far"},
        {**PHOTOGRAPHS, "name": "near", "source": "digits", "images": 7},
        {**PHOTOGRAPHS, "name": "mine", "source": "folder", "path": own, "images": None},
    ]
    alone, checksums = {}, {}
    for section in sections:
        name = f"out_of_distribution/{section['name']}"
        path = write(tmp_path, source, others=[section])
        alone[name] = read_images(path, name)[0]
        with h5py.File(path) as file:
            checksums |= json.loads(file.attrs["sha256"])["out_of_distribution"]
    assert [len(images) for images in alone.values()] == [5, 7, 3]
    path = write(tmp_path, source, others=sections)
    for name, images in alone.items():
        found, labels = read_images(path, name)
        np.testing.assert_array_equal(found, images)
        assert labels.tolist() == [-1] * len(images)
    with h5py.File(path) as file:
        assert json.loads(file.attrs["sha256"])["out_of_distribution"] == checksums
        assert json.loads(file.attrs["out_of_distribution_files"])["mine"]["read"] == 3
    assert len(set(checksums.values())) == 3


def test_each_source_is_read_from_its_own_archives(tmp_path, uncorrupted, monkeypatch):
    read = []

    def answer(source, archives, **_):
        read.append((source, archives))
        split = noise(4, 1, 8, 8), np.zeros(4, np.int64)
        return Dataset(split, split, ["a"], source)

    monkeypatch.setattr(shift, "read_source", answer)
    source = images_file(tmp_path / "images.h5", photographs(1, 8, 8), [0, 1, 0, 1])
    sections = [{**PHOTOGRAPHS, "name": it, "source": it} for it in ("svhn", "cifar100")]
    archives = ["svhn_train_32x32.mat", "svhn_test_32x32.mat", "cifar-100-python.tar.gz"]
    archives = [f"downloads/{archive}" for archive in archives]
    write(tmp_path, source, others=sections, archives=archives)
    assert read == [("svhn", archives[:2]), ("cifar100", archives[2:])]
