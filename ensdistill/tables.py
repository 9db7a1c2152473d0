"""The results table, for people to read."""

import html
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal

import numpy as np
import pandas as pd

from ensdistill.judging import Metric
from ensdistill.latex import UNICODE_ENGINE, latex
from ensdistill.markup import html_page, markdown, markdown_table, number, unbroken
from ensdistill.metrics import METRICS

COLUMNS = {key: metric for key, metric in METRICS.items() if metric.in_table}
"""Of the table; the wide one and the CSV have all metrics."""

REPLICATES = (
    "Mean ± standard deviation over n replicates: student seeds, or for DE-m subsets of the pool "
    "of teachers (overlapping, so the spread is understated)."
)
ABSENT = "–"


def legend(summary: pd.DataFrame, columns: Mapping[str, Metric]) -> str:
    """What a table's columns are."""
    meanings = (
        f"{metric.title}: {metric.meaning}{' in nats' if metric.unit == 'nats' else ''}"
        for metric in columns.values()
        if metric.meaning
    )
    of_costs = f" {LEGEND_OF_COSTS}" if "passes" in summary else ""
    return (
        f"{REPLICATES} {'; '.join(meanings)}. '{ABSENT}': undefined, as is the diversity of a "
        f"network that predicts one distribution. Arrows point to better.{of_costs}"
    )


def measured_columns(summary: pd.DataFrame) -> dict[str, Metric]:
    """Of the wide table: all metrics that some system has."""
    return {key: metric for key, metric in METRICS.items() if summary[key].notna().any()}


COSTS = {
    "parameters": ("Parameters", lambda value: f"{int(value):,}"),
    "passes": ("Passes", "{:.3g}".format),
    "ms_1": ("ms", "{:.3g}".format),
}
"""Behind the metrics, where they are known: title, and how a value is written."""

LEGEND_OF_COSTS = (
    "Passes: multiply–adds for an image over those of one plain network of the same architecture; "
    "ms: median of the milliseconds for an image alone (processor, threads and more: "
    "metrics/costs.csv)."
)


