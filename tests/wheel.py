"""The package as a user gets it: a wheel, installed apart from this checkout."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.project import REPOSITORY


def built(folder: Path, *arguments: str, project: Path = REPOSITORY) -> list[Path]:
    """The files that `python -m build` makes of this checkout, sdist and wheel unless told."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, *arguments]
    done = subprocess.run(
        [*command, project], capture_output=True, text=True, env=clean_environment()
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return sorted(folder.iterdir())


def installed(wheel: Path, folder: Path) -> Path:
    """A folder for PYTHONPATH with what a wheel installs; its dependencies are the tests' own."""
    shutil.unpack_archive(wheel, folder, "zip")
    return folder


def clean_environment(site: Path | None = None) -> dict[str, str]:
    """Of a process that sees no other folder's library than `site`, and writes no bytecode."""
    known = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return {**known, "PYTHONDONTWRITEBYTECODE": "1", **({"PYTHONPATH": str(site)} if site else {})}


class Installed:
    """The installed package, whose commands run in a folder that is not this checkout."""

    def __init__(self, site: Path):
        self.site = site

    def run(self, *command: str | Path, cwd: Path, status: int = 0) -> subprocess.CompletedProcess:
        """Run `python -m <command>`."""
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=cwd,
            capture_output=True,
            text=True,
            env=clean_environment(self.site),
        )
        assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
        return done

    def snakemake(self, *arguments: str | Path, cwd: Path, status: int = 0) -> str:
        """What Snakemake says of a run on two cores."""
        done = self.run("snakemake", "--cores", "2", *arguments, cwd=cwd, status=status)
        return done.stdout + done.stderr
