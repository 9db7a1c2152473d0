"""`ensdistill init`: studies begun in any folder, of images of one's own."""

import json
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from ensdistill import InputError, new_study
from ensdistill.cli import app
from ensdistill.studies import read_configuration
from ensdistill.survey import Survey, survey
from tests.project import REPOSITORY

SCHEMA = json.loads((REPOSITORY / "config.schema.json").read_text())


def write_images(folder, counts, size=(32, 32), mode="RGB"):
    """Noise, below <class>/."""
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            shape = (size[1], size[0], 3)[: 3 if mode == "RGB" else 2]
            pixels = rng.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def configuration(folder):
    """What its config.yaml says, checked against the schema and by the library."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(config, SCHEMA)
    return read_configuration(config)


def test_a_study_of_a_folder_of_images_says_what_it_found_and_guessed(tmp_path, monkeypatch):
    monkeypatch.setattr(new_study, "visible_cards", dict)
    images = write_images(tmp_path / "my pictures ü", {"rose": 40, "tulip": 30})
    place = tmp_path / "flowers 花"
    done = CliRunner().invoke(app, ["init", str(place), "--images", str(images)])
    assert done.exit_code == 0, done.output
    assert "70 images of 2 classes, 30 to 40 in each; colour, 32×32 pixels." in done.output
    assert f"cd '{place}'" in done.output
    study = configuration(place).studies["flowers"]
    assert study.images.path == str(images)
    # A fifth of 70, then 0.15 of the other 56.
    assert (study.images.size, study.images.test, study.images.validation) == (32, 14, 8)
    assert study.architecture.name == "resnet8"
    assert study.images.train is None
    first = (place / "config.yaml").read_text().splitlines()[0]
    schema = first.removeprefix("# yaml-language-server: $schema=file://")
    assert json.loads(Path(schema).read_text()) == SCHEMA


def test_json_has_the_same(tmp_path):
    images = write_images(tmp_path / "images", {"a": 4, "b": 3}, (9, 12), "L")
    done = CliRunner().invoke(app, ["init", str(tmp_path / "new"), "--images", images, "--json"])
    told = json.loads(done.output)
    assert told["found"]["classes"] == {"a": 4, "b": 3}
    assert told["found"]["size"] == [12, 9]
    assert told["found"]["colour"] is False
    assert told["next"] == [f"cd {tmp_path / 'new'}", "snakemake --cores all"]
    assert [Path(file).exists() for file in told["files"]] == [True] * 3


def test_without_images_it_is_the_default_study(tmp_path):
    new_study.new_study(tmp_path / "new")
    text = (tmp_path / "new/config.yaml").read_text()
    ours = yaml.safe_load((REPOSITORY / "config.yaml").read_text())
    expected = {"run": ["digits"], "studies": {"digits": ours["studies"]["digits"]}}
    assert yaml.safe_load(text) == expected
    configuration(tmp_path / "new")
    profile = (tmp_path / "new/profiles/default/profile.yaml").read_text()
    assert profile == (REPOSITORY / "profiles/default/profile.yaml").read_text()


@pytest.mark.parametrize("file", ["config.yaml", "Snakefile"])
def test_nothing_is_overwritten(tmp_path, file):
    (tmp_path / file).write_text("mine")
    with pytest.raises(InputError, match=f"{file}: is there already; choose another folder"):
        new_study.new_study(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file]
    assert (tmp_path / file).read_text() == "mine"


@pytest.mark.parametrize(
    ("counts", "sentence"),
    [
        ({"a": 5, "b": 2}, "class 'b' has 2 training images; to train, to validate and to test"),
        ({"a": 5}, "has images of one class"),
    ],
)
def test_images_that_cannot_be_a_study_are_refused(tmp_path, counts, sentence):
    images = write_images(tmp_path / "images", counts)
    if len(counts) == 1:  # alone, a folder would be what all images have in common
        images = tmp_path / "split"
        for split in ("train", "test"):
            write_images(images / split, counts)
    with pytest.raises(InputError, match=sentence):
        new_study.new_study(tmp_path / "new", images)
    assert not (tmp_path / "new").exists()


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    done = CliRunner().invoke(app, ["init", str(tmp_path / "file/study")])
    assert done.exit_code == 1
    assert isinstance(done.exception, InputError)


def test_a_survey_counts_splits_and_sizes_upright(tmp_path):
    for split, count in (("train", 3), ("test", 1)):
        write_images(tmp_path / split, {"a": count, "b": count}, (40, 30))
    turned = Image.new("RGB", (20, 60))
    exif = turned.getexif()
    exif[274] = 6  # to be turned by 90°: 60 wide, 20 high
    turned.save(tmp_path / "train/a/turned.jpg", exif=exif)
    found = survey(tmp_path)
    assert found.classes == {"a": 4, "b": 3}
    assert (found.test, found.validation) == (2, None)
    assert (found.sides, found.size) == ((20, 30, 30), None)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("timm", [False, True])
@pytest.mark.parametrize(
    ("sides", "size"),
    [
        ((28, 28, 28), (28, 28)),
        ((20, 30, 90), None),
        ((30, 30, 30), (30, 40)),
        ((200, 480, 3000), None),
        ((256, 256, 256), (256, 256)),
    ],
)
@pytest.mark.parametrize("count", [3, 100, 60_000])
def test_every_guess_is_a_configuration_that_can_be_trained(
    tmp_path, monkeypatch, gpu, timm, sides, size, count
):
    monkeypatch.setattr(new_study.importlib.util, "find_spec", lambda name: timm or None)
    found = Survey({"a": count, "b": count, "c": 2 * count}, None, None, True, sides, size)
    guesses = new_study.guessed(found, gpu=gpu)
    (tmp_path / "config.yaml").write_text(
        new_study.configured("mine", tmp_path / "a: {b} # 'c' \"d\"", found, guesses)
    )
    study = configuration(tmp_path).studies["mine"]
    images = study.images
    assert images.path == str(tmp_path / "a: {b} # 'c' \"d\"")
    # Every class is in every split, and all numbers together are no more than there are.
    train = images.train or 4 * count - images.test - images.validation
    assert min(images.test, images.validation, train) >= 3
    assert images.test + images.validation + train <= 4 * count
    photographs = sides[1] > 64
    expected = "timm:resnet18" if photographs and gpu and timm else "resnet20" if gpu else "resnet8"
    assert study.architecture.name == expected
    if not photographs and size:
        assert images.size == (size[0] if size[0] == size[1] else None)
    else:
        assert images.size in (
            (24,) if not photographs else (224,) if "timm" in expected else (64,)
        )
    if not gpu and count == 60_000:
        assert images.train * study.teacher.epochs <= new_study.IMAGE_EPOCHS


def test_numbers_that_the_images_say_are_kept():
    found = Survey({"a": 50, "b": 50}, 20, 30, False, (8, 8, 8), (8, 8))
    guesses = new_study.guessed(found, gpu=False)
    assert "test" not in guesses
    assert guesses["validation"].value == 20
    assert {*guesses} == {"architecture", "size", "validation", "epochs", "batch_size"}
