"""Findings: estimates by hand, what flips them, and how simulated worlds are answered."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.special import softmax
from scipy.stats import kendalltau, norm, ttest_1samp, ttest_rel

from ensdistill.bootstrap import Estimate, Weights, holm, image_weights, interval, mean_of, p_value
from ensdistill.findings import CONTRASTS, Systems, adjusted, answers, findings
from ensdistill.hdf5 import write_hdf5
from ensdistill.studies import Study
from tests.project import REPOSITORY

N, COPIED, VALIDATED, K, POOL, MEMBERS, SEEDS = 400, 60, 90, 4, 3, 2, 4
SPREADS = {
    "Plain": 0.9,
    "Plain+Gaussian": 0.85,
    "Plain+ODS": 0.6,
    "Plain+ConfODS": 0.3,
    "Plain+mixup": 0.62,
    "Lone": 1.4,
    "Lone+ODS": 0.5,
    "Lone+ConfODS": 0.2,
    "Lone+mixup": 1.3,
    "Each+ODS": 0.5,
    "Each": 0.9,
    "Once": 0.9,
}
"""Of a student's error; that of a teacher is 1.2."""
FAMILIES = [
    {
        "none": "Plain",
        "gaussian": "Plain+Gaussian",
        "ods": "Plain+ODS",
        "conf_ods": "Plain+ConfODS",
        "mixup": "Plain+mixup",
    },
    {"none": "Lone", "ods": "Lone+ODS", "conf_ods": "Lone+ConfODS", "mixup": "Lone+mixup"},
    {"ods": "Each+ODS", "ods_each": "Each", "ods_each_single_pass": "Once"},
]
SPLITS = {
    "test": N,
    "val": VALIDATED,
    "corrupted/clean/0": COPIED,
    "corrupted/fog/1": COPIED,
    "corrupted/snow/5": COPIED,
    "out_of_distribution/other": 10,
}
COSTS = pd.DataFrame(
    [("DE-1", 100.0), ("DE-2", 200.0), *((name, 200.0) for name in SPREADS)],
    columns=["system", "macs"],
)
COSTS.loc[COSTS["system"].str.startswith("Lone"), "macs"] = 109.0


