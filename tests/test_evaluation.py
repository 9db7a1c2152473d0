"""Tables of numbers against sums written out, SciPy and scikit-learn."""

import math
from itertools import combinations, permutations, product
from math import comb

import numpy as np
import pandas as pd
import pytest
from scipy.special import log_softmax, logsumexp, softmax
from scipy.stats import bootstrap
from scipy.stats import entropy as kl_or_entropy
from sklearn.metrics import average_precision_score, brier_score_loss, log_loss, roc_auc_score

from ensdistill import InputError, metrics
from ensdistill.downloads import ANSWERS, Archive
from ensdistill.hdf5 import write_hdf5
from ensdistill.predictions import read_prediction
from ensdistill.reports import (
    corruptions,
    directions,
    diversity_students,
    diversity_teachers,
    jacobians,
    learning_curves,
    out_of_distribution,
    reliability,
    saturation,
    scores,
    selective,
    sweep,
    transfer,
)
from ensdistill.reports.diversity_teachers import diversity_by_confidence
from ensdistill.systems import by_label, subsets
from tests.builders import md5

POOL, K = 4, 5


@pytest.fixture
def files(tmp_path):
    """Logits files of a pool of teachers and of students of two members each."""
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


def read_logits(path, split):
    prediction, labels = read_prediction(path, split)
    return prediction.logits, labels


def pairwise(logits):
    """KL(p_i ‖ p_j) of every image, averaged over ordered pairs of members."""
    p = softmax(np.asarray(logits, np.float64), axis=2)
    pairs = permutations(range(p.shape[1]), 2)
    return np.mean([kl_or_entropy(p[:, i], p[:, j], axis=1) for i, j in pairs], axis=0)


def is_mean_with_interval(found, values):
    """Estimate, low and high against SciPy's percentile bootstrap of the mean over images."""
    reference = bootstrap((values,), np.mean, n_resamples=9999, method="percentile", rng=1)
    # The ends are quantiles of resamples, and vary by 0.06 standard errors.
    ends = pytest.approx(reference.confidence_interval, abs=0.3 * reference.standard_error)
    return found[0] == pytest.approx(np.mean(values)) and found[1:] == ends


def test_scores_of_every_subset_and_student(files):
    teachers, students = files
    frame = scores.table(teachers, students, n_bins=15)
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
    frame = scores.table(teachers, students, n_bins=15)
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


def test_the_temperature_is_from_the_validation_images_alone(files):
    teachers, students = files
    frame = scores.table(teachers, students, n_bins=15).set_index(["system", "replicate"])
    (val, val_labels), (test, labels) = (read_logits(students["C"][0], s) for s in ("val", "test"))
    row, temperature = (
        frame.loc["C", "0"],
        metrics.optimal_temperature(metrics.ensemble_probs(val), val_labels),
    )
    scaled = softmax(np.log(softmax(test.astype(float), axis=2).mean(1)) / temperature, axis=1)
    assert row.temperature == temperature
    assert row.nll_ts == pytest.approx(log_loss(labels, scaled, labels=range(K)))


def publish_answers(monkeypatch, path, shares):
    """Write an archive of people's answers that stands for the official one."""
    np.save(path, shares)
    known = Archive("http://127.0.0.1/", md5(path.read_bytes()))
    monkeypatch.setitem(ANSWERS, path.name, known)
    return str(path)


def test_predictions_are_compared_with_peoples_answers_where_there_are_some(
    files, tmp_path, monkeypatch
):
    teachers, students = files
    students = {"A": students["A"]}
    assert scores.table(teachers, students, n_bins=15).human_kl.isna().all()
    labels = read_logits(teachers[0], "test")[1]
    shares = 0.6 * np.eye(K)[labels] + 0.4 * np.random.default_rng(7).dirichlet(np.ones(K), 120)
    archive = publish_answers(monkeypatch, tmp_path / "cifar10h-probs.npy", shares)
    table = scores.table(teachers, students, n_bins=15, human=[archive])
    rows = table.set_index(["system", "replicate"])
    p = softmax(np.float64(read_logits(students["A"][1], "test")[0]), axis=2).mean(1)
    assert rows.human_kl["A", "1"] == pytest.approx(np.mean(kl_or_entropy(shares, p, axis=1)))
    for wrong in (shares[:-1], np.roll(shares, 1, axis=1)):
        publish_answers(monkeypatch, tmp_path / "cifar10h-probs.npy", wrong)
        with pytest.raises(InputError, match="answers are not about the study's test images"):
            scores.table(teachers, students, n_bins=15, human=[archive])
    (tmp_path / "cifar10h-probs.npy").write_bytes(b"x")
    with pytest.raises(InputError, match=r"not the official cifar10h-probs\.npy"):
        scores.table(teachers, students, n_bins=15, human=[archive])


