"""`ensdistill predict`: tables of what a student says of one's own images."""

import csv
import json
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import h5py
import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp, softmax, xlogy
from typer.testing import CliRunner

from ensdistill import asking, cli, predicting
from ensdistill.asking import Found, ahead, image_files
from ensdistill.deployment import Deployment, open_student
from ensdistill.students import predict
from ensdistill.weights import load_student
from tests.builders import encode, noise, write_tar, write_tree, write_zip
from tests.deployed import CLASSES, deploy


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    """A BatchEnsemble of two members for colour images of 8×8, with a temperature."""
    return deploy(tmp_path_factory.mktemp("study of Ünïcode"))


@pytest.fixture(scope="module")
def images(student):
    """Twelve test images (N, 3, 8, 8)."""
    with h5py.File(student.parents[3] / "images.h5") as file:
        return file["test/images"][:12]


def png(pixels):
    return encode(pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels)


def run(*arguments):
    """The command in this process: its result, of which `exit_code` and `output` are checked."""
    return CliRunner().invoke(cli.app, [str(it) for it in arguments])


def table(path):
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def refused(*arguments):
    """The one sentence with which the command ends, and nothing is written."""
    result = run(*arguments)
    assert type(result.exception).__name__ == "InputError", result.output
    assert "\n" not in str(result.exception)
    return str(result.exception)


def logits_of(student, images):
    """(N, M, K), as stored by a study."""
    return predict(load_student(student), torch.from_numpy(images)).astype(np.float64)


def entropy(probs):
    return -xlogy(probs, probs).sum(-1)


def test_values_are_those_of_the_formulas(tmp_path, student, images):
    folder = write_tree(tmp_path / "in", {f"{i:02}.png": png(it) for i, it in enumerate(images)})
    result = run(
        *("predict", student, folder, "-o", tmp_path / "o.csv", "--coverage", 0.8),
        *("--batch-size", 5),
    )
    assert result.exit_code == 0, result.output
    rows = table(tmp_path / "o.csv")

    with h5py.File(student.parents[3] / "logits/students/kd/0.h5") as file:
        validation, labels = file["val/logits"][:].astype(float), file["val/labels"][:]
    log_mean = np.log(softmax(validation, -1).mean(1))
    own = np.arange(len(labels)), labels

    def loss(log_temperature):
        z = log_mean / np.exp(log_temperature)
        return np.mean(logsumexp(z, 1) - z[own])

    temperature = np.exp(minimize_scalar(loss, bracket=(0, 1), tol=1e-10).x)
    assert temperature == pytest.approx(2, rel=0.5)

    logits = logits_of(student, images)
    p = softmax(np.log(softmax(logits, -1).mean(1)) / temperature, -1)
    members = softmax(logits / temperature, -1)
    best = p.argmax(1)
    half = np.sort(np.random.default_rng(0).permutation(200)[:100])
    held = softmax(log_mean / temperature, -1)[own][half]
    limit = np.sort(held)[100 - int(np.ceil(101 * 0.8))]  # of 100 the 81st score 1 − p
    assert {len(json.loads(row["conformal_set"])) for row in rows} != {1}

    assert [row["class"] for row in rows] == [CLASSES[k] for k in best]
    for name, expected in {
        "probability": p.max(1),
        "entropy": entropy(p),
        "mutual_information": entropy(members.mean(1)) - entropy(members).mean(1),
    }.items():
        got = [float(row[name]) for row in rows]
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-7, err_msg=name)
    for i, row in enumerate(rows):
        assert json.loads(row["member_classes"]) == [CLASSES[k] for k in members[i].argmax(1)]
        got = json.loads(row["member_probabilities"])
        np.testing.assert_allclose(got, members[i, :, best[i]], rtol=1e-5)
        chosen = [k for k in np.argsort(-p[i]) if p[i, k] >= limit or k == best[i]]
        assert json.loads(row["conformal_set"]) == [CLASSES[k] for k in chosen]
        assert int(row["set_size"]) == len(chosen)
        assert row["error"] == ""
        assert row["path"] == f"{folder}/{i:02}.png"


