"""The page of the paper's claims, for people to read."""

import html
from collections.abc import Mapping
from math import floor, log10
from typing import Any

import numpy as np
import pandas as pd

from ensdistill.bootstrap import LEVEL, RESAMPLES
from ensdistill.markup import html_page, markdown, markdown_table, number, unbroken

VERDICTS = {"supported": "✓", "not supported": "✗", "undecided": "?"}
"""What `claims.verdict` may say, each with a sign that needs no colour."""

PERCENT = f"{100 * LEVEL:g} %"
TITLES = ["Quantity", "Claimed", f"Estimate ({PERCENT} interval)", "Verdict"]
TITLES += ["Images", "Seeds"]

TAIL = (1 - LEVEL) / 2
METHOD = (
    f"In parentheses: the {PERCENT} interval by a bootstrap over images ({RESAMPLES:,} resamples, "
    "the same images for both sides of a comparison); for students, the error of a mean "
    "over few seeds is added, by Student's t; two methods are compared seed by seed, for students "
    "of the same seed start alike. With one seed a row speaks of that student only, not "
    "of its method; and all rows speak of this one ensemble of teachers, not of others.",
    "Supported: the whole interval lies among the claimed values; not supported: none of it does; "
    "undecided: part of it does, or the quantity is undefined. Where a claim has a bound on one "
    f"side only, a quantity right at the bound is called supported in {100 * TAIL:g} % of runs, "
    "and not supported in as many; a wrong verdict is rarer the further it is from the bound. "
    f"The rows are many: of those near their bound, about one in {1 / TAIL:.0f} errs by chance. "
    "“At least as good” is supported only where it is better: equality cannot be shown.",
)
"""How the verdicts come about, by paragraph."""


def _title(study: str) -> str:
    return f"Claims of Nam et al. (2021) in the study {study}"


def _summary(table: pd.DataFrame) -> str:
    counts = ", ".join(f"{sum(table['verdict'] == verdict)} {verdict}" for verdict in VERDICTS)
    quantities = _count(len(table), "quantity", "quantities")
    return f"{_count(table['claim'].nunique(), 'claim', 'claims')} on {quantities}: {counts}."


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Texts under `TITLES`."""
    return [
        row["quantity"],
        row["claimed"],
        with_interval(row["estimate"], row["low"], row["high"]),
        f"{VERDICTS[row['verdict']]} {row['verdict']}",
        f"{row['n']:,}",
        str(row["seeds"] or ""),
    ]


def with_interval(*values: float) -> str:
    """An estimate and the ends of its interval, all with the same decimals.

    The largest has three significant digits, and their range at least two.
    """
    # Differences of what is equal may be 1e-17.
    estimate, low, high = numbers = np.round(values, 9)
    if np.isnan(numbers).any():
        return "undefined"
    sizes = [size for size in (np.abs(numbers).max() / 10, high - low) if size > 0]
    decimals = max([0, *(1 - floor(log10(size)) for size in sizes)])
    shown = [number(value, decimals) for value in (estimate, low, high)]
    return "{} ({} to {})".format(*shown)


def to_markdown(table: pd.DataFrame, study: str) -> str:
    """The page of the paper's claims in GitHub's Markdown.

    Args:
        table: what `claims.claims` returns.
        study: its name.
    """
    lines = [TITLES, [*[":--"] * (len(TITLES) - 2), "--:", "--:"]]
    for claim, rows in table.groupby("claim", sort=False):
        lines.append([f"**{markdown(claim)}**", *[""] * (len(TITLES) - 1)])
        for _, row in rows.iterrows():
            quantity, *others = map(markdown, _cells(row))
            lines.append([quantity, *map(unbroken, others)])
    title, counts = f"# {markdown(_title(study))}", f"**{_summary(table)}**"
    return "\n\n".join([title, counts, markdown_table(lines), *METHOD]) + "\n"


def to_html(table: pd.DataFrame, study: str) -> str:
    """`to_markdown`, as a page of its own."""
    groups = []
    for claim, rows in table.groupby("claim", sort=False):
        heading = f"<th colspan={len(TITLES)} scope=rowgroup>{html.escape(claim)}</th>"
        lines = [f"<tr>{heading}</tr>"]
        for _, row in rows.iterrows():
            verdict = row["verdict"].replace(" ", "-")
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in _cells(row))
            lines.append(f"<tr class={verdict}>{cells}</tr>")
        groups.append("\n".join(["<tbody>", *lines, "</tbody>"]))
    title, head = _title(study), "".join(f"<th>{title}</th>" for title in TITLES)
    return html_page(
        title,
        f"<h1>{html.escape(title)}</h1>",
        f"<p><b>{_summary(table)}</b></p>",
        f"<table class=claims><thead><tr>{head}</tr></thead>",
        *groups,
        "</table>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in METHOD),
    )
