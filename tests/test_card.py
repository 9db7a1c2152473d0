"""Model cards: their numbers against the study's files, and what they are to the Hub."""

import contextlib
import io
import json
import os
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import CommitOperationAdd, ModelCard
from safetensors.numpy import load_file
from scipy.special import softmax
from sklearn.metrics import log_loss
from torchmetrics.functional.classification import multiclass_calibration_error
from typer.testing import CliRunner

from ensdistill import DamagedFile
from ensdistill.card import make_card
from ensdistill.card.citations import PAPERS, SOURCES, citations
from ensdistill.cli import app
from ensdistill.deployment import deployment_of, open_student
from ensdistill.options import AnyObjective, AnyPerturbation, AnyStudent
from ensdistill.sections import kinds
from tests.builders import message

HOSTILE = '<script>alert(1)</script> | *x* `y` [z](http://a) $1$ & "q" # 模型\n---'


@pytest.fixture(scope="module")
def made(finished, tmp_path_factory):
    """The card of a student, in a folder of its own."""
    return make_card(weights_of(finished), tmp_path_factory.mktemp("card"))


def weights_of(project, network="students/kd_conf_ods/0"):
    return project.file(f"{network}/weights.safetensors")


def text_of(card):
    return (card.folder / "README.md").read_text(encoding="utf-8")


def sections(text):
    """The card's paragraphs by heading."""
    parts = re.split(r"^## (.+)$", text, flags=re.MULTILINE)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def rows(section, first):
    """The lines of the table whose head begins so, by their first cell."""
    table = section[section.index(f"| {first} |") :].split("\n\n")[0]
    cells = [[cell.strip() for cell in line.strip(" |").split(" | ")] for line in table.split("\n")]
    return {line[0]: line[1:] for line in cells[2:]}


def probs_of(project, networks, split):
    """Their mean prediction, and the labels."""
    logits = []
    for network in networks:
        with h5py.File(project.file(f"logits/{network}.h5")) as file:
            logits.append(file[f"{split}/logits"][:].astype(float))
            labels = file[f"{split}/labels"][:]
    return softmax(np.concatenate(logits, axis=1), axis=-1).mean(1), labels


SYSTEMS = {
    "This student": ["students/kd_conf_ods/0"],
    "Teacher 0": ["teachers/0"],
    "Ensemble of 2": ["teachers/0", "teachers/1"],
}


@pytest.mark.parametrize("place", range(3))
def test_metrics_are_those_of_other_libraries(finished, made, place):
    name, networks = [*SYSTEMS.items()][place]
    system = made.systems[place]
    assert system.name == name
    probs, labels = probs_of(finished, networks, "test")
    val, val_labels = probs_of(finished, networks, "val")
    scaled = softmax(np.log(probs) / system.temperature, axis=1)
    # T* is where the NLL of the validation images is least, in 0.05 … 20.
    near = [min(factor * system.temperature, 20) for factor in (1, 0.99, 1.01)]
    nlls = [log_loss(val_labels, softmax(np.log(val) / it, axis=1)) for it in near]
    assert nlls[0] <= min(nlls[1:])
    for ending, these in (("", probs), ("_ts", scaled)):
        one_hot = np.eye(10)[labels]
        ece = multiclass_calibration_error(*map(torch.tensor, (these, labels)), 10, n_bins=15)
        expected = {
            "nll": log_loss(labels, these, labels=range(10)),
            "bs": ((these - one_hot) ** 2).sum(1).mean(),
            "ece": float(ece),
        }
        for key, value in expected.items():
            assert system.metrics[f"{key}{ending}"].estimate == pytest.approx(value, abs=1e-6), key
    assert system.metrics["acc"].estimate == pytest.approx(100 * (probs.argmax(1) == labels).mean())
    # Intervals: the middle 95 % of means over images that are drawn again.
    rng, values = np.random.default_rng(0), -np.log(probs[np.arange(len(labels)), labels])
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(2000)]
    ends = values.mean() + np.quantile(means, [0.025, 0.975]) - np.median(means)
    found = system.metrics["nll"]
    np.testing.assert_allclose([found.low, found.high], ends, rtol=1e-9)


