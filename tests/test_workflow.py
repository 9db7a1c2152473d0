"""The whole workflow on a tiny study, run as a user runs it: what is made, again, and not again."""

import json
import shutil
from itertools import permutations

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.metrics import brier_score_loss, log_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from ensdistill.devices import visible_cards
from ensdistill.weights import read_header
from tests.project import FIGURES, METHODS, Project, another_result, without_times


def test_everything_is_made_and_a_second_run_has_nothing_to_do(finished):
    for ending in ("csv", "md", "tex", "html"):
        assert finished.file(f"tables/results.{ending}").stat().st_size > 200
    for ending in ("md", "html"):
        assert "APS size" in finished.file(f"tables/wide.{ending}").read_text()
    for figure in FIGURES:
        assert finished.file(f"figures/{figure}.png").read_bytes().startswith(b"\x89PNG")
        assert finished.file(f"figures/{figure}.pdf").read_bytes().startswith(b"%PDF")
    page = finished.file("index.html").read_text()
    for figure in FIGURES:
        assert f'<figure id="figure-{figure}">' in page
    assert finished.planned() == set()
    assert not list(finished.folder.rglob("results/**/.*")), "temporary files are left"
    assert not list(finished.folder.rglob("state.pt")), "states of training are left"


def member_logits(project, name, split):
    with h5py.File(project.file(f"logits/{name}.h5")) as file:
        return file[f"{split}/logits"][:].astype(float), file[f"{split}/labels"][:]


def test_metrics_recomputed_from_the_logits_by_other_libraries_agree(finished):
    table = pd.read_csv(finished.file("tables/results.csv")).set_index("system")
    assert list(table.index) == ["DE-1", "DE-2", "DE-3", "BE", "KD-single", "KD", "KD+ConfODS"]
    absent = ["diversity", "diversity_std", "human_kl", "human_kl_std"]
    assert np.isfinite(table.drop(columns=absent).to_numpy()).all()
    assert table["human_kl"].isna().all()
    assert table.index[table.diversity.isna()].tolist() == ["DE-1", "KD-single"]
    labels_of = {method["label"]: name for name, method in METHODS.items()}
    systems = {label: [f"students/{name}/0"] for label, name in labels_of.items()}
    systems["DE-3"] = [f"teachers/{seed}" for seed in range(3)]
    for label, networks in systems.items():
        row = table.loc[label]
        stored = {
            split: [member_logits(finished, name, split) for name in networks]
            for split in ("val", "test")
        }
        probs, labels = {}, {}
        for split, files in stored.items():
            logits = np.concatenate([logits for logits, _ in files], axis=1)
            probs[split], labels[split] = softmax(logits, axis=2).mean(1), files[0][1]
        members = softmax(logits, axis=2).transpose(1, 0, 2)
        temperature = row["temperature"]
        scaled = softmax(np.log(probs["test"]) / temperature, axis=1)
        for p, suffix in ((probs["test"], ""), (scaled, "_ts")):
            y = labels["test"]
            assert row[f"nll{suffix}"] == pytest.approx(log_loss(y, p, labels=range(10)), abs=1e-6)
            brier = brier_score_loss(y, p, labels=range(10), scale_by_half=False)
            assert row[f"bs{suffix}"] == pytest.approx(brier, abs=1e-6)
            ece = multiclass_calibration_error(
                torch.tensor(p), torch.tensor(y), num_classes=10, n_bins=15
            )
            assert row[f"ece{suffix}"] == pytest.approx(ece.item(), abs=1e-6)
        assert row["acc"] == pytest.approx(100 * np.mean(probs["test"].argmax(1) == y))
        assert row["entropy"] == pytest.approx(entropy(probs["test"], axis=1).mean(), abs=1e-6)
        pairs = list(permutations(members, 2))
        if pairs:
            kl = np.mean([entropy(a, b, axis=1).mean() for a, b in pairs])
            assert row["diversity"] == pytest.approx(kl, abs=1e-6)
        losses = [
            log_loss(labels["val"], softmax(np.log(probs["val"]) / t, axis=1), labels=range(10))
            for t in (temperature * 0.99, temperature, temperature * 1.01)
        ]
        assert losses[1] == min(losses) or temperature in (0.05, 20)
    for size in (1, 2, 3):
        assert table.loc[f"DE-{size}", "parameters"] == size * table.loc["DE-1", "parameters"]
        assert table.loc[f"DE-{size}", "n"] == [3, 3, 1][size - 1]


