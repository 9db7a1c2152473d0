"""Figures show the numbers of their files, the same bytes every time, without torch."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ensdistill import drawing
from ensdistill.files import read_csv
from ensdistill.hdf5 import write_hdf5
from ensdistill.metrics import pairwise_kl
from ensdistill.reports import (
    corruptions,
    de_curve,
    diversity_teachers,
    examples,
    jacobians,
    learning_curves,
    out_of_distribution,
    reliability,
    saturation,
    selective,
    sweep,
    transfer,
)
from ensdistill.reports import results as all_results


def stored(path, frame):
    """The table as the figures' job reads it."""
    frame.to_csv(path, index=False)
    return read_csv(path)


def bins(name, count, **columns):
    edges = np.arange(6) / 5
    return pd.DataFrame(
        {"name": name, "bin": range(5), "low": edges[:-1], "high": edges[1:], "count": count}
        | columns
    )


@pytest.fixture
def diversity(tmp_path):
    tables = [
        bins("train_clean", [0, 0, 1, 3, 96], kl=[0, 0, 0.9, 0.5, 0.01], mean_kl=0.03, n=1),
        bins("train_ods", [2, 8, 20, 30, 40], kl=[2.0, 1.5, 1.2, 0.8, 0.3], mean_kl=0.7, n=1),
        bins("test_clean", [1, 2, 3, 4, 10], kl=[1.0, 0.9, 0.8, 0.4, 0.1], mean_kl=0.4, n=1),
    ]
    titles = ("Train, clean", "Both", "Both")
    named = [it.assign(title=title) for it, title in zip(tables, titles, strict=True)]
    return stored(tmp_path / "diversity.csv", pd.concat(named))


def test_bars_are_the_bins_with_images_shaded_by_their_share(diversity):
    clean, ods, test, summary, *_ = diversity_teachers.draw(diversity).axes
    bars, feet = clean.containers
    assert [bar.get_height() for bar in bars] == [0.9, 0.5, 0.01]
    assert [bar.get_x() for bar in bars] == pytest.approx([0.4, 0.6, 0.8])
    expected = diversity_teachers.SHADES(diversity_teachers.SHARES(np.array([0.01, 0.03, 0.96])))
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [to_hex(shade) for shade in expected]
    assert [to_hex(foot.get_facecolor()) for foot in feet] == [to_hex(shade) for shade in expected]
    assert len(ods.containers[0]) == len(test.containers[0]) == 5
    assert clean.get_ylim() == ods.get_ylim() == test.get_ylim()
    assert [bar.get_width() for bar in summary.containers[0]] == [0.03, 0.7, 0.4]
    titles = [axis.get_title(loc="left") for axis in (clean, ods, test)]
    assert titles == [label.get_text() for label in summary.get_yticklabels()]
    assert titles == ["Train, clean", "Both", "Both"]