def test_the_card_shows_what_was_measured_and_the_coverage_of_its_sets(finished, made):
    metrics = sections(text_of(made))["Metrics"]
    table = rows(metrics, "Metric")
    for place, system in enumerate(made.systems):
        found = system.metrics["nll"]
        shown = [float(it) for it in re.findall(r"[\d.]+", table["NLL ↓"][place])]
        np.testing.assert_allclose(shown, [found.estimate, found.low, found.high], atol=0.006)
        assert float(table["T\\*"][place]) == pytest.approx(system.temperature, abs=5e-4)
    assert f"{len(probs_of(finished, SYSTEMS['Teacher 0'], 'test')[1])} test images" in metrics
    deployment = deployment_of(weights_of(finished))
    probs, labels = probs_of(finished, SYSTEMS["This student"], "test")
    scaled = softmax(np.log(probs) / deployment.temperature, axis=1)
    sets = scaled >= deployment.threshold(0.9)
    sets[scaled == scaled.max(1, keepdims=True)] = True
    inside, size = re.search(r"that of ([\d.]+) .* with ([\d.]+) ", metrics).groups()
    assert float(inside) == pytest.approx(
        100 * sets[np.arange(len(labels)), labels].mean(), abs=0.5
    )
    assert float(size) == pytest.approx(sets.sum(1).mean(), abs=0.05)


def test_costs_shift_and_detection_are_those_of_the_studys_tables(finished, made):
    found = sections(text_of(made))
    costs = pd.read_csv(finished.file("metrics/costs.csv")).set_index("system")
    table = rows(found["Cost"], "System")
    systems = {"This student": "KD+ConfODS", "One teacher": "DE-1", "Ensemble of 2": "DE-2"}
    assert list(table) == list(systems)
    for name, label in systems.items():
        numbers = [float(it.split(" ")[0].replace(",", "")) for it in table[name]]
        keys = ["parameters", "bytes", "macs", "ms_1", "ms_128"]
        np.testing.assert_allclose(numbers, costs.loc[label, keys].astype(float), rtol=5e-3)
    assert costs["processor"].iloc[0].split(",")[0] in found["Cost"]
    frame = pd.read_csv(finished.file("metrics/corruptions.csv"))
    own = frame[(frame["system"] == "KD+ConfODS") & (frame["severity"] == 5)]
    shown = rows(found["Limits"], "Severity")["5"]
    assert [float(it) for it in shown] == pytest.approx(
        [own["acc"].mean(), own["nll"].mean(), own["ece"].mean()], abs=0.06
    )
    frame = pd.read_csv(finished.file("metrics/out_of_distribution.csv"))
    own = frame[(frame["system"] == "KD+ConfODS") & (frame["score"] == "entropy")]
    own = own.sort_values("set")
    lines = [it.split(" | ") for it in found["Limits"].split("\n") if " | entropy | " in it]
    assert [float(it[-2]) for it in lines] == pytest.approx(own["auroc"].tolist(), abs=6e-4)
    assert len(lines) == 2


def test_the_hub_understands_its_metadata_and_takes_its_files(made):
    card = ModelCard.load(made.folder / "README.md")
    assert card.data.library_name == "ensdistill"
    assert card.data.pipeline_tag == "image-classification"
    assert card.data.datasets == ["digits"]
    assert card.data.license is None
    assert card.data.model_name == "KD+ConfODS of tiny"
    results = {it.metric_type: it.metric_value for it in card.data.eval_results}
    own = made.systems[0].metrics
    assert results["accuracy"] == pytest.approx(own["acc"].estimate / 100, abs=1e-6)
    assert results["nll"] == pytest.approx(own["nll"].estimate, abs=1e-6)
    assert {*results} == {*card.data.metrics}
    front = text_of(made).split("---\n")[1]
    assert ModelCard(f"---\n{card.data.to_yaml()}\n---\n").data == card.data
    assert list(yaml.safe_load(front)) == [
        "library_name", "pipeline_tag", "tags", "datasets", "metrics", "model-index"
    ]  # fmt: skip
    assert {path.name for path in made.folder.iterdir()} == {*made.files}
    for name in made.files:
        assert CommitOperationAdd(name, made.folder / name).upload_info.size == made.files[name]


