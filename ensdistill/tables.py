"""The results table, and the page of the paper's claims, for people to read."""

import html
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from math import floor, log10
from typing import Any, Literal

import numpy as np
import pandas as pd

from ensdistill.bootstrap import LEVEL, RESAMPLES
from ensdistill.evaluation import METRICS


@dataclass(frozen=True)
class Column:
    """How one column of the table is shown."""

    key: str
    title: str
    decimals: int
    better: int = 0
    """+1: larger is better, −1: smaller is better, 0: neither."""


COLUMNS = [
    Column("acc", "ACC %", 2, +1),
    Column("nll", "NLL", 4, -1),
    Column("bs", "BS", 4, -1),
    Column("ece", "ECE", 4, -1),
    Column("nll_ts", "NLL, TS", 4, -1),
    Column("bs_ts", "BS, TS", 4, -1),
    Column("ece_ts", "ECE, TS", 4, -1),
    Column("temperature", "T*", 2),
    Column("dee", "DEE", 2, +1),
    Column("dee_ts", "DEE, TS", 2, +1),
    Column("diversity", "Diversity", 4),
]

LEGEND = (
    "Mean ± standard deviation over n replicates: student seeds, or for DE-m subsets of the pool "
    "of teachers (overlapping, so the spread is understated). ACC: accuracy; NLL: negative "
    "log-likelihood in nats; BS: Brier score; ECE: expected calibration error; TS: after "
    "temperature scaling on the validation split, T* its temperature; DEE: Deep Ensemble "
    "Equivalent, the number of ensembled networks with the same NLL; '<' or '>' where all "
    "replicates lie outside the pool's curve, '≤' or '≥' where some do; Diversity: pairwise KL "
    "between members in nats. Arrows point to better."
)


