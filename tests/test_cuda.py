"""What a GPU would have to wait for: nothing, in a step of training.

Two ways together stand for a card. On tensors that say they are on one (PyTorch's FakeTensorMode),
a number that is asked for or a tensor on the wrong device raises; gradients are stood in for by
tensors of their shape, as PyTorch's engine needs a driver. And the whole step, backward pass
included, runs on the CPU under a mode that looks at every operation. Where there is a card the
same steps run on it too, and PyTorch raises where it waits.
"""

from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
import torch.cuda.amp.common
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from ensdistill import analysis, perturbations
from ensdistill.batches import TrainingBatches
from ensdistill.learning import RunningSums, learning, new_optimizer, train_step
from ensdistill.numerics import set_float32
from ensdistill.objectives import member_cross_entropy
from ensdistill.step_graphs import CudaCapturer
from ensdistill.students import STUDENTS, Step, build_student, predict, predictions
from tests import test_step_graphs
from tests.test_factorial import ARCHITECTURE, CLASSES, MEMBERS, STUDY

METHODS = [*STUDY.methods]
ON_CARD = [
    name
    for name, method in STUDY.methods.items()
    if method.student.name == "batch_ensemble"
    or method.perturbation.name in ("none", "conf_ods", "ods_each")
]
"""Every student and objective with few perturbations, and one student with all of them."""
WAITS = {"gaussian_logits": ("aten::_linalg_eigh",)}
"""What cannot be avoided: the eigenvalues of DLF's E-step are computed on the host in part."""

B = 3
CPU, CARD = torch.device("cpu"), torch.device("cuda", 0)


DEPENDS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
"""Operations that are so tagged give a number, or a shape that depends on numbers."""

READ_BY_THE_HOST = tuple(
    f"aten::{name}"
    for name in (
        "_linalg_eigh",
        "_linalg_svd",
        "_linalg_check",
        "linalg_lstsq",
        "histc",
        "bincount",
    )
)
"""Not tagged, but PyTorch asks a GPU for a number in them."""


class Waits(AssertionError):
    """A GPU would have to be waited for."""


COPIES = ("aten::_to_copy", "aten::copy_", "aten::to.", "aten::cpu")


def is_waited_for(operation, inputs, outputs):
    """Whether the host waits for an operation whose tensors are on a GPU."""
    name = operation.name()
    if name.startswith(("aten::index", "aten::_index", "aten::_unsafe_index")):
        return any(it.dtype in (torch.bool, torch.uint8) for it in inputs[1:])
    if name.startswith(COPIES):
        return len({it.device.type for it in (*inputs, *outputs)}) > 1
    return bool(DEPENDS & {*operation.tags}) or name.startswith(READ_BY_THE_HOST)


class Watch(TorchDispatchMode):
    """Looks at every operation; raises, or counts, where a GPU would be waited for."""

    def __init__(self, allowed=()):
        super().__init__()
        self.allowed, self.seen, self.operations = allowed, [], 0
        self.parameters = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        inputs = [it for it in tree_leaves((args, kwargs)) if isinstance(it, torch.Tensor)]
        if operation.name().startswith("aten::_fused_") and isinstance(inputs[0], FakeTensor):
            assert {it.device for it in inputs} == {CARD}  # all that a fake optimiser can do
            return None
        result = operation(*args, **(kwargs or {}))
        outputs = [it for it in tree_leaves(result) if isinstance(it, torch.Tensor)]
        self.operations += 1
        if is_waited_for(operation, inputs, outputs):
            name = operation.name()
            self.seen.append("copy" if name.startswith(COPIES) else name)
            if self.seen[-1] not in self.allowed:
                raise Waits(name)
        return result


class NoNumbers(TorchFunctionMode):
    """Tensors that are made of the host's numbers would have to be copied to the card."""

    MAKERS = ("tensor", "new_tensor", "as_tensor", "from_numpy", "asarray", "scalar_tensor")

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.MAKERS:
            raise Waits(function.__name__)
        return function(*args, **(kwargs or {}))


class FakeGenerator(torch.Generator):
    """Says that it is on the card; fake tensors draw nothing."""

    device = CARD


def on_card(module):
    """The module with parameters and buffers on a card that is not there; under a mode."""
    for part in module.modules():
        for place in (part._parameters, part._buffers):
            for name, it in place.items():
                if it is not None:
                    how = {"dtype": it.dtype, "device": CARD}
                    fake = torch.empty_strided(it.shape, it.stride(), **how)
                    parameter = isinstance(it, nn.Parameter)
                    place[name] = nn.Parameter(fake, it.requires_grad) if parameter else fake
    return module