def test_a_single_network_has_no_diversity(files):
    teachers, students = files
    frame = scores.table(teachers, {**students, "single": teachers[:1]}, n_bins=15)
    without = frame.system.isin(["DE-1", "single"])
    assert frame.diversity.isna().tolist() == without.tolist()
    expected = pairwise(read_logits(students["B"][0], "test")[0]).mean()
    assert frame.diversity[frame.system == "B"].tolist() == pytest.approx([expected])


def test_large_pools_are_sampled_without_repetition():
    drawn = subsets(12, 6)
    assert len(drawn) == len(set(drawn)) == 64
    assert drawn == subsets(12, 6)
    assert all(len(set(chosen)) == 6 and max(chosen) < 12 for chosen in drawn)
    assert subsets(5, 2) == list(combinations(range(5), 2))


def test_reliability_bins_add_up_to_the_calibration_error(files):
    teachers, students = files
    table = reliability.table(teachers[:2], students, n_bins=10)
    assert list(table.name.unique()) == ["DE-2", "A", "B", "C"]
    for name, group in table.groupby("name"):
        images = group["count"].sum()
        assert images == 120 * (2 if name == "A" else 1)
        if name != "A":
            gaps = (group.accuracy - group.confidence).abs() * group["count"]
            assert gaps.sum() / images == pytest.approx(group.ece.iloc[0])
    assert table[table.name == "A"].n.unique().tolist() == [2]


def test_risk_coverage_curves_are_the_errors_among_the_surest(files):
    teachers, students = files
    table = selective.table(teachers[:2], students)
    assert list(table.system.unique()) == ["DE-1", "DE-2", "A", "B", "C"]
    assert table.groupby("system").replicate.nunique().to_dict() == {
        **{"DE-1": 2, "DE-2": 1},
        **{"A": 2, "B": 1, "C": 1},
    }
    read = [(name, 0, students[name][0]) for name in "ABC"] + [("DE-1", 1, teachers[1])]
    for system, replicate, path in read:
        logits, labels = read_logits(path, "test")
        p = softmax(np.float64(logits), axis=2).mean(1)
        wrong = [np.argmax(p[i]) != labels[i] for i in sorted(range(120), key=lambda i: -max(p[i]))]
        rows = table[(table.system == system) & (table.replicate == replicate)]
        assert rows.coverage.tolist() == list(range(1, 101))
        for coverage, risk in zip(rows.coverage, rows.risk, strict=True):
            kept = math.ceil(coverage * 120 / 100)
            assert risk == pytest.approx(100 * sum(wrong[:kept]) / kept)
        means = [sum(wrong[:k]) / k for k in range(1, 121)]
        assert rows.aurc.tolist() == pytest.approx([sum(means) / 120] * 100)
        assert rows.n.unique().tolist() == [120]


def test_diversity_in_confidence_bins_averages_to_the_diversity(files):
    _, students = files
    replicates = [read_prediction(path, "test")[0] for path in students["A"]]
    table = diversity_by_confidence("A", replicates, n_bins=8)
    assert table["count"].sum() == 240
    mean = (table.kl * table["count"]).sum() / 240
    expected = np.mean([metrics.pairwise_kl(it.logits) for it in replicates])
    assert mean == pytest.approx(expected)
    assert table.mean_kl.unique() == pytest.approx([expected])
    confidence = np.concatenate([metrics.ensemble_probs(it.logits) for it in replicates]).max(1)
    for _, row in table.iterrows():
        assert row["count"] == np.sum((confidence > row.low) & (confidence <= row.high))


@pytest.fixture
def perturbed(tmp_path):
    """Two teachers on training images, as they are and moved; sure of some and not of others."""
    rng = np.random.default_rng(2)
    size = rng.uniform(1, 20, (90, 1, 1))
    arrays = {f"{name}/logits": size * rng.normal(size=(90, 2, K)) for name in ("clean", "ods")}
    path = str(tmp_path / "perturbed.h5")
    labels = arrays["clean/logits"].mean(1).argmax(1)
    said = {"titles": {"clean": "as they are", "ods": "A step"}, "eta": 0.25}
    write_hdf5(path, {**arrays, "labels": labels}, said)
    return path, arrays, labels


