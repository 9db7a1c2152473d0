"""Kinds of prediction: what metrics ask of them, and one more kind."""

import math

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from ensdistill import InputError, tables
from ensdistill.hdf5 import write_hdf5
from ensdistill.predictions import Mixture, join, read_prediction
from ensdistill.reports import (
    corruptions,
    diversity_students,
    out_of_distribution,
    reliability,
    scores,
)
from ensdistill.resampled import ResampledSystems

N, K = 60, 4


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(0, 2, (N, 3, K)).astype(np.float32)


def test_a_mixture_averages_the_probabilities_of_its_members(logits):
    p = softmax(logits.astype(float), axis=2)
    prediction = Mixture(logits)
    np.testing.assert_allclose(prediction.probs(), p.mean(1))
    np.testing.assert_allclose(prediction.doubt(), 1 - p.mean(1).max(1), atol=1e-12)
    np.testing.assert_allclose(prediction.entropy(), entropy(p.mean(1), axis=1))
    means = [[sum(column) / 3 for column in image.T] for image in logits.astype(float)]
    energies = [-math.log(sum(math.exp(z) for z in image)) for image in means]
    np.testing.assert_allclose(prediction.energy(), energies)
    np.testing.assert_allclose(prediction.max_logit(), [-max(image) for image in means])
    information = entropy(p.mean(1), axis=1) - entropy(p, axis=2).mean(1)
    np.testing.assert_allclose(prediction.mutual_information(), information)
    pairs = [(i, j) for i in range(3) for j in range(3) if i != j]
    divergence = np.mean([entropy(p[:, i], p[:, j], axis=1) for i, j in pairs], axis=0)
    np.testing.assert_allclose(prediction.diversity(), divergence)
    votes = p.argmax(2)
    apart = np.mean([votes[:, i] != votes[:, j] for i, j in pairs], axis=0)
    np.testing.assert_allclose(prediction.disagreement(), apart)


def test_a_single_network_has_no_members_to_differ(logits):
    alone = Mixture(logits[:, :1])
    assert alone.diversity() is alone.disagreement() is alone.mutual_information() is None
    assert alone.entropy().shape == alone.doubt().shape == (N,)


def test_joined_single_networks_are_the_deep_ensemble(logits):
    parts = [Mixture(logits[:, [member]]) for member in range(3)]
    for joined in (join(parts), Mixture.join([Mixture(logits[:, :2]), parts[2]])):
        np.testing.assert_array_equal(joined.logits, logits)
        assert joined.shape == (N, 3, K)
        whole, labels = Mixture(logits), np.arange(N) % K
        np.testing.assert_array_equal(joined.nll(labels), whole.nll(labels))
        for name in ("probs", "diversity", "mutual_information", "disagreement", "entropy"):
            np.testing.assert_array_equal(getattr(joined, name)(), getattr(whole, name)(), name)


def test_the_log_likelihood_needs_labels_that_are_classes(logits):
    p, labels = softmax(logits.astype(float), axis=2).mean(1), np.arange(N) % K
    np.testing.assert_allclose(Mixture(logits).nll(labels), -np.log(p[np.arange(N), labels]))
    with pytest.raises(ValueError, match="labels must be in 0 … 3"):
        Mixture(logits).nll(labels + 1)


@pytest.fixture
def written(tmp_path, logits):
    labels = np.random.default_rng(1).integers(0, K, N)

    def write(name, members, splits=("val", "test"), **attributes):
        arrays = {f"{split}/logits": logits[:, :members] for split in splits}
        arrays |= {f"{split}/labels": labels for split in splits}
        path = str(tmp_path / f"{name}.h5")
        write_hdf5(path, arrays, {"parameters": 5, **attributes})
        return path

    return write


DIRICHLET = {"prediction": "dirichlet", "concentration_offset": 1.0}


def test_results_ask_whatever_kind_of_prediction_a_file_names(written, logits):
    teachers = [written("a", 1), written("b", 1, prediction="mixture")]
    students = {"D": [written("c", 1, **DIRICHLET)], "one": [written("d", 1)]}
    alpha = np.exp(logits[:, 0].astype(float)) + 1
    probs, expected = alpha / alpha.sum(1, keepdims=True), np.mean(3 / alpha.sum(1))
    frame = scores.table(teachers, students, n_bins=5)
    by_system = frame.set_index("system")
    assert by_system.diversity["D"] == pytest.approx(expected)
    assert by_system.entropy["D"] == pytest.approx(entropy(probs, axis=1).mean())
    assert np.isnan(by_system.diversity["one"])
    cells = {row.cells[0][0]: row.cells[-2][0] for row in tables._rows(tables.summarize(frame))}
    assert (cells["D"], cells["one"]) == (f"{expected:.4f}", "–")
    binned = diversity_students.table(teachers, students, n_bins=5)
    assert binned.name.unique().tolist() == ["DE-2", "D"]
    assert binned.mean_kl[binned.name == "D"].unique() == pytest.approx([expected])
    diagram = reliability.table(teachers, students, n_bins=5)
    bins = diagram[diagram.name == "D"]
    confidence = np.average(bins["confidence"], weights=bins["count"])
    assert confidence == pytest.approx(probs.max(1).mean())


def test_shifted_images_are_judged_by_what_a_prediction_has(written, logits):
    splits = ["out_of_distribution/far", "corrupted/clean/0", "corrupted/fog/3"]
    inside = [written(name, 1) for name in "ab"], {"D": [written("c", 1, **DIRICHLET)]}
    outside = [written(name, 1, splits) for name in "ef"]
    outside = outside, {"D": [written("d", 1, splits, **DIRICHLET)]}
    found = out_of_distribution.table(*inside, *outside, ["far"])
    assert set(found.score[found.system == "D"]) == set(out_of_distribution.UNCERTAINTIES)
    single = {"max_probability", "entropy", "energy", "max_logit"}
    assert set(found.score[found.system == "DE-1"]) == single
    outside[1]["one"] = outside[0][:1]
    shifted = corruptions.table(*outside, n_bins=5).groupby("system").diversity.mean()
    alpha = np.exp(logits[:, 0].astype(float)) + 1
    assert shifted["D"] == pytest.approx(np.mean(3 / alpha.sum(1)))
    assert np.isnan(shifted["one"])


def test_claims_speak_of_the_diversity_that_a_prediction_has(written):
    teachers, students = [written(name, 1) for name in "ab"], {"D": [written("c", 1, **DIRICHLET)]}
    found = ResampledSystems(teachers, students, 2, 5).metrics["D"]
    assert "diversity" in found
    assert "disagreement" not in found


def test_an_unknown_kind_of_prediction_is_refused(written):
    path = written("x", 1, prediction="oracle")
    with pytest.raises(InputError, match=r"x.h5: unknown prediction 'oracle'; known are mixture"):
        read_prediction(path, "test")