def test_files_say_what_made_them(finished):
    teachers = [header(finished, f"teachers/{seed}")["digest"] for seed in range(2)]
    kd = {"name": "one_to_one", "alpha": 0.9, "temperature": 2.0}
    conf_ods = {"name": "conf_ods", "eta": 13 / 255, "temperature": 2.0}
    made = {  # objective, perturbation, and who taught
        "teachers/0": ({"name": "labels"}, {"name": "none"}, []),
        "students/be/0": ({"name": "labels"}, {"name": "none"}, []),
        "students/kd_single/0": ({**kd, "name": "ensemble_mean"}, {"name": "none"}, teachers),
        "students/kd/0": (kd, {"name": "none"}, teachers),
        "students/kd_conf_ods/0": (kd, conf_ods, teachers),
    }
    digests = set()
    for name, parts in made.items():
        of_weights = header(finished, name)
        for stored in (f"logits/{name}.h5", f"logits/shifted/{name}.h5"):
            with h5py.File(finished.file(stored)) as file:
                known = {key: parsed(value) for key, value in file.attrs.items()}
            for said in (known, of_weights):
                assert (said["objective"], said["perturbation"], said["teachers"]) == parts
                assert said["architecture"] == {"name": "resnet8", "width": 4}
                assert (said["study"], said["replicate"], said["precision"]) == ("tiny", 0, "fp32")
                assert said["method"] == (name.split("/")[1] if "students" in name else "teacher")
                assert {"seed", "recipe", "torch", "ensdistill", "device"} <= said.keys()
            assert known["weights"] == of_weights["digest"]
            digests |= {known["digest"], of_weights["digest"]}
    # Logits on other images are the same step's: their names tell them apart.
    assert len(digests) == 2 * len(made)


def header(project, name):
    return read_header(project.file(f"{name}/weights.safetensors"))


def parsed(value):
    """An attribute of an HDF5 file: sections are JSON in it."""
    try:
        return json.loads(value)
    except (TypeError, ValueError):
        return value


def test_the_same_configuration_gives_the_same_bytes(finished, tmp_path):
    again = Project.new(tmp_path / "again")
    done = again.run("tables", "results/tiny/claims.csv", "results/tiny/metrics/corruptions.csv")
    assert done.stderr.count("No GPU found") == (0 if visible_cards() else 1)
    names = [
        str(path.relative_to(again.file("")))
        for pattern in ("*.safetensors", "*.h5", "*.csv", "*.md", "*.tex", "*.html")
        for path in again.file("").rglob(pattern)
        if path.name != "history.csv"  # has seconds in it
        and path.parent.name != "tables"  # milliseconds
    ]
    assert len(names) > 15
    for name in names:
        first, second = (project.file(name) for project in (finished, again))
        if name == "metrics/costs.csv":
            assert without_times(first) == without_times(second)
        else:
            assert first.read_bytes() == second.read_bytes(), name
    tables = (without_times(it.file("tables/results.csv")) for it in (finished, again))
    assert next(tables) == next(tables)
    weights = {
        finished.file(f"teachers/{seed}/weights.safetensors").read_bytes() for seed in range(3)
    }
    assert len(weights) == 3, "another seed gives other weights"


@pytest.mark.parametrize(
    ("path", "value", "sentence"),
    [
        (["teacher", "epoch"], 3, "study 'tiny': unknown key 'teacher.epoch'; did you mean"),
        (["members"], "four", "study 'tiny': members: input should be a valid integer"),
        (["images", "source"], "mnist", "study 'tiny': images.source: "),
    ],
)
def test_a_wrong_configuration_is_one_sentence(changed, path, value, sentence):
    changed.change("studies", "tiny", *path, value=value)
    done = changed.snakemake("--dry-run")
    assert done.returncode != 0
    output = done.stdout + done.stderr
    lines = [line for line in output.splitlines() if "config.yaml, study" in line]
    assert len(lines) == 1
    assert sentence in lines[0]
    assert "Traceback" not in output


