"""Everything that lies in folders of own images: read, skipped and told, or refused."""

import json
import logging
import os
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from ensdistill import InputError
from ensdistill.images import read_images
from ensdistill.own_data import current_state, known_state, remember
from ensdistill.sources import folder
from tests.builders import encode, fails, make, noise, write_tar, write_tree, write_zip

IMAGES = {
    f"{split}/{label}/{i}.png": encode(noise(4, 4, seed=100 * (split == "test") + 10 * k + i))
    for split in ("train", "test")
    for k, label in enumerate("ab")
    for i in range(3)
}
SPARE = encode(noise(4, 4, seed=999))
HEIC = b"\0\0\0\x18ftypheic" + bytes(20)
PACKERS = {
    "folder": lambda root, files: write_tree(root / "own", files),
    "tar": lambda root, files: write_tar(root / "own.tar", files),
    "tar.gz": lambda root, files: write_tar(root / "own.tar.gz", files, "w:gz"),
    "zip": lambda root, files: write_zip(root / "own.zip", files),
}


def counts(path, **options):
    return folder(path=path, size=None, **options).files


def refused(path, **options):
    with pytest.raises(InputError) as caught:
        folder(path=path, size=None, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def without(prefix, files=IMAGES):
    return {name: data for name, data in files.items() if not name.startswith(prefix)}


# --- what is counted -------------------------------------------------------------------------

TREATED = {
    "formats": ["train/a/x.HEIC", "test/b/x.dng", "train/a/x.svg"],
    "endings": ["train/a/x.jpg_large"],
    "deeper": ["train/a/more/0.png", "test/b/more/still/0"],
    "classless": ["train/0.png", "test/0"],
    "archives": ["train/a/x.zip", "other.tar.gz"],
    "others": ["train/a/readme.txt", "train/a/licence.pdf", "test/b/features.h5", "train/notes",
               "train/a/labels.csv", "train/a/more/x.mat", "train/a/clip.mpg", "train/a/empty"],
    "hidden": ["train/a/.DS_Store", "__MACOSX/train/a/._0.png", "train/a/.cache/0.png",
               ".git/train/a/0.png", "@eaDir/test/a/0.png"],
    "elsewhere": ["readme.png", "val/a/0.png", "labels/train.png", "test.png"],
}  # fmt: skip
CONTENT = {"x.jpg_large": SPARE, "0": SPARE, "empty": b""}


@pytest.mark.parametrize("packing", PACKERS)
def test_everything_that_is_met_is_counted_by_its_treatment(tmp_path, caplog, packing):
    caplog.set_level(logging.INFO)
    clutter = {
        name: CONTENT.get(name.rpartition("/")[2], b"no image")
        for names in TREATED.values()
        for name in names
    }
    path = PACKERS[packing](tmp_path, IMAGES | clutter)
    expected = {kind: len(names) for kind, names in TREATED.items()} | {"read": 12}
    assert counts(path) == expected
    assert sum(expected.values()) == len(IMAGES | clutter)
    (told,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert told.getMessage() == (
        f"{path}: images read: 12; skipped: formats that are not read (3), "
        "endings of no image format (1), in folders below a class (2), in no class (2), "
        "archives within a folder (2), no images (8), hidden (5), outside of train/ and test/ (4)"
    )
    for place in TREATED["deeper"]:
        assert f"{path}/{place}" in caplog.text


def test_the_counts_are_in_images_h5(tmp_path):
    path = write_tree(tmp_path / "own", IMAGES | {"train/a/x.heic": HEIC})
    make(tmp_path / "images.h5", path=path, validation=2)
    with h5py.File(tmp_path / "images.h5") as file:
        assert json.loads(file.attrs["files"]) == {"read": 12, "formats": 1}


@pytest.mark.parametrize("extra", [{}, {"train/a/notes.txt": b"x", ".x": b""}])
def test_what_nobody_misses_gives_no_warning(tmp_path, caplog, extra):
    caplog.set_level(logging.INFO)
    counts(write_tree(tmp_path / "own", IMAGES | extra))
    assert [record.levelno for record in caplog.records if "images read" in record.message] == [
        logging.INFO
    ]


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp", "jp2"])
def test_images_without_an_ending_are_read(tmp_path, packing, ending):
    files = {name.removesuffix(".png"): data for name, data in IMAGES.items()}
    data = encode(np.full((4, 4, 3), 77, np.uint8), ending.replace("jp2", "jpeg2000"))
    path = PACKERS[packing](tmp_path, files | {"train/b/9": data})
    images = folder(path=path, size=None).train[0]
    assert images.shape == (7, 3, 4, 4)
    np.testing.assert_allclose(images[-1], 77, atol=1)


def test_heic_without_an_ending_is_told(tmp_path):
    path = write_tree(tmp_path / "own", IMAGES | {"train/a/photo": HEIC})
    assert counts(path) == {"read": 12, "formats": 1}


def test_archives_beside_train_and_test_are_told_and_not_read(tmp_path):
    path = write_tree(tmp_path / "own", IMAGES)
    write_zip(tmp_path / "own/own.zip", {"train/c/0.png": SPARE})
    data = folder(path=path, size=None)
    assert data.files == {"read": 12, "archives": 1}
    assert data.classes == ["a", "b"]


# --- classes without images ------------------------------------------------------------------

LOST = {
    "of another format": ({"c/0.heic": HEIC}, "formats that are not read (PATH/train/c/0.heic)"),
    "deeper": ({"c/images/0.png": SPARE}, "in folders below a class (PATH/train/c/images/0.png)"),
    "of no images": ({"c/0.npy": b"\x93NUMPY"}, "no images (PATH/train/c/0.npy)"),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("what", LOST)
def test_a_class_of_which_nothing_is_read_is_refused(tmp_path, packing, what):
    files, reason = LOST[what]
    files = {f"{split}/{name}": data for name, data in files.items() for split in ("train", "test")}
    path = PACKERS[packing](tmp_path, IMAGES | files)
    expected = f"{path}: class 'c' has no images in train/c/: files there are {reason}"
    message = refused(path)
    assert message.replace("test/c", "train/c") == expected.replace("PATH", path)


def test_an_empty_class_folder_is_refused(tmp_path):
    path = write_tree(tmp_path / "own", IMAGES)
    (tmp_path / "own/train/c").mkdir()
    assert refused(path) == (
        f"{path}: class 'c' has no images in train/c/: files there are missing"
    )


# --- the same images twice -------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize(("one", "other"), [("", "own/"), ("x/", "x/x/"), ("v1/", "v2/")])
def test_a_second_copy_is_refused_by_both_places(tmp_path, packing, one, other):
    files = {f"{above}{name}": data for above in (one, other) for name, data in IMAGES.items()}
    path = PACKERS[packing](tmp_path, files)
    places = {f"{path}/{above}{split}" for above in (one, other) for split in ("train", "test")}
    message = refused(path)
    first, _, second = message.partition(":")[0].partition(" and ")
    assert {first, second} <= places
    assert len({first, second}) == 2
    assert first.rpartition("/")[2] == second.rpartition("/")[2]
    assert message.endswith(": images are in both; keep one, or name one of them")


@pytest.mark.parametrize("packing", PACKERS)
def test_one_wrapping_folder_is_no_second_copy(tmp_path, packing):
    wrapped = {f"train/{name}": data for name, data in IMAGES.items()}
    assert counts(PACKERS[packing](tmp_path, wrapped)) == {"read": 12}


@pytest.mark.parametrize("packing", PACKERS)
def test_equal_images_of_a_class_are_read_once(tmp_path, packing):
    """Or one could come into training and one into validation."""
    copies = {f"train/a/copy {i}.png": IMAGES["train/a/1.png"] for i in range(4)}
    data = folder(path=PACKERS[packing](tmp_path, copies | IMAGES), size=None)
    plain = folder(path=write_tree(tmp_path / "plain", IMAGES), size=None)
    assert data.files == {"read": 12, "duplicates": 4}
    np.testing.assert_array_equal(data.train[0], plain.train[0])
    assert data.sha256 == plain.sha256


def test_a_list_of_two_copies_is_read_once(tmp_path):
    paths = [write_zip(tmp_path / "1.zip", IMAGES), write_tar(tmp_path / "2.tar", IMAGES)]
    assert counts(paths) == {"read": 12, "duplicates": 12}


def test_equal_images_in_two_splits_or_classes_are_read_and_told(tmp_path, caplog):
    files = IMAGES | {"test/a/7.png": IMAGES["train/a/0.png"], "train/b/8.png": SPARE}
    files |= {"train/a/9.png": SPARE}
    path = write_tree(tmp_path / "own", files)
    assert counts(path) == {"read": 15, "in_both_splits": 1, "in_several_classes": 1}
    assert caplog.messages == [
        f"{path}: images read: 15; images that are in train and in test (1); "
        "images that are in several classes (1)"
    ]


def test_validation_images_are_no_training_images(tmp_path):
    """Of ten images that are all there three times."""
    files = {
        f"{split}/a/{i}-{j}.png": encode(noise(4, 4, seed=i + 50 * (split == "test")))
        for split in ("train", "test")
        for i in range(10)
        for j in range(3)
    }
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "own", files), validation=4)
    train, val = (
        {image.tobytes() for image in read_images(tmp_path / "images.h5", split)[0]}
        for split in ("train", "val")
    )
    assert (len(train), len(val), len(train & val)) == (6, 4, 0)


@pytest.mark.parametrize("equal", [True, False])
def test_a_file_twice_in_one_archive(tmp_path, equal):
    """As `tar -r` leaves it; unpacked the second one replaces the first."""
    path = write_tar(tmp_path / "own.tar", IMAGES)
    again = IMAGES["train/a/0.png"] if equal else SPARE
    write_tar(tmp_path / "own.tar", {"train/a/0.png": again}, "a")
    if equal:
        assert counts(path) == {"read": 12, "duplicates": 1}
    else:
        assert refused(path) == f"{path}/train/a/0.png: is there twice, with different content"


# --- links -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "others"),
    [
        (["train/a/0.png"], ""),
        (["train/a/0.png", "test/b/1.png", "train/b/photo"], ", as are 2 others"),
        (["train/c"], ""),
        (["test/v1.0"], ""),
    ],
)
def test_links_that_lead_nowhere_are_refused(tmp_path, names, others):
    """A cache of DVC or git-annex that was not fetched, or a moved folder."""
    path = write_tree(tmp_path / "own", IMAGES)
    for name in names:
        Path(path, name).unlink(missing_ok=True)
        Path(path, name).symlink_to("../../.cache/absent")
    first = min(names)
    assert refused(path) == (
        f"{path}/{first}: is a link that cannot be followed{others}; "
        "put the images themselves there"
    )