@pytest.fixture
def results(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["DE-1", "DE-2", "DE-3", "A", "B"]
    columns = {key: rng.random(5) for key in ("acc", "nll", "ece", "acc_std", "nll_std", "ece_std")}
    frame = pd.DataFrame({"system": rows, "n": [3, 3, 1, 2, 1], **columns})
    return frame, stored(tmp_path / "results.csv", frame)


def test_the_curve_and_every_student_are_where_the_table_says(results):
    frame, files = results
    for axis, key in zip(de_curve.draw(files).axes, ("acc", "nll", "ece"), strict=True):
        curve, *lines = [line for line in axis.lines if len(line.get_xdata()) > 1]
        assert list(curve.get_xdata()) == [1, 2, 3]
        assert list(curve.get_ydata()) == list(frame[key][:3])
        assert [lines[0].get_ydata()[0], lines[1].get_ydata()[0]] == list(frame[key][3:])


def test_reliability_dots_are_accuracy_against_confidence(tmp_path):
    table = bins("A", [0, 2, 0, 8, 10], confidence=[0, 0.3, 0, 0.7, 0.9], ece=0.1, n=2)
    table["accuracy"] = [0, 0.5, 0, 0.6, 1.0]
    (axis,) = reliability.draw(stored(tmp_path / "r.csv", table)).axes
    dots = axis.collections[-1].get_offsets()
    np.testing.assert_allclose(dots, [[0.3, 0.5], [0.7, 0.6], [0.9, 1.0]])


def test_learning_curves_are_means_over_networks(tmp_path):
    histories = [
        pd.DataFrame(
            {
                "system": system,
                "replicate": replicate,
                "epoch": [1, 2, 3, 4],
                "learning_rate": 0.1,
                "loss": np.array([4.0, 3, 2, 1]) * (replicate + 1),
                "cross_entropy": 0.5,
                "accuracy": [10, 50, 80, 90],
                "val_accuracy": [np.nan, 40, np.nan, 70],
                "val_nll": [np.nan, 2, np.nan, 1],
            }
        )
        for system, replicate in (("teacher", 0), ("A", 0), ("A", 1))
    ]
    axes = learning_curves.draw(stored(tmp_path / "h.csv", pd.concat(histories))).axes
    teacher, student = axes[0].lines
    assert list(teacher.get_ydata()) == [4, 3, 2, 1]
    assert list(student.get_ydata()) == [6, 4.5, 3, 1.5]
    assert [list(line.get_xdata()) for line in axes[4].lines] == [[2, 4], [2, 4]]


def said_of(**titles):
    """Attributes of perturbed images."""
    options = {name: {"name": name, "eta": 1 / 255} for name in titles if name != "clean"}
    return {"titles": titles, "eta": 1 / 255, "perturbations": options}


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_show_the_images_the_differences_and_the_diversity(tmp_path, channels):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("clean", "ods"):
        arrays[f"{name}/examples"] = rng.random((8, channels, 6, 6)).astype(np.float32)
        arrays[f"{name}/logits"] = rng.normal(size=(9, 2, 3)).astype(np.float32)
    write_hdf5(tmp_path / "p.h5", arrays, said_of(clean="clean", ods="ODS"))
    axes = examples.draw(str(tmp_path / "p.h5")).axes
    clean, ods, difference = (np.atleast_3d(axis.images[0].get_array()) for axis in axes[:3])
    np.testing.assert_allclose(clean, arrays["clean/examples"][0].transpose(1, 2, 0))
    np.testing.assert_allclose(ods, arrays["ods/examples"][0].transpose(1, 2, 0))
    change = (arrays["ods/examples"] - arrays["clean/examples"])[0].transpose(1, 2, 0)
    factor = float(axes[2].get_title(loc="center").split("×")[1])
    expected = change if channels == 1 else np.clip(0.5 + factor * change, 0, 1)
    np.testing.assert_allclose(difference, expected, rtol=1e-5)
    kl = pairwise_kl(arrays["ods/logits"][:1])
    assert float(axes[1].get_xlabel().split()[1]) == pytest.approx(kl, rel=0.05)


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [(250, 4, 2.5), (4, 250, 0.4), (1, 100, 0.4), (1, 1, 1), (5, 10, 0.5), (10, 4, 2.5)],
)
def test_images_of_any_shape_make_a_sheet_of_readable_size(tmp_path, height, width, shown):
    arrays = {}
    for name in ("clean", "ods", "gaussian", "conf_ods"):
        arrays[f"{name}/examples"] = np.full((5, 3, height, width), 0.5, np.float32)
        arrays[f"{name}/logits"] = np.zeros((5, 2, 3), np.float32)
    path = tmp_path / "p.h5"
    write_hdf5(path, arrays, said_of(clean="clean", ods="a", gaussian="b", conf_ods="c"))
    figure = examples.draw(str(path))
    assert (figure.get_size_inches() <= (7, 12)).all()
    figure.draw_without_rendering()
    for axis in figure.axes:
        box = axis.get_window_extent()
        assert box.height / box.width == pytest.approx(shown, rel=0.02)
        assert min(box.height, box.width) > 0.3 * figure.dpi
    assert ("stretched" in figure.get_supxlabel()) == (shown != height / width)


@pytest.mark.parametrize("label", ["x" * 400, "ab " * 130])
def test_a_long_label_leaves_a_figure_its_size(tmp_path, label):
    frame = pd.DataFrame({"system": ["A", label], "replicate": 0, "n": 5})
    for key in ("error", "cosine"):
        frame = frame.assign(**{key: 0.5, f"{key}_low": 0.4, f"{key}_high": 0.6})
    assert (jacobians.draw(frame).get_size_inches() <= (7, 3)).all()
    curve = pd.DataFrame({"system": ["DE-1", "DE-2", label], "n": 1})
    for key in ("acc", "nll", "ece"):
        curve = curve.assign(**{key: [1.0, 2, 3], f"{key}_std": 0.1})
    figure = de_curve.draw(curve)
    figure.draw_without_rendering()
    assert figure.legends[0].get_window_extent().width < figure.bbox.width
    assert figure.axes[0].get_window_extent().width > 100


