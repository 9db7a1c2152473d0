"""Pages of verdicts, for people to read: of the paper's claims, and of the bench's findings."""

import html
from collections.abc import Mapping
from math import floor, log10
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ensdistill.bootstrap import LEVEL, RESAMPLES
from ensdistill.markup import html_page, markdown, markdown_table, number, unbroken

PERCENT = f"{100 * LEVEL:g} %"
INTERVALS = (
    f"In parentheses: the {PERCENT} interval by a bootstrap over images ({RESAMPLES:,} resamples, "
    "the same images for both sides of a comparison); for students, the error of a mean "
    "over few seeds is added, by Student's t; two methods are compared seed by seed, for students "
    "of the same seed start alike. With one seed a row speaks of that student only, not "
    "of its method; and all rows speak of this one ensemble of teachers, not of others."
)
TAIL = (1 - LEVEL) / 2


class Page(NamedTuple):
    """What the pages differ in."""

    title: str
    """Of the page, with `{study}`."""
    group: str
    """The column by which rows are grouped."""
    wanted: tuple[str, str]
    """The column of the values that make a verdict positive, and its title."""
    verdicts: Mapping[str, str]
    """What a verdict may be, each with a sign that needs no colour; positive, negative, none."""
    method: tuple[str, ...]
    """How the verdicts come about, by paragraph."""
    has_p: bool
    """Whether rows have p-values."""

    @property
    def titles(self) -> list[str]:
        """Of the columns."""
        p = ["p, adjusted"] if self.has_p else []
        estimate = f"Estimate ({PERCENT} interval)"
        return ["Quantity", self.wanted[1], estimate, "Verdict", *p, "Images", "Seeds"]


CLAIMS = Page(
    "Claims of Nam et al. (2021) in the study {study}",
    "claim",
    ("claimed", "Claimed"),
    {"supported": "✓", "not supported": "✗", "undecided": "?"},
    (
        INTERVALS,
        "Supported: the whole interval lies among the claimed values; not supported: none of it "
        "does; undecided: part of it does, or the quantity is undefined. Where a claim has a bound "
        "on one side only, a quantity right at the bound is called supported in "
        f"{100 * TAIL:g} % of runs, and not supported in as many; a wrong verdict is rarer the "
        "further it is from the bound. The rows are many: of those near their bound, about one in "
        f"{1 / TAIL:.0f} errs by chance. “At least as good” is supported only where it is better: "
        "equality cannot be shown.",
    ),
    has_p=False,
)
FINDINGS = Page(
    "Findings of the study {study}",
    "question",
    ("asked", "Asked"),
    {"yes": "✓", "no": "✗", "undecided": "?"},
    (
        INTERVALS,
        "Yes: the quantity is among the values asked for; no: it is not; undecided: these images "
        "and seeds are too few to tell, or the quantity is undefined. The first row of a question "
        f"is its answer. A verdict needs a two-sided p-value below {1 - LEVEL:.2g}, adjusted by "
        "Holm's method (1979): that of a first row for the number of questions, so that in at most "
        f"{100 * (1 - LEVEL):.2g} % of runs any answer is wrong by chance; that of another row for "
        "the number of these in its question. Intervals are not adjusted: one may lie beyond its "
        "bound and the row be undecided.",
        "Compared are students that differ in nothing but the inputs at which their teachers are "
        "asked, by the difference of NLL on test images, positive where the answer is yes. "
        "“Enough” is what loses at most a tenth of the ensemble's gain over one network. The best "
        "students are chosen by NLL on the validation images, first among those that cost one "
        "network (at most 10 % more multiply–adds for a prediction), then among all. Temperatures "
        "are fitted to the validation images too. Kendall's τ is the mean over seeds of that "
        "between two orders of one seed's students, which chance lowers.",
    ),
    has_p=True,
)


def _summary(page: Page, table: pd.DataFrame) -> str:
    counts = ", ".join(f"{sum(table['verdict'] == verdict)} {verdict}" for verdict in page.verdicts)
    quantities = _count(len(table), "quantity", "quantities")
    groups = _count(table[page.group].nunique(), page.group, f"{page.group}s")
    return f"{groups} on {quantities}: {counts}."


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _cells(page: Page, row: Mapping[str, Any]) -> list[str]:
    """Texts under the page's titles."""
    system, found = row.get("system"), (row["estimate"], row["low"], row["high"])
    return [
        row["quantity"] if pd.isna(system) or not system else f"{row['quantity']}, {system}",
        row[page.wanted[0]],
        _with_interval(*found),
        f"{page.verdicts[row['verdict']]} {row['verdict']}",
        *([_p_value(row["p"])] if page.has_p else []),
        f"{row['n']:,}",
        str(row["seeds"] or ""),
    ]


def _p_value(p: float) -> str:
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _with_interval(*values: float) -> str:
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


def to_markdown(page: Page, table: pd.DataFrame, study: str) -> str:
    """A page in GitHub's Markdown.

    Args:
        page: which it is.
        table: what `claims.claims` or `findings.findings` returns.
        study: its name.
    """
    titles = page.titles
    lines = [titles, [*[":--"] * (len(titles) - 2), "--:", "--:"]]
    for group, rows in table.groupby(page.group, sort=False):
        lines.append([f"**{markdown(group)}**", *[""] * (len(titles) - 1)])
        for _, row in rows.iterrows():
            quantity, *others = map(markdown, _cells(page, row))
            lines.append([quantity, *map(unbroken, others)])
    title = f"# {markdown(page.title.format(study=study))}"
    counts = f"**{_summary(page, table)}**"
    return "\n\n".join([title, counts, markdown_table(lines), *page.method]) + "\n"


def to_html(page: Page, table: pd.DataFrame, study: str) -> str:
    """`to_markdown`, as a page of its own."""
    groups, titles = [], page.titles
    classes = dict(zip(page.verdicts, ("supported", "not-supported", "undecided"), strict=True))
    for group, rows in table.groupby(page.group, sort=False):
        heading = f"<th colspan={len(titles)} scope=rowgroup>{html.escape(group)}</th>"
        lines = [f"<tr>{heading}</tr>"]
        for _, row in rows.iterrows():
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in _cells(page, row))
            lines.append(f"<tr class={classes[row['verdict']]}>{cells}</tr>")
        groups.append("\n".join(["<tbody>", *lines, "</tbody>"]))
    title, head = page.title.format(study=study), "".join(f"<th>{title}</th>" for title in titles)
    return html_page(
        title,
        f"<h1>{html.escape(title)}</h1>",
        f"<p><b>{_summary(page, table)}</b></p>",
        f"<table class=claims><thead><tr>{head}</tr></thead>",
        *groups,
        "</table>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in page.method),
    )
