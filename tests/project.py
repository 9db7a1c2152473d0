"""A copy of the workflow with a tiny study, run as a user runs it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import yaml

from tests.preloaded import snakemake

REPOSITORY = Path(__file__).parents[1]
PARTS = ["Snakefile", "rules", "workflow_scripts", "ensdistill", "report", "envs", "profiles"]

ON_STUDENTS = {"reliability", "diversity_students", "learning_curves", "jacobians"}
ON_STUDENTS |= {"corruptions", "out_of_distribution", "selective"}
ON_TEACHERS = {"diversity_teachers", "saturation", "sweep", "transfer"}
FIGURES = {"cost_quality", "de_curve", "examples", *ON_STUDENTS, *ON_TEACHERS}

METHODS = {
    "be": {"label": "BE", "objective": "labels", "paper": "be"},
    "kd_single": {
        "label": "KD-single",
        "student": "single",
        "objective": "ensemble_mean",
        "paper": "kd_single",
    },
    "kd": {"label": "KD", "paper": "kd"},
    "kd_conf_ods": {"label": "KD+ConfODS", "perturbation": "conf_ods", "paper": "kd_conf_ods"},
}
RECIPE = {"epochs": 3, "batch_size": 64, "learning_rate": 0.1, "warmup_epochs": 1}
TINY = {
    "images": {"source": "digits", "train": 200, "validation": 100, "test": 100},
    "corruptions": {"images": 20},
    "out_of_distribution": [{"images": 50}, {"name": "few", "images": 10}],
    "analyses": {"train_images": 100, "jacobian_images": 20},
    "costs": {"seconds": 0.1},  # while all else waits
    "architecture": {"name": "resnet8", "width": 4},
    "members": 2,
    "pool": 3,
    "student_seeds": 1,
    "augmentation": {"crop_padding": 1, "flip": False},
    "teacher": RECIPE,
    "student": RECIPE,
    "distillation": {"temperature": 2.0, "eta": "13/255"},
    "methods": METHODS,
}


class Project:
    """A copy of the workflow in a folder of its own, with its own library and results."""

    def __init__(self, folder: Path):
        self.folder = folder

    @classmethod
    def new(cls, folder: Path) -> "Project":
        for part in PARTS:
            source = REPOSITORY / part
            copy = shutil.copytree if source.is_dir() else shutil.copy2
            (folder / part).parent.mkdir(parents=True, exist_ok=True)
            copy(source, folder / part)
        project = cls(folder)
        project.configure({"run": ["tiny"], "studies": {"tiny": TINY}})
        return project

    def copy(self, folder: Path) -> "Project":
        shutil.copytree(self.folder, folder)
        return Project(folder)

    def configure(self, config) -> None:
        (self.folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def change(self, *path, value) -> None:
        """Set one key of the configuration, by its path."""
        config = yaml.safe_load((self.folder / "config.yaml").read_text())
        place = config
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value
        self.configure(config)

    def edit(self, file, old, new) -> None:
        text = (self.folder / file).read_text()
        assert text.count(old) == 1, f"{old!r} is in {file} {text.count(old)} times"
        (self.folder / file).write_text(text.replace(old, new))

    def snakemake(self, *arguments, cores=("--cores", "2"), **options):
        """As users run it."""
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *cores, *arguments],
            cwd=self.folder,
            capture_output=True,
            text=True,
            **{"env": self.environment, **options},
        )

    @property
    def environment(self):
        return {**os.environ, "PYTHONPATH": str(self.folder)}

    def run(self, *arguments):
        """Quickly, and to its end."""
        known = {"folder": self.folder, "environment": self.environment}
        done = snakemake("--cores", "2", *arguments, **known)
        assert done.returncode == 0, done.stderr[-4000:]
        return done

    def planned(self, *arguments) -> set[str]:
        """What a dry run would make: rules, with the study unless tiny, and the network."""
        jobs = []
        for line in self.run("--dry-run", *arguments).stdout.splitlines():
            line = line.strip()  # those of a group are indented
            if rule := re.match(r"(?:local)?rule (\w+):", line):
                jobs.append(rule[1])
            elif line.startswith("wildcards: "):
                values = re.findall(r"\w+=(?!tiny(?:,|$))([^,\s]+)", line)
                jobs[-1] = " ".join([jobs[-1], *values])
        return set(jobs) - {"all", "tables"}

    def file(self, name) -> Path:
        return self.folder / "results" / "tiny" / name

    def log(self, name) -> str:
        return self.file(f"logs/{name}.log").read_text()


def another_result(project):
    """A file in ensdistill/reports and its caption are all that it takes."""
    shutil.copy2(REPOSITORY / "tests/surest.py", project.folder / "ensdistill/reports")
    (project.folder / "report/surest.rst").write_text("How sure every system is.")


def without_times(path):
    """The lines of a table, but for milliseconds and how often they were taken."""
    frame = pd.read_csv(path, dtype=str)
    return frame[[it for it in frame if not it.startswith("ms_") and it != "n"]].to_csv()
