"""The first page of a study: what it says, and that it is sound HTML."""

import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ensdistill import DamagedFile, InputError
from ensdistill.metrics import METRICS
from ensdistill.page.answer import Scale, percent
from ensdistill.page.figures import caption, embedded
from ensdistill.page.making import duration
from ensdistill.page.numbers_table import short
from tests.pages import (
    NEAR,
    SYSTEMS,
    TITLES,
    claims,
    finding,
    findings,
    make_folder,
    page_of,
    results,
    write_header,
)

HOSTILE = "<script>alert('1')</script> & \"quotes\" {{ 1 }} 模型" + "x" * 200


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def sentences(page):
    section = page.section("answer")
    return [page.text(it) for it in section.iter("p") if it.get("class") in ("answer", "second")]


def test_the_answer_has_the_numbers_of_findings_and_results(folder):
    first, second = sentences(page_of(folder))
    # Of DE-2, for the study has M = 2 members: 1000 of 2000 parameters, 2.1 of 2 million.
    assert first == (
        "KD-single keeps 42 % (20 to 63) of the ensemble’s gain in NLL at 50 % of its parameters "
        "and 50 % of its compute."
    )
    assert second == (
        "That is the best of all students. The best that costs no more than one network: "
        "KD+ConfODS keeps 92 % (85 to 97) of the ensemble’s gain in NLL at 55 % of its parameters "
        "and 105 % of its compute."
    )


def test_one_best_student_is_told_of_once(tmp_path):
    rows = [finding(NEAR, "KD-single", 1.16, 0.95, 1.4, "yes")] * 2
    first, second = sentences(page_of(make_folder(tmp_path, findings=pd.DataFrame(rows))))
    assert first.startswith("KD-single keeps 116 % (95 to 140) of the ensemble’s gain")
    assert second == "It is the best of all students, in however many passes."


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((-0.12, -0.4, 0.15), "KD keeps nothing of the ensemble’s gain in NLL, −12 % (−40 to 15)"),
        ((0.5, np.nan, np.nan), "KD keeps 50 % of the ensemble’s gain in NLL at 55 %"),
        ((np.nan,) * 3, "How much KD keeps of the ensemble’s gain in NLL is undefined"),
        ((0.004, 0.001, 0.2), "KD keeps 0.4 % (0.1 to 20) of the ensemble’s gain"),
    ],
)
def test_an_answer_that_is_not_simple(tmp_path, row, expected):
    table = pd.DataFrame([finding(NEAR, "KD", *row, "undecided")])
    assert expected in sentences(page_of(make_folder(tmp_path, findings=table)))[0]


@pytest.mark.parametrize("known", [None, ["parameters"], []])
def test_a_cost_that_is_not_known_is_not_told(tmp_path, known):
    table = None if known is None else results().drop(columns=["passes", "macs", "ms_1", "ms_128"])
    if known == []:
        table = table[table["system"] != "KD-single"]
    page = page_of(make_folder(tmp_path, results=table))
    rest = " at 50 % of its parameters" if known == ["parameters"] else ""
    assert sentences(page)[0] == (
        f"KD-single keeps 42 % (20 to 63) of the ensemble’s gain in NLL{rest}."
    )
    assert "Compute:" not in page.text(page.section("answer"))


def test_the_systems_of_the_answer_stand_beside_it(folder):
    page = page_of(folder)
    table = next(page.section("answer").iter("table"))
    rows = [[page.text(cell) for cell in row] for row in table.iter("tr")]
    nll = results().set_index("system")["nll"]
    assert [row[0] for row in rows] == ["System", "DE-1", "DE-2", "KD-single", "KD+ConfODS"]
    assert [row[1] for row in rows[1:]] == [f"{nll[row[0]]:.4f}" for row in rows[1:]]
    assert rows[4][3:] == ["1,100", "2.10 M", "1.10"]


def test_places_on_the_scale():
    scale = Scale(-0.5, 1.5)
    assert [scale.place(it) for it in (-9, -0.5, 0, 0.5, 1.5, 9)] == [0, 0, 25, 50, 100, 100]