def test_a_split_that_is_a_link_to_nowhere_is_refused(tmp_path):
    path = write_tree(tmp_path / "own", without("test"))
    Path(path, "test").symlink_to("absent")
    assert refused(path).startswith(f"{path}/test: is a link that cannot be followed;")


def test_links_to_images_elsewhere_are_read(tmp_path):
    path = write_tree(tmp_path / "own", without("train/a/0"))
    write_tree(tmp_path / "cache", {"x": IMAGES["train/a/0.png"]})
    Path(path, "train/a/0.png").symlink_to(tmp_path / "cache/x")
    assert counts(path) == {"read": 12}


@pytest.mark.parametrize("name", ["train/a/9.png", "train/c"])
@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "zip"])
def test_links_in_archives_are_refused(tmp_path, kind, name):
    """They are not followed, and what they stand for would be lacking."""
    if kind == "zip":
        path = write_zip(tmp_path / "own.zip", IMAGES)
        with zipfile.ZipFile(path, "a") as archive:
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o120777 << 16
            archive.writestr(entry, "train/a/0.png")
    else:
        path = write_tar(tmp_path / "own.tar", IMAGES)
        with tarfile.open(path, "a") as archive:
            link = tarfile.TarInfo(name)
            link.type, link.linkname = getattr(tarfile, kind), "train/a/0.png"
            archive.addfile(link)
    assert refused(path).startswith(f"{path}/{name}: is a link that cannot be followed;")


