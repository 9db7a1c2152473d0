"""What systems cost: forms that predict the same, multiply–adds by hand, fair turns, the figure."""

import math
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from ensdistill import batch_ensemble, costs
from ensdistill.costs import cost_table, processor, take_turns
from ensdistill.flow_matching import BLOCKS, FlowMatching
from ensdistill.hdf5 import write_hdf5
from ensdistill.inference import (
    SideBySide,
    ensemble_forms,
    fastest,
    for_inference,
    inference_forms,
)
from ensdistill.networks import fold_batch_norms
from ensdistill.operations import prediction_macs, training_macs
from ensdistill.reports import cost_quality
from ensdistill.students import BatchEnsemble, build_student
from ensdistill.tables import summarize, to_html, to_latex, to_markdown
from tests.test_tables import latex_rows, markdown_rows, scores  # noqa: F401

M, K, SIDE, WIDTH = 3, 5, 8, 4
ARCHITECTURE = {"name": "resnet8", "width": WIDTH, "num_classes": K, "in_channels": 2}
ARCHITECTURE |= {"mean": [0.4, 0.5], "std": [0.2, 0.3]}
KINDS = {
    "single": {},
    "batch_ensemble": {},
    "latent_batch_ensemble": {},
    "hydra": {},
    "hydra of linear layers": {"cut": "linear"},
    "mimo": {},
    "packed": {"widen": 3.0},
    "packed in groups": {"widen": 6.0, "groups": 2},
    "gaussian_logits": {"rank": 3, "samples": 6},
    "flow_matching": {"width": 7, "samples": 6},
}


def new(kind, architecture=ARCHITECTURE):
    """A student with weights and statistics that none has at the start."""
    torch.manual_seed(0)
    student = build_student(kind.partition(" ")[0], architecture, M, **KINDS[kind])
    with torch.no_grad():
        for module in student.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
        for parameter in student.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return student.double().eval()


