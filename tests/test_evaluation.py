"""Tables of numbers, and how they are shown, against sums written out."""

from itertools import combinations
from math import comb

import numpy as np
import pandas as pd
import pytest

from ensdistill import InputError, metrics, tables
from ensdistill.evaluation import (
    METRICS,
    diversity_by_confidence,
    learning_curves,
    reliability_table,
    score_systems,
    subsets,
)
from ensdistill.logits import read_logits
from ensdistill.provenance import write_hdf5

POOL, K = 4, 5


@pytest.fixture
def files(tmp_path):
    """Logits files of a pool of teachers and of two students of two members each."""
    rng = np.random.default_rng(0)
    labels = {"val": rng.integers(0, K, 80), "test": rng.integers(0, K, 120)}

    def write(name, members, skill):
        arrays = {}
        for split, y in labels.items():
            logits = rng.normal(size=(len(y), members, K))
            logits[np.arange(len(y)), :, y] += skill
            arrays |= {f"{split}/logits": logits.astype(np.float32), f"{split}/labels": y}
        path = str(tmp_path / f"{name}.h5")
        write_hdf5(path, arrays, {"parameters": 10 * members})
        return path

    teachers = [write(f"teacher{seed}", 1, 1.5) for seed in range(POOL)]
    students = {"A": [write(f"a{seed}", 2, 1.55) for seed in range(2)], "B": [write("b", 2, 0.1)]}
    students["C"] = [write("c", 2, 9.0)]
    return teachers, students


def test_scores_of_every_subset_and_student(files):
    teachers, students = files
    frame = score_systems(teachers, students, n_bins=15)
    assert list(frame.system) == [
        f"DE-{m}" for m in range(1, POOL + 1) for _ in range(comb(POOL, m))
    ] + ["A", "A", "B", "C"]
    pool = [read_logits(path, "test") for path in teachers]
    labels = pool[0][1]
    for chosen in combinations(range(POOL), 2):
        logits = np.concatenate([pool[i][0] for i in chosen], axis=1)
        row = frame[frame.replicate == "+".join(map(str, chosen))].iloc[0]
        assert row.nll == pytest.approx(metrics.nll(metrics.ensemble_probs(logits), labels))
    assert frame[frame.system == "DE-3"].parameters.unique().tolist() == [30]


def test_deep_ensemble_equivalents_are_read_off_the_mean_curve(files):
    teachers, students = files
    frame = score_systems(teachers, students, n_bins=15)
    for metric, column in (("nll", "dee"), ("nll_ts", "dee_ts")):
        curve = [frame[frame.system == f"DE-{m}"][metric].mean() for m in range(1, POOL + 1)]
        assert curve == sorted(curve, reverse=True)
        for m in range(1, POOL + 1):
            assert frame[frame.system == f"DE-{m}"][column].unique() == pytest.approx([m])
        worse, better = frame[frame.system == "B"].iloc[0], frame[frame.system == "C"].iloc[0]
        assert (worse[column], worse[f"{column}_outside"]) == (1, -1)
        assert (better[column], better[f"{column}_outside"]) == (POOL, 1)
        for _, row in frame[frame.system == "A"].iterrows():
            crossing = np.interp(row[metric], curve[::-1], range(POOL, 0, -1))
            assert row[column] == pytest.approx(crossing)


def test_large_pools_are_sampled_without_repetition():
    drawn = subsets(12, 6)
    assert len(drawn) == len(set(drawn)) == 64
    assert drawn == subsets(12, 6)
    assert all(len(set(chosen)) == 6 and max(chosen) < 12 for chosen in drawn)
    assert subsets(5, 2) == list(combinations(range(5), 2))


def test_summary_is_mean_and_sample_deviation(files):
    frame = score_systems(*files, n_bins=15)
    summary = tables.summarize(frame).set_index("system")
    group = frame[frame.system == "A"]
    assert summary.loc["A", "n"] == 2
    for metric in METRICS:
        values = group[metric].to_numpy()
        assert summary.loc["A", metric] == pytest.approx(values.mean())
        expected = abs(values[0] - values[1]) / np.sqrt(2)
        assert summary.loc["A", f"{metric}_std"] == pytest.approx(expected)
        assert summary.loc["B", f"{metric}_std"] == 0