def test_a_licence_and_a_repository_stand_where_they_are_needed(finished, tmp_path):
    card = make_card(weights_of(finished), tmp_path, "someone/my-digits", "cc-by-4.0")
    known = ModelCard.load(tmp_path / "README.md")
    assert (known.data.license, known.data.model_name) == ("cc-by-4.0", "my-digits")
    assert "hf download someone/my-digits --local-dir student" in text_of(card)
    assert "No licence is stated" not in text_of(card)


@pytest.mark.parametrize("name", ["a b", "a/b/c", "a;rm", "-x", "$(x)", "a/../b", "\n"])
def test_names_that_the_hub_does_not_have_are_refused(finished, tmp_path, name):
    for options in ({"repository": name}, {"licence": name}):
        assert "not as the Hub has it" in message(
            make_card, weights_of(finished), tmp_path / "new", **options
        )
    assert not (tmp_path / "new").exists()


def test_its_commands_run_where_it_is_and_give_what_the_study_has(made, monkeypatch, finished):
    code = re.search(r"```python\n(.+?)```", text_of(made), re.DOTALL)[1]
    monkeypatch.chdir(made.folder)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        exec(code, {})
    student = open_student(weights_of(finished))
    found = student(np.zeros((1, 1, 8, 8), np.uint8))
    best = found.probabilities[0].argmax()
    digit, probability, entropy = said.getvalue().split()
    assert digit == student.deployment.classes[best]
    expected = found.probabilities[0, best], found.entropy[0]
    assert (float(probability), float(entropy)) == pytest.approx(expected)
    assert deployment_of(made.folder / "weights.safetensors") == student.deployment
    ours, theirs = map(load_file, (made.folder / "weights.safetensors", weights_of(finished)))
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_the_same_files_give_the_same_bytes(finished, made, tmp_path):
    again = make_card(weights_of(finished), tmp_path)
    for name in made.files:
        assert (made.folder / name).read_bytes() == (again.folder / name).read_bytes()


def test_an_exported_file_is_told_of_if_it_is_of_these_weights(finished, tmp_path):
    digest = deployment_of(weights_of(finished)).origin["digest"]
    (tmp_path / "model.onnx").write_bytes(b"ONNX of " + digest.encode())
    card = make_card(weights_of(finished), tmp_path)
    assert "onnxruntime.InferenceSession" in text_of(card)
    assert "onnx" in ModelCard.load(tmp_path / "README.md").data.tags
    assert card.left_out == {}
    other = message(make_card, weights_of(finished, "students/kd/0"), tmp_path)
    assert "model.onnx: not of the weights" in other


def test_weights_alone_have_no_card(finished, tmp_path):
    weights = Path(shutil.copy2(weights_of(finished), tmp_path))
    said = message(make_card, weights, tmp_path / "card")
    assert said.startswith(f"{weights}: lies in no study's folder, such as results/<study>/")
    assert [it.name for it in tmp_path.iterdir()] == ["weights.safetensors"]
    (tmp_path / "cut.safetensors").write_bytes(weights.read_bytes()[:999])
    with pytest.raises(DamagedFile):
        make_card(tmp_path / "cut.safetensors")
    assert "no such file" in message(make_card, tmp_path / "none.safetensors")


