"""The page of claims: estimates by hand, and verdicts that follow what is in the files."""

from itertools import permutations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy as kl
from scipy.stats import gmean, norm

from ensdistill import metrics
from ensdistill.bootstrap import Interval
from ensdistill.claims import above, below, claims, verdict
from ensdistill.hdf5 import write_hdf5
from ensdistill.resampled import ResampledSystems

N, K, BINS = 300, 4, 10
LABELS = {
    "be": "Scratch",
    "kd_single": "Lone",
    "kd": "Plain",
    "kd_gaussian": "Noisy",
    "kd_ods": "Diverse",
    "kd_conf_ods": "Confident",
}
SPREAD = {"be": 1.4, "kd_single": 1.5, "kd": 0.85, "kd_gaussian": 0.85, "kd_ods": 0.3}
SPREAD["kd_conf_ods"] = 0.6
"""Of a student's error; that of a teacher is 1.2 for each member on its own."""
SEEDS = dict.fromkeys(LABELS, 3)
TITLES = "clean", "Gaussian", "ODS", "ConfODS"


class World:
    """A small study's files, with everything in them."""

    def __init__(self, folder, *, members=2, pool=3, methods=tuple(LABELS), permuted=None):
        rng = np.random.default_rng(0)
        truth = rng.normal(0, 1.5, (N, K))
        self.labels = (softmax(truth, axis=1).cumsum(1) > rng.random((N, 1))).argmax(1)
        self.members, self.folder = members, folder
        self.pool = [truth + rng.normal(0, 1.2, (N, K)) for _ in range(pool)]
        self.students, self.distances = {}, {}
        for name, spread in SPREAD.items():
            size = 1 if name == "kd_single" else members
            common = truth[:, None] + spread * rng.normal(size=(N, 1, K))
            spreads = spread * rng.uniform(0.1, 0.2, SEEDS[name])
            self.students[name] = [common + own * rng.normal(size=(N, size, K)) for own in spreads]
            for seed in range(SEEDS[name]):
                for measure, level in (("error", spread), ("cosine", 1 - spread / 2)):
                    key = f"students/{name}/{seed}/{measure}"
                    self.distances[key] = level + 0.1 * rng.normal(size=(40, members))
        train = rng.normal(0, 0.1, (150, members, K))
        scales = {"clean": 1, "gaussian": 1.02, "ods": 3, "conf_ods": 4}
        self.perturbed = {name: train * scale for name, scale in scales.items()}
        self.still = rng.normal(0, 0.1, (80, pool, K))
        self.moved = np.stack([self.still * (3 + source) for source in range(pool)])
        self.cosines = rng.uniform(0.1, 0.3, (80, pool, pool))
        self.noise = rng.normal(0, 0.05, (80, pool))

        self.arguments = {
            "teachers": [
                self.write(f"teacher{i}", self.of(logits[:, None]), {"parameters": 100})
                for i, logits in enumerate(self.pool)
            ],
            "students": {
                LABELS[name]: [
                    self.write(
                        f"{name}{seed}",
                        self.of(logits, rng.permutation(self.labels) if name == permuted else None),
                        {"parameters": 110},
                    )
                    for seed, logits in enumerate(self.students[name])
                ]
                for name in LABELS
                if name in methods
            },
            "paper": {
                name: {"name": name, "label": LABELS[name]} for name in LABELS if name in methods
            },
            "members": members,
            "n_bins": BINS,
            "perturbed": self.write(
                "perturbed",
                {f"{name}/logits": logits for name, logits in self.perturbed.items()},
                {"titles": dict(zip(scales, TITLES, strict=True)), "eta": 0.1},
            ),
            "transferred": self.write(
                "transferred",
                {
                    "clean/logits": self.still,
                    "ods/logits": self.moved,
                    "cosines": self.cosines,
                    "random_cosines": self.noise,
                },
                {},
            ),
            "distances": self.write(
                "distances",
                {key: v for key, v in self.distances.items() if key.split("/")[1] in methods},
                {},
            ),
        }
        self.claims = claims(**self.arguments)

    def of(self, logits, labels=None):
        labels = self.labels if labels is None else labels
        return {"test/logits": logits, "test/labels": labels}

    def write(self, name, arrays, attributes):
        path = str(self.folder / f"{name}.h5")
        write_hdf5(path, arrays, attributes)
        return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def involves(row, name):
    return LABELS[name] in f"{row.claim} {row.quantity}"