@pytest.mark.parametrize("name", ["resnet8", "wrn10x2"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_form_predicts_what_the_student_predicts(kind, name, monkeypatch):
    student = new(kind, {**ARCHITECTURE, "name": name})
    before = {key: value.clone() for key, value in student.network.state_dict().items()}
    x = torch.rand(2, 2, SIDE, SIDE, dtype=torch.double)
    expected = student.predictor().eval()(x).detach()
    assert expected.std() > 0.1
    for limit in (math.inf, -math.inf):  # a BatchEnsemble scales activations, or makes M weights
        monkeypatch.setitem(batch_ensemble.SCALED, "cpu", limit)
        for form in inference_forms(student):
            torch.testing.assert_close(form(x), expected, rtol=1e-9, atol=1e-9)
            if name == "resnet8":  # all of its normalisations follow a convolution
                assert not any(isinstance(it, nn.BatchNorm2d) for it in form.modules())
    torch.testing.assert_close(for_inference(student, x)(x), expected, rtol=1e-9, atol=1e-9)
    after = student.network.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.parametrize("kind", ["batch_ensemble", "hydra"])
def test_members_differ_and_images_are_not_mixed_up(kind):
    """So the test above can tell a wrong order of members or images."""
    logits = new(kind)(torch.rand(2, 2, SIDE, SIDE, dtype=torch.double))
    pairs = combinations(logits.flatten(0, 1), 2)
    assert min((one - other).abs().max() for one, other in pairs) > 1e-3


def test_an_ensemble_side_by_side_is_its_networks():
    torch.manual_seed(1)
    students = [build_student("single", ARCHITECTURE, 1).double().eval() for _ in range(M)]
    x = torch.rand(4, 2, SIDE, SIDE, dtype=torch.double)
    networks = [fold_batch_norms(student.network) for student in students]
    expected = torch.stack([network(x) for network in networks])
    forms = ensemble_forms(networks, ARCHITECTURE)
    assert isinstance(forms[1], SideBySide)
    for form in forms:
        torch.testing.assert_close(form(x), expected, rtol=1e-9, atol=1e-9)


class Sleepy(nn.Module):
    """Notes when it is called; `steps` decide how long it takes."""

    def __init__(self, name, steps, calls):
        super().__init__()
        self.name, self.steps, self.calls = name, steps, calls

    def forward(self, x):
        self.calls.append(self.name)
        for _ in range(self.steps):
            x = x @ x
        return x


def test_the_fastest_form_is_taken():
    forms = [Sleepy("slow", 300, []), Sleepy("fast", 0, []), Sleepy("slower", 900, [])]
    assert fastest(forms, torch.rand(30, 30)).name == "fast"


def test_calls_take_turns_at_least_five_times(monkeypatch):
    monkeypatch.setattr(costs, "TURN", 1e-9)
    calls = []
    forms = [(Sleepy(name, 0, calls), torch.rand(size, 1)) for name, size in (("a", 1), ("b", 4))]
    rounds = take_turns(forms, time_limit=0)
    assert rounds.shape == (5, 2)
    assert calls == ["a", "b"] * 7  # a warm-up, and one to see how often each is to be called


def test_seconds_are_for_one_image_and_quartiles_are_of_the_rounds(monkeypatch):
    class Form(list):
        """The seconds that its calls take: a warm-up, a trial, the rounds."""

        def __call__(self, x):
            self.warmed = getattr(self, "warmed", 0) + 1

    monkeypatch.setattr(costs, "seconds", lambda form, x, calls=1: form.pop(0) * calls)
    monkeypatch.setattr(costs, "TURN", 7.0)
    monkeypatch.setattr(costs, "ROUNDS", (5, 5))
    forms = Form([2.0, 2.0, 1.0, 2.0, 3.0, 4.0, 9.0]), Form([8.0] * 7)
    rounds = take_turns([(forms[0], torch.rand(2, 1)), (forms[1], torch.rand(4, 1))], 0)
    assert forms[0].warmed == 5
    np.testing.assert_allclose(rounds[:, 0], [0.5, 1, 1.5, 2, 4.5])
    np.testing.assert_allclose(rounds[:, 1], 2)
    row = costs._milliseconds(rounds)
    assert (row["ms_1_low"], row["ms_1"], row["ms_1_high"]) == (1000, 1500, 2000)
    assert (row["ms_128_low"], row["ms_128"], row["ms_128_high"]) == (2000, 2000, 2000)


# --- multiply–adds by hand -------------------------------------------------------------------


def layers(inputs, width, outputs, groups=1, stem_groups=1):
    """(stage, multiply–adds) of each convolution and of the linear layer of a ResNet-8."""
    found, side, channels = [("stem", inputs * width * 9 * SIDE**2 // stem_groups)], SIDE, width
    for stage, out in enumerate((width, 2 * width, 4 * width)):
        side //= 2 if stage else 1
        for taken in (channels, out):
            found.append((stage, taken * out * 9 * side**2 // groups))
        channels = out
    return [*found, ("linear", channels * outputs // groups)]


def total(inputs=2, width=WIDTH, outputs=K, **groups):
    return sum(macs for _, macs in layers(inputs, width, outputs, **groups))


def by_hand(kind):
    """Multiply–adds of a prediction for one image."""
    plain, options = total(), KINDS[kind]
    parts = layers(2, WIDTH, K)
    heads = {"hydra": (2, "linear"), "hydra of linear layers": ("linear",)}.get(kind, ())
    calls = 13 * options.get("samples", 0)
    features, width = 4 * WIDTH, options.get("width", 0)
    mlp = (K + features) * width + (BLOCKS - 1) * width**2 + width * K
    return {
        "single": plain,
        "batch_ensemble": M * plain,
        "latent_batch_ensemble": plain,
        "mimo": total(inputs=2 * M, outputs=K * M),
        "packed": total(2 * M, 3 * WIDTH, K * M, groups=M, stem_groups=M),
        "packed in groups": total(2 * M, 6 * WIDTH, 0, groups=2 * M, stem_groups=M)
        + 4 * 2 * WIDTH * K * M,
        "gaussian_logits": total(outputs=K + 3) + 6 * K * 3,
        "flow_matching": total(outputs=0) + calls * mlp,
    }.get(kind, plain + (M - 1) * sum(macs for stage, macs in parts if stage in heads))


@pytest.mark.parametrize("kind", KINDS)
def test_multiply_adds_of_a_prediction_are_those_of_the_layers(kind):
    x = torch.rand(2, 2, SIDE, SIDE, dtype=torch.double)
    assert {prediction_macs(form, x) for form in inference_forms(new(kind))} == {by_hand(kind)}


CLEAN, ODS = {"name": "none"}, {"name": "ods", "eta": 0.1, "temperature": 1.0}
ONE_TO_ONE = {"name": "one_to_one", "alpha": 0.9, "temperature": 1.0}
EPOCHS, IMAGES, BATCH = 8, 21, 10  # two steps an epoch, of ten images each


def trained(kind, objective, perturbation, asked=M, **more):
    """Multiply–adds for an image, mean over the training."""
    teachers = [build_student("single", ARCHITECTURE, 1).network.eval() for _ in range(asked)]
    student = build_student(kind, ARCHITECTURE, M, **KINDS[kind])
    macs = training_macs(
        student,
        [fold_batch_norms(teacher.requires_grad_(False)) for teacher in teachers],
        {"objective": objective, "perturbation": perturbation, **more},
        images=IMAGES,
        shape=(2, SIDE, SIDE),
        epochs=EPOCHS,
        batch_size=BATCH,
    )
    return macs / (EPOCHS * 2 * BATCH)


F = total()
STEM = layers(2, WIDTH, K)[0][1]
"""Its input needs no gradient, unless a BatchEnsemble's factors scale it."""
ONCE, PAIR = 3 * M * F, 6 * M * F  # passes of a BatchEnsemble with all their gradients


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("single", {"name": "labels"}, CLEAN, 0), 3 * F - STEM),
        (("batch_ensemble", {"name": "labels"}, CLEAN, 0), ONCE),
        (("batch_ensemble", ONE_TO_ONE, CLEAN), ONCE + M * F),
        # One teacher's forward pass and the gradient of its input.
        (("batch_ensemble", ONE_TO_ONE, ODS), PAIR + M * F + 2 * F),
        (("batch_ensemble", ONE_TO_ONE, {**ODS, "name": "ods_each"}), PAIR + M * F + 2 * M * F),
        (("batch_ensemble", ONE_TO_ONE, {**ODS, "eta": 0.0}), ONCE + M * F),
        # TDiv–SDiv: two teachers and the student forward, one teacher and the student back.
        (
            ("latent_batch_ensemble", ONE_TO_ONE, {"name": "tdiv_sdiv", "eta": 0.1, "sdiv": True}),
            PAIR + M * F + (2 * F + M * F) + (F + M * F),
        ),
    ],
)
def test_multiply_adds_of_a_training_are_those_of_its_passes(arguments, expected):
    assert trained(*arguments) == expected


def test_a_single_pass_is_one():
    assert trained("batch_ensemble", ONE_TO_ONE, ODS, single_pass=True) == ONCE + M * F + 2 * F


def test_held_out_images_cost_what_others_do():
    found = trained("batch_ensemble", ONE_TO_ONE, {"name": "held_out"}, held_out=True)
    assert found == PAIR + M * F


def test_gradients_of_grouped_convolutions_are_as_many_as_their_products():
    once = by_hand("packed")
    stem = 2 * M * 3 * WIDTH * 9 * SIDE**2 // M
    assert trained("packed", {"name": "labels"}, CLEAN, 0) == 3 * once - stem


def test_phases_of_a_training_are_averaged():
    """A Hydra's head 0 learns alone in the first half."""
    head = sum(macs for stage, macs in layers(2, WIDTH, K) if stage in (2, "linear"))
    alone, together = 3 * F - STEM, 3 * (F + (M - 1) * head) - STEM
    assert trained("hydra", ONE_TO_ONE, CLEAN) == (alone + together) / 2 + M * F


# --- the table -------------------------------------------------------------------------------


def method(label, kind, objective="labels", **more):
    student = {"name": kind.partition(" ")[0], **KINDS[kind]}
    parts = {"student": student, "members": M if kind != "single" else 1, **more}
    parts["architecture"] = {"name": "resnet8", "width": WIDTH}
    parts |= {"objective": {"name": objective}, "perturbation": CLEAN}
    teachers = 0 if objective == "labels" else M
    return {"label": label, "parts": parts, "teachers": teachers, "epochs": 2, "batch_size": BATCH}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("costs") / "images.h5"
    pixels = np.zeros((IMAGES, 2, SIDE, SIDE), np.uint8)
    arrays = {"train/images": pixels, "val/images": pixels, "val/labels": np.zeros(IMAGES, int)}
    attributes = {"classes": ["a"] * K, "mean": [0.4, 0.5], "std": [0.2, 0.3]}
    write_hdf5(path, {**arrays, "train/labels": np.zeros(IMAGES, int)}, attributes)
    methods = {
        "one": method("One", "single"),
        "latent": method("Latent", "latent_batch_ensemble"),
        "be": method("BE", "batch_ensemble"),
        "flow": method("Flow", "flow_matching", "flow_matching", backbone="one"),
    }
    cpu = torch.device("cpu")
    teacher = method("", "single")
    found = cost_table(path, teacher=teacher, methods=methods, pool=3, time_limit=0, device=cpu)
    return found.set_index("system")


def test_the_table_counts_what_is_stored(table):
    assert table.index.tolist() == ["DE-1", "DE-2", "DE-3", "One", "Latent", "BE", "Flow"]
    network = build_student("single", ARCHITECTURE, 1).network
    stored = sum(it.numel() * it.element_size() for it in network.state_dict().values())
    parameters = sum(it.numel() for it in network.parameters())
    assert table["parameters"][:5].tolist() == [n * parameters for n in (1, 2, 3, 1, 1)]
    assert table["bytes"][:5].tolist() == [n * stored for n in (1, 2, 3, 1, 1)]
    assert table["macs"].tolist() == [n * F for n in (1, 2, 3, 1, 1, 3)] + [
        by_hand("flow_matching")
    ]
    np.testing.assert_allclose(table["passes"], table["macs"] / F)
    be = sum(it.numel() for it in BatchEnsemble(ARCHITECTURE, M).parameters())
    flow = sum(it.numel() for it in FlowMatching(ARCHITECTURE, M, 7, 6).parameters())
    assert table["parameters"][5:].tolist() == [be, flow]


def test_a_training_contains_that_of_the_student_it_starts_from(table):
    one = 2 * 2 * BATCH * (3 * F - STEM)
    assert table["training_macs"][:4].tolist() == [one, 2 * one, 3 * one, one]
    assert table["training_macs"]["BE"] == 2 * 2 * BATCH * ONCE
    assert table["training_macs"]["Flow"] > one + 2 * 2 * BATCH * 2 * F  # backbone and teacher


def test_what_predicts_by_the_same_network_is_timed_once(table):
    times = [name for name in table if name.startswith("ms_")]
    assert len(times) == 6
    assert len(table[times].drop_duplicates()) == 5
    assert (table.loc["DE-1", times] == table.loc["Latent", times]).all()
    for name in ("ms_1", "ms_128"):
        assert (table[f"{name}_low"] <= table[name]).all()
        assert (table[name] <= table[f"{name}_high"]).all()
        assert (table[f"{name}_low"] > 0).all()
    assert (table["n"] == 5).all()
    assert (table["threads"] == torch.get_num_threads()).all()
    assert set(table["processor"]) == {processor(torch.device("cpu"))} != {""}


def test_costs_stand_in_the_results_and_readably_in_the_table(scores):  # noqa: F811
    frame = pd.DataFrame({"system": ["B", "A", "DE-1", "DE-2", "C"]})
    frame = frame.assign(passes=[1.8816, 4, 1, 2, 116.36], macs=7, ms_1=[0.2856, 1, 2, 3, 13.06])
    summary = summarize(scores, costs=frame.assign(ms_128=0.5)).set_index("system")
    assert summary.loc["B", ["passes", "macs", "ms_1", "ms_128"]].tolist() == [
        1.8816,
        7,
        0.2856,
        0.5,
    ]
    summary = summary.reset_index()
    for rows in (markdown_rows(to_markdown(summary)), latex_rows(to_latex(summary))):
        cells = {row[0]: row[-3:] for row in rows}
        assert cells["System"] == ["Parameters", "Passes", "ms"]
        assert cells["B"] == ["1,234,567", "1.88", "0.286"]
        assert cells["C"] == ["1,234,567", "116", "13.1"]
    assert "<th>Passes</th><th>ms</th>" in to_html(summary)


# --- the figure ------------------------------------------------------------------------------


def test_a_front_is_what_no_other_system_beats():
    rng = np.random.default_rng(0)
    for _ in range(50):
        costs, losses = rng.integers(0, 6, (2, 12)).astype(float)  # with ties
        losses[rng.random(12) < 0.1] = np.nan
        front = []
        for i in range(12):
            beaten = np.isnan(losses[i])
            for j in range(12):
                worse = costs[j] > costs[i] or losses[j] > losses[i] or np.isnan(losses[j])
                beaten |= not worse and (costs[j], losses[j]) != (costs[i], losses[i])
            front.append(not beaten)
        assert cost_quality.pareto_front(costs, losses).tolist() == front


def test_names_are_spread_as_little_as_can_be():
    rng = np.random.default_rng(0)
    for count in (1, 2, 5, 8):
        places = rng.random(count)
        found = cost_quality.spread_out(places, 0.09)
        order = np.argsort(places)
        gaps = [
            {"type": "ineq", "fun": lambda x, i=i, j=j: x[j] - x[i] - 0.09}
            for i, j in pairwise(order)
        ]
        start = np.empty(count)
        start[order] = np.linspace(0, 1, count) if count > 1 else 0.5
        best = minimize(
            lambda x, places=places: ((x - places) ** 2).sum(),
            start,
            bounds=[(0, 1)] * count,
            constraints=gaps,
        )
        np.testing.assert_allclose(found, best.x, atol=1e-3)


def figure_of(students):
    rng = np.random.default_rng(0)
    systems = [*(f"DE-{m}" for m in (1, 2, 3)), *students]
    count = len(systems)
    columns = {key: np.exp(rng.normal(size=count)) for key in ("ms_128", "macs", "parameters")}
    frame = pd.DataFrame({"system": systems, "nll": rng.random(count) + 0.1, "n": 3, **columns})
    frame["dee"] = 1 + 2 * rng.random(count)
    sets = [(system, kind, s) for system in systems[1:] for kind in "ab" for s in (0, 1, 5)]
    shifted = pd.DataFrame(sets, columns=["system", "kind", "severity"])
    shifted["nll"] = 0.1 + rng.random(len(shifted))
    return frame, shifted, cost_quality.draw(frame, shifted)


@pytest.mark.parametrize("count", [1, 14, 20])
def test_dots_are_where_the_tables_say_and_every_name_at_its_height(count):
    students = [f"F{i % 4}+{i}" for i in range(count)]
    frame, shifted, figure = figure_of(students)
    means = {}
    for name, group in shifted[shifted.severity > 0].groupby("system"):
        means[name] = sum(group["nll"]) / len(group)
    frame = frame.set_index("system").assign(shift=pd.Series(means))
    figure.draw_without_rendering()
    for row, key in enumerate(("nll", "dee", "shift")):
        *panels, names = figure.axes[4 * row : 4 * row + 4]
        for panel, cost in zip(panels, ("ms_128", "macs", "parameters"), strict=True):
            dots = [
                tuple(line.get_xydata()[0]) for line in panel.lines if len(line.get_xdata()) == 1
            ]
            expected = [tuple(pair) for pair in frame[[cost, key]].dropna().to_numpy()]
            np.testing.assert_allclose(sorted(dots), sorted(expected))
            front, curve = (line for line in panel.lines if len(line.get_xdata()) > 1)
            ensembles = frame[[cost, key]][:3].dropna().to_numpy()
            np.testing.assert_allclose(curve.get_xydata(), ensembles)
            sign = 1 if key == "dee" else -1
            on = cost_quality.pareto_front(frame[cost], -sign * frame[key])
            np.testing.assert_allclose(
                front.get_xydata()[:-1], frame[on].sort_values(cost)[[cost, key]]
            )
        texts = [text.get_text() for text in names.texts]
        assert sorted(texts) == sorted(students)
        assert_apart(names.texts)
        heights = [text.get_position()[1] for text in names.texts]
        assert np.argsort(heights).tolist() == np.argsort(frame[key][texts]).tolist()


def assert_apart(texts):
    boxes = sorted((text.get_window_extent() for text in texts), key=lambda box: box.y0)
    assert all(high.y0 > low.y0 + 0.8 * low.height for low, high in pairwise(boxes))


def test_of_many_systems_the_best_of_each_family_and_of_the_fronts_have_names():
    students = [f"F{i % 9}+{i}" for i in range(63)]
    frame, _, figure = figure_of(students)
    figure.draw_without_rendering()
    assert figure.get_size_inches()[1] < 10
    frame = frame.set_index("system")
    names = {text.get_text() for text in figure.axes[3].texts}
    for family in range(9):
        own = [name for name in students if name.startswith(f"F{family}+")]
        assert frame["nll"][own].idxmin() in names
    for cost in ("ms_128", "macs", "parameters"):
        on = frame.index[cost_quality.pareto_front(frame[cost], frame["nll"])]
        assert {*on} - {"DE-1", "DE-2", "DE-3"} <= names
    assert len(names) < 25
    assert_apart(figure.axes[3].texts)