class World:
    """A small study's logits; `permuted` is a student whose test labels are shuffled."""

    def __init__(self, folder, *, swapped=(), permuted=None):
        rng = np.random.default_rng(1)
        truth = {split: rng.normal(0, 1.5, (n, K)) for split, n in SPLITS.items()}
        self.labels = {
            split: (softmax(x, axis=1).cumsum(1) > rng.random((len(x), 1))).argmax(1)
            for split, x in truth.items()
        }
        self.folder = folder
        self.pool = [
            {split: x + rng.normal(0, 1.2, x.shape) for split, x in truth.items()}
            for _ in range(POOL)
        ]
        self.students = {}
        for name, spread in SPREADS.items():
            common = {split: rng.normal(size=x.shape) for split, x in truth.items()}
            self.students[name] = [
                {
                    split: x + spread * common[split] + 0.1 * rng.normal(size=x.shape)
                    for split, x in truth.items()
                }
                for _ in range(SEEDS)
            ]
        if swapped:
            one, other = swapped
            self.students[one], self.students[other] = self.students[other], self.students[one]
        teachers = [self.write(f"teacher{i}", it) for i, it in enumerate(self.pool)]
        students = {
            name: [
                self.write(f"{name}{i}", it, shuffled=name == permuted)
                for i, it in enumerate(seeds)
            ]
            for name, seeds in self.students.items()
        }
        self.findings = findings(
            teachers=teachers,
            students=students,
            shifted_ensemble=teachers[:MEMBERS],
            shifted_students=students,
            costs=COSTS,
            families=FAMILIES,
            members=MEMBERS,
        )

    def write(self, name, logits, shuffled=False):
        labels = dict(self.labels)
        if shuffled:
            labels["test"] = np.random.default_rng(2).permutation(labels["test"])
        arrays = {f"{split}/logits": x[:, None] for split, x in logits.items()}
        arrays |= {f"{split}/labels": y for split, y in labels.items()}
        path = str(self.folder / f"{name}.h5")
        write_hdf5(path, arrays, {})
        return path

    def nll(self, systems, split):
        """Of a mixture of systems: mean over images, written out."""
        total = 0.0
        for i, label in enumerate(self.labels[split]):
            p = [np.exp(it[split][i]) / np.exp(it[split][i]).sum() for it in systems]
            total -= np.log(np.mean(p, axis=0)[label])
        return total / len(self.labels[split])

    def scaled(self, system):
        """NLL on test at the best of many temperatures on the validation images."""
        temperatures = np.geomspace(0.2, 5, 4000)
        z, y = system["val"], self.labels["val"]
        scores = [
            -np.log(softmax(z / t, axis=1)[np.arange(len(y)), y]).mean() for t in temperatures
        ]
        best = temperatures[int(np.argmin(scores))]
        return self.nll([{"test": system["test"] / best}], "test")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def test_estimates_are_those_computed_by_hand(world):
    table = world.findings
    on_test = {
        name: [world.nll([seed], "test") for seed in seeds]
        for name, seeds in world.students.items()
    }
    one = np.mean([world.nll([teacher], "test") for teacher in world.pool])
    ensemble = np.mean([world.nll(pair, "test") for pair in combinations(world.pool, 2)])

    def shifted(systems):
        return np.mean(
            [world.nll(systems, split) for split in ("corrupted/fog/1", "corrupted/snow/5")]
        )

    shift_one = np.mean([shifted([teacher]) for teacher in world.pool[:MEMBERS]])
    shift_ensemble = shifted(world.pool[:MEMBERS])
    on_copies = {
        name: [shifted([seed]) for seed in seeds] for name, seeds in world.students.items()
    }

    def share(name):
        return (one - np.mean(on_test[name])) / (one - ensemble)

    def share_shifted(name):
        return (shift_one - np.mean(on_copies[name])) / (shift_one - shift_ensemble)

    def difference(name, other):
        return np.mean(on_test[name]) - np.mean(on_test[other])

    confident = [("Plain", "Plain+ConfODS"), ("Lone", "Lone+ConfODS")]
    mixed = [("Plain+ODS", "Plain+mixup"), ("Lone+ODS", "Lone+mixup")]
    orders = [
        [kendalltau([on_test[x][seed] for x in SPREADS], [at[x][seed] for x in SPREADS]).statistic
         for seed in range(SEEDS)]
        for at in (
            on_copies,
            {x: [world.scaled(seed) for seed in seeds] for x, seeds in world.students.items()},
        )
    ]  # fmt: skip
    # Of the validation images, Lone+ConfODS is the best of all and of those that cost one network.
    expected = [
        share("Lone+ConfODS"),
        share_shifted("Lone+ConfODS"),
        np.mean([difference(*pair) for pair in confident]),
        *(difference(*pair) for pair in confident),
        difference("Plain+Gaussian", "Plain+ConfODS"),
        difference("Each+ODS", "Each"),
        np.mean([difference(*pair) for pair in mixed]),
        *(difference(*pair) for pair in mixed),
        difference("Each", "Once"),
        *np.mean(orders, axis=1),
    ]
    assert table["estimate"].tolist() == pytest.approx(expected, rel=1e-5)
    tenth = f"> −{0.1 * (one - ensemble):.3g}"
    asked = ["> 0.5", "> 0.5", *["> 0"] * 5, *[tenth] * 4, "> 0.5", "> 0.5"]
    assert table["asked"].tolist() == asked
    assert table["n"].tolist() == [N, COPIED, *[N] * 9, COPIED, N]
    assert (table["seeds"] == SEEDS).all()
    assert table["system"].tolist() == ["Lone+ConfODS"] * 2 + [""] * 11
    assert table["quantity"].tolist()[2:5] == [
        "NLL, mean difference over 2 families",
        "NLL, Plain − Plain+ConfODS",
        "NLL, Lone − Lone+ConfODS",
    ]
    assert ((table["low"] < table["estimate"]) & (table["estimate"] < table["high"])).all()


