from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from ensdistill import InputError
from ensdistill.images import read_description, read_images
from ensdistill.sources import stratified
from tests.builders import encode, fails, good_tree, make, noise, per_class, write_tree

SPLITS = ("train", "val", "test")
DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)


def digits_file(path, seed=0, **options):
    make(path, source="digits", **{"validation": 200, "test": 597, "seed": seed, **options})
    return {split: read_images(path, split) for split in SPLITS}


def indices(split):
    """Which of scikit-learn's digits the images of a split are."""
    known = {image.tobytes(): i for i, image in enumerate(DIGITS)}
    assert len(known) == len(DIGITS)
    return [known[image.tobytes()] for image in split[0]]


def test_digits_are_scikit_learns_rescaled_split_without_remainder_and_stratified(tmp_path):
    splits = digits_file(tmp_path / "images.h5")
    found = {split: indices(pair) for split, pair in splits.items()}
    assert sorted(chain.from_iterable(found.values())) == list(range(1797))
    assert {split: len(there) for split, there in found.items()} == {
        "train": 1000,
        "val": 200,
        "test": 597,
    }
    shares = np.bincount(load_digits().target) / 1797
    for split, (pixels, labels) in splits.items():
        assert pixels.dtype == np.uint8
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(pixels[:, 0], DIGITS[found[split]])
        np.testing.assert_array_equal(labels, load_digits().target[found[split]])
        assert np.abs(np.bincount(labels) - shares * len(labels)).max() < 2


def test_digits_are_split_by_the_seed_alone(tmp_path):
    first, again, other = (
        digits_file(tmp_path / f"{name}.h5", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    for split in SPLITS:
        assert indices(first[split]) == indices(again[split])
        assert set(indices(first[split])) != set(indices(other[split]))


def test_a_training_subset_is_of_the_wanted_size_and_avoids_validation(tmp_path):
    splits = digits_file(tmp_path / "images.h5", train=100)
    found = {split: set(indices(pair)) for split, pair in splits.items()}
    assert len(found["train"]) == 100
    assert not found["train"] & (found["val"] | found["test"])
    for split, (_, labels) in splits.items():
        np.testing.assert_array_equal(labels, load_digits().target[indices(splits[split])])
    assert set(splits["train"][1]) == set(range(10))


def test_held_out_images_serve_for_nothing_else_and_leave_the_other_splits_as_they_are(tmp_path):
    path = tmp_path / "images.h5"
    without = digits_file(path, train=100)
    with h5py.File(path) as file:
        assert set(file) == set(SPLITS)
    digits_file(path, train=100, held_out=60)
    found = {split: set(indices(read_images(path, split))) for split in (*SPLITS, "held_out")}
    assert len(found["held_out"]) == 60
    everything = [index for them in found.values() for index in them]
    assert len(everything) == len(set(everything))
    for split in ("val", "test"):
        assert found[split] == set(indices(without[split]))
    labels = read_images(path, "held_out")[1]
    assert set(np.bincount(labels)) <= {5, 6, 7}  # stratified


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path):
    splits = digits_file(tmp_path / "images.h5")
    known = read_description(tmp_path / "images.h5")
    assert known["classes"] == [str(digit) for digit in range(10)]
    assert known["shape"] == (1, 8, 8)
    pixels = splits["train"][0] / 255
    np.testing.assert_allclose(known["mean"], [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(known["std"], [pixels.std()], rtol=1e-12)


def test_mean_and_std_are_per_channel_and_std_is_never_zero(tmp_path):
    pictures = noise(4, 6, 6, 3)
    pictures[..., 2] = 7
    files = {f"train/{'ab'[i % 2]}/{i}.png": encode(picture) for i, picture in enumerate(pictures)}
    files |= {f"test/{label}/0.png": encode(noise(6, 6, 3, seed=1)) for label in "ab"}
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "tree", files), validation=2)
    known = read_description(tmp_path / "images.h5")
    train, _ = read_images(tmp_path / "images.h5", "train")
    scaled = train.transpose(0, 2, 3, 1).reshape(-1, 3) / 255
    assert len(train) == 2
    np.testing.assert_allclose(known["mean"], scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(known["std"], [*scaled.std(0)[:2], 1 / 255], rtol=1e-12)


# --- too few images --------------------------------------------------------------------------


def test_the_good_folder_is_not_refused(tmp_path):
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "tree", good_tree()), validation=2)
    assert [len(read_images(tmp_path / "images.h5", split)[1]) for split in SPLITS] == [6, 2, 2]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"validation": 9}, "has 8 training images, fewer than 9 for validation and 2 for"),
        ({"validation": 7}, "has 8 training images, fewer than 7 for validation and 2 for"),
        (
            {"validation": 2, "held_out": 5},
            "has 8 training images, fewer than 2 for validation, 5 held out and 2 for training",
        ),
        ({"validation": 2, "train": 7}, "fewer than 2 for validation and 7 for training"),
        ({"validation": 1}, "1 validation images cannot be chosen from 8 images of 2 classes"),
        ({"validation": 2, "test": 5}, "5 test images are wanted, but there are only 2"),
    ],
)
def test_too_few_images_are_refused(tmp_path, options, expected):
    path = write_tree(tmp_path / "tree", good_tree())
    assert expected in fails(tmp_path / "images.h5", path=path, **options)


