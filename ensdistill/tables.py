"""The results table as CSV, Markdown, LaTeX and HTML."""

import html
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

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


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """One row per system: n replicates, mean of every metric, `<metric>_std` beside.

    Args:
        scores: what `evaluation.score_systems` returns.

    The standard deviation is that of a sample (n−1), and 0 where n = 1. For DE-m it is over
    overlapping subsets of one pool, so it understates the spread of independent ensembles.
    """
    groups = scores.groupby("system", sort=False)
    means, spreads = groups[METRICS].mean(), groups[METRICS].std().fillna(0.0)
    outside = groups[["dee_outside", "dee_ts_outside"]].mean()
    summary = pd.concat([groups.size().rename("n"), means, groups["parameters"].first()], axis=1)
    summary = summary.assign(entropy=summary.pop("entropy"))
    return pd.concat([summary, spreads.add_suffix("_std"), outside], axis=1).reset_index()


def _rows(summary: pd.DataFrame) -> list[list[tuple[str, int]]]:
    """Cells of the table as (text, rank); rank 1 and 2 mark the best and second best student."""
    students = ~summary["system"].str.fullmatch(r"DE-\d+")
    ranks = {
        column.key: (column.better * summary[column.key])[students].rank(
            method="min", ascending=False
        )
        for column in COLUMNS
        if column.better
    }
    rows = []
    for index, row in summary.iterrows():
        cells = [(row["system"], 0), (str(row["n"]), 0)]
        for column in COLUMNS:
            text = f"{row[column.key]:.{column.decimals}f}"
            if spread := row[f"{column.key}_std"]:
                text += f" ± {spread:.{column.decimals}f}"
            text = _bound(row.get(f"{column.key}_outside", 0)) + text
            rank = ranks[column.key].get(index, 0) if column.better else 0
            cells.append((text, int(rank)))
        rows.append([*cells, (f"{int(row['parameters']):,}", 0)])
    return rows


def _bound(outside: float) -> str:
    """How a mean of clipped values is to be read; ±1 if all of them were clipped."""
    if abs(outside) == 1:
        return "<" if outside < 0 else ">"
    return "≤" if outside < 0 else "≥" if outside > 0 else ""


def _titles() -> list[str]:
    arrows = {1: " ↑", -1: " ↓", 0: ""}
    return ["System", "n", *(c.title + arrows[c.better] for c in COLUMNS), "Parameters"]


def _mark(cell: tuple[str, int], best: Callable[[str], str], second: Callable[[str], str]) -> str:
    text, rank = cell
    return best(text) if rank == 1 else second(text) if rank == 2 else text


def to_markdown(summary: pd.DataFrame) -> str:
    """The table in GitHub's Markdown; best student bold, second best in italics."""
    lines = [_titles(), [":--", *["--:"] * (len(COLUMNS) + 2)]]
    for row in _rows(summary):
        lines.append([_mark(cell, "**{}**".format, "*{}*".format) for cell in row])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\n{LEGEND} **Best** and *second best* student are marked.\n"


def to_latex(summary: pd.DataFrame) -> str:
    r"""A `tabular` for the booktabs package; best student bold, second best underlined."""

    def escape(text: str) -> str:
        for plain, latex in (
            ("%", r"\%"),
            ("_", r"\_"),
            ("&", r"\&"),
            ("±", r"$\pm$"),
            ("↑", r"$\uparrow$"),
            ("↓", r"$\downarrow$"),
            ("T*", r"$T^*$"),
            ("<", "$<$"),
            (">", "$>$"),
            ("≤", r"$\le$"),
            ("≥", r"$\ge$"),
        ):
            text = text.replace(plain, latex)
        return text

    def line(cells: list[str]) -> str:
        return " & ".join(cells) + r" \\"

    body = [
        line(
            [
                _mark((escape(text), rank), r"\textbf{{{}}}".format, r"\underline{{{}}}".format)
                for text, rank in row
            ]
        )
        for row in _rows(summary)
    ]
    first_student = sum(summary["system"].str.fullmatch(r"DE-\d+"))
    body.insert(first_student, r"\midrule")
    return "\n".join(
        [
            f"% {LEGEND}",
            rf"\begin{{tabular}}{{l{'r' * (len(COLUMNS) + 2)}}}",
            r"\toprule",
            line([escape(title) for title in _titles()]),
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            "",
        ]
    )


STYLE = """
body { font: 13px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .45rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
thead th { border-block: 2px solid #222; }
tbody tr:last-child td { border-bottom: 2px solid #222; }
tr.first-student td { border-top: 1px solid #999; }
p { max-width: 60rem; color: #555; }
"""


def to_html(summary: pd.DataFrame) -> str:
    """A page of its own; best student bold, second best underlined."""
    first_student = sum(summary["system"].str.fullmatch(r"DE-\d+"))
    body = []
    for index, row in enumerate(_rows(summary)):
        cells = "".join(
            f"<td>{_mark((html.escape(text), rank), '<b>{}</b>'.format, '<u>{}</u>'.format)}</td>"
            for text, rank in row
        )
        body.append(f"<tr{' class=first-student' * (index == first_student)}>{cells}</tr>")
    head = "".join(f"<th>{title}</th>" for title in _titles())
    return "\n".join(
        [
            "<!doctype html><html lang=en><meta charset=utf-8><title>Results</title>",
            f"<style>{STYLE}</style>",
            f"<table><thead><tr>{head}</tr></thead><tbody>",
            *body,
            "</tbody></table>",
            f"<p>{html.escape(LEGEND)} <b>Best</b> and <u>second best</u> student are marked.</p>",
            "</html>",
            "",
        ]
    )