def test_teachers_diversity_is_shown_on_train_and_on_test(files, perturbed):
    teachers, _ = files
    path, arrays, _ = perturbed
    table = diversity_teachers.table(path, teachers[:2], n_bins=8)
    test = np.concatenate([read_logits(teacher, "test")[0] for teacher in teachers[:2]], axis=1)
    expected = {f"train_{name}": pairwise(arrays[f"{name}/logits"]) for name in ("clean", "ods")}
    expected["test_clean"] = pairwise(test)
    assert list(table.name.unique()) == list(expected)
    assert list(table.title.unique()) == ["Train, as they are", "Train, A step", "Test, clean"]
    for name, group in table.groupby("name"):
        assert group["count"].sum() == len(expected[name])
        assert group.mean_kl.tolist() == pytest.approx([expected[name].mean()] * 8)


def test_students_diversity_leaves_single_networks_out(files):
    teachers, students = files
    table = diversity_students.table(teachers, {**students, "single": teachers[:1]}, n_bins=8)
    assert list(table.name.unique()) == ["DE-4", "A", "B", "C"]
    expected = np.mean([pairwise(read_logits(path, "test")[0]) for path in students["A"]])
    assert table[table.name == "A"].mean_kl.tolist() == pytest.approx([expected] * 8)


def test_saturation_counts_images_by_how_far_from_one_hot_a_teacher_is(files, perturbed):
    teachers, _ = files
    path, arrays, labels = perturbed
    table = saturation.table(path, teachers[:2])
    test = [read_logits(teacher, "test") for teacher in teachers[:2]]
    expected = {("test", j): (logits[:, 0], y) for j, (logits, y) in enumerate(test)}
    expected |= {("train", j): (arrays["clean/logits"][:, j], labels) for j in range(2)}
    groups = dict(list(table.groupby(["split", "teacher"])))
    assert groups.keys() == expected.keys()
    for key, (logits, y) in expected.items():
        largest = log_softmax(logits.astype(float), axis=1).max(1)
        # 1 − max p = −(exp(log max p) − 1)
        shares = [np.mean(-np.expm1(largest) <= doubt) for doubt in saturation.DOUBTS]
        assert groups[key].share.tolist() == shares
        assert groups[key].doubt.tolist() == saturation.DOUBTS.tolist()
        same = groups[key][["confidence", "accuracy", "n"]].drop_duplicates().to_numpy().tolist()
        right = 100 * np.mean(logits.argmax(1) == y)
        assert same == [pytest.approx([np.exp(largest).mean(), right, len(y)])]
    share = groups["train", 0].share
    assert 0 < share.iloc[0] < share.iloc[-2] < share.iloc[-1] == 1


def test_sweep_is_the_diversity_at_every_size(files, perturbed, tmp_path):
    teachers, _ = files
    rng = np.random.default_rng(3)
    etas, sets = [0.125, 0.25, 0.5], ["gaussian", "ods"]
    arrays = {f"{name}/logits": rng.normal(size=(3, 70, 2, K)) for name in sets}
    swept = str(tmp_path / "swept.h5")
    write_hdf5(swept, arrays, {"etas": etas, "titles": dict(zip(sets, "GO", strict=True))})
    table = sweep.table(swept, perturbed[0], teachers[:2])
    rows = table.set_index(["perturbation", "eta"])
    assert list(rows.index) == [(name, eta) for name in sets for eta in etas]
    for (name, eta), row in rows.iterrows():
        assert row.title == {"gaussian": "G", "ods": "O"}[name]
        values = pairwise(arrays[f"{name}/logits"][etas.index(eta)])
        assert is_mean_with_interval(row[["kl", "low", "high"]].tolist(), values)
        assert row.n == 70
    test = np.concatenate([read_logits(teacher, "test")[0] for teacher in teachers[:2]], axis=1)
    train = pairwise(perturbed[1]["clean/logits"]).mean()
    same = table[["train_kl", "test_kl", "study_eta"]].drop_duplicates().to_numpy().tolist()
    assert same == [pytest.approx([train, pairwise(test).mean(), 0.25])]