def test_reliability_bins_add_up_to_the_calibration_error(files):
    teachers, students = files
    table = reliability_table(students, teachers[:2], n_bins=10)
    assert list(table.name.unique()) == ["DE-2", "A", "B", "C"]
    for name, group in table.groupby("name"):
        images = group["count"].sum()
        assert images == 120 * (2 if name == "A" else 1)
        if name != "A":
            gaps = (group.accuracy - group.confidence).abs() * group["count"]
            assert gaps.sum() / images == pytest.approx(group.ece.iloc[0])
    assert table[table.name == "A"].n.unique().tolist() == [2]


def test_diversity_in_confidence_bins_averages_to_the_diversity(files):
    _, students = files
    replicates = [read_logits(path, "test")[0] for path in students["A"]]
    table = diversity_by_confidence("A", replicates, n_bins=8)
    assert table["count"].sum() == 240
    mean = (table.kl * table["count"]).sum() / 240
    expected = np.mean([metrics.pairwise_kl(logits) for logits in replicates])
    assert mean == pytest.approx(expected)
    assert table.mean_kl.unique() == pytest.approx([expected])
    confidence = metrics.ensemble_probs(np.concatenate(replicates)).max(1)
    for _, row in table.iterrows():
        assert row["count"] == np.sum((confidence > row.low) & (confidence <= row.high))


def test_learning_curves_are_joined_with_their_system(tmp_path):
    paths = []
    for index in range(3):
        path = tmp_path / f"{index}.csv"
        pd.DataFrame({"epoch": [1, 2], "loss": [index, index / 2]}).to_csv(path, index=False)
        paths.append(str(path))
    joined = learning_curves(["teacher", "KD", "KD"], paths)
    assert joined.groupby(["system", "replicate"]).loss.sum().to_dict() == {
        ("KD", 0): 1.5,
        ("KD", 1): 3.0,
        ("teacher", 0): 0.0,
    }


def test_logits_that_are_not_finite_are_refused(tmp_path):
    path = tmp_path / "logits.h5"
    logits = np.zeros((3, 2, 4), np.float32)
    logits[1, 1, 1] = np.nan
    write_hdf5(path, {"test/logits": logits, "test/labels": np.zeros(3, np.int64)}, {})
    with pytest.raises(InputError, match=r"logits.h5: some test logits are not finite"):
        read_logits(path, "test")


@pytest.fixture
def summary(files):
    return tables.summarize(score_systems(*files, n_bins=15))


def test_markdown_marks_best_and_second_best_student(summary):
    lines = tables.to_markdown(summary).splitlines()
    header, rows = lines[0].split(" | "), {line.split(" | ")[0][2:]: line for line in lines[2:9]}
    nll = header.index("NLL ↓")
    assert rows["C"].split(" | ")[nll].startswith("**")
    assert rows["A"].split(" | ")[nll].startswith("*")
    assert not rows["A"].split(" | ")[nll].startswith("**")
    assert "*" not in rows["B"].split(" | ")[nll]
    assert "*" not in rows["DE-4"].replace("T*", "")
    dee = header.index("DEE ↑")
    assert rows["B"].split(" | ")[dee] == "<1.00"
    assert rows["C"].split(" | ")[dee] == f"**>{POOL}.00**"
    value = summary.set_index("system").loc["A"]
    assert f"{value.nll:.4f} ± {value.nll_std:.4f}" in rows["A"]


def test_latex_escapes_and_has_as_many_cells_in_every_row(summary):
    summary["system"] = summary["system"].replace("A", "A_100% & more")
    text = tables.to_latex(summary)
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert r"A\_100\% \& more" in text
    assert {len(row.replace(r"\&", "").split("&")) for row in rows} == {len(tables.COLUMNS) + 3}


def test_html_escapes_labels(summary):
    summary["system"] = summary["system"].replace("A", "<script>")
    assert "<script>" not in tables.to_html(summary)
