"""The results table and the page of claims, as people read them."""

import html
import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest

from ensdistill import tables, verdict_pages
from ensdistill.files import read_csv, write_csv
from ensdistill.findings import COLUMNS
from ensdistill.latex import CHARACTERS, latex
from ensdistill.metrics import METRICS

PUBLISHED = {
    "source": "Table 1_a & <b> of\n50% more",
    "scores": {
        "A": {"acc": 80.0, "nll": 0.789, "bs": 0.28},
        "DE-2": {"nll": 0.7},
        "DE-9": {"ece": 1.0},
    },
}


@pytest.fixture
def scores():
    """Two replicates of DE-1 and A, one of DE-2, B and C; C is best and B worst."""
    rng = np.random.default_rng(0)
    systems, steps = ["DE-1", "DE-1", "DE-2", "A", "A", "B", "C"], [2, 2, 1, 1, 1, 2, 0]
    frame = pd.DataFrame(rng.uniform(0.4, 0.6, (7, len(METRICS))), columns=list(METRICS))
    frame = frame.add(steps, axis=0).assign(system=systems, parameters=1234567)
    for metric in ("acc", "dee", "dee_ts"):
        frame[metric] = 4 - frame[metric]
    frame["dee_outside"] = [0, 0, 0, 0, 1, -1, 1]
    frame["dee_ts_outside"] = [0, -1, 0, 0, 0, 0, 0]
    return frame


@pytest.fixture
def summary(scores):
    return tables.summarize(scores)


@pytest.fixture
def beside(scores):
    return tables.summarize(scores, PUBLISHED)


def markdown_rows(text):
    """Cells of every line of a Markdown table, its head first."""
    lines = text.replace("\N{NO-BREAK SPACE}", " ").splitlines()
    rows = [re.split(r" (?<!\\)\| ", line[2:-2]) for line in lines if line.startswith("|")]
    return [rows[0], *rows[2:]]


def latex_rows(text):
    lines = [line[:-3] for line in text.splitlines() if line.endswith(r" \\")]
    return [re.split(r" (?<!\\)& ", line) for line in lines if "multicolumn" not in line]


def html_rows(text):
    """Cells of every row of a page, without their marks."""
    rows = re.findall(r"<tr.*?>(.*?)</tr>", text)
    cells = [re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row) for row in rows]
    return [[html.unescape(re.sub("</?[bu]>", "", cell)) for cell in row] for row in cells]


FORMATS = [
    (tables.to_markdown, markdown_rows),
    (tables.to_latex, latex_rows),
    (tables.to_html, html_rows),
]


def test_summary_is_mean_and_sample_deviation(scores, summary):
    summary = summary.set_index("system")
    assert summary.index.tolist() == ["DE-1", "DE-2", "A", "B", "C"]
    assert summary["n"].tolist() == [2, 1, 2, 1, 1]
    for metric in METRICS:
        first, second = scores[scores.system == "A"][metric]
        assert summary.loc["A", metric] == pytest.approx((first + second) / 2)
        expected = abs(first - second) / np.sqrt(2)
        assert summary.loc["A", f"{metric}_std"] == pytest.approx(expected)
        assert summary.loc["B", f"{metric}_std"] == 0


def test_published_results_and_differences_stand_after_the_others(summary, beside):
    assert beside.columns[: summary.shape[1]].tolist() == summary.columns.tolist()
    assert beside.columns[summary.shape[1] :].tolist() == [
        *("acc_published", "acc_difference", "nll_published", "nll_difference"),
        *("bs_published", "bs_difference", "published_source"),
    ]
    rows = beside.set_index("system")
    assert rows.loc["A", "nll_difference"] == pytest.approx(rows.loc["A", "nll"] - 0.789)
    assert rows.loc["DE-2", "nll_published"] == 0.7
    assert rows["bs_published"].count() == 1
    assert rows["published_source"].dropna().index.tolist() == ["DE-2", "A"]


def test_only_published_results_of_the_tables_systems_count(scores, summary):
    nothing = {"source": "elsewhere", "scores": {"DE-9": {"ece": 1.0}}}
    for published in (None, nothing):
        pd.testing.assert_frame_equal(tables.summarize(scores, published), summary)
    for show in (tables.to_markdown, tables.to_latex, tables.to_html):
        shown = show(summary).replace("tr.published", "")
        assert "published" not in shown.lower()