@pytest.fixture
def transferred(tmp_path):
    """Three members of an ensemble and a fourth network outside it."""
    rng = np.random.default_rng(4)
    arrays = {
        "clean/logits": rng.normal(size=(60, 4, K)),
        "ods/logits": 2 * rng.normal(size=(4, 60, 4, K)),
        "cosines": rng.uniform(-1, 1, (60, 4, 4)),
        "random_cosines": rng.uniform(-0.1, 0.1, (60, 4)),
    }
    path = str(tmp_path / "transferred.h5")
    write_hdf5(path, arrays, {})
    return path, arrays


def test_transfer_is_measured_on_the_members_other_than_the_source(transferred):
    path, arrays = transferred
    clean, ods = arrays["clean/logits"], arrays["ods/logits"]
    others = {0: [1, 2], 1: [0, 2], 2: [0, 1], 3: [0, 1, 2]}
    table = transfer.table(path, members=3).set_index("source")
    assert table["where"].to_dict() == {0: "inside", 1: "inside", 2: "inside", 3: "outside"}
    for source, row in table.iterrows():
        moved = pairwise(ods[source][:, others[source]])
        assert row.clean == pytest.approx(pairwise(clean[:, others[source]]).mean())
        assert is_mean_with_interval(row[["ods", "ods_low", "ods_high"]].tolist(), moved)
        own = pairwise(ods[source][:, :3]).mean() if source < 3 else np.nan
        assert row.own == pytest.approx(own, nan_ok=True)
        assert row.n == 60


def test_cosines_are_told_apart_by_where_the_two_networks_are(transferred):
    path, arrays = transferred
    cosines = arrays["cosines"]
    expected = {
        "inside": [cosines[:, i, j] for i, j in [(0, 1), (0, 2), (1, 2)]],
        "outside": [cosines[:, i, 3] for i in range(3)],
        "random": list(arrays["random_cosines"].T),
    }
    table = directions.table(path, members=3)
    assert list(table.name.unique()) == list(expected)
    for name, group in table.groupby("name"):
        values = np.concatenate(expected[name])
        for _, row in group.iterrows():
            assert row["count"] == np.sum((values >= row.low) & (values < row.high))
        assert group["mean"].tolist() == pytest.approx([values.mean()] * len(group))
        assert group["n"].unique().tolist() == [group["count"].sum()] == [len(values)]
    # Without an external network nothing is outside.
    assert list(directions.direction_cosines(path, members=4)) == ["inside", "random"]


def test_jacobian_distances_are_averaged_over_members_seed_by_seed(tmp_path):
    rng = np.random.default_rng(5)
    arrays = {
        f"students/{method}/{seed}/{measure}": rng.gamma(2.0, size=(50, 3))
        for method in ("kd", "be")
        for seed in (10, 2, 0)  # whose order as text is another
        for measure in ("error", "cosine")
    }
    path = str(tmp_path / "distances.h5")
    write_hdf5(path, arrays, {})
    table = jacobians.table(path, {"be": "BE-3", "kd": "KD"})
    rows = table.set_index(["system", "replicate"])
    assert list(rows.index) == [(label, i) for label in ("BE-3", "KD") for i in range(3)]
    for (label, replicate), row in rows.iterrows():
        student = f"students/{'kd' if label == 'KD' else 'be'}/{(0, 2, 10)[replicate]}"
        for measure in ("error", "cosine"):
            found = row[[measure, f"{measure}_low", f"{measure}_high"]].tolist()
            assert is_mean_with_interval(found, arrays[f"{student}/{measure}"].mean(1))
        assert row.n == 50


@pytest.fixture
def shifted(tmp_path):
    """Logits files of two teachers and of students on shifted images, and their arrays."""
    rng = np.random.default_rng(6)
    labels = {split: rng.integers(0, K, 40) for split in ("clean/0", "fog/1", "fog/5")}
    labels = {f"corrupted/{split}": y for split, y in labels.items()}
    labels["out_of_distribution/near"] = np.full(55, -1)
    labels["out_of_distribution/far"] = np.full(30, -1)
    known = {}

    def write(name, members):
        path = str(tmp_path / f"shifted_{name}.h5")
        known[path] = {split: rng.normal(size=(len(y), members, K)) for split, y in labels.items()}
        arrays = {f"{split}/logits": logits for split, logits in known[path].items()}
        write_hdf5(path, {**arrays, **{f"{split}/labels": y for split, y in labels.items()}}, {})
        return path

    teachers = [write(f"teacher{seed}", 1) for seed in range(2)]
    students = {"A": [write(f"a{seed}", 2) for seed in range(2)], "single": [write("single", 1)]}
    return teachers, students, known, labels


