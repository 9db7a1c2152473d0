"""Own images as they come: folders of classes, tables of paths, datasets saved by a library."""

import csv
import hashlib
import json
import logging
import os
import sys
from pathlib import Path

import datasets
import h5py
import numpy as np
import pandas as pd
import pytest

from ensdistill import InputError, sources, splits
from ensdistill.archives import LARGEST
from ensdistill.images import read_images
from ensdistill.own_data import current_state, known_state, remember
from ensdistill.sources import folder
from ensdistill.splits import by_groups
from tests.builders import encode, fails, make, noise, write_tar, write_tree, write_zip

datasets.disable_progress_bars()

COUNT = 30
CLASSES = ["cat", "dog", "emu"]


def picture(number):
    """An image that says which it is."""
    return np.full((4, 4, 3), [number, 7, number // 256], np.uint8)


def numbers(path, split):
    """Which images are in a split of images.h5, and their labels by number."""
    images, labels = read_images(path, split)
    assert (images[:, 1] == 7).all()
    found = images[:, 0, 0, 0].astype(int) + 256 * images[:, 2, 0, 0].astype(int)
    return dict(zip(found.tolist(), labels.tolist(), strict=True))


def rows(count=COUNT, **columns):
    """Rows of a table, whose images are in some folders, in no order."""
    known = [
        {"path": f"some/{n % 4}/{n:03}.png", "label": CLASSES[n % 3], **{
            name: value(n) for name, value in columns.items()
        }}
        for n in range(count)
    ]  # fmt: skip
    return [known[n] for n in np.random.default_rng(0).permutation(count)]


def write_images_of(root, table):
    files = {row["path"]: encode(picture(int(row["path"][-7:-4]))) for row in table}
    return write_tree(root, files)


def as_csv(root, table):
    write_images_of(root, table)
    path = Path(root, "images.csv")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, table[0].keys())
        writer.writeheader()
        writer.writerows(table)
    return str(path)


def as_parquet(root, table):
    write_images_of(root, table)
    path = Path(root, "images.parquet")
    pd.DataFrame(table).to_parquet(path)
    return str(path)


def features(names):
    return datasets.Features(
        {
            "image": datasets.Image(),
            "label": datasets.ClassLabel(names=CLASSES),
            **{name: datasets.Value("string") for name in names},
        }
    )


def as_saved(root, table):
    """A Dataset, or of rows with splits a DatasetDict."""
    write_images_of(root, table)

    def saved(some):
        extra = [name for name in some[0] if name not in ("path", "label", "split")]
        columns = {name: [row[name] for row in some] for name in extra}
        columns["image"] = [str(Path(root, row["path"])) for row in some]
        columns["label"] = [CLASSES.index(row["label"]) for row in some]
        return datasets.Dataset.from_dict(columns, features=features(extra))

    path = str(Path(root, "saved"))
    if "split" in table[0]:
        parts = dict.fromkeys(row["split"] for row in table)
        known = {part: saved([row for row in table if row["split"] == part]) for part in parts}
        datasets.DatasetDict(known).save_to_disk(path)
    else:
        saved(table).save_to_disk(path)
    for row in table:
        Path(root, row["path"]).unlink()  # the images are in the dataset
    return path


KINDS = {"csv": as_csv, "parquet": as_parquet, "saved": as_saved}
TABLES = {"csv": as_csv, "parquet": as_parquet}


def refused(path, **options):
    with pytest.raises(InputError) as caught:
        folder(path=path, size=None, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# --- folders of classes ----------------------------------------------------------------------


def class_tree(above=""):
    return {
        f"{above}{CLASSES[n % 3]}/{n:03}.png": encode(picture(n)) for n in reversed(range(COUNT))
    }


PACKERS = {
    "folder": lambda root, files: write_tree(root / "own", files),
    "tar.gz": lambda root, files: write_tar(root / "own.tar.gz", files, "w:gz"),
    "zip": lambda root, files: write_zip(root / "own.zip", files),
}


@pytest.mark.parametrize("packing", PACKERS)
@pytest.mark.parametrize("above", ["", "flowers/", "v1/all/"])
def test_classes_without_train_and_test_are_split_by_the_seed(tmp_path, packing, above, caplog):
    caplog.set_level(logging.INFO)
    clutter = {f"{above}readme.txt": b"x", f"__MACOSX/{above}cat/._0.png": b"x", ".x/a/0.png": b"x"}
    path = PACKERS[packing](tmp_path, class_tree(above) | clutter)
    make(tmp_path / "images.h5", path=path, validation=3)
    found = {split: numbers(tmp_path / "images.h5", split) for split in ("train", "val", "test")}
    assert {split: len(known) for split, known in found.items()} == {
        "train": 21, "val": 3, "test": 6,
    }  # fmt: skip
    assert sorted(n for known in found.values() for n in known) == list(range(COUNT))
    assert all(label == n % 3 for known in found.values() for n, label in known.items())
    assert sorted(found["test"].values()) == [0, 0, 1, 1, 2, 2]
    with h5py.File(tmp_path / "images.h5") as file:
        said = "6 of 30 images, stratified by class, seed 0"
        assert file.attrs["split"] == said
        assert json.loads(file.attrs["files"]) == {"read": 30, "others": 1, "hidden": 2}
        assert json.loads(file.attrs["classes"]) == CLASSES
    assert f"{path}: says not which images are for testing; chosen: {said}" in caplog.messages
    make(tmp_path / "other.h5", path=path, validation=3, test=9, seed=1)
    other = numbers(tmp_path / "other.h5", "test")
    assert len(other) == 9
    assert not set(found["test"]) <= set(other)


def test_train_and_test_say_nothing_of_a_choice(tmp_path):
    files = class_tree("train/") | {f"test/{it}/0.png": encode(noise(4, 4)) for it in CLASSES}
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "own", files), validation=3)
    with h5py.File(tmp_path / "images.h5") as file:
        assert "split" not in file.attrs


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        ({"gnu/0.heic": b"x"}, "class 'gnu' has no images in gnu/: files there are formats"),
        (
            {"gnu/more/0.png": encode(noise(4, 4))},
            "'gnu' has no images in gnu/: files there are",
        ),
    ],
)
def test_a_class_of_which_nothing_is_read_is_refused(tmp_path, extra, expected):
    assert expected in refused(write_tree(tmp_path / "own", class_tree() | extra))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "own: holds no images in <class>/"),
        ({"0.png": encode(noise(4, 4))}, "no images in <class>/; skipped: in no class (1)"),
        ({"a/0.png": encode(noise(4, 4))}, "no images in <class>/; skipped: in no class (1)"),
        (
            {f"training/{name}": data for name, data in class_tree().items()}
            | {f"validation/{name}": data for name, data in class_tree().items()},
            "no images in <class>/; skipped: in folders below a class (60)",
        ),
    ],
)
def test_what_is_no_folder_of_classes_is_refused(tmp_path, files, expected):
    (tmp_path / "own").mkdir()
    assert expected in refused(write_tree(tmp_path / "own", files))


