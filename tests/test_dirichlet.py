"""Dirichlet predictions against draws, integrals and digits that share no code with them."""

import mpmath
import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Categorical, kl_divergence
from torch.distributions import Dirichlet as Sampler

from ensdistill.hdf5 import write_hdf5
from ensdistill.predictions import Dirichlet, Mixture, join, read_prediction

N, K, DRAWS = 4, 3, 100_000


@pytest.fixture(params=[(1, 0.0), (1, 1.0), (3, 0.0)], ids=["one", "offset", "three"])
def made(request):
    """A prediction, and draws (S, N, K) from it, twice, independent of each other."""
    networks, offset = request.param
    logits = np.random.default_rng(0).normal(1, 1.2, (N, networks, K)).astype(np.float32)
    sampler = Sampler(torch.from_numpy(logits).double().exp() + offset)
    torch.manual_seed(0)
    draws = [sampler.sample((DRAWS,)) for _ in range(2)]  # (S, N, M, K)
    chosen = [torch.randint(networks, (DRAWS, N, 1, 1)).expand(-1, -1, 1, K) for _ in range(2)]
    pairs = [part.gather(2, which)[:, :, 0] for part, which in zip(draws, chosen, strict=True)]
    return Dirichlet(logits, offset), *pairs


def assert_mean(found, draws):
    """Equal to the mean over draws (S, N), up to five of its standard errors, which are small."""
    mean, error = draws.mean(0), draws.std(0) / DRAWS**0.5
    assert (error < 0.02 * mean.abs()).all()
    assert (np.abs(found - mean.numpy()) < 5 * error.numpy()).all()


def test_all_is_what_draws_from_it_say(made):
    prediction, first, second = made
    entropy = Categorical(first.mean(0)).entropy()
    np.testing.assert_allclose(prediction.probs(), first.mean(0), atol=0.005)
    np.testing.assert_allclose(prediction.entropy(), entropy, atol=0.005)
    np.testing.assert_allclose(prediction.doubt(), 1 - first.mean(0).amax(1), atol=0.005)
    information = torch.from_numpy(prediction.entropy()) - Categorical(first).entropy()
    assert_mean(prediction.mutual_information(), information)
    assert_mean(prediction.diversity(), kl_divergence(Categorical(first), Categorical(second)))
    assert prediction.disagreement() is None


def test_it_is_the_limit_of_a_mixture_of_many_members():
    logits = np.random.default_rng(1).normal(1, 1, (N, 2, K))
    torch.manual_seed(1)
    draws = Sampler(torch.from_numpy(logits).exp() + 1).sample((20_000,))  # (S, N, M, K)
    members = Mixture(draws.permute(1, 0, 2, 3).flatten(1, 2).log().numpy())
    prediction = Dirichlet(logits, 1.0)
    for name in ("probs", "entropy", "doubt", "mutual_information", "diversity"):
        found, expected = (getattr(it, name)() for it in (prediction, members))
        np.testing.assert_allclose(found, expected, rtol=0.03, err_msg=name)


def test_with_two_classes_it_is_integrals_over_beta_densities():
    logits, offset = np.array([[[0.3, 1.1], [2.0, -0.4]]]), 0.5
    betas = [stats.beta(*alpha) for alpha in np.exp(logits[0]) + offset]

    def mean(density, function):
        return integrate.quad(lambda p: density.pdf(p) * function(p), 0, 1, epsabs=1e-11)[0]

    p = np.mean([beta.mean() for beta in betas])
    own = [mean(beta, lambda p: p * np.log(p) + (1 - p) * np.log1p(-p)) for beta in betas]
    logs = [(mean(beta, np.log), mean(beta, lambda p: np.log1p(-p)), beta.mean()) for beta in betas]
    crossed = [here * log_p + (1 - here) * log_q for *_, here in logs for log_p, log_q, _ in logs]
    prediction = Dirichlet(logits, offset)
    assert prediction.probs()[0, 0] == pytest.approx(p)
    assert prediction.diversity()[0] == pytest.approx(np.mean(own) - np.mean(crossed), rel=1e-7)
    information = stats.entropy([p, 1 - p]) + np.mean(own)
    assert prediction.mutual_information()[0] == pytest.approx(information, rel=1e-7)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("level", [-30, -5, 2, 6.9, 7.1, 12, 25])