def summarize(
    scores: pd.DataFrame,
    published: Mapping[str, Any] | None = None,
    costs: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """One row per system: n replicates, mean of every metric, `<metric>_std` beside.

    Args:
        scores: what `reports.scores.table` returns.
        published: `source` and `scores` by system and metric, as `studies.Published` has them.
        costs: what `costs.cost_table` returns; passes, macs, ms_1 and ms_128 are taken over.

    The standard deviation is that of a sample (n−1), and 0 where n = 1. For DE-m it is over
    overlapping subsets of one pool, so it understates the spread of independent ensembles. Both
    are NaN of what a system does not have, such as the diversity of a single network.

    Of every metric with a published result there is `<metric>_published` and
    `<metric>_difference` (ours − published), and of their systems `published_source`.
    """
    metrics = list(METRICS)
    groups = scores.groupby("system", sort=False)
    means = groups[metrics].mean()
    spreads = groups[metrics].std().fillna(0.0).where(means.notna()).add_suffix("_std")
    outside = groups[[column for column in scores.columns if column.endswith("_outside")]].mean()
    # Of an ensemble of different networks the subsets differ.
    parameters = groups["parameters"].mean().round().astype("Int64")
    first: list[Any] = [groups.size().rename("n"), means, parameters]
    summary = pd.concat([*first, spreads, outside], axis=1)
    if costs is not None:
        summary = summary.join(costs.set_index("system")[["passes", "macs", "ms_1", "ms_128"]])
    if published is not None:
        theirs = pd.DataFrame.from_dict(published["scores"], orient="index")
        theirs = theirs.reindex(index=summary.index, columns=metrics)
        beside: dict[str, Any] = {}
        for metric in metrics:
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


def are_students(summary: pd.DataFrame) -> pd.Series:
    """Of each row, whether it is a student; else it is a deep ensemble."""
    return ~summary["system"].str.fullmatch(r"DE-\d+")


def ranks(summary: pd.DataFrame, key: str) -> pd.Series:
    """Of each row its place among the students by a metric, 1 the best; 0 where it has none."""
    values = METRICS[key].better * summary[key].where(are_students(summary))
    places = values.rank(method="min", ascending=False) * abs(METRICS[key].better)
    return places.fillna(0).astype(int)


def _rows(summary: pd.DataFrame, columns: Mapping[str, Metric] = COLUMNS) -> Iterator[Row]:
    students = are_students(summary)
    places = {key: ranks(summary, key) for key in columns}
    decimals = {key: published_decimals(summary, key) for key in columns}
    kind: Literal["ensemble", "student"]
    index: Any
    for index, row in summary.iterrows():
        cells = [(row["system"], 0), (str(row["n"]), 0)]
        cells += [(cell_text(row, key), places[key][index]) for key in columns]
        kind = "student" if students[index] else "ensemble"
        costs = _costs(summary).items()
        written = [(ABSENT if pd.isna(row[key]) else text(row[key]), 0) for key, (_, text) in costs]
        yield Row(kind, [*cells, *written])
        if pd.notna(row.get("published_source")):
            for title, suffix, sign in (
                ("published", "published", ""),
                ("ours − published", "difference", "+"),
            ):
                values = ((row.get(f"{key}_{suffix}"), places) for key, places in decimals.items())
                numbers = ["" if pd.isna(value) else number(value, n, sign) for value, n in values]
                empty = [""] * len(written)
                yield Row("published", [(text, 0) for text in (title, "", *numbers, *empty)])


def cell_text(row: pd.Series, key: str) -> str:
    """The mean of a metric, and its spread if it has any."""
    decimals, mean, spread = METRICS[key].decimals, row[key], row[f"{key}_std"]
    if pd.isna(mean):
        return ABSENT
    text = f"{_bound(row.get(f'{key}_outside', 0))}{mean:.{decimals}f}"
    return f"{text} ± {spread:.{decimals}f}" if spread else text


def published_decimals(summary: pd.DataFrame, key: str) -> int:
    """As many decimals as were published, or as we show if those are fewer."""
    values = summary.get(f"{key}_published", pd.Series(dtype=float)).dropna()
    given = (-int(Decimal(str(value)).normalize().as_tuple().exponent) for value in values)
    return min(max([0, *given]), METRICS[key].decimals)


def _bound(outside: float) -> str:
    """How a mean of clipped values is to be read; ±1 if all of them were clipped."""
    if abs(outside) == 1:
        return "<" if outside < 0 else ">"
    return "≤" if outside < 0 else "≥" if outside > 0 else ""


def _costs(summary: pd.DataFrame) -> dict[str, tuple[str, Callable[[Any], str]]]:
    return {key: column for key, column in COSTS.items() if key in summary}


def _titles(summary: pd.DataFrame, columns: Mapping[str, Metric] = COLUMNS) -> list[str]:
    costs = [title for title, _ in _costs(summary).values()]
    return ["System", "n", *(metric.column for metric in columns.values()), *costs]


def source_sentence(summary: pd.DataFrame) -> str:
    """Where the published results stand, as a sentence; empty if there are none."""
    if "published_source" not in summary:
        return ""
    return f"Published: {' '.join(summary['published_source'].dropna().iloc[0].split())}."


def _mark(cell: tuple[str, int], best: Callable[[str], str], second: Callable[[str], str]) -> str:
    text, rank = cell
    return best(text) if rank == 1 else second(text) if rank == 2 else text


def to_markdown(summary: pd.DataFrame, columns: Mapping[str, Metric] = COLUMNS) -> str:
    """The table in GitHub's Markdown; best student bold, second best in italics."""
    titles = _titles(summary, columns)
    lines = [titles, [":--", *["--:"] * (len(titles) - 1)]]
    for row in _rows(summary, columns):
        texts = ((markdown(text).replace("± ", unbroken("± ")), rank) for text, rank in row.cells)
        line = [_mark(cell, "**{}**".format, "*{}*".format) for cell in texts]
        if row.kind == "published":
            line[0] = unbroken(f"↳ {line[0]}")
        lines.append(line)
    marks = "**Best** and *second best* student are marked."
    below = f"{markdown(legend(summary, columns))} {marks} {markdown(source_sentence(summary))}"
    return f"{markdown_table(lines)}\n\n{below.rstrip()}\n"


FOR_OTHER_ENGINES = (
    "% pdfLaTeX has no command for some letters and shows their code points (U+...): "
    "use XeLaTeX or LuaLaTeX, and a font that has them."
)


def to_latex(summary: pd.DataFrame) -> str:
    r"""A `tabular` for the booktabs package; best student bold, second best underlined."""

    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    rows, columns = list(_rows(summary)), len(_titles(summary))
    body = []
    for row in rows:
        cells = [
            _mark((latex(text), rank), r"\textbf{{{}}}".format, r"\underline{{{}}}".format)
            for text, rank in row.cells
        ]
        if row.kind == "published":
            cells = [rf"\textit{{{cell}}}" if cell else "" for cell in cells]
            cells[0] = rf"\quad {cells[0]}"
        body.append(line(cells))
    body.insert(_first_student(rows), r"\midrule")
    source = latex(source_sentence(summary))
    return "\n".join(
        [
            f"% {latex(legend(summary, COLUMNS))}",
            *([FOR_OTHER_ENGINES] if UNICODE_ENGINE in "".join([*body, source]) else []),
            rf"\begin{{tabular}}{{l{'r' * (columns - 1)}}}",
            r"\toprule",
            line([latex(title).replace("T{*}", "$T^*$") for title in _titles(summary)]),
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


def to_html(
    summary: pd.DataFrame, columns: Mapping[str, Metric] = COLUMNS, title: str = "Results"
) -> str:
    """A page of its own; best student bold, second best underlined."""
    rows, body = list(_rows(summary, columns)), []
    first = _first_student(rows)
    for index, row in enumerate(rows):
        cells = "".join(
            f"<td>{_mark((html.escape(text), rank), '<b>{}</b>'.format, '<u>{}</u>'.format)}</td>"
            for text, rank in row.cells
        )
        kind = "first-student" if index == first else row.kind
        body.append(f"<tr class={kind}>{cells}</tr>")
    head = "".join(f"<th>{column}</th>" for column in _titles(summary, columns))
    below = (
        f"{html.escape(legend(summary, columns))} <b>Best</b> and <u>second best</u> student are "
        f"marked. {html.escape(source_sentence(summary))}"
    )
    return html_page(
        title,
        f"<table><thead><tr>{head}</tr></thead><tbody>",
        *body,
        "</tbody></table>",
        f"<p>{below.rstrip()}</p>",
    )
