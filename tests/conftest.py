"""One thread per test process: as a workflow's jobs run, and kind to a shared machine."""

import pytest
import torch

from tests.project import Project

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The tiny study, run to its end; not to be changed."""
    project = Project.new(tmp_path_factory.mktemp("finished"))
    project.run()
    return project


@pytest.fixture
def changed(finished, tmp_path):
    """A finished project to be changed at will."""
    return finished.copy(tmp_path / "changed")