def divergence(logits):
    """KL(p_i ‖ p_j), mean over images and ordered pairs of members."""
    p = softmax(np.asarray(logits, np.float64), axis=2)
    return np.mean([kl(p[:, i], p[:, j], axis=1) for i, j in permutations(range(p.shape[1]), 2)])


def differing(logits):
    """Share of images and pairs of members with different predictions."""
    pairs = permutations(range(logits.shape[1]), 2)
    predicted = logits.argmax(2)
    return np.mean([predicted[:, i] != predicted[:, j] for i, j in pairs])


def curve(pool, labels):
    """NLL of deep ensembles of 1, 2 and 3 networks."""
    p = [softmax(logits, axis=1) for logits in pool]
    pairs = [(p[i] + p[j]) / 2 for i, j in ((0, 1), (0, 2), (1, 2))]
    groups = (p, pairs, [sum(p) / 3])
    return [np.mean([metrics.nll(probs, labels) for probs in group]) for group in groups]


def measured(logits, labels, sizes):
    """All metrics of a student that claims compare."""
    probs = softmax(logits, axis=2).mean(1)
    nll = metrics.nll(probs, labels)
    return {
        "NLL": nll,
        "ECE": metrics.ece(probs, labels, BINS),
        "Brier score": metrics.brier(probs, labels),
        "accuracy (%)": metrics.accuracy(probs, labels),
        "DEE": np.interp(nll, sizes[::-1], [3, 2, 1]),
    }


def test_estimates_are_those_computed_by_hand(world):
    diversity = {name: divergence(logits) for name, logits in world.perturbed.items()}
    test = divergence(np.stack(world.pool[:2], axis=1))
    expected = {
        "diversity of the teachers, train ÷ test": diversity["clean"] / test,
        "diversity on train, Gaussian ÷ clean": diversity["gaussian"] / diversity["clean"],
        "diversity on train, ODS ÷ clean": diversity["ods"] / diversity["clean"],
        "diversity on train, ConfODS ÷ clean": diversity["conf_ods"] / diversity["clean"],
        "diversity of the other teachers, ODS ÷ clean": divergence(world.moved[2][:, :2])
        / divergence(world.still[:, :2]),
        "mean cosine between two teachers' directions − between ODS and random ones": (
            world.cosines[:, 0, 1].mean() - world.noise.mean()
        ),
    }
    sizes = curve(world.pool, world.labels)
    assert sizes == sorted(sizes, reverse=True)
    mean, spread = {}, {}
    for name, seeds in world.students.items():
        rows = [measured(logits, world.labels, sizes) for logits in seeds]
        mean[name] = {key: np.mean([row[key] for row in rows]) for key in rows[0]}
        spread[name] = gmean([divergence(x) for x in seeds]) if name != "kd_single" else 0
        share = (sizes[0] - mean[name]["NLL"]) / (sizes[0] - sizes[1])
        extent = "more" if name in ("kd_ods", "kd_conf_ods") else "less"
        claim = f"{LABELS[name]} recovers {extent} than half of the ensemble's gain"
        expected[claim] = share
    for name in ("kd_ods", "kd_conf_ods"):
        label = LABELS[name]
        expected[f"diversity (KL) on test, {label} ÷ Plain"] = spread[name] / spread["kd"]
        apart = {x: np.mean([differing(seed) for seed in world.students[x]]) for x in (name, "kd")}
        disagreement = f"pairs of members that disagree on test (%), {label} − Plain"
        expected[disagreement] = 100 * (apart[name] - apart["kd"])
        for measure, title in (("error", "relative error"), ("cosine", "cosine")):
            own, plain = (
                np.mean([world.distances[f"students/{x}/{s}/{measure}"] for s in range(SEEDS[x])])
                for x in (name, "kd")
            )
            if measure == "error":
                expected[f"{title} of the Jacobians, Plain − {label}"] = plain - own
            else:
                expected[f"{title} of the Jacobians, {label} − Plain"] = own - plain
    for better, worse in (
        ("kd_ods", "kd"),
        ("kd_ods", "kd_gaussian"),
        ("kd_conf_ods", "kd"),
        ("kd_conf_ods", "kd_gaussian"),
        ("kd_conf_ods", "kd_ods"),
        ("kd", "kd_single"),
    ):
        for key in mean["kd"]:
            one, other = (
                (worse, better) if key in ("NLL", "ECE", "Brier score") else (better, worse)
            )
            expected[f"{key}, {LABELS[one]} − {LABELS[other]}"] = mean[one][key] - mean[other][key]
    recovers = world.claims.claim.str.contains("recovers")
    names = world.claims.claim.where(recovers, world.claims.quantity)
    found = dict(zip(names, world.claims.estimate, strict=True))
    assert len(found) == len(world.claims)
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-12)
    share = "share of DE-2's gain in NLL over DE-1, at 55 % of its parameters"
    assert world.claims.quantity[recovers].unique().tolist() == [share]