def test_folders_that_cannot_be_entered_are_refused(tmp_path, monkeypatch):
    path, scandir = write_tree(tmp_path / "own", IMAGES), os.scandir

    def forbidding(place):
        if str(place).endswith("train/b"):
            raise PermissionError(13, "Permission denied", str(place))
        return scandir(place)

    monkeypatch.setattr(os, "scandir", forbidding)
    assert refused(path) == f"{path}/train/b: Permission denied"


# --- archives --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "own\\"])
def test_windows_separators_are_understood(tmp_path, prefix):
    files = {prefix + name.replace("/", "\\"): data for name, data in IMAGES.items()}
    for path in (write_zip(tmp_path / "own.zip", files), write_tree(tmp_path / "own", files)):
        data = folder(path=path, size=None)
        assert data.files == {"read": 12}
        assert data.classes == ["a", "b"]


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_joined_tars_are_read_whole(tmp_path, mode):
    parts = [{n: d for n, d in IMAGES.items() if f"/{c}/" in n} for c in "ab"]
    parts = [Path(write_tar(tmp_path / f"{i}", part, mode)) for i, part in enumerate(parts)]
    joined = tmp_path / "own.tar"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    data = folder(path=str(joined), size=None)
    assert data.files == {"read": 12}
    assert data.sha256 == folder(path=write_tree(tmp_path / "own", IMAGES), size=None).sha256


