"""AdamW against its algorithm written out, number by number."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from ensdistill import training
from ensdistill.learning import learning, learning_rate_factor, new_optimizer, train_step
from ensdistill.recipes import Recipe
from ensdistill.state import TrainingState
from ensdistill.students import Step, build_student
from ensdistill.training import fit

M, RATE, DECAY, BETA = 3, 0.02, 0.3, 0.8
ARCHITECTURE = {"name": "resnet8", "num_classes": 5, "in_channels": 1, "width": 4}
RECIPE = Recipe(optimizer="adamw", learning_rate=RATE, weight_decay=DECAY, momentum=BETA)
LABELS = learning([], {"name": "labels"}, {"name": "none"})


def student_of(kind):
    torch.manual_seed(1)
    made = build_student(kind, ARCHITECTURE, M).double()
    with torch.no_grad():  # or deviations, biases and shifts would be 0, which no decay changes
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return made


def batch():
    generator = torch.Generator().manual_seed(2)
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    return x, torch.randint(0, 5, (4,), generator=generator)


def step_at(student, x, y):
    return Step(student, [], x, y, 0.0, torch.Generator(), torch.Generator())


def gradients_of(student, x, y):
    losses = [F.cross_entropy(logits, y) for logits in student(x)]
    return torch.autograd.grad(sum(losses) / len(losses), list(student.parameters()))


class AdamW:
    """Algorithm 2 of Loshchilov & Hutter (2019), of one array."""

    def __init__(self, start, epsilon):
        self.theta, self.epsilon = start.copy(), epsilon
        self.m, self.v, self.t = 0.0, 0.0, 0

    def step(self, gradient, rate, decay):
        self.t += 1
        self.m = BETA * self.m + (1 - BETA) * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - BETA**self.t), self.v / (1 - 0.999**self.t)
        self.theta = self.theta - rate * (m / (np.sqrt(v) + self.epsilon) + decay * self.theta)


def rate_and_decay(kind, name, parameter):
    last = name.rsplit(".", 1)[-1]
    if kind == "batch_ensemble" and last in ("r", "s"):
        return RATE / 2, 0.0
    vector = parameter.ndim == 1 or last == "bias"
    return RATE, 0.0 if vector else DECAY


@pytest.mark.parametrize("kind", ["single", "batch_ensemble", "latent_batch_ensemble", "hydra"])
def test_steps_are_the_algorithms_and_vectors_are_not_decayed(kind):
    """Of LatentBE's deviations the gradient is taken M times, as its authors do: it is the same,
    but that ε is M times as large.
    """
    student, (x, y) = student_of(kind), batch()
    twin = copy.deepcopy(student)
    optimizer = new_optimizer(student, RECIPE)
    times = {n: M if n.endswith((".dr", ".ds")) else 1 for n, _ in twin.named_parameters()}
    arrays = {n: AdamW(p.detach().numpy(), 1e-8 * times[n]) for n, p in twin.named_parameters()}
    for _ in range(3):
        train_step(step_at(student, x, y), LABELS, optimizer, "fp32")
        gradients = gradients_of(twin, x, y)
        with torch.no_grad():
            for (name, parameter), gradient in zip(twin.named_parameters(), gradients, strict=True):
                array, whole = arrays[name], times[name] * gradient.numpy()
                array.step(whole, *rate_and_decay(kind, name, parameter))
                parameter.copy_(torch.from_numpy(array.theta))
    for name, parameter in student.named_parameters():
        np.testing.assert_allclose(parameter.detach().numpy(), arrays[name].theta, rtol=1e-9)
    own = {id(it) for group in optimizer.param_groups for it in group["params"]}
    assert own == {id(it) for it in student.parameters()}


def test_the_schedule_reaches_every_group():
    student = student_of("batch_ensemble")
    run = training.Run(student, new_optimizer(student, RECIPE), epoch=2)
    assert run.set_learning_rate(RECIPE) == pytest.approx(RATE * learning_rate_factor(2, 300))
    rates = [group["lr"] / run.set_learning_rate(RECIPE) for group in run.optimizer.param_groups]
    assert rates == [1, 1, 0.5]  # weights, vectors, factors
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [DECAY, 0, 0]


class Kill(Exception):
    """Stands for SIGKILL."""


def trained(state=None, fatal=None):
    generator = torch.Generator().manual_seed(7)
    images = torch.randint(0, 256, (20, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(20) % 5
    torch.manual_seed(0)
    student = build_student("hydra", ARCHITECTURE, 2)
    steps = iter(range(100))

    def killed(step, x_distill):
        if next(steps) == fatal:
            raise Kill
        return LABELS.objective(step, x_distill)

    how = copy.copy(LABELS)
    object.__setattr__(how, "objective", killed)
    recipe = Recipe(optimizer="adamw", epochs=4, batch_size=6, warmup_epochs=1, learning_rate=0.01)
    split = images, labels
    settings = {"seed": 3, "crop_padding": 1, "flip": True, "precision": "fp32"}
    return fit(student, how, split, split, recipe, state=state, **settings)[0].state_dict()


def test_training_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    """Also where heads begin to learn within it."""
    whole = trained()
    monkeypatch.setattr(training, "SAVE_EVERY", 0)
    for fatal in (2, 5, 8):
        state = TrainingState(tmp_path / f"{fatal}.pt", "same")
        with pytest.raises(Kill):
            trained(state, fatal)
        again = trained(state)
        same = (
            v == again[k] if isinstance(v, bool) else v.equal(again[k]) for k, v in whole.items()
        )
        assert all(same)
