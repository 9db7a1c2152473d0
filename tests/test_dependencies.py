"""What is imported is declared, what is declared is used, and each is explained once."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.project import REPOSITORY

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
BASE = PROJECT["dependencies"]
EXTRAS = PROJECT["optional-dependencies"]
TOOLS = {"docs", "test"}
"""Extras of what is run, not imported."""
NOT_IMPORTED = {"pygments"}
"""Others ask for it."""
OF_OTHERS = {"onnx-ir", "urllib3"}
"""Parts of declared ones: of onnxscript, and of requests for its exceptions."""


def names(requirements):
    found = {re.match(r"[\w.-]+", it)[0].lower().replace("_", "-") for it in requirements}
    return found - {"ensdistill"}


def imported(*folders):
    """Distributions of what the package or the workflow imports, wherever it does so."""
    modules = set()
    for path in (it for folder in folders for it in Path(REPOSITORY, folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    known = packages_distributions()
    others = modules - sys.stdlib_module_names - {"ensdistill"}
    return {it.lower().replace("_", "-") for module in others for it in known.get(module, [module])}


def test_all_that_is_imported_is_declared():
    optional = names(it for key in EXTRAS.keys() - TOOLS for it in EXTRAS[key])
    assert imported("ensdistill", "workflow_scripts") - OF_OTHERS <= names(BASE) | optional


def test_all_that_is_always_installed_is_imported():
    assert names(BASE) - NOT_IMPORTED <= imported("ensdistill", "workflow_scripts")


@pytest.mark.parametrize("extra", [None, *EXTRAS])
def test_each_is_explained_in_one_row(extra):
    (page,) = Path(REPOSITORY, "docs").rglob("dependencies.md")
    rows = re.findall(r"^\| (.+?) \|", page.read_text(encoding="utf-8"), re.M)
    explained = [it.lower().replace("_", "-") for row in rows for it in row.split(", ")]
    for name in names(BASE if extra is None else EXTRAS[extra]):
        assert explained.count(name) == 1, name