def test_what_follows_a_tar_and_is_none_is_refused(tmp_path):
    path = Path(write_tar(tmp_path / "own.tar", IMAGES))
    path.write_bytes(path.read_bytes() + b"more")
    assert refused(str(path)) == f"{path}: not a whole tar or zip archive (its end is missing)"


def test_joined_zips_are_refused(tmp_path):
    parts = [{n: d for n, d in IMAGES.items() if f"/{c}/" in n} for c in "ab"]
    parts = [Path(write_zip(tmp_path / f"{i}", part)) for i, part in enumerate(parts)]
    joined = tmp_path / "own.zip"
    joined.write_bytes(b"".join(part.read_bytes() for part in parts))
    with zipfile.ZipFile(joined) as archive:
        assert len(archive.namelist()) == 6
    assert refused(str(joined)).startswith(f"{joined}: not a whole tar or zip archive (something")


def test_names_of_one_class_written_in_two_ways_are_one_class(tmp_path):
    """macOS writes é as two signs."""
    files = {name.replace("/a/", "/caf\u00e9/"): data for name, data in IMAGES.items()}
    files = {
        name.replace("\u00e9", "e\u0301") if name.startswith("test") else name: data
        for name, data in files.items()
    }
    assert folder(path=write_zip(tmp_path / "x.zip", files), size=None).classes == [
        "b",
        "caf\u00e9",
    ]


# --- without classes -------------------------------------------------------------------------