def test_the_best_student_of_one_network_and_of_all_are_chosen_on_validation_images(
    world, tmp_path
):
    """Of one network cost are those of Lone; here a Plain is better than all of them."""
    other = World(tmp_path, swapped=("Lone+ConfODS", "Plain+ConfODS"))
    near = other.findings[other.findings["question"].str.startswith("How near do students")]
    scores = {
        x: np.mean([other.nll([s], "val") for s in seeds]) for x, seeds in other.students.items()
    }
    cheap = [x for x in scores if x.startswith("Lone")]
    best = [min(scores, key=scores.get), min(cheap, key=scores.get)]
    assert best == ["Plain+ConfODS", "Lone+ConfODS"]
    assert near["system"].tolist() == best


def rows_about(table, name):
    return [
        name in (row.system, *row.quantity.removeprefix("NLL, ").split(" − "))
        for row in table.itertuples()
    ]


def test_permuted_labels_flip_what_depends_on_that_student_and_nothing_else(world, tmp_path):
    """Its own rows change to no; means over families and rankings hold it too."""
    other, name = World(tmp_path, permuted="Plain+ConfODS").findings, "Plain+ConfODS"
    before = world.findings
    about = np.array(rows_about(before, name))
    shared = before["quantity"].str.contains("mean difference over|Kendall")
    shared &= before["question"].str.contains("ConfODS inputs|ranking")
    assert about.sum() == 2
    assert (before["verdict"][about] == "yes").all()
    assert (other["verdict"][about] == "no").all()
    for column in ("estimate", "low", "high"):
        same = before[column] == other[column]
        assert same[~about & ~shared].all()
        # Scaled or not, it is the worst: its temperature leaves that order as it is.
        assert not same[about | (shared & ~before["question"].str.contains("scaling"))].any()
    untouched = ~about & ~shared & before["quantity"].str.startswith("NLL")
    assert (before["verdict"] == other["verdict"])[untouched].all()


def test_swapped_systems_turn_their_comparison_round(world, tmp_path):
    other = World(tmp_path, swapped=("Plain+Gaussian", "Plain+ConfODS")).findings
    row = np.flatnonzero(world.findings["question"].str.contains("noise of their size"))
    (before,), (after,) = (table.iloc[row].itertuples() for table in (world.findings, other))
    assert after.estimate == pytest.approx(-before.estimate)
    assert (before.verdict, after.verdict) == ("yes", "no")
    each = world.findings["question"].str.contains("per teacher|one pass|mixup")
    columns = ["estimate", "low", "high"]
    assert world.findings[each][columns].equals(other[each][columns])


def test_without_families_and_with_few_students_the_rest_is_answered(world):
    systems = systems_of({"A": 0.3, "B": 0.1}, np.random.default_rng(0))
    table = answers(systems, [], {"A": False, "B": True})
    assert set(table["question"]) == {"How near do students come to the ensemble?"}
    assert table["system"].tolist() == ["A", "B"]


def test_p_values_are_adjusted_for_answers_together_and_for_other_rows_by_question():
    questions = pd.Series(["a", "a", "a", "b", "c", "c"])
    found = adjusted([0.02, 0.03, 0.04, 0.01, 0.2, 0.03], questions)
    # Answers: 0.01 · 3, 0.02 · 2, 0.2 · 1. Others of a: 0.03 · 2, then no less; of c: 0.03 · 1.
    np.testing.assert_allclose(found, [0.04, 0.06, 0.06, 0.03, 0.2, 0.03])


@pytest.mark.parametrize(
    ("loss", "expected"), [(-0.02, "yes"), (0.05, "yes"), (0.1, "undecided"), (0.2, "no")]
)
def test_enough_is_what_loses_at_most_a_tenth_of_the_gain(loss, expected):
    """The ensemble gains 1 nat; ODS has 0.5, mixup so much more, from seed to seed the same."""
    noise = np.array([0.0, 1e-3, -1e-3, 2e-3, -2e-3])
    systems = Systems(members=4, one=exact([1.5]), ensemble=exact([0.5]), images=10)
    systems.on_test = {"ODS": exact(np.full(5, 0.5)), "mixup": exact(0.5 + loss + noise)}
    systems.on_validation = {"ODS": 0.5, "mixup": 0.6}
    table = answers(systems, [{"ods": "ODS", "mixup": "mixup"}], {"ODS": True, "mixup": True})
    (row,) = table[table["question"].str.contains("mixup")].itertuples()
    assert (row.verdict, row.asked) == (expected, "> −0.1")
    assert row.estimate == pytest.approx(-loss)