def test_saturation_shows_every_teacher_on_train_and_on_test(tmp_path):
    rows = [
        {"split": split, "teacher": teacher, "doubt": doubt, "share": share, "n": 10}
        | {"confidence": 0.9 + teacher / 100, "accuracy": 80 + teacher}
        for split in ("train", "test")
        for teacher in (0, 1)
        for doubt, share in ((1e-6, 0.1 * teacher), (1e-2, 0.5), (1, 1.0))
    ]
    doubts, calibration = saturation.draw(stored(tmp_path / "s.csv", pd.DataFrame(rows))).axes
    colours = [drawing.SPLITS[split] for split in ("train", "train", "test", "test")]
    assert [line.get_color() for line in doubts.lines] == colours
    np.testing.assert_allclose(doubts.lines[1].get_xdata(), [1e-4, 1, 100])
    np.testing.assert_allclose(doubts.lines[1].get_ydata(), [10, 50, 100])
    dots = [line.get_xydata()[0] for line in calibration.lines[:-1]]
    np.testing.assert_allclose(dots, [[90, 80], [91, 81]] * 2)
    assert [dot.get_color() for dot in calibration.lines[:-1]] == colours
    np.testing.assert_array_equal(*calibration.lines[-1].get_data())  # the diagonal


@pytest.fixture
def swept(tmp_path):
    rows = [
        {"perturbation": name, "title": title, "eta": eta / 255}
        | {"kl": kl * eta, "low": kl, "high": 9 * kl, "n": 5}
        for name, title, kl in (
            ("conf_ods", "ConfODS", 0.2),
            ("gaussian", "Gaussian", 0.1),
            ("ods", "ODS", 0.4),
        )
        for eta in (1, 2, 4)
    ]
    frame = pd.DataFrame(rows).assign(train_kl=0.1, test_kl=0.3, study_eta=2 / 255)
    return frame, stored(tmp_path / "sweep.csv", frame)


def test_sweep_shows_the_diversity_at_every_size_beside_that_of_clean_images(swept):
    (axis,) = sweep.draw(swept[1]).axes
    *curves, train, test, study = axis.lines
    assert [curve.get_label() for curve in curves] == ["Gaussian", "ODS", "ConfODS"]
    for curve, kl in zip(curves, (0.1, 0.4, 0.2), strict=True):
        np.testing.assert_allclose(curve.get_xydata(), [[1, kl], [2, 2 * kl], [4, 4 * kl]])
    bands = [band.get_datalim(axis.transData) for band in axis.collections]
    np.testing.assert_allclose([[band.y0, band.y1] for band in bands][1], [0.4, 3.6])
    assert (train.get_ydata()[0], test.get_ydata()[0]) == (0.1, 0.3)
    assert study.get_xdata()[0] == 2
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["train, clean: 0.10", "test, clean: 0.30", "the study: η = 2/255"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1", "2", "4"]


def test_sweep_shows_whatever_perturbation_a_study_has(swept, tmp_path):
    frame = swept[0].replace({"gaussian": "uniform", "Gaussian": "flat"})
    (axis,) = sweep.draw(stored(tmp_path / "u.csv", frame)).axes
    curves = {line.get_label(): line for line in axis.lines if line.get_label()[0] != "_"}
    assert list(curves) == ["ODS", "ConfODS", "flat"]
    np.testing.assert_allclose(curves["flat"].get_ydata(), [0.1, 0.2, 0.4])
    assert len({line.get_color() for line in curves.values()}) == 3


def test_sweep_has_no_line_at_a_size_of_nothing(swept, tmp_path):
    (axis,) = sweep.draw(stored(tmp_path / "0.csv", swept[0].assign(study_eta=0))).axes
    assert len(axis.lines) == 5


@pytest.mark.parametrize("external", [False, True])
def test_transfer_shows_every_source_and_the_densities_of_cosines(tmp_path, external):
    sources = pd.DataFrame({"source": [0, 1, 2], "where": ["inside", "inside", "outside"]})
    sources = sources.assign(clean=[0.1, 0.2, 0.3], ods=[1.0, 2, 3], own=[4, 5, np.nan], n=7)
    sources = sources.assign(ods_low=sources["ods"] / 2, ods_high=sources["ods"] * 2)
    names = ["inside", "outside", "random"]
    cosines = pd.concat([bins(name, [1, 2, 0, 4, 3], mean=0.25, n=10) for name in names])
    if not external:
        sources = sources[sources["where"] == "inside"]
        cosines = cosines[cosines["name"] != "outside"]
    tables = stored(tmp_path / "t.csv", sources), stored(tmp_path / "d.csv", cosines)
    axis, *histograms = transfer.draw(*tables).axes
    shown = {line.get_label(): line.get_xydata() for line in axis.lines}
    clean, inside, own, *outside = (place[~np.isnan(place[:, 0])] for place in shown.values())
    np.testing.assert_allclose(clean[:2], [[0.1, 0], [0.2, 1]])
    np.testing.assert_allclose(inside, [[1, 0], [2, 1]])
    np.testing.assert_allclose(own, [[4, 0], [5, 1]])
    np.testing.assert_allclose(outside, [[[3, 2]]] if external else [])
    intervals = [path[:, 0].tolist() for path in axis.collections[1].get_segments()]
    assert intervals == [[0.5, 2], [1, 4], [1.5, 6]][: len(sources)]
    assert len(histograms) == 2 + external
    for histogram in histograms:
        density, edges, _ = histogram.patches[0].get_data()
        np.testing.assert_allclose(density, np.array([1, 2, 0, 4, 3]) / 10 / 0.2)
        np.testing.assert_allclose(edges, np.arange(6) / 5)
        assert histogram.lines[0].get_xdata()[0] == 0.25
        assert histogram.get_title(loc="left").endswith("mean 0.25")


@pytest.mark.parametrize("seeds", [1, 3])
def test_jacobians_are_means_over_seeds_above_every_seed_with_its_interval(tmp_path, seeds):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"system": np.repeat(["A", "B"], seeds), "n": 5})
    frame["replicate"] = [*range(seeds)] * 2
    for key in ("error", "cosine"):
        frame[key] = rng.random(2 * seeds)
        frame[f"{key}_low"], frame[f"{key}_high"] = frame[key] - 0.1, frame[key] + 0.2
    axes = jacobians.draw(stored(tmp_path / "j.csv", frame)).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["A", "B"]
    for axis, key in zip(axes, ("error", "cosine"), strict=True):
        for row, (_, runs) in enumerate(frame.groupby("system")):
            small, large = axis.lines[2 * row : 2 * row + 2]
            np.testing.assert_allclose(small.get_xdata(), runs[key])
            np.testing.assert_allclose(large.get_xdata(), runs[key].mean())
            intervals = [path[:, 0] for path in axis.collections[row].get_segments()]
            np.testing.assert_allclose(intervals, runs[[f"{key}_low", f"{key}_high"]])
            places = [*small.get_ydata(), *large.get_ydata()]
            assert np.round(places).tolist() == [row] * (seeds + 1)