def test_what_is_not_there_is_said_and_nothing_is_made_up(tmp_path):
    bare = make_folder(tmp_path, results=None, findings=None, claims=None)
    for name in TITLES:
        (bare / f"figures/{name}.png").unlink()
    page = page_of(bare)
    (note,) = page.all(role="note")
    assert page.text(note) == (
        "So far. Not there yet: the results; the findings; the paper's claims; figures (Quality "
        "and cost, Curve, Diversity by size)."
    )
    missing = [page.text(it) for it in page.all("p") if "missing" in it.get("class", "")]
    assert len(missing) == 7
    assert all(re.search("made|Not there yet|not known yet", text) for text in missing)
    assert not page.all("table")
    assert not page.all("img")
    shown = "".join(page.text(page.section(it)) for it in ("answer", "verdicts", "results"))
    assert re.findall(r"\d+", shown) == ["2021"], "the year of the paper is the only number"


def test_a_page_with_everything_has_no_note(folder):
    page = page_of(folder)
    assert not page.all(role="note")
    assert not [it for it in page.all("p") if "missing" in it.get("class", "")]


def test_verdicts_are_counted_and_open_to_their_rows(folder):
    page = page_of(folder)
    section = page.section("verdicts")
    sums = [page.text(it) for it in section.iter("p") if it.get("class") == "sums"]
    assert sums == [
        "✓ 4 yes ✗ 2 no ? 1 undecided on 7 quantities",
        "✓ 1 supported ✗ 1 not supported ? 1 undecided on 3 quantities",
    ]
    heads = [page.text(it) for it in section.iter("summary")]
    assert heads == [
        f"{NEAR} ✓ yes ✓ 3 yes",
        "Is mixup enough? ✓ yes ✓ 1 yes ✗ 2 no ? 1 undecided",
        "A ✓ 1 supported ? 1 undecided",
        "B ✗ 1 not supported",
    ]
    first, second, claim, _ = (
        [[page.text(cell) for cell in row] for row in it.iter("tr")]
        for it in section.iter("details")
    )
    assert first[2] == [
        "share of the gain, KD+ConfODS", "✓ yes", "> 0.5", "0.920 (0.850 to 0.970)", "0.010", "100",
        "2"
    ]  # fmt: skip
    assert second[3][0] == "share of the gain, KD"
    assert second[3][1:] == [
        "? undecided", "> 0.5", "0.100 (−0.100 to 0.300)", "< 0.001", "100", "2"
    ]  # fmt: skip
    assert claim[1] == ["of A", "✓ supported", "> 0", "0.500 (0.250 to 0.750)", "100", ""]
    # As wide as their share of the verdicts.
    bars = [it for it in section.iter("span") if it.get("class") == "bar"]
    widths = [(it.get("class"), it.get("style")) for it in bars[0]]
    assert widths == [
        ("for", "flex-grow:4"), ("against", "flex-grow:2"), ("open", "flex-grow:1")
    ]  # fmt: skip


def test_the_table_sorts_by_the_numbers_of_the_csv_and_marks_the_best_students(folder):
    page, frame = page_of(folder), results().set_index("system")
    table = page.table()
    assert list(table) == SYSTEMS
    for key, metric in METRICS.items():
        ranked = frame[key].iloc[3:].dropna().sort_values(ascending=metric.better < 0).index
        for system, cells in table.items():
            value = cells[key].get("data-value")
            if np.isnan(frame[key][system]):
                assert value is None
                assert page.text(cells[key]) == "–"
                continue
            assert float(value) == frame[key][system]
            spread = frame[f"{key}_std"][system]
            text = f"{frame[key][system]:.{metric.decimals}f}"
            beside = f" ± {spread:.{metric.decimals}f}" if spread else ""
            assert page.text(cells[key]) == text + beside
            marks = {it.tag for it in cells[key]} & {"b", "u"}
            expected = {"b"} if system == ranked[0] else {"u"} if system == ranked[1] else set()
            assert marks == (expected if metric.better else set()), (key, system)
        (button,) = page.all("button", data_key=key)
        assert button.get("data-better") == str(metric.better)
        assert button.get("title", "") == metric.meaning
        assert metric.in_table == ("extra" not in table["KD"][key].get("class", ""))
    texts = [page.text(table["KD+ConfODS"][it]) for it in ("parameters", "passes", "macs", "ms_1")]
    assert texts == ["1,100", "2", "2.10 M", "1.10"]
    assert float(table["KD"]["macs"].get("data-value")) == 2.1e6