def test_the_three_kinds_of_tables_say_the_same(tmp_path, student, images):
    files = {"b.png": png(images[0]), "a.png": b"no image", "c.png": png(images[1])}
    folder = write_tree(tmp_path / "in", files)
    for ending in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"o.{ending}"
        assert run("predict", student, folder, "-o", output, "--coverage", 0.9).exit_code == 3
    lines = (tmp_path / "o.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    stored = pyarrow.parquet.read_table(tmp_path / "o.parquet").to_pylist()
    assert rows == stored
    assert [Path(row["path"]).name for row in rows] == ["a.png", "b.png", "c.png"]

    def cell(value):
        if isinstance(value, list):
            return json.dumps(value, ensure_ascii=False)
        return "" if value is None else str(value)

    in_csv = [{key: cell(value) for key, value in row.items()} for row in rows]
    assert in_csv == table(tmp_path / "o.csv")
    assert list(rows[0])[-1] == "error"
    assert rows[0]["error"] == "not an image of a known format"
    assert {rows[0][key] for key in rows[0] if key not in ("path", "error")} == {None}


def test_order_folders_archives_and_what_is_skipped(tmp_path, student, images):
    one, two, three = map(png, images[:3])
    root = tmp_path / "öwn images"
    write_tree(
        root / "folder",
        {
            "z.png": one,
            "deep er/ä/1.PNG": two,
            "README.txt": b"x",
            ".DS_Store": b"x",
            "raw.cr2": b"x",
            "deep er/no ending": three,
            "0.png": b"",
        },
    )
    write_tar(root / "b.tar.gz", {"x/2.png": one, "x/1.png": two, "x/notes.md": b"x"}, "w:gz")
    write_zip(root / "a.zip", {"y.png": three, "__MACOSX/y.png": b"x"})
    (root / "single.bin").write_bytes(one)
    places = [root / "b.tar.gz", root / "single.bin", root / "folder", root / "a.zip"]
    output = tmp_path / "o.jsonl"
    result = run("predict", student, *places, "-o", output, "--json", "--batch-size", 2)
    assert result.exit_code == 3
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [row["path"].removeprefix(f"{root}/") for row in rows] == [
        "b.tar.gz/x/2.png",
        "b.tar.gz/x/1.png",
        "single.bin",
        "folder/0.png",
        "folder/deep er/no ending",
        "folder/deep er/ä/1.PNG",
        "folder/z.png",
        "a.zip/y.png",
    ]
    assert rows[0]["entropy"] == pytest.approx(rows[6]["entropy"], rel=1e-6)
    assert rows[3]["error"] == "not an image of a known format (it is empty)"
    summary = json.loads(result.stdout)
    assert summary == {
        "images": 8,
        "broken": 1,
        "resized": 0,
        "skipped": {"others": 2, "hidden": 2, "formats": 1},
        "output": str(output),
        "student": str(student),
        "temperature": open_student(student).deployment.temperature,
        "coverage": None,
    }
    assert "could not be read: 1 of 8" in result.stderr


def test_what_cannot_be_read_is_a_row_in_its_place(tmp_path, student, images):
    good = png(images[0])
    folder = tmp_path / "in"
    write_tree(folder, {"1.png": good, "2.png": good[: len(good) // 2], "4.png": good})
    (folder / "3.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "text.txt").write_text("hello")
    whole = Path(write_tar(tmp_path / "whole.tar", {"a.png": good, "b.png": good}))
    cut = tmp_path / "cut.tar"
    cut.write_bytes(whole.read_bytes()[: 512 * 2 + len(good) // 512 * 512 + 100])
    output = tmp_path / "o.jsonl"
    given = (folder, tmp_path / "text.txt", cut)
    assert run("predict", student, *given, "-o", output).exit_code == 3
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    errors = {row["path"].removeprefix(f"{tmp_path}/"): row["error"] for row in rows}
    assert list(errors) == [
        *(f"in/{i}.png" for i in range(1, 5)),
        *("text.txt", "cut.tar/a.png", "cut.tar"),
    ]
    assert [row["class"] is None for row in rows] == [bool(it) for it in errors.values()]
    assert [name for name, error in errors.items() if not error] == [
        *("in/1.png", "in/4.png", "cut.tar/a.png")
    ]
    assert errors["in/2.png"].startswith("not a readable image (")
    assert errors["in/3.png"] == "is a link that cannot be followed"
    assert errors["text.txt"] == "not an image of a known format"
    assert errors["cut.tar"].startswith("not a whole tar or zip archive (")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["in", "-o", "o.csv", "--coverage", "0"], "the coverage must be between 0 and 1"),
        (["in", "-o", "o.csv", "--coverage", "1"], "the coverage must be between 0 and 1"),
        (["in", "-o", "new/o.csv"], "new: no such folder"),
        (["in", "-o", "o.txt"], "o.txt: the ending must be one of .csv, .jsonl, .parquet"),
        (["empty", "-o", "o.csv"], "empty: no image was found; skipped: no images (1)"),
        (["in", "gone.png", "-o", "o.csv"], "gone.png: no such file or folder"),
        (["in/a.csv", "-o", "in/a.csv"], "in/a.csv: is an input, and would be replaced"),
        (["in", "-o", "o.csv", "--device", "cuda:7"], "cannot be computed on 'cuda:7' ("),
    ],
)
def test_one_sentence_and_nothing_written(
    tmp_path, monkeypatch, student, images, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    write_tree(tmp_path, {"in/a.csv": png(images[0]), "empty/readme": b"x"})
    before = sorted(tmp_path.rglob("*"))
    assert sentence in refused("predict", student, *arguments)
    assert sorted(tmp_path.rglob("*")) == before


def test_exit_statuses(tmp_path, monkeypatch, capsys, student, images):
    write_tree(tmp_path, {"a.png": png(images[0]), "b.png": b"x"})
    # As a user runs it, once: broken images are told to scripts, and logs go elsewhere.
    command = [sys.executable, "-m", "ensdistill", "predict", student, tmp_path]
    done = subprocess.run([*command, "-o", tmp_path / "o.csv"], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr
    assert done.stdout == f"{tmp_path}/o.csv: images: 2\n"
    assert done.stderr == ("images that could not be read: 1 of 2; the column 'error' says why\n")
    for arguments, status in (
        ([tmp_path / "a.png", "-o", tmp_path / "p.csv"], 0),
        ([tmp_path / "nowhere", "-o", tmp_path / "o.csv"], 1),
        (["-o", tmp_path / "o.csv"], 2),
        ([tmp_path, "-o", tmp_path / "o.csv", "--batch-size", "0"], 2),
    ):
        monkeypatch.setattr(sys, "argv", ["", "predict", str(student), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0) == status
    monkeypatch.setattr(sys, "argv", ["", "predict", str(student), "gone", "-o", "o.csv"])
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr() == ("", "ensdistill: error: gone: no such file or folder\n")


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_an_interruption_leaves_what_was_there(tmp_path, student, images, monkeypatch, ending):
    write_tree(tmp_path / "in", {f"{i}.png": png(it) for i, it in enumerate(images)})
    output = tmp_path / f"o.{ending}"
    output.write_text("of before")
    predictor, calls = open_student(student), []

    def interrupted(given):
        calls.append(len(given))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predictor(given)

    interrupted.deployment = predictor.deployment
    monkeypatch.setattr(predicting, "ROW_GROUP", 1)
    with pytest.raises(KeyboardInterrupt):
        predicting.write_predictions(interrupted, [tmp_path / "in"], output, batch_size=4)
    assert calls == [4, 4, 4]
    assert output.read_text() == "of before"
    assert {it.name for it in tmp_path.iterdir()} == {"in", output.name}


def test_only_a_bounded_number_is_decoded_ahead():
    given, content = [], png(noise(3, 8, 8))

    def endless():
        while True:
            given.append(len(given))
            yield Found(str(given[-1]), ("x",), lambda: content)

    known = Deployment(classes=["a"], channels=3, size=(8, 8))
    for taken, picture in enumerate(islice(ahead(endless(), known, 10), 100)):
        assert picture.place == str(taken)
        assert len(given) <= taken + 10


def test_rows_are_written_before_the_last_image_is_read(tmp_path, student, images):
    """So memory does not grow with their number, and neither does what an error loses."""
    predictor, output, content = open_student(student), tmp_path / "o.csv", png(images[0])
    lines = []

    def slow(paths, skipped):
        for i in range(3000):
            if i == 2999:
                (part,) = tmp_path.glob(".o.csv-*.csv")
                lines.append(part.read_bytes().count(b"\n"))
            yield Found(f"{i}.png", (f"{i}.png",), lambda: content)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predicting, "image_files", slow)
        found = predicting.write_predictions(predictor, [], output)
    assert found["images"] == 3000
    assert lines[0] > 2500


@pytest.mark.parametrize(
    ("resize", "crop"), [(8, 8), (10, 8)], ids=["whole squares", "a centre of larger squares"]
)
def test_pictures_are_resized_as_in_the_study(tmp_path, resize, crop):
    evaluation = {"resize": resize, "crop": crop, "interpolation": "bicubic"}
    student = deploy(tmp_path / "study", evaluation=evaluation)
    picture = Image.fromarray(noise(40, 30, 3))
    path = tmp_path / "own.png"
    picture.save(path)
    output = tmp_path / "o.csv"
    result = run("predict", student, path, "-o", output, "--json")
    assert json.loads(result.stdout)["resized"] == 0  # as the study did, so nothing to tell
    box = (0, 5, 30, 35)
    square = picture.resize((resize, resize), Image.Resampling.BICUBIC, box)
    start = (resize - crop) // 2
    seen = np.asarray(square).transpose(2, 0, 1)[None, :, start : start + 8, start : start + 8]
    answers = open_student(student)(np.ascontiguousarray(seen))
    (row,) = table(output)
    assert float(row["probability"]) == pytest.approx(answers.probabilities.max(), rel=1e-5)


def test_pictures_of_another_size_become_squares_of_the_study(tmp_path, student, images):
    large = Image.fromarray(images[0].transpose(1, 2, 0)).resize((20, 30))
    write_tree(tmp_path / "in", {"0.png": png(images[0]), "1.png": encode(large)})
    output = tmp_path / "o.csv"
    result = run("predict", student, tmp_path / "in", "-o", output, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["resized"] == 1
    assert "resized to the study's 8×8 pixels, as the centre square: 1" in result.stderr
    small = large.resize((8, 8), Image.Resampling.BICUBIC, (0, 5, 20, 25))
    seen = np.stack([images[0], np.asarray(small).transpose(2, 0, 1)])
    expected = open_student(student)(seen).probabilities.max(1)
    got = [float(row["probability"]) for row in table(output)]
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_what_is_no_square_is_not_resized(tmp_path):
    student = deploy(tmp_path / "study", channels=1, size=(6, 9))
    write_tree(tmp_path / "in", {"0.png": png(noise(6, 9)), "1.png": png(noise(9, 6))})
    output = tmp_path / "o.csv"
    assert run("predict", student, tmp_path / "in", "-o", output).exit_code == 3
    errors = [row["error"] for row in table(output)]
    assert errors == ["", "has 6×9 pixels, and the student takes 9×6"]


def test_a_student_in_no_study_takes_pictures_as_they_are(tmp_path, student, images, caplog):
    alone = tmp_path / "weights.safetensors"
    alone.write_bytes(student.read_bytes())
    files = {"0.png": png(images[0]), "1.png": png(noise(3, 12, 10)), "2.png": png(images[1])}
    folder = write_tree(tmp_path / "in", files)
    output = tmp_path / "o.jsonl"
    assert run("predict", alone, folder, "-o", output).exit_code == 0
    assert "lies in no study's folder" in caplog.text
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    p = softmax(logits_of(student, images[:2]), -1).mean(1)
    assert [rows[0]["class"], rows[2]["class"]] == [str(k) for k in p.argmax(1)]
    assert rows[2]["probability"] == pytest.approx(p[1].max(), rel=1e-5)
    message = refused("predict", alone, folder, "-o", tmp_path / "p.csv", "--coverage", "0.9")
    assert message == "nothing is known of validation images, so no coverage can be promised"


def test_one_network_has_no_members_to_tell_of(tmp_path, images):
    student = deploy(tmp_path / "study", "single", members=1)
    (tmp_path / "a.png").write_bytes(png(images[0]))
    assert run("predict", student, tmp_path / "a.png", "-o", tmp_path / "o.csv").exit_code == 0
    (row,) = table(tmp_path / "o.csv")
    assert list(row) == ["path", "class", "probability", "entropy", "mutual_information", "error"]
    assert row["mutual_information"] == ""


def test_a_dirichlet_knows_its_mutual_information(tmp_path, images):
    kind = {"prediction": "dirichlet", "concentration_offset": 1.0}
    student = deploy(tmp_path / "study", "single", members=1, prediction=kind)
    (tmp_path / "a.png").write_bytes(png(images[0]))
    assert run("predict", student, tmp_path / "a.png", "-o", tmp_path / "o.csv").exit_code == 0
    (row,) = table(tmp_path / "o.csv")
    alpha = np.exp(logits_of(student, images[:1])[0, 0]) + 1
    draws = np.random.default_rng(0).dirichlet(alpha, 400_000)
    expected = entropy(alpha / alpha.sum()) - entropy(draws).mean()
    assert float(row["mutual_information"]) == pytest.approx(expected, abs=2e-3)


def test_every_sample_of_logits_is_a_member(tmp_path, images):
    student = deploy(tmp_path / "study", "gaussian_logits", samples=5)
    (tmp_path / "a.png").write_bytes(png(images[0]))
    assert run("predict", student, tmp_path / "a.png", "-o", tmp_path / "o.csv").exit_code == 0
    (row,) = table(tmp_path / "o.csv")
    assert len(json.loads(row["member_classes"])) == 5


def test_probabilities_that_are_no_numbers_are_refused(tmp_path, student, images):
    predictor = open_student(student)

    def ill(given):
        found = predictor(given)
        return found._replace(probabilities=found.probabilities * np.nan)

    ill.deployment = predictor.deployment
    write_tree(tmp_path / "in", {"0.png": png(images[0])})
    with pytest.raises(predicting.InputError, match="not finite"):
        predicting.write_predictions(ill, [tmp_path / "in"], tmp_path / "o.csv")
    assert not (tmp_path / "o.csv").exists()


def test_names_that_are_no_text(tmp_path, student, images):
    folder = tmp_path / "in"
    folder.mkdir()
    name = b"\xff\n.png"
    Path(folder, name.decode(errors="surrogateescape")).write_bytes(png(images[0]))
    for ending in ("csv", "jsonl", "parquet"):
        output = tmp_path / f"o.{ending}"
        assert run("predict", student, folder, "-o", output).exit_code == 0
    (row,) = table(tmp_path / "o.csv")
    assert row["path"] == f"{folder}/\\xff\n.png"


def test_pictures_that_would_fill_the_memory_are_broken(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    write_tree(tmp_path, {f"{i}.png": png(noise(3, 8, 8, seed=i)) for i in range(20)})
    known = Deployment(classes=["a"], channels=3, size=(8, 8))
    pictures = list(ahead(image_files([tmp_path], Counter()), known, 8))
    assert len(pictures) == 20
    assert all("decompression bomb" in picture.error for picture in pictures)


def test_it_needs_no_heavy_library_before_a_student_does():
    heavy = ["torch", "pandas", "sklearn", "matplotlib", "pyarrow", "requests", "snakemake"]
    code = (
        "import sys, ensdistill.cli.evaluate, ensdistill.cli.predict, ensdistill.predicting; "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_file_that_is_gone_when_its_turn_comes_is_broken(tmp_path, images):
    paths = [tmp_path / "0.png", tmp_path / "1.png"]
    for path in paths:
        path.write_bytes(png(images[0]))
    found = image_files(paths, Counter())
    paths[1].unlink()
    known = Deployment(classes=["a"], channels=3, size=(8, 8))
    assert [it.error for it in ahead(found, known, 2)] == [None, "No such file or directory"]


def test_images_are_asked_in_batches(tmp_path, student, images):
    write_tree(tmp_path / "in", {f"{i}.png": png(it) for i, it in enumerate(images[:7])})
    predictor, sizes = open_student(student), []

    def counting(given):
        sizes.append(len(given))
        return predictor(given)

    counting.deployment = predictor.deployment
    found = image_files([tmp_path / "in"], Counter())
    list(asking.answered(counting, found, 3))
    assert sizes == [3, 3, 1]