def test_too_few_images_of_a_class_cannot_be_split(tmp_path):
    files = class_tree() | {"fox/0.png": encode(picture(200))}
    message = refused(write_tree(tmp_path / "own", files))
    assert message == (
        "6 test images cannot be chosen from 31 with every class in both parts: "
        "there is only 1 of 'fox'"
    )


# --- tables and saved datasets ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [0, 2**28])
def test_a_table_gives_its_images_with_their_labels(tmp_path, monkeypatch, kind, kept):
    monkeypatch.setattr(sources, "KEPT", kept)
    make(tmp_path / "images.h5", path=KINDS[kind](tmp_path, rows()), validation=3)
    found = {split: numbers(tmp_path / "images.h5", split) for split in ("train", "val", "test")}
    assert [len(known) for known in found.values()] == [21, 3, 6]
    assert sorted(n for known in found.values() for n in known) == list(range(COUNT))
    assert all(label == n % 3 for known in found.values() for n, label in known.items())


SPELT = ["Train", " training", "VAL", "valid", "validation", "dev", "test", "Testing"]
MEANT = ["train", "train", "val", "val", "val", "val", "test", "test"]


@pytest.mark.parametrize("kind", KINDS)
def test_splits_that_are_given_are_kept(tmp_path, kind):
    table = rows(72, split=lambda n: SPELT[n // 3 % 8])
    path = KINDS[kind](tmp_path, table)
    for validation, expected in ((5000, 36), (9, 9)):
        make(tmp_path / "images.h5", path=path, validation=validation)
        found = {it: numbers(tmp_path / "images.h5", it) for it in ("train", "val", "test")}
        for split, known in found.items():
            assert {MEANT[n // 3 % 8] for n in known} == {split}
            assert all(label == n % 3 for n, label in known.items())
        assert [len(known) for known in found.values()] == [18, expected, 18]
        assert set(found["val"].values()) == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_without_test_rows_the_test_images_are_chosen_of_the_training_images(tmp_path, kind):
    table = rows(60, split=lambda n: "validation" if n < 12 else "train")
    make(tmp_path / "images.h5", path=KINDS[kind](tmp_path, table), validation=5000)
    assert set(numbers(tmp_path / "images.h5", "val")) == set(range(12))
    assert len(numbers(tmp_path / "images.h5", "test")) == 9  # a fifth of 48
    assert len(numbers(tmp_path / "images.h5", "train")) == 39


@pytest.mark.parametrize("kind", TABLES)
def test_columns_may_have_other_names_and_paths_may_be_absolute(tmp_path, kind):
    table = [
        {"File Name": str(Path(tmp_path, row["path"])) if n % 2 else row["path"],
         "Diagnosis": row["label"], "fold": "test" if n < 9 else "train", "split": "unused"}
        for n, row in enumerate(rows())
    ]  # fmt: skip
    write_images_of(tmp_path, rows())
    path = Path(tmp_path, f"t.{kind}")
    frame = pd.DataFrame(table)
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    columns = {"path": "File Name", "label": "Diagnosis", "split": "fold", "group": None}
    data = folder(path=str(path), size=None, columns=columns)
    assert (len(data.train[0]), len(data.test[0]), data.classes) == (21, 9, CLASSES)


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize(
    ("labels", "order"),
    [
        ([10, 9, 2], ["2", "9", "10"]),
        (["10", "9", "x"], ["10", "9", "x"]),
        (["NA", "null", "TRUE"], ["NA", "TRUE", "null"]),
        (["a, b", 'say "x"', "Ärzte"], ["a, b", 'say "x"', "Ärzte"]),
    ],
)
def test_labels_are_texts_and_whole_numbers_are_in_their_order(tmp_path, kind, labels, order):
    table = [row | {"label": labels[CLASSES.index(row["label"])]} for row in rows()]
    assert folder(path=TABLES[kind](tmp_path, table), size=None).classes == order


def test_class_names_of_a_dataset_keep_their_order(tmp_path):
    part = datasets.Dataset.from_dict(
        {"image": [picture(n) for n in range(12)], "label": [n % 3 for n in range(12)]},
        features=datasets.Features(
            {"image": datasets.Image(), "label": datasets.ClassLabel(names=["z", "b", "a", "q"])}
        ),
    )
    part.save_to_disk(tmp_path / "saved")
    data = folder(path=str(tmp_path / "saved"), size=None, test=3)
    assert data.classes == ["z", "b", "a"]
    assert sorted(data.test[1].tolist()) == [0, 1, 2]
    colours = data.train[0][:, 0, 0, 0]
    np.testing.assert_array_equal(data.train[1], colours % 3)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows_changes_nothing(tmp_path, kind):
    table = rows(group=lambda n: f"P{n // 3}")
    found = []
    for k, some in enumerate((table, table[::-1])):
        if kind == "saved" and k:  # whose rows have no other names
            break
        data = folder(path=KINDS[kind](tmp_path / str(k), some), size=None)
        found.append((data.sha256, data.train[1].tolist(), np.asarray(data.test[0]).tolist()))
    assert all(it == found[0] for it in found)
    changed = [row | {"group": "P0"} if row["group"] == "P1" else row for row in table]
    assert folder(path=KINDS[kind](tmp_path / "2", changed), size=None).sha256 != found[0][0]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_images_are_told(tmp_path, kind, caplog):
    table = rows(split=lambda n: "test" if n % 2 else "train")
    one, other = (next(row for row in table if row["path"].endswith(f"{n:03}.png")) for n in (0, 3))
    for row, path in ((one, "twin/000.png"), (other, "again/000.png"), (one, "same/000.png")):
        table.append(row | {"path": path, "label": "cat"})
    data = folder(path=KINDS[kind](tmp_path, table), size=None)
    assert data.files == {"read": 31, "duplicates": 2, "in_both_splits": 1}
    (told,) = [it.message for it in caplog.records if it.levelno == logging.WARNING]
    assert told.endswith(
        ": images read: 31; skipped: the same as another of their class (2); "
        "images that are in train and in test (1)"
    )


@pytest.mark.parametrize("kind", KINDS)
def test_out_of_distribution_needs_no_labels(tmp_path, kind):
    data = folder(path=KINDS[kind](tmp_path / "a", rows()), size=None, labelled=False)
    assert (len(data.train[0]), len(data.test[0])) == (0, COUNT)
    table = rows(split=lambda n: "test" if n < 7 else "train")
    data = folder(path=KINDS[kind](tmp_path / "b", table), size=None, labelled=False)
    assert sorted(data.test[0][:, 0, 0, 0].tolist()) == list(range(7))


# --- errors ----------------------------------------------------------------------------------


def edited(row, **cells):
    """A change of one row of a table."""

    def change(table):
        table[row] = table[row] | cells

    return change


ERRORS = {
    "a label": (edited(4, label="  "), "{row 5}: the label is empty"),
    "a split": (edited(0, split="foo"), "{row 1}: the split 'foo' is unknown; it is train, va"),
    "no split": (edited(9, split=""), "{row 10}: the split is empty; it is train, valid"),
    "no group": (edited(2, group=""), "{row 3}: the group is empty"),
    "a path": (edited(3, path=""), "{row 4}: the path is empty"),
    "a path twice": (
        lambda table: table.append(table[6] | {"path": "./some/../" + table[6]["path"]}),
        "{row 31}: './some/../PATH' is in {row 7} too",
    ),
    "a missing file": (edited(5, path="x.png"), "{row 6}: the file 'x.png' is not there"),
    "missing files": (
        lambda table: [edited(row, path=f"{row}.png")(table) for row in (2, 8, 9)],
        "{row 3}: the file '2.png' is not there, as are 2 others",
    ),
    "a folder": (edited(5, path="some"), "{row 6}: 'some' is no file, or has more than 268,435"),
    "a class": (
        lambda table: [edited(n, label="fox")(table) for n, it in enumerate(table)
                       if it["split"] == "test" and it["label"] == "cat"],
        "class 'cat' is in train/ but not in test/",
    ),
    "no training": (
        lambda table: [edited(n, split="test")(table) for n in range(COUNT)],
        "has no training images, only test",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TABLES)
@pytest.mark.parametrize("what", ERRORS)
def test_a_wrong_table_is_refused_in_one_sentence(tmp_path, kind, what):
    change, expected = ERRORS[what]
    table = rows(
        split=lambda n: "test" if n % 5 == 0 else "train", group=lambda n: f"{n % 5 == 0} {n // 6}"
    )
    write_images_of(tmp_path, table)
    known = table[6]["path"]
    change(table)
    path = tmp_path / f"t.{kind}"
    frame = pd.DataFrame(table)
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    message = fails(tmp_path / "images.h5", path=str(path))
    expected = expected.replace("PATH", known)
    for row in (31, 10, 7, 6, 5, 4, 3, 1):
        said = f"line {row + 1}" if kind == "csv" else f"row {row}"
        expected = expected.replace(f"{{row {row}}}", f"{path}, {said}")
    assert expected in message
    assert message.startswith(str(path))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", ["val", "test"])
def test_a_group_on_both_sides_of_given_splits_is_refused(tmp_path, kind, other):
    table = rows(split=lambda n: "train" if n < 20 else other, group=lambda n: f"P{n // 8}")
    message = refused(KINDS[kind](tmp_path, table))
    assert ": group 'P2' is in " in message
    assert f"{other} (" in message
    assert "train (" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "has no column 'path'; it has none"),
        ("path,label\n", "has no rows"),
        ("file,label\na,b\n", "has no column 'path'; it has 'file', 'label'"),
        ("path;label\na;b\n", "has no column 'path'; it has 'path;label'"),
        ("path,class\na,b\n", "has no column 'label'; it has 'path', 'class'"),
        ("path,label,path\na,b,c\n", "has two columns 'path'"),
        ("path,label\na,b\nc\n", ", line 3: has 1 cells, not 2"),
        ('path,label\n"a,b\n', "not a table in CSV (unexpected end of data)"),
        (b"path,label\n\xff\xfe,b\n", "not a table in CSV ('utf-8' codec can't decode byte 0xff"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path, text, expected):
    path = tmp_path / "t.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refused(str(path))
    assert message.startswith(str(path))
    assert expected in message


def test_a_table_of_excel_is_read(tmp_path):
    """With a mark of its encoding, and carriage returns."""
    path = Path(as_csv(tmp_path, rows()))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes() + b"\r\n")
    assert len(folder(path=str(path), size=None).train[0]) == 24


@pytest.mark.parametrize("content", [b"", b"PAR1 and no more"])
def test_what_is_no_parquet_is_refused(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    assert "t.parquet: not a table in Parquet" in refused(str(tmp_path / "t.parquet"))
    assert refused(str(tmp_path / "u.parquet")).startswith(f"{tmp_path}/u.parquet: No such file")


def saved(tmp_path, columns, **kinds):
    part = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
    part.save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


TEXT, IMAGE = datasets.Value("string"), datasets.Image()
FOUR = [picture(n) for n in range(4)]
SAVED = {
    "no images": ({"label": list("abab")}, {"label": TEXT}, {}, "has no column of images; say in"),
    "two columns": (
        {"one": FOUR, "two": FOUR, "label": list("abab")},
        {"one": IMAGE, "two": IMAGE, "label": TEXT},
        {},
        "has the columns 'one', 'two' of images; say in 'images.columns.path' which it is",
    ),
    "no such column": (
        {"one": FOUR, "label": list("abab")},
        {"one": IMAGE, "label": TEXT},
        {"label": "class"},
        "has no column 'class'; it has 'one', 'label'",
    ),
    "no column of images": (
        {"one": FOUR, "label": list("abab")},
        {"one": IMAGE, "label": TEXT},
        {"path": "label"},
        "the column 'label' holds no images",
    ),
    "a missing image": (
        {"image": [*FOUR[:3], None], "label": list("abab")},
        {"image": IMAGE, "label": TEXT},
        {},
        ", row 4: the image is missing",
    ),
    "a missing label": (
        {"image": FOUR, "label": ["a", None, "b", "b"]},
        {"image": IMAGE, "label": TEXT},
        {},
        ", row 2: the label is empty",
    ),
    "an unknown label": (
        {"image": FOUR, "label": [0, 1, -1, 0]},
        {"image": IMAGE, "label": datasets.ClassLabel(names=["a", "b"])},
        {},
        ", row 3: the label is empty",
    ),
    "fractions": (
        {"image": FOUR, "label": [0.5, 1, 0, 0]},
        {"image": IMAGE, "label": datasets.Value("float32")},
        {},
        "the labels in 'label' are no whole numbers",
    ),
}


@pytest.mark.parametrize("what", SAVED)
def test_a_saved_dataset_that_lacks_something_is_refused(tmp_path, what):
    columns, kinds, chosen, expected = SAVED[what]
    path = saved(tmp_path, columns, **kinds)
    message = refused(path, columns=chosen)
    assert message.startswith(path)
    assert expected in message


def test_splits_of_a_saved_dataset_are_known_ones(tmp_path):
    message = refused(as_saved(tmp_path, rows(split=lambda n: "train" if n % 2 else "extra")))
    assert ", extra, row 1: the split 'extra' is unknown; it is train, val" in message


def test_a_damaged_dataset_is_refused(tmp_path):
    path = as_saved(tmp_path, rows())
    (arrow,) = Path(path).glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    assert refused(path).startswith(f"{path}: not a dataset saved by save_to_disk (")


def test_a_dataset_whose_images_end_outside_of_their_file_is_refused(tmp_path):
    """Arrow would read there, and end the process."""
    table = rows()
    path = as_saved(tmp_path, table)
    sizes = [len(encode(picture(int(row["path"][-7:-4])))) for row in table]
    ends = np.cumsum(sizes, dtype=np.int32)
    wrong = ends + np.int32(2**30) * (np.arange(COUNT) == 9)
    (arrow,) = Path(path).glob("*.arrow")
    content = arrow.read_bytes()
    assert content.count(ends.tobytes()) == 1
    arrow.write_bytes(content.replace(ends.tobytes(), wrong.tobytes()))
    assert refused(path).startswith(f"{path}: not a dataset saved by save_to_disk (")


@pytest.mark.parametrize(
    ("kind", "library", "extra"),
    [("parquet", "pyarrow", "parquet"), ("saved", "datasets", "huggingface")],
)
def test_a_library_that_is_not_there_is_named(tmp_path, monkeypatch, kind, library, extra):
    path = KINDS[kind](tmp_path, rows())
    monkeypatch.setitem(sys.modules, library, None)
    assert f"pip install 'ensdistill[{extra}]'" in refused(path)


def test_a_table_is_alone_and_only_tables_have_columns(tmp_path):
    table = as_csv(tmp_path, rows())
    tree = write_tree(tmp_path / "own", class_tree())
    assert refused([tree, table]) == f"{table}: must be the only path"
    assert refused(tree, columns={"label": "x", "path": None}) == (
        f"{tree}: is no table and no saved dataset, so 'images.columns' means nothing"
    )


def test_a_file_that_is_too_large_to_be_an_image_is_refused(tmp_path):
    path = as_csv(tmp_path, rows())
    with (tmp_path / rows()[0]["path"]).open("wb") as file:
        file.truncate(LARGEST + 1)
    assert "line 2: " in refused(path)


# --- groups ----------------------------------------------------------------------------------


def grouped(seed):
    """A random table of groups, of one image to many and of one class or several."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, rng.integers(3, 13), rng.integers(12, 40))
    group = np.repeat(np.arange(len(sizes)), sizes)
    usual = rng.integers(0, 3, len(sizes))[group]
    label = np.where(rng.random(len(group)) < rng.random(), usual, rng.integers(0, 3, len(group)))
    return group, label


@pytest.mark.parametrize("seed", range(25))
def test_a_group_is_never_on_both_sides(tmp_path, seed):
    group, label = grouped(seed)
    count, path = len(group), tmp_path / "images.h5"
    table = [
        {"path": f"some/{n:03}.png", "label": CLASSES[label[n]], "group": f"P{group[n]}"}
        for n in range(count)
    ]
    options = {"validation": count // 8, "held_out": count // 8, "test": count // 6, "seed": seed}
    try:
        make(path, path=as_csv(tmp_path, table), **options)
    except InputError as error:
        sentence = str(error)
    else:
        sentence = ""
    if sentence:
        assert "cannot be chosen from" in sentence
        return
    found = {split: numbers(path, split) for split in ("train", "val", "held_out", "test")}
    assert sum(map(len, found.values())) == count
    sides = [{group[n] for n in known} for known in found.values()]
    assert sum(map(len, sides)) == len(set.union(*sides)) == len(set(group))
    for split, known in found.items():
        assert set(known.values()) == {0, 1, 2}
        assert all(label[n] == it for n, it in known.items())
        if split != "train":
            wanted = count // (6 if split == "test" else 8)
            assert wanted / 2 <= len(known) <= 1.5 * wanted


def test_most_random_tables_with_groups_can_be_split():
    possible = 0
    for seed in range(25):
        group, label = grouped(seed)
        try:
            mask = by_groups(label, group.astype(str), len(group) // 5, seed, "test", CLASSES)
        except InputError:
            continue
        possible += abs(mask.mean() - 0.2) < 0.03
        assert not set(group[mask]) & set(group[~mask])
    assert possible >= 22


def test_groups_keep_the_shares_of_classes():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(500), 6)
    label = rng.choice(3, 500, p=[0.7, 0.2, 0.1])[group]
    for seed in (0, 1):
        mask = by_groups(label, group.astype(str), 600, seed, "test", CLASSES)
        shares = np.bincount(label[mask]) / np.bincount(label)
        np.testing.assert_allclose(shares, 0.2, atol=0.01)
    again = by_groups(label, group.astype(str), 600, 1, "test", CLASSES)
    np.testing.assert_array_equal(mask, again)
    assert (by_groups(label, group.astype(str), 600, 2, "test", CLASSES) != mask).any()


@pytest.mark.parametrize(
    ("groups", "labels", "count", "expected"),
    [
        ("aabb", "0101", 4, "4 test images are wanted, but there are only 4"),
        (
            "aabbcc", "001122", 2,
            "2 test images cannot be chosen from 6 by whole groups with every class in both parts: "
            "images of 'cat' are in 1 group: all of 'a'",
        ),
        (
            "a" * 12 + "b" * 12, "012012012012" * 2, 2,
            "2 test images cannot be chosen from 24 by whole groups: the nearest number is 12",
        ),
        (
            "abcab", "01022", 2,
            "2 test images cannot be chosen from 5 by whole groups with every class in both parts: "
            "images of 'dog' are in 1 group: all of 'b'",
        ),
        (
            "aabbcc", "011202", 2,
            "2 test images cannot be chosen from 6 by whole groups with every class in both parts",
        ),
    ],
)  # fmt: skip
def test_impossible_groups_are_refused_in_one_sentence(groups, labels, count, expected):
    given = np.array([int(it) for it in labels]), np.array([*groups]), count, 0, "test", CLASSES
    with pytest.raises(InputError) as caught:
        by_groups(*given)
    assert str(caught.value) == expected


# --- whether images have changed -------------------------------------------------------------


def touch(path):
    os.utime(path, ns=(10**18, 10**18))


def first_image(path):
    return Path(path).parent / min(row["path"] for row in rows())


def with_another_label(path):
    text = path.read_text()
    path.write_text(text.replace("dog", "cow"))


CHANGES = {
    "an image": lambda path: first_image(path).write_bytes(encode(noise(4, 4, 3))),
    "an image less": lambda path: first_image(path).unlink(),
    "the labels": with_another_label,
}
NO_CHANGES = {
    "nothing": lambda path: None,
    "times": lambda path: [touch(it) for it in (path, first_image(path))],
    "the order": lambda path: path.write_text(
        "\n".join([(lines := path.read_text().splitlines())[0], *lines[:0:-1]])
    ),
    "a note beside": lambda path: path.with_name("notes.txt").write_text("x"),
    "gone": lambda path: path.rename(path.with_name("elsewhere")),
}


@pytest.mark.parametrize("what", [*CHANGES, *NO_CHANGES])
def test_a_changed_image_of_a_table_is_noticed(tmp_path, what):
    path, record = Path(as_csv(tmp_path / "own", rows())), tmp_path / "record.json"
    options = {"labelled": True, "columns": dict.fromkeys(("path", "label", "split", "group"))}
    state = known_state(record, str(path), **options)
    remember(record, state, folder(path=str(path), size=None).sha256)
    (CHANGES | NO_CHANGES)[what](path)
    assert (known_state(record, str(path), **options) != state) == (what in CHANGES)


def test_a_changed_image_of_other_kinds_is_noticed_too(tmp_path):
    for kind in ("parquet", "saved"):
        root = tmp_path / kind
        path = KINDS[kind](root, rows())
        before = current_state(path)
        assert current_state(path) == before
        changed = next(Path(path).glob("*.arrow")) if kind == "saved" else first_image(path)
        touch(changed)
        assert current_state(path) != before


def test_states_of_archives_are_what_they_were(tmp_path):
    """Or all own images would be read again after an update."""
    path = Path(write_zip(tmp_path / "own.zip", class_tree()))
    status = path.stat()
    known = repr((status.st_size, status.st_mtime_ns)).encode()
    assert current_state(str(path)) == hashlib.sha256(known).hexdigest()


def test_orders_of_groups_are_tried_until_one_is_good(monkeypatch):
    """Of two groups one is far too large; which comes first is a matter of chance."""
    group = np.repeat(["big", "a", "b", "c"], [20, 4, 4, 4])
    label = np.arange(32) % 2
    monkeypatch.setattr(splits, "TRIES", 30)
    for seed in range(10):
        mask = by_groups(label, group, 8, seed, "test", ["x", "y"])
        assert mask.sum() == 8
        assert not mask[:20].any()