def test_a_metric_that_no_system_has_is_left_out(tmp_path):
    frame = results()
    frame["diversity"] = np.nan
    page = page_of(make_folder(tmp_path, results=frame.drop(columns=["entropy", "entropy_std"])))
    assert {"diversity", "entropy"} & page.table()["KD"].keys() == set()


def test_published_results_stand_under_their_system(tmp_path):
    frame = results()
    frame["nll_published"] = [np.nan] * 5 + [0.5, np.nan]
    frame["nll_difference"] = frame["nll"] - frame["nll_published"]
    frame["published_source"] = [None] * 5 + ["Table 2 of <b>", None]
    page = page_of(make_folder(tmp_path, results=frame))
    (table,) = page.all("table", id="table")
    bodies = {page.text(it.find("tr")[0]): it for it in table.iter("tbody")}
    counts = {name: len(body) for name, body in bodies.items()}
    assert counts == {name: 3 if name == "KD" else 1 for name in SYSTEMS}
    place = list(page.table()["KD"]).index("nll")
    difference = frame["nll"][5] - 0.5
    shown = [page.text(row[place]) for row in bodies["KD"][1:]]
    assert shown == ["0.5", f"{difference:+.1f}".replace("-", "−")]
    assert "Published: Table 2 of <b>." in page.text(page.section("results"))


def test_figures_have_their_captions_and_stand_in_a_reader_s_order(folder):
    page = page_of(folder)
    figures = {it.get("id"): it for it in page.all("figure")}
    assert list(figures) == ["figure-cost_quality", "figure-de_curve", "figure-sweep"]
    assert list(page.section("cost").iter("figure")) == [figures["figure-cost_quality"]]
    for name, title in TITLES.items():
        figure = figures[f"figure-{name}"]
        (image,) = figure.iter("img")
        assert image.get("alt") == f"{title}: What {name} shows of tiny, n = 3."
        assert (image.get("width"), image.get("height")) == ("30", "20")
        assert next(figure.iter("em")).text == name
        assert page.text(next(figure.iter("figcaption"))).endswith("It is noise.")


def test_an_embedded_figure_has_every_pixel(folder, tmp_path):
    path = folder / "figures/sweep.png"
    uri, width, height = embedded(path)
    kind, content = uri.split(",")
    assert kind == "data:image/webp;base64"
    with Image.open(io.BytesIO(base64.b64decode(content))) as image, Image.open(path) as drawn:
        assert image.size == (width, height) == drawn.size
        assert np.array_equal(np.asarray(image.convert("RGB")), np.asarray(drawn.convert("RGB")))