@pytest.mark.parametrize(("show", "read"), FORMATS)
def test_every_format_has_published_results_under_their_system(beside, show, read):
    rows = [
        [re.sub(r"\\textit{(.*)}|↳ |\\quad ", r"\1", cell).replace("$-$", "−") for cell in row]
        for row in read(show(beside))
    ]
    assert {len(row) for row in rows} == {len(tables.COLUMNS) + 3}
    below = ["published", "ours − published"]
    assert [row[0] for row in rows[1:]] == ["DE-1", "DE-2", *below, "A", *below, "B", "C"]
    ours = beside.set_index("system").loc["A"]
    signed = [f"{ours.acc - 80:+.0f}", f"{ours.nll - 0.789:+.3f}", f"{ours.bs - 0.28:+.2f}"]
    assert rows[6][1:] == ["", "80", "0.789", "0.28", *[""] * 9]
    assert rows[7][1:] == ["", *(text.replace("-", "−") for text in signed), *[""] * 9]


def test_sources_are_named_and_escaped(beside):
    assert r"Published: Table 1\_a \& \<b> of 50% more." in tables.to_markdown(beside)
    lines = tables.to_latex(beside).splitlines()
    assert lines[-2].endswith(r"{Published: Table 1\_a \& $<$b$>$ of 50\% more.} \\")
    assert "Published: Table 1_a &amp; &lt;b&gt; of 50% more.</p>" in tables.to_html(beside)


def test_markdown_marks_best_and_second_best_student(beside):
    head, *rows = markdown_rows(tables.to_markdown(beside))
    rows = {row[0]: dict(zip(head, row, strict=True)) for row in rows}
    for column in ("ACC % ↑", "NLL ↓", "ECE, TS ↓", "DEE ↑"):
        assert re.fullmatch(r"\*\*[^*]+\*\*", rows["C"][column])
        assert re.fullmatch(r"\*[^*]+\*", rows["A"][column])
        assert "*" not in rows["B"][column] + rows["DE-2"][column]
    value = beside.set_index("system").loc["A"]
    assert rows["A"]["NLL ↓"] == f"*{value.nll:.4f} ± {value.nll_std:.4f}*"
    assert rows["A"]["Parameters"] == "1,234,567"


def test_deep_ensemble_equivalents_outside_the_curve_are_bounds(summary):
    head, *rows = markdown_rows(tables.to_markdown(summary))
    found = {row[0]: row[head.index("DEE ↑")].strip("*")[0] for row in rows}
    assert (found["A"], found["B"], found["C"]) == ("≥", "<", ">")
    assert rows[0][head.index("DEE, TS ↑")][0] == "≤"


@pytest.mark.parametrize(
    ("show", "read", "expected"),
    [
        (*FORMATS[0], r"\*a\|\_100% \& \<i>\\ \$1"),
        (*FORMATS[1], r"{*}a$|$\_100\% \& $<$i$>$\textbackslash{} \$1"),
        (*FORMATS[2], r"*a|_100% & <i>\ $1"),
    ],
)
def test_labels_are_escaped(summary, show, read, expected):
    summary["system"] = summary["system"].replace("A", r"*a|_100% & <i>\ $1")
    text = show(summary)
    rows = read(text)
    assert rows[3][0] == expected
    assert {len(row) for row in rows} == {len(tables.COLUMNS) + 3}
    assert not re.search(r"(?<!\\)<i>", text)


@pytest.mark.parametrize(("show", "read"), FORMATS)
def test_what_a_system_does_not_have_is_a_dash(scores, show, read):
    scores.loc[scores.system.isin(["DE-1", "B"]), "diversity"] = np.nan
    summary = tables.summarize(scores)
    assert summary.diversity_std.isna().tolist() == summary.diversity.isna().tolist()
    head, *rows = read(show(summary))
    place = next(i for i, title in enumerate(head) if title.startswith("Diversity"))
    absent = [row[0] for row in rows if row[place].replace("--", "–") == "–"]
    assert absent == ["DE-1", "B"]


