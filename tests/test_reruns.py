"""The table of docs/reruns.md, row by row: what a changed mind reruns, and what not."""

import os
import re

import pytest
import yaml

from tests.builders import encode, hash_of, noise, write_tree
from tests.project import (
    FIGURES,
    METHODS,
    ON_STUDENTS,
    ON_TEACHERS,
    RECIPE,
    REPOSITORY,
    TINY,
    another_result,
)

TEACHERS = {f"teacher {seed}" for seed in range(3)}
STUDENTS = {f"student {method} 0" for method in METHODS}
REDRAWN = {f"figure_{figure}" for figure in FIGURES}
TABLE = {"table", "figure_de_curve", "figure_cost_quality"}
DIRECTIONS = {"diversity_teachers", "saturation", "sweep", "transfer", "directions"}
BINNED = {"reliability", "corruptions", "diversity_students", "diversity_teachers"}
INTERVALS = {"sweep", "transfer", "jacobians"}
AT_PERTURBED = {"diversity_teachers", "saturation"}


def logits(*networks):
    return {f"logits {network}" for network in networks}


def figures(tables):
    return {f"figure_{table}" for table in tables}


# What is made of students, whichever, and of what teachers say around training images.
VERDICTS = {"claims", "findings"}
OF_STUDENTS = {"distances", "scores", *VERDICTS, *TABLE, *ON_STUDENTS, *figures(ON_STUDENTS)}
OF_TEACHERS = {"perturbed", "swept", "transferred", "claims", *DIRECTIONS}
OF_TEACHERS |= {"figure_examples", *figures(ON_TEACHERS)}
AFTER_STUDENTS = {*logits(*(f"students/{m}/0" for m in METHODS)), *OF_STUDENTS}
AFTER_TEACHERS = {*logits(*(f"teachers/{seed}" for seed in range(3))), *OF_TEACHERS}
TRAINING = {*TEACHERS, *STUDENTS, *AFTER_TEACHERS, *AFTER_STUDENTS}
EVERYTHING = {"images", "shifted", "costs", *TRAINING}
# One job makes a network's logits on all images, so all that is made of logits runs again.
OF_LOGITS = {"reliability", "selective", "corruptions", "out_of_distribution"}
OF_LOGITS |= {"diversity_students", "diversity_teachers", "saturation", "sweep"}
OF_SHIFTED = {"shifted", *(job for job in EVERYTHING if job.startswith("logits"))}
OF_SHIFTED |= {"scores", *VERDICTS, *TABLE, *OF_LOGITS, *figures(OF_LOGITS)}
SHIFTED = OF_SHIFTED | REDRAWN  # captions say how many images


def with_pages(reruns):
    """And the pages that show what was remade."""
    return reruns | {"page other" if "other" in job else "page" for job in reruns}


def of_method(name, seeds=(0,)):
    networks = [f"students/{name}/{seed}" for seed in seeds]
    return {*(f"student {name} {seed}" for seed in seeds), *logits(*networks)}


def setting(*path, value):
    return lambda project: project.change("studies", "tiny", *path, value=value)


def code(file, old, new):
    return lambda project: project.edit(file, old, new)


def touched(*files):
    return lambda project: [os.utime(project.file(file)) for file in files]


def deleted(*files):
    return lambda project: [project.file(file).unlink() for file in files]


def remade(file):
    """Deleted, and asked for by name; its bytes must be the same."""

    def change(project):
        before = project.file(file).read_bytes()
        deleted("images.h5", file)(project)
        target = f"results/tiny/{file}"
        assert project.planned(target) == {"images", "teacher 0"}
        project.run(target)
        assert project.file(file).read_bytes() == before

    return change


def all_but_one_method(project):
    methods = {name: method for name, method in METHODS.items() if name != "kd_single"}
    project.change("studies", "tiny", "methods", value=methods)


def own_architecture_and_recipe(project):
    student = {"name": "batch_ensemble", "architecture": {"name": "resnet14", "width": 4}}
    setting("methods", "kd", "student", value=student)(project)
    setting("methods", "be", "recipe", value={"epochs": 4})(project)


