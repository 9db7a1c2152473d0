"""Steps as graphs: all that is around a capture, with operations repeated on the CPU instead.

What a graph fixes is fixed here too: images, labels and rates are looked up where a graph would
look for them, and what the host decided is what it was at the capture.
"""

from functools import partial

import pytest
import torch

from ensdistill import step_graphs, training
from ensdistill.learning import learning, new_optimizer, train_step
from ensdistill.recipes import Recipe
from ensdistill.state import TrainingState
from ensdistill.step_graphs import StepGraphs
from ensdistill.students import Step, build_student
from tests import test_factorial
from tests.test_factorial import ARCHITECTURE, Kill, same, trained


class Repeats:
    """Captures nothing, and repeats the operations; or says why not."""

    def __init__(self, refusal=None, error=None):
        self.refusal, self.error = refusal, error
        self.captured = self.repeated = 0

    def warm_up(self, step):
        step()
        return self.refusal

    def capture(self, step, generator):
        if self.error:
            raise RuntimeError(self.error)
        self.captured += 1

        def again():
            self.repeated += 1
            step()

        return again


@pytest.fixture
def repeats(monkeypatch):
    """`trained` by graphs, of which each is captured at its outcome's second step."""
    found = Repeats()
    monkeypatch.setattr(step_graphs, "WARM_UPS", 1)
    monkeypatch.setattr(step_graphs, "capturer_for", lambda device: found)
    return found


def by_graphs(monkeypatch, method, **how):
    with monkeypatch.context() as patch:
        patch.setattr(test_factorial, "fit", partial(training.fit, cuda_graphs=True))
        return trained(method, **how)


REPEATED = {
    "single_gaussian": (1, 7),
    "single_mixup": (0, 0),  # its share is another one in every step
    "single_dirichlet_none": (2, 6),  # τ is another one in the last epoch
    "batch_ensemble_conf_ods": (2, 6),
    "batch_ensemble_ods_each": (1, 7),
    "batch_ensemble_tdiv_sdiv": (2, 6),
    "batch_ensemble_held_out": (1, 7),
    "latent_batch_ensemble_ods": (2, 6),
    "hydra_none": (2, 6),  # its heads part in the second half
    "mimo_none": (1, 7),
    "gaussian_logits_none": (2, 6),  # its latents are free in the first epoch
    "flow_matching_ods": (3, 4),  # of four pairs of teachers
}
"""Graphs, and how many of 8 steps are computed by them."""


@pytest.mark.parametrize("method", REPEATED)
def test_steps_by_graphs_give_the_bits_of_ordinary_steps(method, repeats, monkeypatch):
    same(by_graphs(monkeypatch, method), trained(method))
    assert (repeats.captured, repeats.repeated) == REPEATED[method]


def test_a_training_by_graphs_goes_on_within_an_epoch(repeats, monkeypatch, tmp_path):
    whole = trained("batch_ensemble_conf_ods")
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    state = TrainingState(tmp_path / "state.pt", "same")
    with pytest.raises(Kill):
        by_graphs(monkeypatch, "batch_ensemble_conf_ods", state=state, fatal=5)
    assert state.load()["steps"] == 1
    same(by_graphs(monkeypatch, "batch_ensemble_conf_ods", state=state), whole)


