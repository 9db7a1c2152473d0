"""Which precision the processor computes in hardware, and whether its gradients are right."""

import copy
import logging
import math
import platform
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ensdistill import InputError

logger = logging.getLogger(__name__)

Precision = Literal["fp32", "bf16", "tf32"]

TOLERANCE, TOLERANCE_16_BITS = 0.01, 0.1
"""Largest relative error ‖result − reference‖₂ / ‖reference‖₂ of one operation that is accepted.

The second one is for operations on 16-bit floats. Right operations were measured to stay below
4e-5 (float32) and 0.004 (bfloat16) unless they cancel, for which `_noise` allows; a wrong sign, a
factor of 81, zeros or NaN give 1 or more.
"""

MOST_WORK = 2 * 10**9
"""Bound of parameters × pixels of all images in `check_gradients`, a proxy for its time."""


def choose_precision(asked: Precision, device: torch.device) -> tuple[Precision, str]:
    """The precision to train in: the one asked for if the processor computes it in hardware.

    bfloat16 without such instructions is slower than float32: measured for a training step, 1.5 to
    3 times on AVX-512 (oneDNN emulates it) and 6 to 10 times on AVX2 (PyTorch's own loop).

    Args:
        asked: of the study.
        device: where the job computes.

    Returns:
        The precision to use, and a sentence that says why.
    """
    if asked == "fp32":
        return "fp32", "float32, as the study says"
    name = {"bf16": "bfloat16", "tf32": "TF32"}[asked]
    if device.type == "cuda":
        # TF32 and bfloat16 came with the same generation of GPUs.
        able = torch.cuda.is_bf16_supported(including_emulation=False)
        processor = torch.cuda.get_device_name(device)
    else:
        able = asked == "bf16" and _has_bfloat16()
        processor = processor_name()
    if able:
        return asked, f"{name}, as the study says; {processor} computes it in hardware"
    return "fp32", f"float32, not {name}: {processor} has no instructions for {name}"


def _has_bfloat16() -> bool:
    """Whether the CPU has bfloat16 instructions that oneDNN uses."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True  # There oneDNN says so only of processors that have the instructions.
    # On x86 it says so of every AVX-512 processor.
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def processor_name() -> str:
    """The CPU's model and the instruction set that PyTorch uses, such as `Intel Xeon (AVX512)`."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model} ({torch.backends.cpu.get_cpu_capability()})"


