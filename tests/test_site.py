"""The site: whole, valid in what it says of config.yaml, and nothing from other hosts."""

import json
import re
import subprocess
import sys
from textwrap import dedent

import pytest
import typer
import yaml

from ensdistill.cli import app
from ensdistill.objectives import OBJECTIVES
from ensdistill.perturbations import PERTURBATIONS
from ensdistill.students import STUDENTS
from ensdistill.studies import Study, read_configuration
from tests.project import REPOSITORY

DOCS = REPOSITORY / "docs"
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", folder]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def test_every_page_of_the_repository_is_there(site):
    assert {str(page.relative_to(DOCS).with_suffix(".html")) for page in PAGES[2:]} <= site.keys()


def test_nothing_is_fetched_from_other_hosts(site):
    fetched = r'<(?:script|img|iframe)[^>]*\ssrc="?([^" >]+)|<link[^>]*\shref="?([^" >]+)'
    for name, page in site.items():
        found = {one or other for one, other in re.findall(fetched, page)}
        assert len(found) > 3, name
        assert not {it for it in found if re.match(r"(?:https?:)?//", it)}, name


def test_formulas_are_mathml_and_none_is_left_over(site):
    assert site["methods/single.html"].count("<math ") > 0
    for name, page in site.items():
        assert r'class="arithmatex">\\' not in page, name
        formulas = re.findall(r"<math .*?</math>", page, re.DOTALL)
        assert not [it for it in formulas if "\\" in it or "merror" in it], name


def test_every_key_of_the_configuration_has_an_anchor(site):
    schema = json.loads((REPOSITORY / "config.schema.json").read_text())
    sections = {"Configuration": schema, **schema["$defs"]}
    wanted = {
        f"{section.lower()}-{key}"
        for section, known in sections.items()
        for key in known["properties"]
    }
    ids = set(re.findall(r'<code id="([^"]+)">', site["configuration.html"]))
    assert wanted == ids
    assert len(wanted) > 100


def test_every_subcommand_is_described(site):
    page = site["reference/command.html"]
    for name, command in getattr(typer.main.get_command(app), "commands", {}).items():
        section = page.partition(f'<h2 id="{name}"')[2].partition("<h2")[0]
        for parameter in command.params:
            shown = (
                parameter.metavar if parameter.param_type_name == "argument" else parameter.opts[0]
            )
            assert f"<code>{shown}</code>" in section, (name, shown)


@pytest.mark.parametrize("page", PAGES[:2], ids=lambda page: page.name)
def test_links_of_the_repositorys_first_pages_lead_somewhere(page):
    for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (REPOSITORY / link).exists(), link


def test_every_method_of_the_registries_has_a_page():
    covered = {"students": [], "objectives": [], "perturbations": []}
    for page in (DOCS / "methods").glob("*.md"):
        head = re.match(r"---\n(.*?)\n---\n", page.read_text(), re.DOTALL)
        for axis, names in yaml.safe_load(head[1])["covers"].items() if head else ():
            covered[axis] += names
    registries = {"students": STUDENTS, "objectives": OBJECTIVES, "perturbations": PERTURBATIONS}
    assert {axis: sorted(names) for axis, names in covered.items()} == {
        axis: sorted(entries) for axis, entries in registries.items()
    }


def configurations():
    """What pages show of config.yaml, each as a whole configuration."""
    for page in PAGES:
        for block in re.findall(r"^```yaml[^\n]*\n(.*?)^```$", page.read_text(), re.S | re.M):
            given = yaml.safe_load(dedent(block))
            if {"set-resources", "set-threads"} & given.keys():
                continue  # of a profile
            if "studies" not in given:
                study = given if given.keys() <= Study.model_fields.keys() else {"methods": given}
                images = {"held_out": 10, **study.get("images", {})}
                given = {"run": ["shown"], "studies": {"shown": {**study, "images": images}}}
            yield pytest.param(given, id=str(page.relative_to(REPOSITORY)))


@pytest.mark.parametrize("given", [*configurations()])
def test_what_pages_show_of_the_configuration_is_valid(given):
    read_configuration(given)


def test_spelling():
    command = [sys.executable, "-m", "codespell_lib", *PAGES, REPOSITORY / "ensdistill"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
