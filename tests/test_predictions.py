"""Kinds of prediction: what metrics ask of them, and one more kind."""

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from ensdistill import InputError
from ensdistill.files import write_hdf5
from ensdistill.predictions import PREDICTIONS, Mixture, Prediction, join, read_prediction
from ensdistill.reports import diversity_students, out_of_distribution, scores

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
    joined = join([Mixture(logits[:, [member]]) for member in range(3)])
    np.testing.assert_array_equal(joined.logits, logits)


class Dirichlet(Prediction):
    """Concentrations e^z + prior; what the next kind of prediction may be like."""

    def __init__(self, logits, prior):
        super().__init__(logits)
        self.alpha = np.exp(self.logits[:, 0].astype(float)) + prior

    @classmethod
    def stored(cls, logits, attributes):
        return cls(logits, attributes["prior"])

    @classmethod
    def join(cls, parts):
        raise NotImplementedError

    def probs(self):
        return self.alpha / self.alpha.sum(1, keepdims=True)

    def diversity(self):
        return (K - 1) / self.alpha.sum(1)


@pytest.fixture
def written(tmp_path, logits, monkeypatch):
    monkeypatch.setitem(PREDICTIONS, "dirichlet", Dirichlet)
    labels = np.random.default_rng(1).integers(0, K, N)

    def write(name, members, splits=("val", "test"), **attributes):
        arrays = {f"{split}/logits": logits[:, :members] for split in splits}
        arrays |= {f"{split}/labels": labels for split in splits}
        path = str(tmp_path / f"{name}.h5")
        write_hdf5(path, arrays, {"parameters": 5, **attributes})
        return path

    return write


def test_results_ask_whatever_kind_of_prediction_a_file_names(written, logits):
    teachers = [written("a", 1), written("b", 1, prediction="mixture")]
    student = written("c", 1, prediction="dirichlet", prior=1.0)
    alpha = np.exp(logits[:, 0].astype(float)) + 1
    expected = np.mean(3 / alpha.sum(1))
    frame = scores.table(teachers, {"D": [student]}, n_bins=5).set_index("system")
    assert frame.diversity["D"] == pytest.approx(expected)
    probs = alpha / alpha.sum(1, keepdims=True)
    assert frame.entropy["D"] == pytest.approx(entropy(probs, axis=1).mean())
    table = diversity_students.table(teachers, {"D": [student]}, n_bins=5)
    assert table.mean_kl[table.name == "D"].unique() == pytest.approx([expected])
    shifted = written("d", 1, ["out_of_distribution"], prediction="dirichlet", prior=1.0)
    others = [written(name, 1, ["out_of_distribution"]) for name in "ef"]
    found = out_of_distribution.table(teachers, {"D": [student]}, others, {"D": [shifted]})
    assert set(found.score[found.system == "D"]) == {"max_probability", "entropy"}


def test_an_unknown_kind_of_prediction_is_refused(written):
    path = written("x", 1, prediction="oracle")
    with pytest.raises(InputError, match=r"x.h5: unknown prediction 'oracle'; known are mixture"):
        read_prediction(path, "test")