# --- p-values --------------------------------------------------------------------------------


def exact(values, resamples=4000):
    values = np.asarray(values, dtype=float)
    return Estimate(values, np.tile(values, (resamples, 1)))


@pytest.mark.parametrize("bound", [0.0, 0.7, -2.0])
@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_over_seeds_alone_the_p_value_is_students(seeds, bound):
    rng = np.random.default_rng(seeds)
    first, second = rng.normal(2, 1, seeds), rng.normal(0, 1, seeds)
    expected = ttest_1samp(first, bound).pvalue
    assert p_value(exact(first), bound=bound) == pytest.approx(expected)
    expected = ttest_rel(first, second + bound).pvalue
    assert p_value(exact(first), exact(second), bound=bound) == pytest.approx(expected)


@pytest.mark.parametrize("sign", [-1, 1])
def test_over_images_alone_the_p_value_is_the_normal_one(sign):
    values = np.random.default_rng(1).normal(size=1000)
    error = values.std(ddof=1) / np.sqrt(1000)
    estimate = mean_of(values, image_weights(1000, resamples=4000))
    for distance in (0.5, 1.0, 2.0):
        found = p_value(estimate, bound=values.mean() + sign * distance * error)
        assert found == pytest.approx(2 * norm.sf(distance), abs=0.04)
    assert p_value(estimate, bound=values.mean() + sign * 9 * error) == pytest.approx(2 / 4001)


def test_the_p_value_at_an_end_of_the_interval_is_what_the_interval_leaves_out():
    rng = np.random.default_rng(3)
    values = rng.normal(size=(500, 1)) + rng.normal(0, 0.03, 5)
    estimate = mean_of(values, image_weights(500))
    found = interval(estimate)
    for end in (found.low, found.high):
        assert p_value(estimate, bound=end) == pytest.approx(0.05, abs=0.01)


def test_what_has_no_value_has_no_p_value():
    assert np.isnan(p_value(exact([np.nan, 1.0])))
    assert np.isnan(p_value(exact([1.0, 2.0]), exact([np.inf, 1.0])))