def test_no_digits_are_lost_however_large_the_concentrations_are(level, offset):
    logits = np.array([[[0.0, 1, -2], [1, 0, 0]]]) + level
    found = Dirichlet(logits, offset)
    with mpmath.workdps(50):
        alpha = [[mpmath.exp(z) + offset for z in row] for row in logits[0].tolist()]
        p = [[a / sum(row) for a in row] for row in alpha]
        own = [
            sum(
                row[k] / sum(row) * (mpmath.psi(0, row[k] + 1) - mpmath.psi(0, sum(row) + 1))
                for k in range(K)
            )
            for row in alpha
        ]
        logs = [[mpmath.psi(0, a) - mpmath.psi(0, sum(row)) for a in row] for row in alpha]
        mean = [sum(column) / 2 for column in zip(*p, strict=True)]
        information = sum(own) / 2 - sum(q * mpmath.log(q) for q in mean)
        crossed = [mpmath.fdot(qs, row) for qs in p for row in logs]
        diversity = sum(own) / 2 - sum(crossed) / 4
    np.testing.assert_allclose(found.mutual_information(), float(information), rtol=1e-9)
    np.testing.assert_allclose(found.diversity(), float(diversity), rtol=1e-9)
    alone = Dirichlet(logits[:, :1], offset)
    np.testing.assert_allclose(alone.diversity(), float(2 / sum(alpha[0])), rtol=1e-12)


@pytest.mark.filterwarnings("error")
def test_logits_of_any_size_give_numbers():
    logits = np.random.default_rng(2).choice([-1e4, -800, 0, 800, 1e4], (200, 2, K))
    for offset in (0.0, 1.0):
        for prediction in (Dirichlet(logits, offset), Dirichlet(logits[:, :1], offset)):
            np.testing.assert_allclose(prediction.probs().sum(1), 1)
            information = prediction.mutual_information()
            assert (information > -1e-9).all()
            assert (information < np.log(K) + 1e-9).all()
            assert np.isfinite(prediction.diversity()).all()
            assert (prediction.diversity() >= 0).all()


def test_far_from_zero_it_is_a_point_or_the_corners():
    def ends(logit, offset=0.0):
        prediction = Dirichlet(np.full((1, 1, K), np.float32(logit)), offset)
        return [float(x[0]) for x in (prediction.mutual_information(), prediction.diversity())]

    assert ends(1e4) == pytest.approx([0, 0])
    assert ends(-1e4)[0] == pytest.approx(np.log(K))
    # α = 1: uniform on the simplex; E H(π) is 1/2 + … + 1/K.
    assert ends(-1e4, 1.0) == pytest.approx([np.log(K) - (1 / 2 + 1 / 3), (K - 1) / K])


def test_networks_are_joined_with_the_offsets_that_they_have():
    logits = np.random.default_rng(3).normal(0, 2, (N, 2, K))
    joined = join([Dirichlet(logits[:, :1], 1.0), Dirichlet(logits[:, 1:], 0.0)])
    alpha = np.exp(logits) + np.array([1.0, 0.0])[:, None]
    np.testing.assert_allclose(joined.probs(), (alpha / alpha.sum(2, keepdims=True)).mean(1))
    same = Dirichlet(np.log(alpha))
    np.testing.assert_allclose(joined.diversity(), same.diversity())
    np.testing.assert_allclose(joined.mutual_information(), same.mutual_information())


@pytest.mark.parametrize(("said", "offset"), [({}, 0), ({"concentration_offset": 1.0}, 1)])
def test_a_file_says_its_offset(tmp_path, said, offset):
    logits = np.random.default_rng(4).normal(0, 2, (N, 1, K)).astype(np.float32)
    arrays = {"test/logits": logits, "test/labels": np.zeros(N, int)}
    write_hdf5(tmp_path / "d.h5", arrays, {"prediction": "dirichlet", **said})
    prediction, _ = read_prediction(tmp_path / "d.h5", "test")
    alpha = np.exp(logits[:, 0].astype(float)) + offset
    np.testing.assert_allclose(prediction.probs(), alpha / alpha.sum(1, keepdims=True))


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_the_energy_of_one_network_is_its_concentration(offset):
    logits = np.random.default_rng(3).normal(0, 2, (N, 2, K))
    alpha = np.exp(logits) + offset
    one = Dirichlet(logits[:, :1], offset)
    np.testing.assert_allclose(one.energy(), -np.log(alpha[:, 0].sum(1)))
    np.testing.assert_allclose(one.max_logit(), -np.log(alpha[:, 0].max(1)))
    both = Dirichlet(logits, offset)
    geometric = np.sqrt(alpha[:, 0] * alpha[:, 1])
    np.testing.assert_allclose(both.energy(), -np.log(geometric.sum(1)))
    np.testing.assert_allclose(both.max_logit(), -np.log(geometric.max(1)))