def test_every_row_has_an_interval_around_its_estimate_and_its_sample_sizes(world):
    table = world.claims
    first = ["claim", "quantity", "estimate", "low", "high", "verdict", "n"]
    assert list(table.columns[:7]) == first
    assert (table.low <= table.estimate).all()
    assert (table.estimate <= table.high).all()
    assert (table.low < table.high).all()
    for row in table.itertuples():
        fewest = min((SEEDS[name] for name in LABELS if involves(row, name)), default=0)
        assert row.seeds == fewest
    sizes = {"train, ": 150, "other teachers": 80, "two teachers": 80, "Jacobians": 40}
    for row in table.itertuples():
        expected = [n for part, n in sizes.items() if part in row.quantity]
        assert row.n == (expected[0] if expected and "÷ test" not in row.quantity else N)


CLAIMED = {
    "agree far more": (-np.inf, 0.5, "< 0.5"),
    "unchanged": (0.8, 1.25, "0.8 to 1.25"),
    "raises": (1, np.inf, "> 1"),
    "transfer": (2, np.inf, "> 2"),
    "alike": (0, np.inf, "> 0"),
    "more diverse, KL": (1, np.inf, "> 1"),
    "more diverse, disagree": (0, np.inf, "> 0"),
    "better": (0, np.inf, "> 0"),
    "as good": (0, np.inf, "> 0"),
    "falls short": (0, np.inf, "> 0"),
    "nearer": (0, np.inf, "> 0"),
    "recovers more": (0.5, np.inf, "> 0.5"),
    "recovers less": (-np.inf, 0.5, "< 0.5"),
}


def test_verdicts_are_about_the_claimed_values(world):
    for row in world.claims.itertuples():
        ((low, high, text),) = [
            bounds
            for parts, bounds in CLAIMED.items()
            if all(part in f"{row.claim} {row.quantity}" for part in parts.split(", "))
        ]
        inside = low < row.low and row.high < high
        beyond = row.high < low or row.low > high
        word = "supported" if inside else "not supported" if beyond else "undecided"
        assert (row.verdict, row.claimed) == (word, text)
    assert set(world.claims.verdict) == {"supported", "not supported", "undecided"}


def test_train_and_test_images_vary_apart_and_perturbed_and_clean_ones_together(world):
    def per_image(logits):
        p = softmax(logits, axis=2)
        return (kl(p[:, 0], p[:, 1], axis=1) + kl(p[:, 1], p[:, 0], axis=1)) / 2

    def error(values):
        return values.std(ddof=1) / np.sqrt(len(values))

    clean, ods = (per_image(world.perturbed[name]) for name in ("clean", "ods"))
    test = per_image(np.stack(world.pool[:2], axis=1))
    # Errors of logarithms of means, by the delta method.
    apart = np.hypot(error(clean) / clean.mean(), error(test) / test.mean())
    together = error(ods / ods.mean() - clean / clean.mean())
    rows = world.claims.set_index("quantity")
    for quantity, expected in (
        ("diversity of the teachers, train ÷ test", apart),
        ("diversity on train, ODS ÷ clean", together),
    ):
        width = np.log(rows.high[quantity] / rows.low[quantity])
        assert width == pytest.approx(2 * norm.ppf(0.975) * expected, rel=0.15)


@pytest.mark.parametrize(
    ("low", "high", "claimed", "expected"),
    [
        (0.1, 0.2, above(0), "supported"),
        (-0.2, -0.1, above(0), "not supported"),
        (-0.1, 0.1, above(0), "undecided"),
        (0.0, 0.0, above(0), "undecided"),  # such as two methods whose DEE is clipped
        (0.0, 0.1, above(0), "undecided"),
        (0.1, 0.2, below(0.5), "supported"),
        (0.6, 0.7, below(0.5), "not supported"),
        (0.9, 1.1, (0.8, 1.25), "supported"),
        (0.7, 1.1, (0.8, 1.25), "undecided"),
        (1.3, 1.4, (0.8, 1.25), "not supported"),
        (0.6, 0.7, (0.8, 1.25), "not supported"),
        (0.7, 1.4, (0.8, 1.25), "undecided"),
        (np.nan, np.nan, (0.8, 1.25), "undecided"),
    ],
)
def test_a_verdict_needs_the_whole_interval(low, high, claimed, expected):
    assert verdict(Interval((low + high) / 2, low, high), claimed) == expected