def summarize(scores: pd.DataFrame, published: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """One row per system: n replicates, mean of every metric, `<metric>_std` beside.

    Args:
        scores: what `evaluation.scores` returns.
        published: `source` and `scores` by system and metric, as `studies.Published` has them.

    The standard deviation is that of a sample (n−1), and 0 where n = 1. For DE-m it is over
    overlapping subsets of one pool, so it understates the spread of independent ensembles.

    Of every metric with a published result there is `<metric>_published` and
    `<metric>_difference` (ours − published), and of their systems `published_source`.
    """
    groups = scores.groupby("system", sort=False)
    means, spreads = groups[METRICS].mean(), groups[METRICS].std().fillna(0.0)
    outside = groups[["dee_outside", "dee_ts_outside"]].mean()
    summary = pd.concat([groups.size().rename("n"), means, groups["parameters"].first()], axis=1)
    summary = summary.assign(entropy=summary.pop("entropy"))
    summary = pd.concat([summary, spreads.add_suffix("_std"), outside], axis=1)
    if published is not None:
        theirs = pd.DataFrame.from_dict(published["scores"], orient="index")
        theirs = theirs.reindex(index=summary.index, columns=METRICS)
        beside: dict[str, Any] = {}
        for metric in METRICS:
            beside[f"{metric}_published"] = theirs[metric]
            beside[f"{metric}_difference"] = summary[metric] - theirs[metric]
        beside["published_source"] = np.where(theirs.notna().any(axis=1), published["source"], None)
        summary = summary.join(pd.DataFrame(beside).dropna(axis=1, how="all"))
    return summary.reset_index()


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    kind: Literal["ensemble", "student", "published"]
    """`published`: published results for the system above, or the difference from them."""
    cells: list[tuple[str, int]]
    """Texts and ranks; 1 and 2 mark the best and second best student."""


def _rows(summary: pd.DataFrame) -> Iterator[Row]:
    students = ~summary["system"].str.fullmatch(r"DE-\d+")
    ranks = {
        column.key: (column.better * summary[column.key])[students].rank(
            method="min", ascending=False
        )
        for column in COLUMNS
        if column.better
    }
    decimals = {column.key: _published_decimals(summary, column) for column in COLUMNS}
    for index, row in summary.iterrows():
        cells = [(row["system"], 0), (str(row["n"]), 0)]
        for column in COLUMNS:
            text = f"{row[column.key]:.{column.decimals}f}"
            if spread := row[f"{column.key}_std"]:
                text += f" ± {spread:.{column.decimals}f}"
            text = _bound(row.get(f"{column.key}_outside", 0)) + text
            rank = ranks[column.key].get(index, 0) if column.better else 0
            cells.append((text, int(rank)))
        kind = "student" if students[index] else "ensemble"
        yield Row(kind, [*cells, (f"{int(row['parameters']):,}", 0)])
        if pd.notna(row.get("published_source")):
            for title, suffix, sign in (
                ("published", "published", ""),
                ("ours − published", "difference", "+"),
            ):
                values = ((row.get(f"{key}_{suffix}"), places) for key, places in decimals.items())
                numbers = ["" if pd.isna(value) else _number(value, n, sign) for value, n in values]
                yield Row("published", [(text, 0) for text in (title, "", *numbers, "")])


def _published_decimals(summary: pd.DataFrame, column: Column) -> int:
    """As many decimals as were published, or as we show if those are fewer."""
    values = summary.get(f"{column.key}_published", pd.Series(dtype=float)).dropna()
    given = (-int(Decimal(str(value)).normalize().as_tuple().exponent) for value in values)
    return min(max([0, *given]), column.decimals)


def _number(value: float, decimals: int, sign: str = "") -> str:
    """With a true minus, none before zero, and `sign` before positive numbers."""
    return f"{value:{sign}z,.{decimals}f}".replace("-", "−")


def _bound(outside: float) -> str:
    """How a mean of clipped values is to be read; ±1 if all of them were clipped."""
    if abs(outside) == 1:
        return "<" if outside < 0 else ">"
    return "≤" if outside < 0 else "≥" if outside > 0 else ""


def _titles() -> list[str]:
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    return ["System", "n", *(c.title + arrows[c.better] for c in COLUMNS), "Parameters"]


def _source(summary: pd.DataFrame) -> str:
    """Where the published results stand, as a sentence; empty if there are none."""
    if "published_source" not in summary:
        return ""
    return f"Published: {' '.join(summary['published_source'].dropna().iloc[0].split())}."


def _mark(cell: tuple[str, int], best: Callable[[str], str], second: Callable[[str], str]) -> str:
    text, rank = cell
    return best(text) if rank == 1 else second(text) if rank == 2 else text


def _markdown(text: str) -> str:
    """Plain text in one line of Markdown; `<1.00` may stay, for only a letter makes it a tag."""
    return re.sub(r"[\\`*_\[\]|~&$]|<(?=[A-Za-z/!?])", r"\\\g<0>", " ".join(text.split()))


def _unbroken(text: str) -> str:
    """Text that GitHub keeps on one line; tables are wide there."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def _markdown_table(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(summary: pd.DataFrame) -> str:
    """The table in GitHub's Markdown; best student bold, second best in italics."""
    lines = [_titles(), [":--", *["--:"] * (len(COLUMNS) + 2)]]
    for row in _rows(summary):
        texts = ((_markdown(text).replace("± ", _unbroken("± ")), rank) for text, rank in row.cells)
        line = [_mark(cell, "**{}**".format, "*{}*".format) for cell in texts]
        if row.kind == "published":
            line[0] = _unbroken(f"↳ {line[0]}")
        lines.append(line)
    legend = (
        f"{LEGEND} **Best** and *second best* student are marked. {_markdown(_source(summary))}"
    )
    return f"{_markdown_table(lines)}\n\n{legend.rstrip()}\n"


LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{plain: f"\\{plain}" for plain in "{}$&#%_"},
        **{plain: f"{{{plain}}}" for plain in "[*"},  # or a row's end would take them
        "±": r"$\pm$",
        "−": "$-$",
        "↑": r"$\uparrow$",
        "↓": r"$\downarrow$",
        "<": "$<$",
        ">": "$>$",
        "≤": r"$\le$",
        "≥": r"$\ge$",
    }
)


