"""Figures of many systems: a row for each, colours for families, numbers where they belong."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ensdistill import drawing
from ensdistill.hdf5 import write_hdf5
from ensdistill.reports import (
    corruptions,
    de_curve,
    diversity_students,
    examples,
    jacobians,
    learning_curves,
    out_of_distribution,
    reliability,
    selective,
)

FAMILIES = ["Single", "KD", "LatentBE", "Hydra", "Proxy-EnD²", "EnD²", "DLF", "Packed", "MIMO"]
WHERE = ["", "+Gaussian", ", own recipe", "+ConfODS", "+TDiv–SDiv, one pass"]
METHODS = [f"{family}{where}" for family in FAMILIES for where in WHERE]
SYSTEMS = ["DE-1", "DE-4", *METHODS]
RNG = np.random.default_rng(0)


def rows_of(axis):
    return [label.get_text().replace("\n", " ") for label in axis.get_yticklabels()]


def assert_readable(figure):
    """On a page, without overlapping or cut names, and no legend that is longer than a page."""
    width, height = figure.get_size_inches()
    assert width == drawing.WIDTH
    assert height < 11.5
    figure.draw_without_rendering()
    assert all(len(legend.get_texts()) <= 12 for legend in figure.legends)
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    tops = sorted((box.y0, box.y1) for box in boxes)
    assert all(here[1] <= above[0] + 0.5 for here, above in pairwise(tops))
    assert all(box.x0 >= 0 for box in boxes)
    for axis in figure.axes:
        assert axis.get_window_extent().width > 0.3 * figure.dpi


def test_colours_are_of_families_and_markers_of_where_teachers_are_asked():
    styles = drawing.styles_of(SYSTEMS)
    lines = {(x["color"], x["ls"]) for x in map(styles.get, METHODS)}
    dots = {(x["color"], x["mfc"]) for x in map(styles.get, METHODS)}
    assert len(lines) == len(dots) == len(FAMILIES)
    for family in FAMILIES:
        same = [styles[f"{family}{where}"] for where in WHERE]
        assert len({(x["color"], x["ls"], x["mfc"]) for x in same}) == 1
        assert [x["marker"] for x in same] == [styles[f"KD{where}"]["marker"] for where in WHERE]
        assert len({x["marker"] for x in same}) == len(WHERE)
    assert styles["DE-4"]["color"] == drawing.INK


def test_up_to_twelve_methods_are_told_apart_by_their_place():
    styles = drawing.styles_of(["DE-1", *METHODS[:12]])
    looks = {(x["color"], x["ls"]) for x in map(styles.get, METHODS[:12])}
    assert len(looks) == 12
    assert not drawing.are_many(["teachers", "DE-1", "DE-2", *METHODS[:12], *METHODS[:12]])
    assert drawing.are_many(METHODS[:13])


def test_more_perturbations_than_colours_differ_in_lines():
    names = ["ods", *"abcdefg"]
    styles = drawing.styles_of_perturbations(names)
    looks = {(x["color"], x["marker"], x.get("ls", "-")) for x in styles.values()}
    assert len(looks) == len(names)
    assert len({(x["color"], x.get("ls", "-")) for x in styles.values()}) == len(names)


def test_results_have_a_row_per_system_and_a_line_down_from_every_size():
    systems = ["DE-1", "DE-2", *METHODS]
    frame = pd.DataFrame({"system": systems, "n": [2, 1, *[3] * len(METHODS)]})
    for key in ("acc", "nll", "ece"):
        frame[key], frame[f"{key}_std"] = RNG.random((2, len(frame)))
    figure = de_curve.draw(frame)
    assert_readable(figure)
    assert rows_of(figure.axes[0]) == systems
    for axis, key in zip(figure.axes, ("acc", "nll", "ece"), strict=True):
        dots = [container[0] for container in axis.containers]
        assert [dot.get_xydata()[0].tolist() for dot in dots] == [
            [value, row] for row, value in enumerate(frame[key])
        ]
        spread = axis.containers[5][2][0].get_segments()[0][:, 0]
        assert np.ptp(spread) == pytest.approx(2 * frame[f"{key}_std"][5])
        assert not axis.containers[1][2]  # one ensemble has no spread
        lines = [it.get_segments()[0] for it in axis.collections if len(it.get_segments()) == 1]
        down = [line.tolist() for line in lines if np.ptp(line[:, 1]) > 1]
        ends = [[[frame[key][m], m], [frame[key][m], len(frame)]] for m in (0, 1)]
        np.testing.assert_allclose(down, ends)


def test_corruption_has_a_dot_per_severity_at_the_mean_over_kinds():
    sets = [("clean", 0), *((f"kind {k}", severity) for severity in (1, 5) for k in range(3))]
    rows = [
        {"system": system, "replicate": replicate, "kind": kind, "severity": severity, "n": 9}
        | dict(zip(("acc", "nll", "ece"), 0.1 + RNG.random(3), strict=True))
        for kind, severity in sets
        for system in SYSTEMS
        for replicate in range(1 if system == "DE-4" else 2)
    ]
    frame = pd.DataFrame(rows)
    figure = corruptions.draw(frame)
    assert_readable(figure)
    assert rows_of(figure.axes[0]) == SYSTEMS
    for axis, key in zip(figure.axes, ("acc", "nll", "ece"), strict=True):
        lines = [line for line in axis.lines if len(line.get_xdata()) == len(SYSTEMS)]
        for line, severity in zip(lines, (0, 1, 5), strict=True):
            chosen = frame[frame["severity"] == severity].groupby("system")[key].mean()
            np.testing.assert_allclose(line.get_xdata(), [chosen[name] for name in SYSTEMS])
            assert line.get_ydata().tolist() == list(range(len(SYSTEMS)))
        assert len({to_hex(line.get_color()) for line in lines}) == 3


def bins_of(names):
    edges = np.arange(6) / 5
    tables = []
    for place, name in enumerate(names):
        table = pd.DataFrame({"name": name, "bin": range(5), "low": edges[:-1], "high": edges[1:]})
        table["count"] = [0, 1, 9, 40, 50] if place % 2 else [5, 0, 5, 40, 50]
        table["confidence"], table["accuracy"], table["kl"] = RNG.random((3, 5))
        tables.append(table.assign(ece=RNG.random(), mean_kl=RNG.random(), n=3))
    return pd.concat(tables, ignore_index=True)


@pytest.mark.parametrize("module", [reliability, diversity_students])
def test_bins_are_dots_coloured_by_value_and_sized_by_share(module):
    names = ["DE-4", *METHODS]
    frame = bins_of(names)
    figure = module.draw(frame)
    assert_readable(figure)
    bins, overall, *_ = figure.axes
    assert rows_of(bins) == names
    dots = [it for it in bins.collections if len(it.get_offsets()) > 1]
    for row, (part, (_, group)) in enumerate(
        zip(dots, frame.groupby("name", sort=False), strict=True)
    ):
        group = group[group["count"] > 0]
        if module is reliability:
            places, values = group["confidence"], group["accuracy"] - group["confidence"]
        else:
            places, values = (group["low"] + group["high"]) / 2, group["kl"]
        np.testing.assert_allclose(part.get_offsets(), np.stack([places, [row] * 4], 1))
        np.testing.assert_allclose(part.get_array(), values)
        sizes = (8 + 2 * np.log10(group["count"] / 100)) ** 2
        np.testing.assert_allclose(part.get_sizes(), sizes)
    beside = [line.get_xydata()[0] for line in overall.lines if line.get_marker() == "o"]
    key = "ece" if module is reliability else "mean_kl"
    expected = frame.groupby("name", sort=False)[key].first()
    np.testing.assert_allclose(beside, np.stack([expected, range(len(names))], 1))


def test_detection_and_jacobians_fit_a_page():
    rows = [
        {"system": system, "replicate": seed, "score": score, "n_in": 30, "n_out": 10, "n": 5}
        | {"set": "far"}
        | dict.fromkeys(("auroc", "aupr", "fpr95"), RNG.random())
        | dict.fromkeys(("error", "error_low", "cosine", "cosine_low"), 0.4 + seed)
        | dict.fromkeys(("error_high", "cosine_high"), 0.5 + seed)
        for system in SYSTEMS
        for seed in range(2)
        for score in out_of_distribution.UNCERTAINTIES
    ]
    for module in (out_of_distribution, jacobians):
        figure = module.draw(pd.DataFrame(rows))
        assert_readable(figure)
        assert rows_of(figure.axes[0]) == SYSTEMS


def test_errors_among_the_surest_have_a_dot_per_coverage():
    rows = [
        {"system": system, "replicate": seed, "coverage": coverage, "n": 9}
        | {"risk": coverage * (1 + seed) + place / 50, "aurc": place + seed}
        for place, system in enumerate(SYSTEMS)
        for seed in range(2)
        for coverage in range(1, 101)
    ]
    figure = selective.draw(pd.DataFrame(rows))
    assert_readable(figure)
    curves, areas = figure.axes
    assert rows_of(curves) == SYSTEMS
    lines = [line for line in curves.lines if len(line.get_xdata()) == len(SYSTEMS)]
    for line, coverage in zip(lines, selective.SHOWN, strict=True):
        expected = [1.5 * coverage + place / 50 for place in range(len(SYSTEMS))]
        np.testing.assert_allclose(line.get_xdata(), expected)
    assert len({to_hex(line.get_color()) for line in lines}) == len(selective.SHOWN)
    dots = [container[0].get_xydata()[0].tolist() for container in areas.containers]
    assert dots == [[place + 0.5, place] for place in range(len(SYSTEMS))]


def history(system, **columns):
    known = {"epoch": [1, 2, 3, 4], "learning_rate": 0.1, "loss": [4.0, 3, 2, 1]}
    known |= {"cross_entropy": 0.5, "accuracy": [10, 50, 80, 90]}
    known |= {"val_accuracy": [np.nan, 40, np.nan, 70], "val_nll": [np.nan, 2, np.nan, 1]}
    return pd.DataFrame({"system": system, "replicate": 0, **known, **columns})


def test_learning_curves_have_a_colour_per_family_and_no_bands():
    figure = learning_curves.draw(pd.concat(map(history, ["teacher", *METHODS])))
    assert_readable(figure)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["teachers", *FAMILIES]
    styles = drawing.styles_of(METHODS)
    teacher, *lines = figure.axes[0].lines
    assert [line.get_color() for line in lines] == [styles[name]["color"] for name in METHODS]
    assert teacher.get_color() == drawing.INK
    assert not figure.axes[0].collections


def test_a_loss_without_labels_may_be_negative_and_leaves_panels_empty():
    nothing = {"cross_entropy": np.nan, "accuracy": np.nan}
    frame = pd.concat([history("A"), history("B", loss=[5, 0, -20, -30], **nothing)])
    axes = learning_curves.draw(frame).axes
    loss, cross_entropy, accuracy = axes[:3]
    assert [line.get_ydata().tolist() for line in loss.lines] == [[4, 3, 2, 1], [5, 0, -20, -30]]
    shown = loss.transData.transform([line.get_xydata()[-1] for line in loss.lines])
    assert np.isfinite(shown).all()
    for axis in (cross_entropy, accuracy):
        assert [len(line.get_xdata()) for line in axis.lines] == [4, 0]
    assert accuracy.get_ylim()[1] == pytest.approx(90, abs=5)
    assert loss.get_yscale() == "symlog"
    texts = [label.get_text() for label in loss.get_yticklabels()]
    assert not any("$" in text for text in texts)  # mathematics is not parsed
    assert cross_entropy.get_yscale() == "log"


@pytest.mark.parametrize("absent", ["dropped", "empty"])
def test_studies_without_any_label_term_have_curves(absent):
    frame = history("A")
    if absent == "dropped":
        frame = frame.drop(columns=["cross_entropy", "accuracy"])
    else:
        frame[["cross_entropy", "accuracy"]] = np.nan
    figure = learning_curves.draw(frame)
    figure.draw_without_rendering()
    assert not [line for line in figure.axes[1].lines if len(line.get_xdata())]
    assert figure.axes[0].lines[0].get_ydata().tolist() == [4, 3, 2, 1]


@pytest.mark.parametrize("size", [(8, 8), (40, 4), (4, 250)])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_of_many_perturbations_is_turned(tmp_path, channels, size):
    names = ["clean", "gaussian", "ods", "conf_ods", "ods_each", "tdiv_sdiv", "mixup", "held_out"]
    stepping = names[1:6]
    arrays = {}
    for name in names:
        count = 3 if name == "held_out" else 8
        arrays[f"{name}/examples"] = RNG.random((count, channels, *size)).astype(np.float32)
        arrays[f"{name}/logits"] = RNG.normal(size=(count + 1, 2, 3)).astype(np.float32)
    options = {name: {"eta": 1} if name in stepping else {"beta": 0.4} for name in names[1:]}
    titles = {name: name.upper() for name in names}
    said = {"titles": titles, "perturbations": options, "eta": 1 / 255}
    write_hdf5(tmp_path / "p.h5", arrays, said)
    figure = examples.draw(str(tmp_path / "p.h5"))
    assert (figure.get_size_inches() <= (7, 12)).all()
    figure.draw_without_rendering()
    grid = np.reshape([axis for axis in figure.axes if axis.get_subplotspec()][:64], (8, 8))
    assert [axis.get_ylabel() for axis in grid[:, 0]] == list(titles.values())
    for row, name in enumerate(names):
        for example in range(4):
            image, difference = grid[row, 2 * example : 2 * example + 2]
            assert len(difference.images) == difference.axison == (name in stepping)
            assert len(image.images) == image.axison == (name != "held_out" or example < 3)
            if image.images:
                expected = arrays[f"{name}/examples"][example].transpose(1, 2, 0)
                np.testing.assert_allclose(np.atleast_3d(image.images[0].get_array()), expected)
            if difference.images and channels == 1:
                change = (arrays[f"{name}/examples"] - arrays["clean/examples"])[example]
                np.testing.assert_allclose(difference.images[0].get_array(), change[0])