def one_more_of_each(project):
    """An entry in every registry, with the code that it names."""
    for file, registry, name in (
        ("students", "STUDENTS: dict[str, type[Student]] = {", "build_student"),
        ("objectives", "OBJECTIVES: dict[str, Callable[..., Parts]] = {", "distillation"),
        ("perturbations", "PERTURBATIONS: dict[str, Callable[..., Tensor]] = {", "ods_direction"),
        ("predictions", "PREDICTIONS: dict[str, type[Prediction]] = {", "Mixture"),
        ("networks", "ARCHITECTURES: dict[str, Callable[..., nn.Module]] = {", "BasicBlock"),
    ):
        function = f"def another(*arguments):\n    return {name}(*arguments)\n\n\n"
        entry = f'{function}{registry}"another": another, '
        project.edit(f"ensdistill/{file}.py", registry, entry)
    probs = "PROBS: dict[str, Callable[[ArrayLike, Mapping[str, Any]], Array]] = {"
    entry = '"another": lambda logits, attributes: metrics.accuracy(logits, attributes),'
    project.edit("ensdistill/predictions.py", probs, f"{probs}{entry}")
    project.edit(
        "ensdistill/architectures.py",
        "ARCHITECTURES = {",
        'ARCHITECTURES = {"another": ("another", 2),',
    )


def another_study(project):
    project.change("studies", "other", value=TINY)
    project.change("run", value=["tiny", "other"])


def reordered(project):
    config = yaml.safe_load((project.folder / "config.yaml").read_text())
    config["studies"]["tiny"] = dict(reversed(config["studies"]["tiny"].items()))
    project.configure({"studies": config["studies"], "run": config["run"]})
    with (project.folder / "config.yaml").open("a") as file:
        file.write("# A comment.\n")


def own_images(section, **options):
    """A finished study's images become own ones, for which its results stand; then one changes."""

    def change(project):
        splits = ("train", "test") if section == "images" else ("test",)
        files = {
            f"{split}/{label}/{i}.png": encode(noise(8, 8, seed=hash_of(split, label, i)))
            for split in splits
            for label in "ab"
            for i in range(6)
        }
        write_tree(project.folder / "own", {**files, f"{splits[0]}/a/0.heic": b""})
        project.change(
            "studies", "tiny", section, value={"source": "folder", "path": "own", **options}
        )
        target = {"images": "images", "out_of_distribution": "shifted"}[section]
        told = project.run(f"results/tiny/{target}.h5").stderr
        sentence = f"own: images read: {len(files)}; skipped: formats that are not read (1)"
        assert f"{target} tiny: warning: {sentence}" in told
        project.run("--touch")
        assert project.planned() == NOTHING
        own = project.folder / f"own/{splits[0]}/a/0.png"
        own.write_bytes(own.read_bytes())
        os.utime(own, ns=(10**18, 10**18))
        assert project.planned() == NOTHING
        own.write_bytes(encode(noise(8, 8)))

    return change


def other_environment(project):
    """A conda that knows itself, and another environment file."""
    code("envs/ensdistill.yaml", "python=3.11", "python=3.12")(project)
    conda = project.folder / "conda"
    conda.write_text(
        "#!/bin/sh\n[ $1 = --version ] && echo conda 25.1.0 ||"
        """ echo '{"conda_prefix": "/", "platform": "linux-64", "get": {}}'"""
    )
    conda.chmod(0o755)