def test_how_it_was_made(folder):
    origin = {"torch": "2.14.1", "ensdistill": "0.1.0", "precision_reason": "float32, as said"}
    for seed, seconds in enumerate((50.0, 30.5, 6.0)):
        write_header(folder / f"teachers/{seed}/weights.safetensors", **origin, device="cpu")
        tsv = folder / f"benchmarks/teachers/{seed}.tsv"
        tsv.parent.mkdir(parents=True, exist_ok=True)
        tsv.write_text(f"s\th:m:s\tcpu_time\n{seconds}\t0:00:01\t{seconds / 2}\n")
    write_header(folder / "students/kd/0/weights.safetensors", **origin, device="cuda")
    (folder / "benchmarks/students/kd").mkdir(parents=True)
    (folder / "benchmarks/students/kd/0.tsv").write_text("s\tcpu_time\n7300\tNA\n")
    # Of a method and a seed that the study no longer has.
    (folder / "benchmarks/students/kd/1.tsv").write_text("s\tcpu_time\n1e9\t1e9\n")
    write_header(folder / "students/old/0/weights.safetensors", **origin, device="cpu")
    (folder / "metrics").mkdir()
    costs = pd.DataFrame({"system": ["DE-1", "KD"], "processor": "Xeon (AVX2)", "threads": 1})
    costs.to_csv(folder / "metrics/costs.csv", index=False)
    page = page_of(folder)
    facts = {
        page.text(term): page.text(text)
        for group in page.section("making").iter("dl")
        for term, text in group
    }
    assert facts["Teachers"] == (
        "3 trainings, 1 min 26 s in all, 28.8 s each on average; 43.2 s of CPU time"
    )
    assert facts["Students"] == "1 training, 2 h 2 min in all, 2 h 2 min each on average"
    assert facts["Trained"] == (
        "3 networks on the CPU, float32, as said; 1 network on a GPU, float32, as said"
    )
    assert (facts["PyTorch"], facts["ensdistill"]) == ("2.14.1", "0.1.0")
    assert facts["Timed"] == "on Xeon (AVX2), threads: 1"
    assert facts["Images"] == "digits: 200 for training, 100 for validation, 100 for testing"
    assert facts["Distillation"].startswith("α = 0.9, τ = 2, η = 13/255")
    assert facts["Ensemble"] == "2 networks, of 3 trained"
    (command,) = page.section("making").iter("code")
    assert command.text == "snakemake --cores all results/tiny/index.html"


def test_the_best_student_is_taken_away_and_cards_are_linked(folder):
    (missing,) = page_of(folder).section("takeaway").iter("p")
    assert missing.text == "The weights of the best student, KD-single, are not here."
    said = {"device": "cpu", "precision_reason": "", "torch": "2", "ensdistill": "1"}
    write_header(folder / "students/kd_single/0/weights.safetensors", **said)
    for name in ("README.md", "model.onnx"):
        (folder / "deployed/kd/1").mkdir(parents=True, exist_ok=True)
        (folder / "deployed/kd/1" / name).touch()
    page = page_of(folder)
    section = page.section("takeaway")
    (commands,) = section.iter("pre")
    first, *others = page.text(commands).split("\n")
    assert first.startswith("STUDENT=results/tiny/students/kd_single/0/weights.safetensors")
    for command in ("predict", "evaluate", "export", "card"):
        assert f"ensdistill {command}" in " ".join([first, *others])
    links = [it.get("href") for it in section.iter("a")]
    assert links == ["deployed/kd/1/README.md", "deployed/kd/1/model.onnx"]


def test_labels_are_shown_as_they_are_and_never_run(tmp_path):
    def hostile(frame):
        return frame.replace({"KD": HOSTILE, "KD-single": HOSTILE + "2", "A": HOSTILE})

    frames = {"results": results(), "findings": findings(), "claims": claims()}
    folder = make_folder(tmp_path, **{name: hostile(it) for name, it in frames.items()})
    page = page_of(folder)
    assert len(page.all("script")) == 1
    assert {HOSTILE, HOSTILE + "2"} <= page.table().keys()
    assert sentences(page)[0].startswith(f"{HOSTILE}2 keeps 42 %")
    assert HOSTILE in [page.text(it) for it in page.all("span", class_="question")]