def test_holms_method_is_the_closed_test_of_bonferronis():
    """A hypothesis falls at a level if every set of hypotheses that has it falls there."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        raw = np.round(rng.beta(0.3, 2, 5), 3)
        expected = [
            max(
                min(1, len(chosen) * min(raw[list(chosen)]))
                for size in range(1, 6)
                for chosen in combinations(range(5), size)
                if i in chosen
            )
            for i in range(5)
        ]
        np.testing.assert_allclose(holm(raw), expected, rtol=1e-12)
    np.testing.assert_allclose(holm([0.5, np.nan, 0.01]), [0.5, np.nan, 0.02])
    assert holm([]).size == 0


# --- simulated worlds ------------------------------------------------------------------------

IMAGES, DRAWS, LABELS = 60, 8, ("A", "B", "C")
WEIGHTS = [image_weights(IMAGES, seed, resamples=200) for seed in range(DRAWS)]


def systems_of(effects, rng, weights: Weights = WEIGHTS[0], seeds=5):
    """Students whose NLL is lower by an effect; those of a seed have something in common."""
    image = rng.gamma(1.0, size=(IMAGES, 1))
    start = rng.normal(0, 0.1, seeds)
    systems = Systems(
        members=4,
        one=mean_of(image + 1 + 0.1 * rng.normal(size=image.shape), weights),
        ensemble=mean_of(image + 0.1 * rng.normal(size=image.shape), weights),
        images=IMAGES,
    )
    for name, effect in effects.items():
        own = 1 - effect + start + rng.normal(0, 0.05, seeds)
        values = image + own + 0.3 * rng.normal(size=(IMAGES, seeds))
        systems.on_test[name] = mean_of(values, weights)
        systems.on_validation[name] = float(values.mean())
    return systems


def worlds(count, effect):
    """Answers, row by row, in worlds where ConfODS and one direction per teacher have an effect."""
    rng = np.random.default_rng(int(1000 * abs(effect)))
    places = ("none", "gaussian", "conf_ods", "ods", "ods_each", "tdiv_sdiv")
    families = [{at: f"{label} {at}" for at in places} for label in LABELS]
    effects = {
        name: effect * (at in ("conf_ods", "ods_each"))
        for family in families
        for at, name in family.items()
    }
    tables = []
    for world in range(count):
        systems = systems_of(effects, rng, WEIGHTS[world % DRAWS])
        tables.append(answers(systems, families, dict.fromkeys(effects, True)))
    return [table[~table["question"].str.startswith("How near")] for table in tables]


def test_without_an_effect_answers_are_rarely_given():
    found = worlds(300, 0.0)
    assert found[0]["question"].nunique() == 4
    first = [table[~table["question"].duplicated()] for table in found]
    wrong = np.mean([(table["verdict"] != "undecided").any() for table in first])
    assert wrong < 0.08  # 5 % are allowed; those of 300 worlds vary by 1.3 %
    raw = np.mean([[not low < 0 < high for low, high in zip(t["low"], t["high"], strict=True)]
                   for t in first], axis=0)  # fmt: skip
    assert 0.01 < raw.mean() < 0.1  # each alone errs in 5 %
    for rows in range(1, 4):
        others = [table.groupby("question").nth(rows) for table in found]
        assert np.mean([(it["verdict"] != "undecided").any() for it in others]) < 0.15


def test_an_effect_is_nearly_always_found_where_it_is_and_nowhere_else():
    found = worlds(60, 0.4)
    verdicts = {
        contrast.question: [
            table["verdict"][table["question"] == contrast.question].tolist() for table in found
        ]
        for contrast in CONTRASTS
        if (found[0]["question"] == contrast.question).any()
    }
    for question, tables in verdicts.items():
        answered = [rows[0] for rows in tables]
        expected = "undecided" if "TDiv" in question else "yes"
        assert answered.count(expected) >= 57, question
        assert "no" not in answered or "TDiv" in question


def test_an_effect_the_other_way_is_answered_no():
    found = worlds(30, -0.4)
    for table in found:
        first = table[~table["question"].duplicated()].set_index("question")["verdict"]
        assert first[CONTRASTS[0].question] == "no"
        assert "yes" not in set(first)


# --- families --------------------------------------------------------------------------------


def study(name):
    return Study.model_validate(
        yaml.safe_load((REPOSITORY / "config.yaml").read_text())["studies"][name]
    )


def test_families_are_of_methods_that_differ_in_where_the_teachers_are_asked_alone():
    (family,) = study("digits").families()
    assert family == {
        "none": "KD",
        "gaussian": "KD+Gaussian",
        "ods": "KD+ODS",
        "conf_ods": "KD+ConfODS",
    }
    bench = study("digits_bench").families()
    assert [len(family) for family in bench] == [9, 9, 9, 6, 6, 6, 6, 6]
    assert bench[1]["ods_each_single_pass"] == "LatentBE+ODS-each, one pass"
    labels = [label for family in bench for label in family.values()]
    assert len(set(labels)) == len(labels)
    assert not any("own recipe" in label for label in labels)


@pytest.mark.parametrize(
    "changes",
    [
        {"perturbation": {"name": "ods", "eta": 0.3}},
        {"recipe": {"epochs": 7}},
        {"objective": {"name": "one_to_one", "alpha": 0.3}},
        {"student": {"name": "batch_ensemble", "architecture": "resnet14"}},
    ],
)
def test_whatever_else_differs_makes_another_family(changes):
    methods = {"a": {"label": "A"}, "b": {"label": "B", "perturbation": "ods", **changes}}
    assert Study.model_validate({"methods": methods}).families() == []
    methods["b"].pop(next(iter(changes)))
    methods["b"]["perturbation"] = "ods"
    expected = [{"none": "A", "ods": "B"}]
    assert Study.model_validate({"methods": methods}).families() == expected