def test_permuted_labels_change_the_verdicts_of_that_method_alone(world, tmp_path):
    other = World(tmp_path, permuted="kd_ods").claims
    assert other.quantity.tolist() == world.claims.quantity.tolist()
    changed = 0
    for before, after in zip(world.claims.itertuples(), other.itertuples(), strict=True):
        without_labels = "diverse" in before.claim or "Jacobians" in before.claim
        if without_labels or not involves(before, "kd_ods"):
            assert before == after
        else:
            # Now it predicts nothing, and whatever is compared with it is better.
            assert after.verdict != before.verdict
            better = "Confident is" in after.claim
            assert after.verdict == ("supported" if better else "not supported")
            changed += 1
    assert changed == 16  # five metrics against three others, and the share recovered


@pytest.mark.parametrize(
    "methods", [("kd", "kd_ods"), ("be", "kd_gaussian", "kd_conf_ods"), ("kd_single",)]
)
def test_without_a_method_just_its_rows_are_missing(world, tmp_path, methods):
    found = World(tmp_path, methods=methods).claims
    missing = LABELS.keys() - set(methods)
    kept = [not any(involves(row, name) for name in missing) for row in world.claims.itertuples()]
    assert found.to_dict("list") == world.claims[kept].to_dict("list")
    assert len(found) == {"kd": 17, "be": 14, "kd_single": 7}[methods[0]]


def test_the_claims_are_about_the_papers_methods_alone(world):
    """Other methods of the same parts, before the paper's in the study, change nothing."""
    arguments, others = world.arguments, {"Another": "Noisy", "EnD2": "Lone", "Late": "Diverse"}
    students = arguments["students"]
    students = {label: students[same] for label, same in others.items()} | students
    found = claims(**arguments | {"students": students})
    assert found.to_dict("list") == world.claims.to_dict("list")


def test_without_methods_of_the_paper_the_claims_are_about_the_teachers(world):
    found = claims(**world.arguments | {"paper": {}})
    of_students = [any(involves(row, name) for name in LABELS) for row in world.claims.itertuples()]
    assert len(found) == 6
    assert found.claim.tolist() == [
        claim for claim, leave in zip(world.claims.claim, of_students, strict=True) if not leave
    ]


def test_without_external_teachers_transfer_is_claimed_within_the_ensemble_only(tmp_path):
    three = World(tmp_path, members=3)
    rows = three.claims[three.claims.claim.str.contains("transfer")]
    assert rows.claim.tolist() == [
        "ODS directions transfer from a network inside the ensemble to its members"
    ]
    others = {0: [1, 2], 1: [0, 2], 2: [0, 1]}
    moved = np.mean([divergence(three.moved[i][:, pair]) for i, pair in others.items()])
    still = np.mean([divergence(three.still[:, pair]) for pair in others.values()])
    assert rows.estimate.tolist() == pytest.approx([moved / still])


def test_two_teachers_leave_none_to_differ_from(tmp_path):
    two = World(tmp_path, members=2, pool=2, methods=("kd",))
    assert not two.claims.claim.str.contains("transfer").any()


def test_resampled_metrics_are_those_of_a_data_set_with_images_repeated(world):
    arguments = world.arguments
    systems = ResampledSystems(arguments["teachers"], arguments["students"], 2, BINS)
    titles = {"nll": "NLL", "ece": "ECE", "bs": "Brier score", "acc": "accuracy (%)", "dee": "DEE"}
    for b in range(5):
        drawn = np.repeat(np.arange(N), np.rint(N * systems.weights[b]).astype(int))
        assert len(drawn) == N
        labels = world.labels[drawn]
        sizes = curve([logits[drawn] for logits in world.pool], labels)
        np.testing.assert_allclose(systems.curve.resampled[b], sizes, rtol=1e-6)
        for name, seeds in world.students.items():
            for seed, logits in enumerate(seeds):
                expected = measured(logits[drawn], labels, sizes)
                found = systems.metrics[LABELS[name]]
                for key, title in titles.items():
                    assert found[key].resampled[b, seed] == pytest.approx(expected[title])
                if name != "kd_single":
                    diversity = found["diversity"].resampled[b, seed]
                    assert diversity == pytest.approx(divergence(logits[drawn]))