@pytest.mark.parametrize(("show", "read"), [FORMATS[0], FORMATS[2]])
def test_the_wide_table_has_every_metric_that_a_system_has(scores, show, read):
    scores["human_kl"] = np.nan
    scores.loc[scores.system == "B", "aurc"] = np.nan
    summary = tables.summarize(scores)
    columns = tables.measured_columns(summary)
    assert [*columns] == [key for key in METRICS if key != "human_kl"]
    text = show(summary, columns)
    head, *rows = read(text)
    assert head == ["System", "n", *(metric.column for metric in columns.values()), "Parameters"]
    found = {
        row[0]: dict(zip(head, (cell.strip("*") for cell in row), strict=True)) for row in rows
    }
    values = summary.set_index("system")
    assert found["B"]["AURC ↓"] == "–"
    for column, key, decimals in (("AUGRC ↓", "augrc", 4), ("LAC size ↓", "lac_size", 3)):
        mean, spread = values.loc["A", [key, f"{key}_std"]]
        assert found["A"][column] == f"{mean:.{decimals}f} ± {spread:.{decimals}f}"
    below = html.unescape(text.replace("\\", ""))
    for metric in columns.values():
        assert f"{metric.title}: {metric.meaning}" in below
    assert METRICS["human_kl"].title not in below
    assert "AURC" not in show(summary)


@pytest.mark.parametrize(("show", "read"), FORMATS)
def test_a_method_called_like_a_missing_value_is_in_the_table(scores, tmp_path, show, read):
    names = {"DE-1": "DE-1", "DE-2": "DE-2", "A": "None", "B": "NA", "C": "nan"}
    write_csv(tmp_path / "scores.csv", scores.assign(system=scores["system"].map(names)))
    summary = tables.summarize(read_csv(tmp_path / "scores.csv"))
    assert [row[0] for row in read(show(summary))[1:]] == list(names.values())
    write_csv(tmp_path / "results.csv", summary)
    assert read_csv(tmp_path / "results.csv")["system"].tolist() == list(names.values())


LABELS = {
    "KD+ODS, η 1/255": r"KD+ODS, $\eta$ 1/255",
    "α ω ς Ω Ρ ο": r"$\alpha$ $\omega$ $\varsigma$ $\Omega$ P o",
    "café Ångström Dvořák ñ ï Ł ß": (
        r"caf\'{e} \r{A}ngstr\"{o}m Dvo\v{r}\'{a}k \~{n} \"{i} \L{} \ss{}"
    ),
    "e\u0301": r"\'{e}",
    "1 ± 2 − 3 × 4 ≤ 5 → 6": r"1 $\pm$ 2 $-$ 3 $\times$ 4 $\le$ 5 $\to$ 6",
    "“a” – ‘b’ — c…": r"``a'' -- `b' --- c\dots{}",
    "a<b>c|d": "a$<$b$>$c$|$d",
    "漢": r"\ifdefined\Umathcode 漢\else U+6F22\fi{}",
    "я 😀 ą ή": "".join(
        rf"\ifdefined\Umathcode {one}\else U+{ord(one):04X}\fi{{}} " for one in "я😀ąή"
    ).rstrip(),
}