@contextmanager
def card_that_is_not_there(watch):
    """Tensors can say that they are on a card; gradients are tensors of their shape."""

    def gradients(outputs, inputs, *_, is_grads_batched=False, **__):
        inputs = [inputs] if isinstance(inputs, torch.Tensor) else inputs
        batch = (len(_[0]),) if is_grads_batched else ()
        return tuple(it.new_empty((*batch, *it.shape)) for it in inputs)

    def backward(loss):
        assert loss.requires_grad
        for parameter in watch.parameters:
            parameter.grad = torch.empty_like(parameter)

    def generator(device="cpu"):
        return FakeGenerator() if torch.device(device).type == "cuda" else CPU_GENERATOR(device)

    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(), watch, NoNumbers():
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        patch.setattr(torch, "Generator", generator)
        patch.setattr(torch.autograd, "grad", gradients)
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.Tensor, "numpy", lambda it: np.zeros(it.shape, np.float32))
        yield watch


CPU_GENERATOR = torch.Generator


def networks(method):
    """Teachers, and the student of a method, on the CPU."""
    parts = STUDY.parts(method)
    torch.manual_seed(0)
    teachers = [
        build_student("single", ARCHITECTURE, 1).network.eval().requires_grad_(False)
        for _ in range(MEMBERS)
    ]
    student = build_student(**parts["student"], architecture=ARCHITECTURE, members=parts["members"])
    return teachers, student.train()


def decided_on_the_host(choice, step):
    """A draw on the CPU, for which no card is waited."""
    with _disable_current_modes():
        return choice(step)


def take_steps(method, teachers, student, precision, device=CPU):
    """Two whole steps, in the first and in the second half of a training; their running sums."""
    parts, recipe, sums = STUDY.parts(method), STUDY.recipe(method), RunningSums()
    how = learning(
        teachers,
        parts["objective"],
        parts["perturbation"],
        single_pass=parts.get("single_pass", False),
    )
    optimizer = new_optimizer(student, recipe)
    on = {"device": device}
    for progress in (0.0, 0.75):
        student.set_progress(progress)
        x, others = torch.rand(2, B, 1, 8, 8, **on)
        y = torch.randint(CLASSES, (B,), **on)
        draws = torch.Generator(device), torch.Generator()
        step = Step(student, teachers, x, y, progress, *draws, others, decided_on_the_host)
        sums.add(train_step(step, how, optimizer, precision, recipe.clip_norm))
    return sums


def watch_for(method):
    return Watch(WAITS.get(STUDY.methods[method].student.name, ()))


def seen(watch):
    """What was waited for is what cannot be avoided."""
    assert {*watch.seen} == {*watch.allowed}
    return watch.operations


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_step_asks_for_no_number(method):
    """On the CPU, backward pass and optimiser included."""
    teachers, student = networks(method)
    with watch_for(method) as watch:
        take_steps(method, teachers, student, "fp32")
    assert seen(watch) > 300


@pytest.mark.parametrize("method", ON_CARD)
def test_a_step_stays_on_the_card(method):
    """In bfloat16, which does all that float32 does."""
    teachers, student = networks(method)
    with card_that_is_not_there(watch_for(method)) as watch:
        teachers = [on_card(it) for it in teachers]
        watch.parameters = [it for it in on_card(student).parameters() if it.requires_grad]
        sums = take_steps(method, teachers, student, "bf16", CARD)
        assert {sums.sums.device, sums.finite.device} == {CARD}
    assert seen(watch) > 100


def test_batches_of_images_on_the_card_stay_there():
    with card_that_is_not_there(Watch()) as watch:
        on = {"device": CARD}
        batches = TrainingBatches(
            torch.empty(2 * B, 1, 8, 8, dtype=torch.uint8, **on),
            torch.empty(2 * B, dtype=torch.long, **on),
            B,
            crop_padding=1,
            flip=True,
        )
        given = [*batches.epoch(FakeGenerator()), batches.any_batch(FakeGenerator())]
        assert {it.device for pair in given for it in pair} == {CARD}
    assert seen(watch) > 30


@pytest.mark.parametrize("name", STUDENTS)
def test_prediction_stays_on_the_card(name):
    method = next(key for key, it in STUDY.methods.items() if it.student.name == name)
    _, student = networks(method)
    student.set_progress(0.75)
    with card_that_is_not_there(Watch()) as watch:
        images = torch.empty(5, 1, 8, 8, dtype=torch.uint8, device=CARD)
        (logits,) = predictions(on_card(student), images)
        assert (logits.device, logits.shape) == (CARD, (5, student.members, CLASSES))
    assert seen(watch) > 30


SIZED = {
    name: {"name": name, "eta": 0.01, **more}
    for name, more in {
        "gaussian": {},
        "ods": {"temperature": 1.0},
        "conf_ods": {"temperature": 1.0},
        "ods_each": {"temperature": 1.0},
        "tdiv_sdiv": {"sdiv": True},
    }.items()
}
ANALYSES = {
    # Of each batch under each perturbation: images to be looked at, and logits.
    "perturbed_logits": (2 * 2 * 6, {"perturbations": SIZED}),
    "sweep_logits": (2 * 2 * 5, {"perturbations": SIZED, "etas": [0.01, 0.02]}),
    # Clean logits, those of each source, cosines, and those with noise.
    "transfer_logits": (2 * 5, {"eta": 0.01, "temperature": 1.0}),
}
"""How often results come to the host, and how they are asked for; of two batches."""