OWN = {"costs", *of_method("kd"), *of_method("be"), *OF_STUDENTS}
WEIGHTS = "teachers/0/weights.safetensors"
NOTHING = set()
ROWS = {
    # config.yaml
    "η of one method": (
        setting("methods", "kd_conf_ods", "perturbation", value={"name": "conf_ods", "eta": 0.1}),
        of_method("kd_conf_ods") | OF_STUDENTS,
    ),
    "τ of one method": (
        setting("methods", "kd", "objective", value={"name": "one_to_one", "temperature": 3.0}),
        of_method("kd") | OF_STUDENTS,
    ),
    "a method's own `architecture` or `recipe`": (own_architecture_and_recipe, OWN),
    "η of the study": (
        setting("distillation", "eta", value="20/255"),
        of_method("kd_conf_ods") | OF_STUDENTS | OF_TEACHERS,
    ),
    "τ or α of the study": (
        setting("distillation", "temperature", value=3.0),
        (STUDENTS - {"student be 0"}) | (AFTER_STUDENTS - logits("students/be/0")) | OF_TEACHERS,
    ),
    "`teacher`": (
        setting("teacher", value={**RECIPE, "epochs": 4}),
        {"costs", *TRAINING} - {"student be 0", *logits("students/be/0")},
    ),
    "`student`": (
        setting("student", value={**RECIPE, "epochs": 4}),
        {"costs", *STUDENTS, *AFTER_STUDENTS, *REDRAWN},
    ),
    "`architecture`, `augmentation`, `precision`, `cuda_graphs`": (
        setting("precision", value="bf16"),
        TRAINING,
    ),
    "more `student_seeds`": (
        setting("student_seeds", value=3),
        {*OF_STUDENTS, *REDRAWN}.union(*(of_method(m, (1, 2)) for m in METHODS)),
    ),
    "a larger `pool`": (
        setting("pool", value=4),
        {"teacher 3", "logits teachers/3", "costs", "scores", "learning_curves", *TABLE, *REDRAWN}
        | {"transferred", "transfer", "directions", *VERDICTS},
    ),
    "`members`": (
        setting("members", value=3),
        {"costs", *STUDENTS, *AFTER_STUDENTS, *OF_TEACHERS, *REDRAWN} - {"transferred"},
    ),
    "a method more": (
        setting("methods", "kd_ods", value={"label": "KD+ODS", "perturbation": "ods"}),
        {"costs", *of_method("kd_ods"), *OF_STUDENTS},
    ),
    "a method at another perturbation": (
        setting("methods", "kd_mixup", value={"label": "KD+mixup", "perturbation": "mixup"}),
        of_method("kd_mixup")
        | OF_STUDENTS
        | {"costs", "perturbed", "diversity_teachers", "saturation", "sweep", "claims"}
        | {f"figure_{it}" for it in ("diversity_teachers", "saturation", "sweep", "examples")},
    ),
    "a method less": (all_but_one_method, {"costs", *OF_STUDENTS}),
    "a method's `label`": (
        setting("methods", "kd", "label", value="KD 1:1"),
        {"costs", *OF_STUDENTS} - {"distances"},
    ),
    "`confidence_bins`": (
        setting("confidence_bins", value=10),
        {*BINNED, "scores", "claims", *TABLE, *REDRAWN},
    ),
    "`analyses`": (
        setting(
            "analyses",
            value={"perturbed_images": 90, "train_images": 90, "jacobian_images": 10},
        ),
        {
            "perturbed",
            "swept",
            "transferred",
            "distances",
            "directions",
            "claims",
            "figure_examples",
        }
        | {*INTERVALS, *AT_PERTURBED, *figures(INTERVALS | AT_PERTURBED)},
    ),
    "`costs`": (setting("costs", value={"seconds": 1}), {"costs", "findings", *TABLE}),
    "`images`": (setting("images", "test", value=90), EVERYTHING),
    "your own images (`source: folder`)": (own_images("images", validation=4), EVERYTHING),
    "your own images out of distribution": (
        own_images("out_of_distribution", images=5),
        OF_SHIFTED,
    ),
    "`corruptions`, `out_of_distribution`": (setting("corruptions", "images", value=10), SHIFTED),
    "`gpus_per_job`": (setting("gpus_per_job", value=2), NOTHING),
    "`published`": (
        setting("published", value={"source": "a paper", "scores": {"KD": {"nll": 0.5}}}),
        TABLE,
    ),
    "`deploy`": (setting("deploy", value={"methods": ["kd"]}), {"card kd 0"}),
    "a study more": (
        another_study,
        {" ".join([rule, "other", *names]) for rule, *names in map(str.split, EVERYTHING)},
    ),
    "comments and the order of keys": (reordered, NOTHING),
    # The code
    "a metric's formula": (
        code("ensdistill/calibration.py", '"left") - 1', '"right") - 1'),
        {*BINNED, *figures(BINNED), "scores", "claims", *TABLE},
    ),
    "a metric more": (
        code(
            "ensdistill/metrics.py",
            "METRICS: dict[str, Metric] = {",
            'METRICS: dict[str, Metric] = {"one": Metric("One", lambda it: 1.0, HIGHER),',
        ),
        {"scores", *TABLE},
    ),
    "a result more": (another_result, {"surest", "figure_surest"}),
    "a perturbation's formula": (
        code("ensdistill/perturbations.py", "** 0.5 /", "** 0.25 /"),
        {"costs", *of_method("kd_conf_ods"), *OF_STUDENTS, *OF_TEACHERS},
    ),
    "an objective's formula": (
        code("ensdistill/objectives.py", "return probs.mean(0)", "return 1.0 * probs.mean(0)"),
        {"costs", *of_method("kd_single"), *OF_STUDENTS},
    ),
    "an objective, a student, a perturbation, a kind of prediction or an architecture more": (
        one_more_of_each,
        NOTHING,
    ),
    "how networks are trained": (
        code("ensdistill/training.py", "= factor * peak", "= 1.0 * factor * peak"),
        TRAINING,
    ),
    "how intervals are computed": (
        code("ensdistill/bootstrap.py", "LEVEL = 0.95", "LEVEL = 0.9"),
        {*VERDICTS, *INTERVALS, *figures(INTERVALS)},
    ),
    "an analysis": (
        code("ensdistill/analysis.py", "2**22", "2**21"),
        {"distances", "jacobians", "figure_jacobians", "claims"},
    ),
    "the style of figures": (code("ensdistill/drawing.py", "WIDTH = 6.8", "WIDTH = 6.7"), REDRAWN),
    "the first page's template or style": (
        code("ensdistill/page/style.css", "max-width: 62rem", "max-width: 60rem"),
        {"page"},
    ),
    "a figure's caption": (code("report/sweep.rst", "Dotted:", "Dots:"), {"page"}),
    "a workflow script": (
        code("workflow_scripts/table.py", "job(snakemake):", "job(snakemake):\n    pass"),
        TABLE,
    ),
    "a comment, a docstring, the formatting": (
        code("ensdistill/perturbations.py", "# Scaled first", "# First scaled"),
        NOTHING,
    ),
    "a checkout of the same code": (
        lambda project: os.utime(project.folder / "workflow_scripts/train.py"),
        NOTHING,
    ),
    "the version of ensdistill": (
        code("ensdistill/__init__.py", '__version__ = "', '__version__ = "9.'),
        NOTHING,
    ),
    "PyTorch, Python, `envs/`, `--sdm`": (other_environment, NOTHING),
    "threads, memory, GPUs, `--cores`": (lambda project: None, NOTHING),
    # Files
    "a deleted table or figure": (deleted("figures/reliability.png"), {"figure_reliability"}),
    "deleted images, weights, logits or metrics": (
        deleted("teachers/1/weights.safetensors", "logits/students/kd/0.h5", "metrics/scores.csv"),
        NOTHING,
    ),
    "a deleted file, made again by its name": (
        remade(WEIGHTS),
        {"learning_curves", "figure_learning_curves"},
    ),
    "a deleted file, when what reads it must run": (
        deleted("images.h5", "logits/perturbed.h5", "figures/examples.png"),
        EVERYTHING,
    ),
    "touched or copied files": (touched("images.h5", WEIGHTS, "logits/teachers/0.h5"), NOTHING),
}
WITHOUT = [row for row, (_, reruns) in ROWS.items() if reruns == NOTHING]
MACHINE = ["--sdm", "conda", "--set-threads", "student=2", "--set-resources", "student:gpu=2"]