@pytest.mark.parametrize("seeds", [1, 3])
def test_boxes_are_of_the_kinds_of_corruption_averaged_over_seeds(tmp_path, seeds):
    rng = np.random.default_rng(0)
    sets = [("clean", 0), *((f"kind {k}", severity) for severity in (1, 5) for k in range(4))]
    rows = [
        {"system": system, "replicate": replicate, "kind": kind, "severity": severity, "n": 9}
        | dict(zip(("acc", "nll", "ece"), 0.1 + rng.random(3), strict=True))
        for kind, severity in sets
        for system in ("DE-1", "DE-4", "A")
        for replicate in range(1 if system == "DE-4" else seeds)
    ]
    frame = pd.DataFrame(rows)
    figure = corruptions.draw(stored(tmp_path / "c.csv", frame))
    for axis, key in zip(figure.axes, ("acc", "nll", "ece"), strict=True):
        values = frame.groupby(["severity", "system", "kind"], sort=False)[key].mean()
        dots = [line for line in axis.lines if len(line.get_xdata()) == 1]
        assert [dot.get_ydata()[0] for dot in dots] == pytest.approx([*values[0]])
        lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
        boxes = zip(axis.patches, lines[::3], lines[1::3], lines[2::3], strict=True)
        places = [(place, severity) for place in range(3) for severity in (1, 5)]
        for (patch, low, high, median), (place, severity) in zip(boxes, places, strict=True):
            box = patch.get_path().get_extents()
            assert (box.x0 + box.x1) / 2 == pytest.approx(severity + dots[place].get_xdata()[0])
            ends = [low.get_ydata()[1], box.y0, median.get_ydata()[0], box.y1, high.get_ydata()[1]]
            kinds = values[severity][("DE-1", "DE-4", "A")[place]]
            np.testing.assert_allclose(ends, kinds.quantile([0, 0.25, 0.5, 0.75, 1]))
    single, ensemble, student = (patch.get_facecolor() for patch in figure.axes[0].patches[::2])
    assert [*map(to_hex, (single, ensemble))] == ["#ffffff", drawing.INK]
    assert to_hex(student) == drawing.COLOURS[0].lower()


