"""One thread per test process: as a workflow's jobs run, and kind to a shared machine."""

import math
import sys

import pytest
import torch
from filelock import FileLock

from ensdistill.batch_ensemble import SCALED
from tests.builders import MINE
from tests.project import Project
from tests.wheel import Installed, built, installed

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory, worker_id):
    """The tiny study, run to its end by one of the test processes; not to be changed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "finished"
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            Project.new(folder).run()
    return Project(folder)


@pytest.fixture
def changed(finished, tmp_path):
    """A finished project to be changed at will."""
    return finished.copy(tmp_path / "changed")


@pytest.fixture(params=["scaled", "explicit"])
def form(request, monkeypatch):
    """Make layers compute in one of their two forms, whatever the size."""
    monkeypatch.setitem(SCALED, "cpu", math.inf if request.param == "scaled" else -math.inf)
    return request.param


@pytest.fixture
def own_networks(tmp_path, monkeypatch):
    """Where snakemake runs: with own networks, and a package that they import."""
    (tmp_path / "models").mkdir()
    (tmp_path / "sizes").mkdir()
    (tmp_path / "sizes/__init__.py").write_text("WIDTH = 6\n")
    (tmp_path / "models/mine.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    before, path = set(sys.modules), [*sys.path]
    yield tmp_path
    sys.path[:] = path
    for name in {*sys.modules} - before:
        if name == "sizes" or name.startswith("ensdistill_architectures_"):
            del sys.modules[name]


@pytest.fixture(scope="session")
def package(tmp_path_factory):
    """The package as its wheel installs it, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("installed package")
    (wheel,) = built(folder / "dist", "--wheel")
    return Installed(installed(wheel, folder / "site"))
