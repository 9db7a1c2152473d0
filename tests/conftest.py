"""One thread per test process: as a workflow's jobs run, and kind to a shared machine."""

import pytest
import torch
from filelock import FileLock

from ensdistill.batch_ensemble import SCALED
from tests.project import Project

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
    monkeypatch.setitem(SCALED, "cpu", 2**30 if request.param == "scaled" else 0)
    return request.param