@pytest.mark.parametrize("seeds", [1, 3])
def test_detection_is_shown_by_system_and_score_with_the_spread_over_seeds(tmp_path, seeds):
    rng = np.random.default_rng(0)
    rows = [
        {"system": system, "replicate": replicate, "score": score, "n_in": 30, "n_out": 10}
        | {"set": "far"}
        | dict(zip(("auroc", "aupr", "fpr95"), rng.random(3), strict=True))
        for system in ("DE-1", "A")
        for replicate in range(seeds)
        for score in out_of_distribution.UNCERTAINTIES
        if (system, score) != ("DE-1", "mutual_information")
    ]
    frame = pd.DataFrame(rows)
    figure = out_of_distribution.draw(stored(tmp_path / "o.csv", frame))
    groups = frame.groupby(["system", "score"], sort=False)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["DE-1", "A"]
    for axis, key in zip(figure.axes, ("auroc", "aupr", "fpr95"), strict=True):
        assert len(axis.containers) == 9
        for container, ((system, score), group) in zip(axis.containers, groups, strict=True):
            dot, _, spread = container
            assert dot.get_xdata()[0] == pytest.approx(group[key].mean())
            assert np.round(dot.get_ydata()[0]) == ["DE-1", "A"].index(system)
            assert dot.get_marker() == out_of_distribution.UNCERTAINTIES[score].marker
            if seeds > 1:
                ends = spread[0].get_segments()[0][:, 0]
                assert np.ptp(ends) == pytest.approx(2 * group[key].std())
    assert "AUPR 0.25" in figure.get_supxlabel()


def test_risk_coverage_curves_are_means_and_areas_have_the_spread_over_seeds(tmp_path):
    rng = np.random.default_rng(0)
    tables = [
        pd.DataFrame({"system": system, "replicate": replicate, "coverage": range(1, 101)}).assign(
            risk=rng.random(100), aurc=rng.random(), n=30
        )
        for system, replicates in (("DE-1", 2), ("DE-4", 1), ("A", 3))
        for replicate in range(replicates)
    ]
    frame = pd.concat(tables)
    figure = selective.draw(stored(tmp_path / "s.csv", frame))
    curves, areas = figure.axes
    groups = frame.groupby("system", sort=False)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(groups.groups)
    for line, container, (_, group) in zip(curves.lines, areas.containers, groups, strict=True):
        assert line.get_xdata().tolist() == list(range(1, 101))
        np.testing.assert_allclose(line.get_ydata(), group.groupby("coverage")["risk"].mean())
        values = group.groupby("replicate")["aurc"].first()
        dot, _, spread = container
        assert dot.get_xdata()[0] == pytest.approx(values.mean())
        if len(values) > 1:
            ends = spread[0].get_segments()[0][:, 0]
            assert np.ptp(ends) == pytest.approx(2 * values.std())
        else:
            assert not spread
    assert "2 (DE-1), 1 (DE-4), 3 seeds (students)" in figure.get_supxlabel()


def test_detection_of_several_sets_has_a_panel_for_each(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"system": system, "replicate": 0, "score": score, "set": name, "n_in": 30, "n_out": count}
        | dict(zip(("auroc", "aupr", "fpr95"), rng.random(3), strict=True))
        for system in ("DE-1", "A")
        for score in ("entropy", "energy")
        for name, count in (("near", 10), ("far", 1234))
    ]
    frame = pd.DataFrame(rows)
    figure = out_of_distribution.draw(stored(tmp_path / "o.csv", frame))
    assert [axis.get_title("left") for axis in figure.axes] == ["AUROC, near", "AUROC, far"]
    for axis, name in zip(figure.axes, ("near", "far"), strict=True):
        shown = sorted(container[0].get_xdata()[0] for container in axis.containers)
        assert shown == pytest.approx(sorted(frame["auroc"][frame["set"] == name]))
    assert "30 test images, others: 10 of near, 1,234 of far." in figure.get_supxlabel()


def test_equal_figures_have_equal_bytes(diversity, tmp_path):
    for turn in ("first", "second"):
        figure = diversity_teachers.draw(diversity)
        drawing.save(figure, [tmp_path / f"{turn}.png", tmp_path / f"{turn}.pdf"])
    for ending in ("png", "pdf"):
        first, second = (tmp_path / f"{turn}.{ending}" for turn in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_judging_and_rendering_never_import_torch():
    names = [
        "tables",
        "claims",
        "verdict_pages",
        "page",
        *(f"reports.{name}" for name in all_results()),
    ]
    modules = ", ".join(f"ensdistill.{name}" for name in names)
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
