"""Pages of verdicts, for people to read: of the paper's claims, and of the bench's findings."""

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import floor, log10
from typing import Any

import numpy as np
import pandas as pd

from ensdistill.bootstrap import LEVEL, RESAMPLES
from ensdistill.markup import counted, html_page, markdown, markdown_table, number, unbroken

Row = Mapping[str, Any] | pd.Series

PERCENT = f"{100 * LEVEL:g} %"
INTERVALS = (
    f"In parentheses: the {PERCENT} interval by a bootstrap over images ({RESAMPLES:,} resamples, "
    "the same images for both sides of a comparison); for students, the error of a mean "
    "over few seeds is added, by Student's t; two methods are compared seed by seed, for students "
    "of the same seed start alike. With one seed a row speaks of that student only, not "
    "of its method; and all rows speak of this one ensemble of teachers, not of others."
)
TAIL = (1 - LEVEL) / 2


@dataclass(frozen=True)
class Kind:
    """A table with verdicts, and how it is shown."""

    title: str
    file: str
    """Its name in the study's folder."""
    by: str
    """The column whose values are the groups."""
    signs: dict[str, str]
    """What a verdict may be: for, against, undecided; each with a sign that needs no colour."""
    cells: dict[str, Callable[[Row], str]]
    """Heads of columns, and what stands under them."""
    columns: tuple[str, ...]
    """All that the table must have."""
    method: tuple[str, ...]
    """How the verdicts come about, by paragraph."""
    is_answered_first: bool = False
    """Whether the first row of a group is its answer."""


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


def _quantity(row: Row) -> str:
    """With the student that it is about, if a finding is about one."""
    system = row.get("system")
    return f"{row['quantity']}, {system}" if system and pd.notna(system) else row["quantity"]


def _p_value(row: Row) -> str:
    p = row["p"]
    return "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


ESTIMATE = f"Estimate ({PERCENT} interval)"
MEASURED = ("quantity", "estimate", "low", "high", "verdict", "n", "seeds")
FOUND = {ESTIMATE: lambda row: with_interval(row["estimate"], row["low"], row["high"])}
NUMBERS = {
    "Images": lambda row: f"{row['n']:,}",
    "Seeds": lambda row: str(row["seeds"] or ""),
}

CLAIMS = Kind(
    "Claims of Nam et al. (2021)",
    "claims.csv",
    "claim",
    {"supported": "✓", "not supported": "✗", "undecided": "?"},
    {"Quantity": _quantity, "Claimed": lambda row: row["claimed"], **FOUND, **NUMBERS},
    ("claim", "claimed", *MEASURED),
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
)
FINDINGS = Kind(
    "Findings of the bench",
    "findings.csv",
    "question",
    {"yes": "✓", "no": "✗", "undecided": "?"},
    {
        "Quantity": _quantity,
        "Asked": lambda row: row["asked"],
        **FOUND,
        "p (Holm)": _p_value,
        **NUMBERS,
    },
    ("question", "system", "p", "asked", *MEASURED),
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
        "students are chosen by NLL on the validation images, first among all, then among those "
        "that cost one network (at most 10 % more multiply–adds for a prediction). Temperatures "
        "are fitted to the validation images too. Kendall's τ is the mean over seeds of that "
        "between two orders of one seed's students, which chance lowers.",
    ),
    is_answered_first=True,
)


def _summary(kind: Kind, table: pd.DataFrame) -> str:
    counts = ", ".join(f"{sum(table['verdict'] == verdict)} {verdict}" for verdict in kind.signs)
    quantities = counted(len(table), "quantity", "quantities")
    return f"{counted(table[kind.by].nunique(), kind.by)} on {quantities}: {counts}."


def _titles(kind: Kind) -> list[str]:
    """Heads of columns, the verdict behind the estimate."""
    heads = list(kind.cells)
    heads.insert(heads.index(ESTIMATE) + 1, "Verdict")
    return heads


def _texts(kind: Kind, row: Row) -> list[str]:
    """Under `_titles`."""
    texts = [text(row) for text in kind.cells.values()]
    verdict = f"{kind.signs[row['verdict']]} {row['verdict']}"
    texts.insert(list(kind.cells).index(ESTIMATE) + 1, verdict)
    return texts


def to_markdown(kind: Kind, table: pd.DataFrame, study: str) -> str:
    """A page in GitHub's Markdown.

    Args:
        kind: of the table.
        table: what `claims.claims` or `findings.findings` returns.
        study: its name.
    """
    titles = _titles(kind)
    lines = [titles, [*[":--"] * (len(titles) - 2), "--:", "--:"]]
    for group, rows in table.groupby(kind.by, sort=False):
        lines.append([f"**{markdown(str(group))}**", *[""] * (len(titles) - 1)])
        for _, row in rows.iterrows():
            quantity, *others = map(markdown, _texts(kind, row))
            lines.append([quantity, *map(unbroken, others)])
    title = f"# {kind.title} in the study {markdown(study)}"
    counts = f"**{_summary(kind, table)}**"
    return "\n\n".join([title, counts, markdown_table(lines), *kind.method]) + "\n"


def to_html(kind: Kind, table: pd.DataFrame, study: str) -> str:
    """`to_markdown`, as a page of its own."""
    groups, titles = [], _titles(kind)
    classes = dict(zip(kind.signs, ("supported", "not-supported", "undecided"), strict=True))
    for group, rows in table.groupby(kind.by, sort=False):
        heading = f"<th colspan={len(titles)} scope=rowgroup>{html.escape(str(group))}</th>"
        lines = [f"<tr>{heading}</tr>"]
        for _, row in rows.iterrows():
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in _texts(kind, row))
            lines.append(f"<tr class={classes[row['verdict']]}>{cells}</tr>")
        groups.append("\n".join(["<tbody>", *lines, "</tbody>"]))
    title = f"{kind.title} in the study {study}"
    head = "".join(f"<th>{title}</th>" for title in titles)
    return html_page(
        title,
        f"<h1>{html.escape(title)}</h1>",
        f"<p><b>{_summary(kind, table)}</b></p>",
        f"<table class=claims><thead><tr>{head}</tr></thead>",
        *groups,
        "</table>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in kind.method),
    )