def systems_of(teachers, students, read):
    """Logits by system and replicate."""
    alone = [read(path) for path in teachers]
    systems = {("DE-1", i): logits for i, logits in enumerate(alone)}
    systems[f"DE-{len(alone)}", 0] = np.concatenate(alone, axis=1)
    pairs = ((label, enumerate(paths)) for label, paths in students.items())
    return systems | {(label, i): read(path) for label, group in pairs for i, path in group}


def test_corruptions_has_every_system_on_every_corrupted_set(shifted):
    teachers, students, known, labels = shifted
    table = corruptions.table(teachers, students, n_bins=10)
    rows = table.set_index(["kind", "severity", "system", "replicate"])
    assert len(rows) == 3 * 6
    for kind, severity in (("clean", 0), ("fog", 1), ("fog", 5)):
        split = f"corrupted/{kind}/{severity}"
        y = labels[split]
        systems = systems_of(teachers, students, lambda path, split=split: known[path][split])
        for system, logits in systems.items():
            row, probs = rows.loc[(kind, severity, *system)], softmax(logits, axis=2).mean(1)
            diversity = pairwise(logits).mean() if logits.shape[1] > 1 else np.nan
            assert row.to_dict() == pytest.approx(
                {
                    "acc": 100 * np.mean(probs.argmax(1) == y),
                    "nll": log_loss(y, probs, labels=range(K)),
                    "ece": metrics.ece(probs, y, 10),
                    "bs": brier_score_loss(y, probs, labels=range(K), scale_by_half=False),
                    "entropy": kl_or_entropy(probs, axis=1).mean(),
                    "diversity": diversity,
                    "n": 40,
                },
                nan_ok=True,
            )


def test_out_of_distribution_images_are_told_from_test_images_by_uncertainty(files, shifted):
    teachers, students = files
    students = {"A": students["A"], "single": [teachers[3]]}
    shifted_teachers, shifted_students, known, _ = shifted
    sets = {"near": 55, "far": 30}
    files = shifted_teachers, shifted_students
    table = out_of_distribution.table(teachers[:2], students, *files, list(sets))
    inside = systems_of(teachers[:2], students, lambda path: read_logits(path, "test")[0])
    outside = {
        name: systems_of(*files, lambda path, name=name: known[path][f"out_of_distribution/{name}"])
        for name in sets
    }
    expected = {}
    for system, name in product(inside, sets):
        logits = np.float64(inside[system]), outside[name][system]
        p = [softmax(part, axis=2) for part in logits]
        uncertainty = {
            "max_probability": [1 - part.mean(1).max(1) for part in p],
            "entropy": [kl_or_entropy(part.mean(1), axis=1) for part in p],
            "energy": [-logsumexp(part.mean(1), axis=1) for part in logits],
            "max_logit": [-part.mean(1).max(1) for part in logits],
        }
        if p[0].shape[1] > 1:
            uncertainty["mutual_information"] = [
                kl_or_entropy(part.mean(1), axis=1) - kl_or_entropy(part, axis=2).mean(1)
                for part in p
            ]
        for score, values in uncertainty.items():
            both, is_outside = np.concatenate(values), np.repeat([0, 1], [120, sets[name]])
            # 53 of 55, and 29 of 30, are the first to make 95 %.
            threshold = np.sort(values[1])[-math.ceil(0.95 * sets[name])]
            expected[*system, score, name] = {
                "auroc": roc_auc_score(is_outside, both),
                "aupr": average_precision_score(is_outside, both),
                "fpr95": np.mean(values[0] >= threshold),
                "n_in": 120,
                "n_out": sets[name],
            }
    assert table["set"].unique().tolist() == ["near", "far"]
    found = table.set_index(["system", "replicate", "score", "set"]).to_dict("index")
    assert found.keys() == expected.keys()
    for key in expected:
        assert found[key] == pytest.approx(expected[key])


def test_learning_curves_are_joined_with_their_system(tmp_path):
    paths = []
    for index in range(3):
        path = tmp_path / f"{index}.csv"
        pd.DataFrame({"epoch": [1, 2], "loss": [index, index / 2]}).to_csv(path, index=False)
        paths.append(str(path))
    students = by_label(["KD", "KD"], paths[1:])
    joined = learning_curves.table(paths[:1], students)
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
