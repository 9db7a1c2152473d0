"""The first page of a study: results/<study>/index.html, one file with all that a reader needs.

The answer comes first, then the verdicts, cost and quality, the table, the figures, how the best
student is taken away, and how all was made. The numbers are read from the study's final files,
never computed here; where one of them is not there yet, the page says so. What it looks like stands
in index.html.jinja, style.css and script.js beside this file, whose contents count as code of the
rule.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ensdistill.page.answer import GLANCE, SCALE, answers, percent
from ensdistill.page.columns import read_columns
from ensdistill.page.figures import figures_of
from ensdistill.page.making import architectures_of_teachers, how_it_was_made
from ensdistill.page.numbers_table import numbers_table
from ensdistill.page.takeaway import takeaway
from ensdistill.page.verdicts import verdict_groups
from ensdistill.tables import REPLICATES
from ensdistill.verdict_pages import CLAIMS, FINDINGS

COST = "cost_quality"
"""The figure that has a section of its own, before the table."""

FILES = {
    "tables/results.csv": "the results table; md, tex and html beside it",
    "findings.csv": "findings of the bench; md and html beside it",
    "claims.csv": "the paper's claims; md and html beside it",
    "figures": "every figure as PNG and PDF",
    "metrics": "every number of a table or figure",
    "logits": "logits (N, M, K) of every network, HDF5",
    "teachers": "weights and history of every teacher",
    "students": "weights and history of every student",
    "deployed": "model cards with all that the Hugging Face Hub takes beside them",
    "logs": "what every job said",
}
"""What a study's folder has for readers of the page."""


def first_page(
    folder: str | os.PathLike[str],
    name: str,
    study: Mapping[str, Any],
    titles: Mapping[str, str],
    captions: str | os.PathLike[str],
) -> str:
    """The page as HTML, of what exists in a study's folder.

    Args:
        folder: results/<study>.
        name: of the study.
        study: its configuration, of `methods` the label by name.
        titles: of every figure, by its name.
        captions: folder of the figures' captions, <name>.rst.

    Raises:
        InputError: a file is damaged or is not what it should be, or a caption is.
    """
    # Slow to import, and Snakemake imports this package in every job.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = Path(folder)
    # What captions know in Snakemake's report.
    job = SimpleNamespace(
        wildcards=SimpleNamespace(study=name), params=SimpleNamespace(study=study)
    )
    results = read_columns(folder / "tables/results.csv", ["system", "n", "parameters"])
    findings = read_columns(folder / "findings.csv", FINDINGS.columns)
    claims = read_columns(folder / "claims.csv", CLAIMS.columns)
    drawn = figures_of(folder, titles, Path(captions), job)
    found = answers(findings, results, study["members"])
    needed = {"the results": results, "the findings": findings, "the paper's claims": claims}
    looks = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    looks.filters["percent"] = percent
    return looks.get_template("index.html.jinja").render(
        name=name,
        study=study,
        architectures=architectures_of_teachers(study),
        scale=SCALE,
        answers=found,
        takeaway=takeaway(folder, study, found),
        table=numbers_table(results),
        glance=GLANCE,
        judged=[
            (kind, verdict_groups(folder, kind, frame))
            for kind, frame in ((FINDINGS, findings), (CLAIMS, claims))
        ],
        cost=drawn.get(COST),
        figures=[it for it in drawn.values() if it and it.name != COST],
        absent=[what for what, frame in needed.items() if frame is None],
        undrawn=[titles[it] for it, figure in drawn.items() if figure is None],
        making=how_it_was_made(folder, study),
        replicates=REPLICATES,
        files={path: what for path, what in FILES.items() if (folder / path).exists()},
    )