@pytest.mark.parametrize(
    ("sizes", "count", "expected"),
    [
        ((10, 10), 19, [(10, 9), (9, 10)]),  # one is left: not every class is
        ((10, 10, 1), 10, [(5, 4, 1), (4, 5, 1)]),
        ((10, 10, 1), 20, [(10, 9, 1), (9, 10, 1)]),
        ((100, 3, 1), 10, [(8, 1, 1)]),
        ((1, 1, 1), 3, None),
    ],
)
def test_a_subset_has_every_class_in_its_share_whatever_is_left_out(sizes, count, expected):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    if expected is None:
        with pytest.raises(InputError, match="3 test images are wanted, but there are only 3"):
            stratified(labels, count, 0, "test", "abc", rest=False)
        return
    masks = [
        stratified(labels, count, seed, "test", "abc"[: len(sizes)], rest=False)
        for seed in (0, 0, 1)
    ]
    for mask in masks:
        assert tuple(np.bincount(labels[mask])) in expected
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[0] != masks[2]).any()


@pytest.mark.parametrize("rest", [True, False])
def test_where_every_class_is_in_both_parts_the_choice_is_scikit_learns(rest):
    labels = np.random.default_rng(0).integers(0, 4, 200)
    _, chosen = train_test_split(np.arange(200), test_size=60, random_state=5, stratify=labels)
    mask = stratified(labels, 60, 5, "test", "abcd", rest=rest)
    assert set(np.flatnonzero(mask)) == set(chosen)


@pytest.mark.parametrize(
    ("rest", "sizes", "expected"),
    [
        (True, (20, 1), "4 val images cannot be chosen from 21 with every class in both parts: "
         "there is only 1 of 'rare'"),
        (False, (20, 0), "4 val images cannot be chosen from 20 with every class among them: "
         "there are only 0 of 'rare'"),
        (True, (3, 2), "4 val images cannot be chosen from 5 images of 2 classes with every class "
         "in both parts"),
    ],
)  # fmt: skip
def test_a_class_that_is_too_small_is_named(rest, sizes, expected):
    labels = np.repeat([0, 1], sizes)
    with pytest.raises(InputError) as caught:
        stratified(labels, 4, 0, "val", ["common", "rare"], rest=rest)
    assert str(caught.value) == expected


def test_fewer_images_than_classes_are_refused(tmp_path):
    path = write_tree(tmp_path / "tree", per_class(a=encode(noise(4, 4)), b=encode(noise(4, 4))))
    assert "has 2 training images" in fails(tmp_path / "images.h5", path=path)


def test_more_digits_than_there_are_are_refused(tmp_path):
    message = fails(tmp_path / "images.h5", source="digits", test=1797)
    assert message == "1797 test images are wanted, but there are only 1797"


def test_a_failed_run_keeps_an_older_file(tmp_path):
    output = tmp_path / "images.h5"
    output.write_text("older")
    fails(output, path=str(tmp_path / "absent"))
    assert output.read_text() == "older"


# --- damaged images.h5 -----------------------------------------------------------------------


def damage(path, what):
    content = bytearray(path.read_bytes())
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("no images here")
    elif what == "flipped byte":
        with h5py.File(path) as file:
            places = [file[f"test/{name}"].id.get_chunk_info(0) for name in ("images", "labels")]
        for chunk in places:
            content[chunk.byte_offset + chunk.size // 2] ^= 0x01
        path.write_bytes(content)
    elif what == "no dataset":
        with h5py.File(path, "a") as file:
            del file["test"]


DAMAGES = ["missing", "truncated", "empty", "text", "flipped byte", "no dataset"]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file_is_refused_by_name(tmp_path, what):
    path = tmp_path / "images.h5"
    digits_file(path)
    damage(path, what)
    with pytest.raises(InputError) as caught:
        read_images(path, "test")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def damaged_attribute(path):
    with h5py.File(path, "a") as file:
        file.attrs["mean"] = "[0.1"


def absent_attribute(path):
    with h5py.File(path, "a") as file:
        del file.attrs["classes"]


def absent_split(path):
    with h5py.File(path, "a") as file:
        del file["val"]


@pytest.mark.parametrize("harm", [Path.unlink, damaged_attribute, absent_attribute, absent_split])
def test_a_damaged_description_is_refused_by_name(tmp_path, harm):
    path = tmp_path / "images.h5"
    digits_file(path)
    harm(path)
    with pytest.raises(InputError, match=r"images\.h5: "):
        read_description(path)