OF_ODS_ALONE = {"transferred", "transfer", "directions", "figure_transfer"}
ENTRIES = {  # what is changed, and what learns by it
    "labels": (
        code("ensdistill/objectives.py", "loss = member_", "loss = 1.0 * member_"),
        {"costs", *TRAINING},
    ),
    "conf_ods": (
        code(
            "ensdistill/perturbations.py",
            "epsilon[0] * probs[0].amax",
            "epsilon[0] / probs[0].amax",
        ),
        {"costs", *of_method("kd_conf_ods"), *OF_STUDENTS, *(OF_TEACHERS - OF_ODS_ALONE)},
    ),
    "one_to_one": (
        code("ensdistill/objectives.py", "lambda probs: probs,", "lambda probs: 1.0 * probs,"),
        {"costs", *of_method("kd"), *of_method("kd_conf_ods"), *OF_STUDENTS},
    ),
    "wrn": (code("ensdistill/networks.py", "2 * width * widen", "3 * width * widen"), NOTHING),
}


@pytest.mark.parametrize("entry", ENTRIES)
def test_a_changed_entry_reruns_what_uses_it(entry, changed):
    change, reruns = ENTRIES[entry]
    change(changed)
    assert changed.planned() == with_pages(reruns)


@pytest.mark.parametrize("row", [row for row in ROWS if row not in WITHOUT])
def test_what_a_change_reruns(row, changed):
    change, reruns = ROWS[row]
    change(changed)
    assert changed.planned() == with_pages(reruns)


