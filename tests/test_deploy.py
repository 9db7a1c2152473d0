"""Cards and exported files as the workflow makes them, and when it makes them again."""

import pytest
import yaml

from ensdistill.card import make_card
from ensdistill.exported import OnnxStudent
from ensdistill.studies import read_configuration
from tests.project import REPOSITORY
from tests.test_reruns import code, setting

CARD = "deployed/kd/0/README.md"


def test_a_card_is_made_on_demand_and_by_nothing_else(finished):
    assert finished.planned(f"results/tiny/{CARD}") == {"card kd 0"}
    assert finished.planned(f"results/tiny/{CARD.replace('README.md', 'model.onnx')}") == {
        "export kd 0"
    }


def test_the_default_study_has_a_card_and_exports_nothing():
    """For export takes longer, and more than what `make run` installs."""
    studies = read_configuration(yaml.safe_load((REPOSITORY / "config.yaml").read_text())).studies
    assert studies["digits"].deploy.methods == ["kd_conf_ods"]
    assert not any(study.deploy.export for study in studies.values())
    assert [name for name, study in studies.items() if study.deploy.methods] == ["digits"]


@pytest.fixture(scope="module")
def carded(finished, tmp_path_factory):
    """A project whose study has the card of one method, made; tests change it in their order."""
    project = finished.copy(tmp_path_factory.mktemp("carded") / "project")
    setting("deploy", value={"methods": ["kd"]})(project)
    project.run()
    return project


def test_the_workflows_card_is_the_commands_and_stands_on_the_first_page(carded, tmp_path):
    by_hand = make_card(carded.file("students/kd/0/weights.safetensors"), tmp_path)
    for name in by_hand.files:
        made = carded.file(CARD).with_name(name)
        assert made.read_bytes() == (tmp_path / name).read_bytes()
    assert f'<a href="{CARD}">README.md</a>' in carded.file("index.html").read_text()
    assert carded.planned() == set()


@pytest.mark.parametrize(
    "change",
    [
        code("ensdistill/card/README.md.jinja", "## Limits", "## Bounds"),
        code("ensdistill/card/measured.py", "BINS = 15", "BINS = 10"),
    ],
)
def test_other_words_or_numbers_make_it_again(carded, tmp_path, change):
    project = carded.copy(tmp_path / "project")
    change(project)
    assert project.planned() == {"card kd 0", "page"}


def test_an_exported_file_is_told_of_by_the_card_made_after_it(carded):
    setting("deploy", value={"methods": ["kd"], "export": True})(carded)
    assert carded.planned() == {"export kd 0", "card kd 0", "page"}
    carded.run(f"results/tiny/{CARD}")
    student = OnnxStudent(carded.file(CARD).with_name("model.onnx"))
    assert student.deployment.origin["method"] == "kd"
    assert "onnxruntime" in carded.file(CARD).read_text()
    assert "model.onnx" in carded.log("deployed/kd/0_onnx")
    # What is there is told of, even if the study no longer asks for it.
    setting("deploy", value={"methods": ["kd"]})(carded)
    assert carded.planned() == {"page"}


def test_a_method_that_the_study_lacks_is_named(changed):
    setting("deploy", value={"methods": ["ods"]})(changed)
    done = changed.snakemake("--dry-run")
    assert done.returncode != 0
    sentence = "'deploy' names the method 'ods', which 'methods' lacks"
    assert sentence in " ".join((done.stdout + done.stderr).split())