def test_what_is_not_there_is_left_out_and_said(changed):
    for name in ("metrics/costs.csv", "figures/reliability.png", "logits/teachers/1.h5"):
        changed.file(name).unlink()
    card = make_card(weights_of(changed))
    assert card.folder == changed.file("deployed/kd_conf_ods/0")
    assert {*card.left_out} == {"cost", "figure", "its teachers", "exported file"}
    assert [it.name for it in card.systems] == ["This student"]
    assert "Cost" not in sections(text_of(card))
    assert "cost (metrics/costs.csv has nothing of this student)" in text_of(card)
    changed.file("metrics/scores.csv").unlink()
    assert make_card(weights_of(changed)).left_out.keys() >= {"shifted images", "other images"}
    changed.file("logits/students/kd_conf_ods/0.h5").unlink()
    card = make_card(weights_of(changed))
    assert {*sections(text_of(card))} == {
        "", "How to use", "Data", "Training", "Limits", "Citation"
    }  # fmt: skip
    assert ModelCard.load(card.folder / "README.md").data.eval_results is None


def test_a_teacher_and_a_student_of_labels_name_no_ensemble(finished, tmp_path):
    for network, title in (("teachers/1", "teacher 1 of tiny"), ("students/be/0", "BE of tiny")):
        card = make_card(weights_of(finished, network), tmp_path / network)
        assert f"# {title}\n" in text_of(card)
        assert "trained on labels alone" in text_of(card)
        assert [it.name for it in card.systems] == ["This student"]
        assert list(rows(sections(text_of(card))["Cost"], "System")) == ["This student"]


def test_names_are_shown_as_they_are_and_mean_nothing_to_markdown(changed, tmp_path):
    with h5py.File(changed.file("images.h5"), "r+") as file:
        file.attrs["classes"] = json.dumps([HOSTILE, *map(str, range(1, 10))])
        images = json.loads(file.attrs["images"]) | {"source": "folder", "path": "/home/me/secret"}
        file.attrs["images"] = json.dumps(images)
    study = changed.file("images.h5").parent
    renamed = study.rename(study.with_name("a *b* <i> & # c: 'd'"))
    scores = pd.read_csv(renamed / "metrics/scores.csv")
    scores.replace({"KD+ConfODS": HOSTILE}).to_csv(renamed / "metrics/scores.csv", index=False)
    card = make_card(renamed / "students/kd_conf_ods/0/weights.safetensors", tmp_path)
    metadata, body = text_of(card).removeprefix("---\n").split("\n---\n", 1)
    known = yaml.safe_load(metadata)["model-index"][0]
    assert known["name"] == f"{HOSTILE} of {renamed.name}"
    assert known["results"][0]["dataset"]["type"] == renamed.name
    assert "<script" not in body.replace("\\<", "")
    assert "\n---" not in body
    assert r"\| \*x\* \`y\` \[z\](http://a) \$1\$ \& " in body
    assert "secret" not in text_of(card)


def test_every_part_that_has_a_source_of_its_own_is_cited():
    axes = {"student": AnyStudent, "objective": AnyObjective, "perturbation": AnyPerturbation}
    for (axis, name), key in SOURCES.items():
        names = {
            it.model_fields["name"].default
            for it in kinds(axes[axis])
            if hasattr(it, "model_fields") and "name" in it.model_fields
        }
        assert name in names
        found = citations({axis: {"name": name}})
        assert any(entry.partition("{")[2].startswith(f"{key},") for entry in found)
        assert found[1].startswith("@inproceedings{nam2021diversity,")
        for entry in found:
            assert entry.count("{") == entry.count("}")
    assert {*SOURCES.values(), "nam2021diversity"} == {*PAPERS}


def test_the_command_says_what_it_wrote(finished, tmp_path):
    run, weights = CliRunner().invoke, os.fspath(weights_of(finished))
    plain = run(app, ["card", weights, "-o", os.fspath(tmp_path)])
    assert plain.exit_code == 0
    assert f"hf upload OWNER/NAME {tmp_path}" in plain.stdout
    known = json.loads(run(app, ["card", weights, "-o", os.fspath(tmp_path), "--json"]).stdout)
    assert known["folder"] == os.fspath(tmp_path)
    assert known["files"] == {it.name: it.stat().st_size for it in tmp_path.iterdir()}
    assert known["left_out"] == {"exported file": "the student has not been exported to model.onnx"}
    assert {*known["metrics"]["This student"]["nll"]} == {"estimate", "low", "high"}
    assert run(app, ["card"]).exit_code == 2