def steps_of(capturer, recipe, precision="fp32", undeclared=False, spoil=None, device="cpu"):
    """Weights after eight steps with other images, teachers and rates each, by a capturer."""
    torch.manual_seed(0)
    teachers = [build_student("single", ARCHITECTURE, 1).network.eval() for _ in range(2)]
    teachers = [it.to(device) for it in teachers]
    student = build_student("batch_ensemble", ARCHITECTURE, 2).train().to(device)
    how = learning(
        teachers,
        {"name": "one_to_one", "alpha": 0.9, "temperature": 2.0},
        {"name": "ods", "eta": 0.05, "temperature": 2.0},
    )
    optimizer = new_optimizer(student, recipe)

    def take(step):
        if undeclared:
            torch.rand((), generator=step.host)
        train_step(step, how, optimizer, precision)

    run = training.Run(student, optimizer)
    taken = StepGraphs(take, optimizer, capturer) if capturer else take
    draws, images = (torch.Generator(device), torch.Generator()), torch.Generator().manual_seed(1)
    for number in range(8):
        run.epoch = 1 + number // 2
        run.set_learning_rate(recipe)
        for it in draws:
            it.manual_seed(number)
        x = torch.rand(6, 1, 8, 8, generator=images)
        y = torch.randint(0, 4, (6,), generator=images)
        taken(Step(student, teachers, x.to(device), y.to(device), 0.0, *draws))
        if spoil:
            spoil(taken)
    return [it.detach().clone() for it in student.parameters()], taken


def equal(first, second):
    return all(torch.equal(*pair) for pair in zip(first, second, strict=True))


RECIPE = Recipe(epochs=8, warmup_epochs=3, learning_rate=0.05)
ADAMW = Recipe(epochs=8, warmup_epochs=3, learning_rate=0.01, optimizer="adamw", momentum=0.9)


@pytest.mark.parametrize(
    ("recipe", "precision"), [(RECIPE, "fp32"), (RECIPE, "bf16"), (ADAMW, "fp32")]
)
def test_optimisers_and_precisions(recipe, precision):
    ordinary, _ = steps_of(None, recipe, precision)
    found, graphs = steps_of(Repeats(), recipe, precision)
    assert equal(found, ordinary)
    assert 0 < graphs.by_graphs < graphs.steps == 8


def test_rates_stay_where_a_graph_looks_for_them():
    places = set()

    def look(graphs):
        places.update(id(group["lr"]) for group in graphs.optimizer.param_groups)

    _, graphs = steps_of(Repeats(), RECIPE, spoil=look)
    assert len(places) == len(graphs.optimizer.param_groups)


@pytest.mark.parametrize("name", ["x", "y"])
def test_inputs_that_a_graph_cannot_see_are_noticed(name):
    """A test of these tests: images or labels are copied to where no graph looks for them."""

    def mislead(graphs):
        if name in graphs.inputs:
            graphs.inputs[name] = graphs.inputs[name].clone()

    found, _ = steps_of(Repeats(), RECIPE, spoil=mislead)
    assert not equal(found, steps_of(None, RECIPE)[0])


@pytest.mark.parametrize(
    ("capturer", "reason"),
    [
        (Repeats(refusal="a step waits for the GPU (a.py:1)"), "a step waits for the GPU (a.py:1)"),
        (Repeats(error="operation not permitted\nmore"), "operation not permitted"),
    ],
)
def test_without_graphs_training_goes_on_and_says_once_why(capturer, reason, caplog):
    with caplog.at_level("INFO"):
        found, graphs = steps_of(capturer, RECIPE)
    assert equal(found, steps_of(None, RECIPE)[0])
    assert caplog.messages == [f"steps are not computed by CUDA graphs: {reason}"]
    assert graphs.by_graphs == 0


def test_a_draw_that_is_not_declared_is_refused(caplog):
    with caplog.at_level("INFO"):
        found, _ = steps_of(Repeats(), RECIPE, undeclared=True)
    assert equal(found, steps_of(None, RECIPE, undeclared=True)[0])
    assert [it.partition(": ")[2] for it in caplog.messages] == [step_graphs.UNKNOWN]


def test_a_cpu_has_no_graphs(caplog, monkeypatch):
    with caplog.at_level("INFO"):
        same(by_graphs(monkeypatch, "single_none"), trained("single_none"))
    (sentence,) = [it for it in caplog.messages if "graphs" in it]
    assert sentence == "steps are not computed by CUDA graphs: there are none on a cpu"