def to_latex(summary: pd.DataFrame) -> str:
    r"""A `tabular` for the booktabs package; best student bold, second best underlined."""

    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows, columns = list(_rows(summary)), len(COLUMNS) + 3
    body = []
    for row in rows:
        cells = [
            _mark(
                (text.translate(LATEX), rank), r"\textbf{{{}}}".format, r"\underline{{{}}}".format
            )
            for text, rank in row.cells
        ]
        if row.kind == "published":
            cells = [rf"\textit{{{cell}}}" if cell else "" for cell in cells]
            cells[0] = rf"\quad {cells[0]}"
        body.append(line(cells))
    body.insert(_first_student(rows), r"\midrule")
    source = _source(summary).translate(LATEX)
    return "\n".join(
        [
            f"% {LEGEND}",
            rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
            r"\toprule",
            line([title.translate(LATEX).replace("T{*}", "$T^*$") for title in _titles()]),
            r"\midrule",
            *body,
            r"\bottomrule",
            *([line([rf"\multicolumn{{{columns}}}{{l}}{{{source}}}"])] if source else []),
            r"\end{tabular}",
            "",
        ]
    )


def _first_student(rows: list[Row]) -> int:
    return next((index for index, row in enumerate(rows) if row.kind == "student"), len(rows))


STYLE = """
body { font: 13px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
h1 { font-size: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .45rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { border-block: 2px solid #222; }
tbody:last-child tr:last-child td { border-bottom: 2px solid #222; }
tr.first-student td { border-top: 1px solid #999; }
tr.published td { padding-block: 0 .15rem; color: #666; font-size: .9em; }
tr.published td:first-child { padding-left: 1.4rem; }
.claims :is(th, td):nth-child(-n + 4) { text-align: left; }
.claims tbody th { padding-top: .9rem; border-bottom: 1px solid #ccc; }
.claims .supported td:nth-child(4) { color: #17692f; font-weight: 600; }
.claims .not-supported td:nth-child(4) { color: #b3261e; font-weight: 600; }
.claims .undecided td:nth-child(4) { color: #666; }
p { max-width: 60rem; color: #555; }
"""


def _page(title: str, *body: str) -> str:
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</html>", ""])


def to_html(summary: pd.DataFrame) -> str:
    """A page of its own; best student bold, second best underlined."""
    rows, body = list(_rows(summary)), []
    first = _first_student(rows)
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td>{_mark((html.escape(text), rank), '<b>{}</b>'.format, '<u>{}</u>'.format)}</td>"
            for text, rank in row.cells
        )
        kind = "first-student" if index == first else row.kind
        body.append(f"<tr class={kind}>{cells}</tr>")
    head = "".join(f"<th>{title}</th>" for title in _titles())
    legend = (
        f"{html.escape(LEGEND)} <b>Best</b> and <u>second best</u> student are marked. "
        f"{html.escape(_source(summary))}"
    )
    return _page(
        "Results",
        f"<table><thead><tr>{head}</tr></thead><tbody>",
        *body,
        "</tbody></table>",
        f"<p>{legend.rstrip()}</p>",
    )


VERDICTS = {"supported": "✓", "not supported": "✗", "undecided": "?"}
"""What `claims.verdict` may say, each with a sign that needs no colour."""

PERCENT = f"{100 * LEVEL:g} %"
CLAIM_TITLES = ["Quantity", "Claimed", f"Estimate ({PERCENT} interval)", "Verdict"]
CLAIM_TITLES += ["Images", "Seeds"]