@pytest.mark.parametrize("label", LABELS)
def test_any_label_is_written_for_every_latex_engine(label):
    assert latex(label) == LABELS[label]
    for_pdflatex = re.sub(r"\\ifdefined\\Umathcode .\\else", "", LABELS[label])
    assert for_pdflatex.isascii()


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_a_table_of_any_labels_compiles(scores, tmp_path):
    text = " ".join([*LABELS, *map(chr, range(32, 127)), *CHARACTERS])
    scores["system"] = scores["system"].replace("A", text)
    source = {"source": text, "scores": {text: {"nll": 0.789}}}
    (tmp_path / "table.tex").write_text(tables.to_latex(tables.summarize(scores, source)))
    (tmp_path / "page.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    )
    done = subprocess.run(
        ["pdflatex", "-halt-on-error", "-interaction=nonstopmode", "page"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stdout[-2000:]
    assert "Missing character" not in (tmp_path / "page.log").read_text(errors="replace")


def test_the_latex_table_is_ascii_whatever_its_own_words_are(beside):
    assert tables.to_latex(beside).isascii()
    assert tables.FOR_OTHER_ENGINES not in tables.to_latex(beside)
    chinese = tables.to_latex(beside.replace({"system": {"A": "漢"}}))
    assert chinese.splitlines()[1] == tables.FOR_OTHER_ENGINES


def claims_of(*rows):
    columns = ["claim", "quantity", "estimate", "low", "high", "verdict", "n", "seeds", "claimed"]
    return pd.DataFrame(rows, columns=columns)


CLAIMS = claims_of(
    ("A is <i>better</i>", "NLL, B − A_1", 0.0087, -0.0261, 0.0494, "undecided", 597, 3, "> 0"),
    ("A is <i>better</i>", "accuracy | %", 1.5, 0.5, 2.5, "supported", 597, 3, "> 0"),
    ("Noise is nothing", "ratio", 19.63, 12.69, 31.24, "not supported", 1000, 0, "0.8 to 1.25"),
    ("Noise is nothing", "other", np.nan, np.nan, np.nan, "undecided", 1, 1, "< 0.5"),
)


@pytest.mark.parametrize(
    ("show", "read"),
    [(verdict_pages.to_markdown, markdown_rows), (verdict_pages.to_html, html_rows)],
)
def test_every_claim_is_a_heading_with_its_quantities_under_it(show, read):
    text = show(verdict_pages.CLAIMS, CLAIMS, "digits_x")
    assert not re.search(r"(?<!\\)<i>", text)
    text = re.sub(r"\\(?!\|)", "", text)
    rows = [[cell.strip("*").replace("\\", "") for cell in row] for row in read(text)]
    assert rows[0][:3] == ["Quantity", "Claimed", "Estimate (95 % interval)"]
    assert rows[0][3:] == ["Verdict", "Images", "Seeds"]
    assert [row[0] for row in rows if not any(row[1:])] == [
        "A is <i>better</i>",
        "Noise is nothing",
    ]
    assert [row for row in rows[1:] if any(row[1:])] == [
        ["NLL, B − A_1", "> 0", "0.0087 (−0.0261 to 0.0494)", "? undecided", "597", "3"],
        ["accuracy | %", "> 0", "1.50 (0.50 to 2.50)", "✓ supported", "597", "3"],
        ["ratio", "0.8 to 1.25", "19.6 (12.7 to 31.2)", "✗ not supported", "1,000", ""],
        ["other", "< 0.5", "undefined", "? undecided", "1", "1"],
    ]
    for part in (
        "Claims of Nam et al. (2021) in the study digits_x",
        "2 claims on 4 quantities: 1 supported, 1 not supported, 2 undecided.",
        "2,000 resamples",
        "is called supported in 2.5 % of runs",
        "about one in 40 errs by chance",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0.0, -0.4083, 0.4233), "0.000 (−0.408 to 0.423)"),
        ((100.123, 100.101, 100.149), "100.123 (100.101 to 100.149)"),
        ((-0.0001, -1.26, 2.56), "0.00 (−1.26 to 2.56)"),
        ((1e-17, -1e-15, 1e-15), "0 (0 to 0)"),
        ((1234.5, -800.0, 98765.0), "1,234 (−800 to 98,765)"),
    ],
)
def test_estimate_and_interval_have_as_many_decimals_as_they_need(values, expected):
    claims = claims_of(("claim", "quantity", *values, "undecided", 1, 1, "> 0"))
    assert (
        html_rows(verdict_pages.to_html(verdict_pages.CLAIMS, claims, "digits"))[2][2] == expected
    )


@pytest.mark.parametrize(
    ("show", "read"),
    [(verdict_pages.to_markdown, markdown_rows), (verdict_pages.to_html, html_rows)],
)
def test_a_finding_names_its_student_and_its_p_value(show, read):
    near, each = "How near?", "Is <i>each</i> better?"
    findings = pd.DataFrame(
        [
            (near, "share", "A_1", 0.924, 0.85, 0.97, 0.0004, "yes", "> 0.5", 597, 3),
            (each, "NLL, B − A", "", -0.0261, -0.03, -0.02, 0.0123, "no", "> 0", 597, 3),
            (each, "NLL, D − C", np.nan, np.nan, np.nan, np.nan, np.nan, "undecided", "> 0", 1, 1),
        ],
        columns=COLUMNS,
    )
    text = show(verdict_pages.FINDINGS, findings, "digits")
    assert not re.search(r"(?<!\\)<i>", text)
    rows = [[cell.replace("\\", "").strip("*") for cell in row] for row in read(text)]
    images = ["Images", "Seeds"]
    assert [row if any(row[1:]) else row[:1] for row in rows] == [
        ["Quantity", "Asked", "Estimate (95 % interval)", "Verdict", "p (Holm)", *images],
        [near],
        ["share, A_1", "> 0.5", "0.924 (0.850 to 0.970)", "✓ yes", "< 0.001", "597", "3"],
        [each],
        ["NLL, B − A", "> 0", "−0.0261 (−0.0300 to −0.0200)", "✗ no", "0.012", "597", "3"],
        ["NLL, D − C", "> 0", "undefined", "? undecided", "–", "1", "1"],
    ]
    assert "2 questions on 3 quantities: 1 yes, 1 no, 1 undecided." in text