@pytest.mark.parametrize("name", ANALYSES)
def test_an_analysis_brings_its_results_alone(name, monkeypatch):
    teachers, _ = networks("single_none")
    transfers, how = ANALYSES[name]
    with card_that_is_not_there(Watch(["copy"])) as watch:
        for choice in ("any_teacher", "_pair"):
            decided = partial(decided_on_the_host, getattr(perturbations, choice))
            monkeypatch.setattr(perturbations, choice, decided)
        images = torch.empty(8, 1, 8, 8, dtype=torch.uint8, device=CARD)
        found = getattr(analysis, name)(
            [on_card(it) for it in teachers], images, batch_size=4, **how
        )
        for blocks in found.values():  # of which some are computed as they are asked for
            list(blocks)
    assert seen(watch) > 100
    assert len(watch.seen) == transfers


def test_distances_of_jacobians_come_to_the_host_as_distances(monkeypatch):
    teachers = [networks("single_none")[1].eval() for _ in range(MEMBERS)]
    student = networks("batch_ensemble_none")[1].eval()
    with card_that_is_not_there(Watch(["copy"])) as watch:
        images = torch.empty(3, 1, 8, 8, dtype=torch.uint8, device=CARD)
        students = {"student": on_card(student)}
        analysis.jacobian_distances([on_card(it) for it in teachers], students, images)
    assert seen(watch) > 100
    assert len(watch.seen) == 2


# --- broken on purpose ------------------------------------------------------------------------

BROKEN = {
    "a number": lambda loss, x: loss * loss.item(),
    "a condition": lambda loss, x: loss if loss > 0 else -loss,
    "to the host": lambda loss, x: loss * x.cpu().mean().to(x.device),
    "a tensor of the host": lambda loss, x: loss + (x.flatten(1) @ torch.ones(64, 1)).mean(),
    "a number to the card": lambda loss, x: loss * torch.tensor(2.0, device=x.device),
    "a shape of numbers": lambda loss, x: loss + x[x > 0.5].mean(),
    "places": lambda loss, x: loss + x.flatten().nonzero().float().mean(),
    "different numbers": lambda loss, x: loss + x.unique().mean(),
}
ON_CPU = ["a number", "a condition", "a shape of numbers", "places", "different numbers"]
"""What can be noticed where there is no card at all."""


def broken_step(harm, device):
    def step(teachers, student):
        x, y = (
            torch.rand(B, 1, 8, 8, device=device),
            torch.zeros(B, dtype=torch.long, device=device),
        )
        loss = member_cross_entropy(student(x), y)
        return BROKEN[harm](loss, x)

    return step


@pytest.mark.parametrize("harm", BROKEN)
def test_on_a_card_that_is_not_there_a_broken_step_fails(harm):
    teachers, student = networks("single_none")
    step = broken_step(harm, CARD)
    with card_that_is_not_there(Watch()), pytest.raises(Exception, match=r".") as caught:
        step(teachers, on_card(student))
    kinds = (Waits, DataDependentOutputException, DynamicOutputShapeException, RuntimeError)
    assert isinstance(caught.value, kinds)


@pytest.mark.parametrize("harm", ON_CPU)
def test_on_a_cpu_a_broken_step_fails(harm):
    with Watch(), pytest.raises(Waits):
        broken_step(harm, CPU)(*networks("single_none"))


def test_the_step_that_is_broken_is_whole_without_harm(monkeypatch):
    monkeypatch.setitem(BROKEN, "nothing", lambda loss, x: loss)
    teachers, student = networks("single_none")
    with Watch():
        broken_step("nothing", CPU)(teachers, student)
    with card_that_is_not_there(Watch()):
        broken_step("nothing", CARD)(teachers, on_card(student))


# --- on a real card ---------------------------------------------------------------------------

real = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@real
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_real_card_is_not_waited_for(precision):
    set_float32(precision)
    for method in (it for it in METHODS if not it.startswith(tuple(WAITS))):
        teachers, student = networks(method)
        teachers, student = [it.to(CARD) for it in teachers], student.to(CARD)
        torch.cuda.set_sync_debug_mode("error")
        try:
            sums = take_steps(method, teachers, student, precision, CARD)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert sums.read()["loss"][1] == 2, method
    set_float32("fp32")


@real
@pytest.mark.parametrize("recipe", [test_step_graphs.RECIPE, test_step_graphs.ADAMW])
def test_graphs_of_a_real_card_give_the_bits_of_ordinary_steps(recipe):
    with torch.backends.cudnn.flags(deterministic=True):
        ordinary, _ = test_step_graphs.steps_of(None, recipe, device=CARD)
        found, graphs = test_step_graphs.steps_of(CudaCapturer(), recipe, device=CARD)
    assert test_step_graphs.equal(found, ordinary)
    assert graphs.by_graphs > 0


@real
def test_a_real_card_and_a_cpu_predict_the_same():
    _, student = networks("batch_ensemble_none")
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    set_float32("fp32")
    expected = predict(student, images)
    found = predict(student.to(CARD), images.to(CARD))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