TAIL = (1 - LEVEL) / 2
METHOD = (
    f"In parentheses: the {PERCENT} interval by a bootstrap over images ({RESAMPLES:,} resamples, "
    "the same images for both sides of a comparison); for students, the error of a mean "
    "over few seeds is added, by Welch's t. With one seed a row speaks of that student only, not "
    "of its method; and all rows speak of this one ensemble of teachers, not of others.",
    "Supported: the whole interval lies among the claimed values; not supported: none of it does; "
    "undecided: part of it does, or the quantity is undefined. Where a claim has a bound on one "
    f"side only, a quantity right at the bound is called supported in {100 * TAIL:g} % of runs, "
    "and not supported in as many; a wrong verdict is rarer the further it is from the bound. "
    f"The rows are many: of those near their bound, about one in {1 / TAIL:.0f} errs by chance. "
    "“At least as good” is supported only where it is better: equality cannot be shown.",
)
"""How the verdicts come about, by paragraph."""


def _claims_title(study: str) -> str:
    return f"Claims of Nam et al. (2021) in the study {study}"


def _claims_summary(table: pd.DataFrame) -> str:
    counts = ", ".join(f"{sum(table['verdict'] == verdict)} {verdict}" for verdict in VERDICTS)
    quantities = _count(len(table), "quantity", "quantities")
    return f"{_count(table['claim'].nunique(), 'claim', 'claims')} on {quantities}: {counts}."


def _count(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _claim_cells(row: Mapping[str, Any]) -> list[str]:
    """Texts under `CLAIM_TITLES`."""
    return [
        row["quantity"],
        row["claimed"],
        _with_interval(row["estimate"], row["low"], row["high"]),
        f"{VERDICTS[row['verdict']]} {row['verdict']}",
        f"{row['n']:,}",
        str(row["seeds"] or ""),
    ]


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
    shown = [_number(value, decimals) for value in (estimate, low, high)]
    return "{} ({} to {})".format(*shown)


def claims_to_markdown(table: pd.DataFrame, study: str) -> str:
    """The page of the paper's claims in GitHub's Markdown.

    Args:
        table: what `claims.claims` returns.
        study: its name.
    """
    lines = [CLAIM_TITLES, [*[":--"] * (len(CLAIM_TITLES) - 2), "--:", "--:"]]
    for claim, rows in table.groupby("claim", sort=False):
        lines.append([f"**{_markdown(claim)}**", *[""] * (len(CLAIM_TITLES) - 1)])
        for _, row in rows.iterrows():
            quantity, *others = map(_markdown, _claim_cells(row))
            lines.append([quantity, *map(_unbroken, others)])
    title, counts = f"# {_markdown(_claims_title(study))}", f"**{_claims_summary(table)}**"
    return "\n\n".join([title, counts, _markdown_table(lines), *METHOD]) + "\n"


def claims_to_html(table: pd.DataFrame, study: str) -> str:
    """`claims_to_markdown`, as a page of its own."""
    groups = []
    for claim, rows in table.groupby("claim", sort=False):
        heading = f"<th colspan={len(CLAIM_TITLES)} scope=rowgroup>{html.escape(claim)}</th>"
        lines = [f"<tr>{heading}</tr>"]
        for _, row in rows.iterrows():
            verdict = row["verdict"].replace(" ", "-")
            cells = "".join(f"<td>{html.escape(text)}</td>" for text in _claim_cells(row))
            lines.append(f"<tr class={verdict}>{cells}</tr>")
        groups.append("\n".join(["<tbody>", *lines, "</tbody>"]))
    title, head = _claims_title(study), "".join(f"<th>{title}</th>" for title in CLAIM_TITLES)
    return _page(
        title,
        f"<h1>{html.escape(title)}</h1>",
        f"<p><b>{_claims_summary(table)}</b></p>",
        f"<table class=claims><thead><tr>{head}</tr></thead>",
        *groups,
        "</table>",
        *(f"<p>{html.escape(paragraph)}</p>" for paragraph in METHOD),
    )