def set_float32(precision: Precision) -> None:
    """Compute float32 operations of a GPU in float32, or in TF32 where `precision` is `tf32`.

    PyTorch's default is TF32 (10 bits of mantissa) in convolutions. Must be called before
    anything is computed, by jobs that only evaluate too (with `fp32`).
    """
    mode = "tf32" if precision == "tf32" else "ieee"
    # The older flags too: PyTorch raises an error when they are read and say something else.
    torch.backends.cudnn.allow_tf32 = mode == "tf32"
    torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
    torch.backends.cuda.matmul.fp32_precision = mode
    # Each by name: setting `torch.backends.fp32_precision` leaves them as they are.
    cudnn: Any = torch.backends.cudnn  # of which PyTorch's types lack these
    cudnn.conv.fp32_precision = mode
    cudnn.rnn.fp32_precision = mode


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context of a forward pass: bfloat16 autocast for `bf16`, else no autocast."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_gradients(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor],
    precision: Precision,
) -> None:
    """Compare one forward and backward pass of a model, operation by operation, with float64.

    Libraries such as oneDNN have had kernels with wrong results for single shapes, numbers of
    threads and instruction sets. So the model computes in its own precision, memory format,
    threads and batch; every operation of PyTorch on the way is computed once more in float64 on
    the CPU, where oneDNN and cuDNN take no part, from the same inputs. Rounding therefore does not
    add up over layers, and a ReLU cannot switch differently on both sides.

    Nothing changes for the training that follows: a copy of the model is used, and PyTorch's
    global random state is restored. A generator that `loss` draws from is not: give it one of
    its own.

    Args:
        model: on the device of x; it is checked in train mode.
        x, y: the first training batch: images (B, C, H, W) in [0, 1] and labels (B,). Fewer of
            them are used where a network is large.
        loss: (model, x, y) → scalar.
        precision: as used in training.

    Raises:
        InputError: an operation's result is wrong.
    """
    parameters = sum(parameter.numel() for parameter in model.parameters())
    work = parameters * x.shape[2] * x.shape[3]
    size = max(2, MOST_WORK // max(work, 1))
    x, y = x[:size], y[:size]
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.enable_grad():
        twin = copy.deepcopy(model).train()
        checked = _EveryOperation(twin)
        with checked:
            with autocast(x.device, precision):
                value = loss(twin, x, y)
            value.backward()
    logger.info(
        "gradients checked with %d images: %d operations, largest relative error %.1g, %d skipped",
        len(x),
        checked.operations,
        checked.largest,
        checked.skipped,
    )


class _EveryOperation(TorchDispatchMode):
    """Computes every operation inside also in float64 on the CPU, and compares.

    Args:
        model: whose parameters give a wrong operation its name.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        # By the memory of a parameter, or of what was computed from parameters alone.
        self.names = {_memory(tensor): name for name, tensor in model.named_parameters()}
        self.kept: list[Tensor] = []  # Or their memory could be given to other tensors.
        self.place = "next to the first layer"
        self.operations = self.skipped = 0
        self.largest = 0.0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or PyTorch would import its compiler, which takes seconds

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        reference = None
        if _is_comparable(operation, inputs):
            # Before the operation, which may change its inputs.
            reference = _reference(operation, args, kwargs)
            before = tree_map(_copied, (args, kwargs)) if operation._schema.is_mutable else None
        result = operation(*args, **kwargs)
        self._follow(inputs, result)
        if reference is not None:
            again = before or (args, kwargs)
            self._compare(operation, again, inputs, result, reference)
        return result

    def _follow(self, inputs: list[Tensor], result: Any) -> None:
        """Keep track of the parameter that the operation belongs to."""
        names = [self.names.get(_memory(tensor)) for tensor in inputs]
        if own := list(filter(None, names)):
            self.place = f"at {own[-1]}"
        else:
            self.place = self.place.replace("at ", "next to ", 1)
        if names and all(names):
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.names.setdefault(_memory(tensor), own[0])
                    self.kept.append(tensor)

    def _compare(
        self, operation: Any, call: Any, inputs: list[Tensor], result: Any, reference: Any
    ) -> None:
        """Raise if one of the results is wrong by more than rounding can explain."""
        if reference is NotImplemented:
            self.skipped += 1
            return
        self.operations += 1
        pairs = zip(tree_leaves(result), tree_leaves(reference), strict=True)
        for index, (got, right) in enumerate(pairs):
            if not isinstance(got, Tensor) or not got.is_floating_point():
                continue
            tolerance = TOLERANCE
            if any(it.dtype in (torch.bfloat16, torch.float16) for it in (*inputs, got)):
                tolerance = TOLERANCE_16_BITS
            error, norm = _difference(got, right)
            if not error <= tolerance * norm:  # NaN too
                noise = _noise(operation, call, tolerance, index, right)
                if not error <= noise:
                    factor = error / norm if norm else math.inf
                    raise InputError(self._sentence(operation, got, factor))
            elif norm:
                self.largest = max(self.largest, error / norm)

    def _sentence(self, operation: Any, got: Tensor, factor: float) -> str:
        if got.device.type == "cuda":
            library = f"cuDNN {torch.backends.cudnn.version()}"
            where = f"{torch.cuda.get_device_name(got.device)}, {library}"
        else:
            where = f"{processor_name()}, threads: {torch.get_num_threads()}"
        return (
            f"wrong gradients {self.place}: {operation.name()} of PyTorch {torch.__version__} "
            f"is off by {factor:.2g} times its norm ({where}), so nothing is "
            "trained; try another number of threads, another width of the network, or another "
            "precision"
        )


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def _is_comparable(operation: Any, inputs: list[Tensor]) -> bool:
    """Whether an operation computes something that its inputs determine."""
    return not (
        operation.is_view
        or torch.Tag.nondeterministic_seeded in operation.tags
        or "empty" in operation.name()
        or not any(tensor.is_floating_point() for tensor in inputs)
    )


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


def _exact(value: Any) -> Any:
    """An argument of an operation for the CPU in float64: always a copy."""
    if isinstance(value, Tensor):
        dtype = torch.float64 if value.is_floating_point() else value.dtype
        return value.detach().to("cpu", dtype, copy=True)
    if isinstance(value, torch.dtype) and value.is_floating_point:
        return torch.float64
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _reference(operation: Any, args: Any, kwargs: Any) -> Any:
    """The operation in float64; NotImplemented where a CPU cannot compute it so."""
    try:
        return operation(*tree_map(_exact, args), **tree_map(_exact, kwargs))
    except (NotImplementedError, RuntimeError, TypeError) as error:
        logger.debug("%s is not checked: %s", operation.name(), str(error).partition("\n")[0])
        return NotImplemented


def _difference(got: Tensor, right: Tensor) -> tuple[float, float]:
    """‖got − right‖₂ and ‖right‖₂, over the elements of `right` that the type of `got` can hold."""
    exact = got.detach().to("cpu", torch.float64)
    error, norm = (exact - right).norm().item(), right.norm().item()
    if not math.isfinite(error + norm):
        held = right.abs() <= torch.finfo(got.dtype).max
        error, norm = (exact - right)[held].norm().item(), right[held].norm().item()
    return error, norm


def _noise(operation: Any, call: Any, relative: float, index: int, right: Tensor) -> float:
    """How far a result moves in float64 if every number of the inputs changes a little.

    Sums that cancel, such as the gradient of a bias before batch normalisation, are nothing but
    rounding error: the result is then far smaller than what goes into it.
    """
    generator = torch.Generator().manual_seed(0)

    def moved(value: Any) -> Any:
        value = _exact(value)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        signs = torch.rand(value.shape, generator=generator, dtype=value.dtype) * 2 - 1
        return value * (1 + relative * signs)

    args, kwargs = tree_map(moved, call)
    return _difference(tree_leaves(operation(*args, **kwargs))[index], right)[0]