def test_changes_that_rerun_nothing_do_so_together(changed, monkeypatch):
    for row in WITHOUT:
        ROWS[row][0](changed)
    monkeypatch.setenv("PATH", str(changed.folder), prepend=os.pathsep)
    assert changed.planned(*MACHINE) == NOTHING


def test_what_failed_is_planned_again(changed):
    """Snakemake alone notes the settings of a failed job, and then finds nothing to be done."""
    setting("images", "test", value=90)(changed)
    code("workflow_scripts/images.py", "job(snakemake):", "job(snakemake):\n    raise OSError")(
        changed
    )
    assert changed.snakemake().returncode != 0
    assert not changed.file("images.h5").exists()
    assert changed.planned() == with_pages(EVERYTHING)


ELSEWHERE = (
    "the file of an architecture (`file:models/mine.py:build`), or one that `pretrained` names",
    "a file of `teachers`, or how it is read",
    "a file of `judge`, or how it is read",
)
"""Rows that test_own_architecture.py and test_own_ensemble.py show."""


def test_the_table_has_these_rows_and_says_where_nothing_runs():
    lines = (REPOSITORY / "docs/reruns.md").read_text().splitlines()
    table = [re.split(r" *\| *", line)[1:-1] for line in lines if line.startswith("|")]
    reruns = {cells[0]: cells[1] for cells in table[2:]}
    assert [row for row in reruns if row not in ELSEWHERE] == list(ROWS)
    assert {*ELSEWHERE} <= reruns.keys()
    assert [row for row, what in reruns.items() if what.startswith("nothing")] == WITHOUT


def test_a_change_can_be_ignored_or_taken_as_made(changed):
    setting("student", "epochs", value=4)(changed)
    assert changed.planned("--rerun-triggers", "mtime") == NOTHING
    changed.run("--touch")
    assert changed.planned() == NOTHING


def test_every_profile_that_takes_the_defaults_place_reruns_alike():
    files = (REPOSITORY / "profiles").glob("*/profile.yaml")
    profiles = {file.parent.name: yaml.safe_load(file.read_text()) for file in files}
    for name, profile in profiles.items():
        if "rerun-incomplete" in profile:
            for key in ("rerun-incomplete", "rerun-triggers", "max-checksum-file-size"):
                assert profile[key] == profiles["default"][key], name