def test_the_report_is_one_page_with_every_figure_and_the_table(finished):
    assert "Warning" not in finished.run("--report", "report.html").stderr
    page = (finished.folder / "report.html").read_text()
    for figure in FIGURES:
        assert f"results/tiny/figures/{figure}.png" in page
    assert "results/tiny/tables/results.html" in page
    assert "results/tiny/tables/wide.html" in page
    assert "results/tiny/claims.html" in page
    assert "results/tiny/index.html" in page


def test_a_result_more_is_one_file_and_its_caption(changed):
    another_result(changed)
    changed.run("results/tiny/figures/surest.png")
    table = pd.read_csv(changed.file("metrics/surest.csv")).set_index("name")
    assert table.index.tolist() == ["DE-2", "BE", "KD-single", "KD", "KD+ConfODS"]
    logits, _ = member_logits(changed, "students/kd/0", "test")
    expected = softmax(logits, axis=2).mean(1).max(1).mean()
    assert table.confidence["KD"] == pytest.approx(expected)
    assert changed.file("figures/surest.pdf").read_bytes().startswith(b"%PDF")
    changed.run("--report", "report.html", "made")
    page = (changed.folder / "report.html").read_text()
    assert "results/tiny/figures/surest.png" in page
    assert "Mean confidence" in page


@pytest.mark.parametrize(
    ("deleted", "missing"),
    [
        (["claims.html", "figures/reliability.png", "figures/sweep.pdf"], ["reliability"]),
        (["claims.html", "tables/results.html"], ["cost_quality", "de_curve"]),
    ],
)
def test_the_report_has_what_is_there_before_all_is_done(changed, deleted, missing):
    for file in deleted:
        changed.file(file).unlink()
    changed.run("--report", "report.html", "made")
    page = (changed.folder / "report.html").read_text()
    for figure in FIGURES:
        assert (f"results/tiny/figures/{figure}.png" in page) == (figure not in missing)
    assert "claims.html" not in page
    assert "index.html" not in page


def test_the_first_page_has_what_is_there_before_all_is_done(changed):
    for file in ("claims.csv", "figures/sweep.png", "logits/perturbed.h5"):
        changed.file(file).unlink()
    target = "results/tiny/so_far.html"
    assert changed.planned(target) == {"page_so_far"}
    # While another snakemake works, which has locked what it reads and makes.
    locks = changed.folder / ".snakemake/locks"
    locks.mkdir(exist_ok=True)
    held = ["tables/results.csv", "figures/sweep.png", "index.html"]
    (locks / "0.output.lock").write_text("".join(f"results/tiny/{it}\n" for it in held))
    assert "cannot be locked" in changed.snakemake().stderr
    changed.run(target)
    page = changed.file("so_far.html").read_text()
    assert "claims.csv has not been made" in page
    assert "Diversity by size of the perturbation" in page
    assert '<figure id="figure-sweep">' not in page
    assert '<figure id="figure-de_curve">' in page
    assert changed.planned(target) == set()
    changed.file("figures/reliability.png").unlink()
    assert changed.planned(target) == {"page_so_far"}


def test_the_images_of_a_folder_reach_the_table(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 10)):
        for label, name in enumerate(("ants", "bees")):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 128, (9, 8, 3), dtype=np.uint8) + 127 * label
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
    project = Project.new(tmp_path / "project")
    project.change(
        "studies",
        "tiny",
        "images",
        value={"source": "folder", "path": "../photos", "size": 8, "validation": 20},
    )
    project.change("studies", "tiny", "methods", value={"kd": METHODS["kd"]})
    project.change("studies", "tiny", "teacher", "batch_size", value=16)
    project.run("tables")
    table = pd.read_csv(project.file("tables/results.csv")).set_index("system")
    assert table.loc["KD", "diversity"] > 0
    shutil.rmtree(tmp_path / "photos" / "test" / "bees")
    project.file("images.h5").unlink()
    done = project.snakemake("results/tiny/images.h5")
    assert done.returncode != 0
    assert "class 'bees' is in train/ but not in test/" in done.stderr
    assert not project.file("images.h5").exists()