UNLABELLED = {
    "test/ alone": (without("train"), 6),
    "test/ beside train/": (IMAGES, 6),
    "no classes": ({f"test/{i}.png": data for i, data in enumerate(IMAGES.values())}, 12),
    "no split": ({f"{i}.png": data for i, data in enumerate(IMAGES.values())}, 12),
    "folders of their own": ({f"kinds/{k}": d for k, d in without("train").items()}, 6),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("what", UNLABELLED)
def test_images_out_of_distribution_need_neither_train_nor_classes(tmp_path, packing, what):
    files, count = UNLABELLED[what]
    data = folder(path=PACKERS[packing](tmp_path, files), size=None, labelled=False)
    assert len(data.test[0]) == len(data.test[1]) == data.files["read"] == count
    assert len(data.train[0]) == 0
    expected = {d for n, d in files.items() if not n.startswith("train")}
    assert {encode(image[0]) for image in data.test[0]} == expected


def test_no_test_images_out_of_distribution_are_refused(tmp_path):
    path = write_tree(tmp_path / "own", without("test"))
    assert refused(path, labelled=False).startswith(f"{path}: holds no images in test/")


# --- whether images have changed -------------------------------------------------------------


def touch(path):
    os.utime(path, ns=(10**18, 10**18))


def made(tmp_path, path):
    """A record of the state of which images.h5 was made."""
    record = tmp_path / "record.json"
    state = known_state(record, path, labelled=True)
    remember(record, state, folder(path=path, size=None).sha256)
    return record, state


CHANGES = {
    "an image more": lambda own: (own / "train/a/9.png").write_bytes(SPARE),
    "an image less": lambda own: (own / "train/a/0.png").unlink(),
    "another image": lambda own: (own / "train/a/0.png").write_bytes(SPARE),
    "another name": lambda own: (own / "train/a/0.png").rename(own / "train/a/9.png"),
    "another class": lambda own: (own / "train/a/0.png").rename(own / "train/b/9.png"),
    "an empty class": lambda own: (own / "train/c").mkdir(),
    "a dead link": lambda own: (own / "train/a/8.png").symlink_to("absent"),
}
NO_CHANGES = {
    "nothing": lambda own: None,
    "times": lambda own: [touch(path) for path in own.rglob("*.png")],
    "a note": lambda own: (own / "train/a/notes.txt").write_text("x"),
    "hidden files": lambda own: (own / "train/a/.DS_Store").write_text("x"),
    "gone": lambda own: own.rename(own.with_name("elsewhere")),
    "emptied": lambda own: [path.unlink() for path in own.rglob("*.png")],
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_images_are_noticed(tmp_path, what):
    own = Path(write_tree(tmp_path / "own", IMAGES))
    record, state = made(tmp_path, str(own))
    CHANGES[what](own)
    other = known_state(record, str(own), labelled=True)
    assert other != state
    assert other == known_state(record, str(own), labelled=True)


@pytest.mark.parametrize("what", NO_CHANGES)
def test_what_changes_no_image_changes_no_state(tmp_path, what):
    own = Path(write_tree(tmp_path / "own", IMAGES))
    record, state = made(tmp_path, str(own))
    NO_CHANGES[what](own)
    assert known_state(record, str(own), labelled=True) == state


def test_images_that_were_changed_back_have_their_first_state(tmp_path):
    own = Path(write_tree(tmp_path / "own", IMAGES))
    record, state = made(tmp_path, str(own))
    (own / "train/a/0.png").write_bytes(SPARE)
    assert known_state(record, str(own), labelled=True) != state
    (own / "train/a/0.png").write_bytes(IMAGES["train/a/0.png"])
    touch(own / "train/a/0.png")
    assert known_state(record, str(own), labelled=True) == state


def test_a_repacked_archive_is_unchanged_and_another_is_not(tmp_path):
    path = write_zip(tmp_path / "own.zip", IMAGES)
    record, state = made(tmp_path, path)
    write_zip(tmp_path / "own.zip", dict(reversed(IMAGES.items())))
    assert known_state(record, path, labelled=True) == state
    write_zip(tmp_path / "own.zip", IMAGES | {"train/a/9.png": SPARE})
    assert known_state(record, path, labelled=True) != state


def test_the_state_is_found_without_reading_a_file(tmp_path, monkeypatch):
    path = write_tree(tmp_path / "own", IMAGES)
    _, state = made(tmp_path, path)

    def never(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr("ensdistill.archives.open", never, raising=False)
    with pytest.raises(AssertionError):
        folder(path=path, size=None)
    assert current_state(path) == state
    assert current_state(str(tmp_path / "absent")) is None


def test_images_that_never_were_there_have_a_state_and_are_refused(tmp_path):
    absent = str(tmp_path / "absent")
    assert known_state(tmp_path / "record.json", absent, labelled=True) == "missing"
    assert fails(tmp_path / "images.h5", path=absent) == f"{absent}: no such folder or archive"
