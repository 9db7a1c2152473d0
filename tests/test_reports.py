"""What the files of ensdistill/reports say of themselves, read without importing them."""

import ast
from importlib import import_module
from inspect import getsource, signature

import pytest

from ensdistill.reports import results
from tests.project import FIGURES, REPOSITORY

RESULTS = results()
SETTINGS = {"n_bins", "members", "labels", "sets"}


def test_every_figure_has_its_caption_and_every_caption_its_figure():
    drawn = {name for name, result in RESULTS.items() if result.has_figure}
    captions = {path.stem for path in (REPOSITORY / "report").glob("*.rst")}
    texts = {"claims", "findings", "page", "results", "wide", "workflow"}
    assert drawn == FIGURES == captions - texts


@pytest.mark.parametrize("name", RESULTS)
def test_what_is_read_of_a_file_is_what_it_says(name):
    result, module = RESULTS[name], import_module(f"ensdistill.reports.{name}")
    assert result.has_table == hasattr(module, "table")
    assert result.has_figure == hasattr(module, "draw")
    assert result.reads == getattr(module, "READS", {})
    assert result.chosen == {key: tuple(x) for key, x in getattr(module, "CHOSEN", {}).items()}
    if result.has_table:
        assert list(signature(module.table).parameters) == [*result.reads, *result.settings]
        assert set(result.settings) <= SETTINGS
    if result.has_figure:
        assert result.title == module.TITLE
        assert len(signature(module.draw).parameters) == len(result.drawn_from)
        named = {x.id for x in ast.walk(ast.parse(getsource(module.draw))) if hasattr(x, "id")}
        assert "table" not in named, "a code digest would follow it, and draw the figure anew"


def test_what_a_result_reads_is_made_by_a_result_or_by_an_earlier_stage():
    made = {f"metrics/{name}.csv" for name, result in RESULTS.items() if result.has_table}
    made |= {"tables/results.csv", "logits/perturbed.h5"}
    for result in RESULTS.values():
        assert not result.has_figure or set(result.drawn_from) <= made