def test_the_page_is_whole_in_itself_and_for_everyone(folder):
    page = page_of(folder)
    (root,) = page.all("html")
    assert root.get("lang") == "en"
    ids = [it.get("id") for it in page.all() if it.get("id")]
    assert len(set(ids)) == len(ids) > 10
    for element in page.all():
        for key in ("src", "srcset", "data", "poster", "action", "background"):
            assert element.get(key, "data:").startswith("data:")
        if element.tag in ("link", "base", "iframe", "object", "embed", "video", "audio"):
            assert (element.tag, element.get("href")) == ("link", "data:,")
        for key in ("aria-labelledby", "aria-describedby", "for"):
            assert element.get(key) is None or element.get(key) in ids
        if element.tag == "a":
            target = element.get("href")
            assert target[1:] in ids if target[0] == "#" else (folder / target).exists()
    assert "url(" not in page.html
    assert "@import" not in page.html
    assert "http" not in page.html.replace("http-equiv", "")
    images = page.all("img")
    assert len(images) == len(TITLES)
    assert all(it.get("alt") for it in images)
    for table in page.all("table"):
        assert all(it.get("scope") in ("col", "row") for it in table.iter("th"))
    levels = [int(it.tag[1]) for it in page.all() if re.fullmatch(r"h\d", it.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert max(np.diff(levels)) == 1


def column(name, table):
    return {table: {"results": results, "findings": findings, "claims": claims}[table]().drop(
        columns=name
    )}  # fmt: skip


@pytest.mark.parametrize(
    ("tables", "sentence"),
    [
        (column("parameters", "results"), "results.csv: lacks the column 'parameters'"),
        (column("verdict", "findings"), "findings.csv: lacks the column 'verdict'"),
        (column("p", "findings"), "findings.csv: lacks the column 'p'"),
        (column("claimed", "claims"), "claims.csv: lacks the column 'claimed'"),
        ({"claims": claims().head(0)}, "claims.csv: has no rows"),
        ({"findings": findings().replace("no", "No")}, "findings.csv: unknown verdict 'No'"),
    ],
)
def test_a_damaged_table_is_one_sentence(tmp_path, tables, sentence):
    with pytest.raises(DamagedFile) as raised:
        page_of(make_folder(tmp_path, **tables))
    assert str(raised.value).endswith(sentence)


@pytest.mark.parametrize(
    ("file", "content", "kind", "sentence"),
    [
        ("figures/sweep.png", "no image", DamagedFile, "sweep.png: damaged, or not an image"),
        ("report/sweep.rst", "{{ nothing.here }}", InputError, "sweep.rst: no caption"),
        ("report/sweep.rst", "{% if %}", InputError, "sweep.rst: no caption"),
        ("report/sweep.rst", "*never ends", InputError, "sweep.rst: no caption"),
        ("report/sweep.rst", ".. include:: /etc/passwd", InputError, "sweep.rst: no caption"),
        ("report/sweep.rst", ".. raw:: html\n\n   <script>", InputError, "sweep.rst: no caption"),
        ("benchmarks/teachers/0.tsv", "s\nNA\n", DamagedFile, "0.tsv: damaged, or not"),
        ("teachers/0/weights.safetensors", "no weights", InputError, "safetensors: damaged, or"),
    ],
)
def test_a_damaged_file_is_one_sentence(folder, file, content, kind, sentence):
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text(content)
    with pytest.raises(InputError) as raised:
        page_of(folder)
    assert type(raised.value) is kind
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_caption_is_what_snakemake_s_report_shows(tmp_path):
    path = tmp_path / "x.rst"
    path.write_text("{% if 1 %}See Nam et al. (2021), ``_ts`` & *e.g.* 0.5.{% endif %}\nMore.\n")
    html, sentence = caption(path, None)
    assert sentence == "See Nam et al. (2021), _ts & e.g. 0.5."
    assert "&amp; <em>e.g.</em> 0.5." in html


@pytest.mark.parametrize(
    ("function", "value", "expected"),
    [
        (percent, 1.155, "116"),
        (percent, -0.004, "−0.4"),
        (short, 19_074, "19.1 k"),
        (short, 999_999, "1.00 M"),
        (short, 5.2e9, "5.20 G"),
        (short, 0.000123456, "0.000123"),
        (short, 12.3456, "12.3"),
        (duration, 59.94, "59.9 s"),
        (duration, 59.96, "1 min 0 s"),
        (duration, 3599.6, "1 h 0 min"),
    ],
)
def test_numbers_as_text(function, value, expected):
    assert function(value) == expected
