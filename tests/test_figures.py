"""Figures show the numbers of their files, the same bytes every time, without torch."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from ensdistill import figures
from ensdistill.metrics import pairwise_kl
from ensdistill.provenance import write_hdf5


def write(path, frame):
    frame.to_csv(path, index=False)
    return [str(path)]


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
    return write(tmp_path / "diversity.csv", pd.concat(tables))


def test_bars_are_the_bins_with_images_shaded_by_their_share(diversity):
    clean, ods, test, summary, *_ = figures.diversity_teachers(diversity).axes
    bars, feet = clean.containers
    assert [bar.get_height() for bar in bars] == [0.9, 0.5, 0.01]
    assert [bar.get_x() for bar in bars] == pytest.approx([0.4, 0.6, 0.8])
    expected = figures.SHADES(figures.SHARES(np.array([0.01, 0.03, 0.96])))
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [to_hex(shade) for shade in expected]
    assert [to_hex(foot.get_facecolor()) for foot in feet] == [to_hex(shade) for shade in expected]
    assert len(ods.containers[0]) == len(test.containers[0]) == 5
    assert clean.get_ylim() == ods.get_ylim() == test.get_ylim()
    assert [bar.get_width() for bar in summary.containers[0]] == [0.03, 0.7, 0.4]


@pytest.fixture
def results(tmp_path):
    rng = np.random.default_rng(0)
    rows = ["DE-1", "DE-2", "DE-3", "A", "B"]
    columns = {key: rng.random(5) for key in ("acc", "nll", "ece", "acc_std", "nll_std", "ece_std")}
    frame = pd.DataFrame({"system": rows, "n": [3, 3, 1, 2, 1], **columns})
    return frame, write(tmp_path / "results.csv", frame)


def test_the_curve_and_every_student_are_where_the_table_says(results):
    frame, files = results
    for axis, key in zip(figures.de_curve(files).axes, ("acc", "nll", "ece"), strict=True):
        curve, *lines = [line for line in axis.lines if len(line.get_xdata()) > 1]
        assert list(curve.get_xdata()) == [1, 2, 3]
        assert list(curve.get_ydata()) == list(frame[key][:3])
        assert [lines[0].get_ydata()[0], lines[1].get_ydata()[0]] == list(frame[key][3:])


def test_reliability_dots_are_accuracy_against_confidence(tmp_path):
    table = bins("A", [0, 2, 0, 8, 10], confidence=[0, 0.3, 0, 0.7, 0.9], ece=0.1, n=2)
    table["accuracy"] = [0, 0.5, 0, 0.6, 1.0]
    (axis,) = figures.reliability(write(tmp_path / "r.csv", table)).axes
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
    axes = figures.learning_curves(write(tmp_path / "h.csv", pd.concat(histories))).axes
    teacher, student = axes[0].lines
    assert list(teacher.get_ydata()) == [4, 3, 2, 1]
    assert list(student.get_ydata()) == [6, 4.5, 3, 1.5]
    assert [list(line.get_xdata()) for line in axes[4].lines] == [[2, 4], [2, 4]]


@pytest.mark.parametrize("channels", [1, 3])
def test_examples_show_the_images_the_differences_and_the_diversity(tmp_path, channels):
    rng = np.random.default_rng(0)
    arrays = {}
    for name in ("clean", "ods"):
        arrays[f"{name}/examples"] = rng.random((8, channels, 6, 6)).astype(np.float32)
        arrays[f"{name}/logits"] = rng.normal(size=(9, 2, 3)).astype(np.float32)
    write_hdf5(tmp_path / "p.h5", arrays, {"sets": ["clean", "ods"], "eta": 1 / 255})
    axes = figures.examples([str(tmp_path / "p.h5")]).axes
    clean, ods, difference = (np.atleast_3d(axis.images[0].get_array()) for axis in axes[:3])
    np.testing.assert_allclose(clean, arrays["clean/examples"][0].transpose(1, 2, 0))
    np.testing.assert_allclose(ods, arrays["ods/examples"][0].transpose(1, 2, 0))
    change = (arrays["ods/examples"] - arrays["clean/examples"])[0].transpose(1, 2, 0)
    factor = float(axes[2].get_title(loc="center").split("×")[1])
    expected = change if channels == 1 else np.clip(0.5 + factor * change, 0, 1)
    np.testing.assert_allclose(difference, expected, rtol=1e-5)
    kl = pairwise_kl(arrays["ods/logits"][:1])
    assert float(axes[1].get_xlabel().split()[1]) == pytest.approx(kl, rel=0.05)


def test_equal_figures_have_equal_bytes(diversity, tmp_path):
    for turn in ("first", "second"):
        figure = figures.diversity_teachers(diversity)
        figures.save(figure, [tmp_path / f"{turn}.png", tmp_path / f"{turn}.pdf"])
    for ending in ("png", "pdf"):
        first, second = (tmp_path / f"{turn}.{ending}" for turn in ("first", "second"))
        assert first.read_bytes() == second.read_bytes()


def test_rendering_and_metrics_never_import_torch():
    code = "import sys, ensdistill.figures, ensdistill.tables; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
