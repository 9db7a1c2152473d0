"""Students as files that need nothing of this package: ONNX, or PyTorch's own format.

A file holds the whole way from images to probabilities and uncertainties (answering.py), and the
`Deployment` as JSON, by which its classes have names.

Of a BatchEnsemble it holds every weight once, beside the members' factors, into which batch
normalisations are folded. Members are computed one after the other by W ∘ (s_j r_jᵀ), which ONNX
Runtime multiplies when it opens the file: the file is as small as the student's, and predicts as
fast as M networks in a file of M times the size.
"""

import copy
import math
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ensdistill import InputError, __version__
from ensdistill.answering import OUTPUTS, Answering
from ensdistill.deployment import Deployment
from ensdistill.exported import KEY
from ensdistill.flow_matching import FlowMatching
from ensdistill.inference import MemberByMember, Sampled, inference_forms
from ensdistill.libraries import LibraryNetwork
from ensdistill.students import BatchEnsemble, Student

Format = Literal["onnx", "torch"]
Precision = Literal["float32", "float16", "int8"]
"""Of the network's weights and arithmetic; what is behind its logits is float32 always."""

ENDINGS: dict[Format, str] = {"onnx": ".onnx", "torch": ".pt2"}

OPSET = 18
"""Version of ONNX's operators that files use."""

MOST_CONSTANT = 64
"""Numbers of a constant that is computed before the file is written, from others."""

MOST_BYTES = 2**31 - 1
"""Of an ONNX file that is one file."""

USAGE = """An image classifier that knows what it does not know, made by ensdistill {version}.
Input `images`: {type} {shape} in 0 … {most}, any B.
Outputs: `probabilities` (B, K), after temperature scaling where a temperature is known;
`member_probabilities` (B, M, K); `entropy` (B,) of probabilities, in nats; `mutual_information`
(B,), what members disagree about, in nats, 0 of one network with a softmax.
'ensdistill' beside this text is JSON: `classes`, the names of the K classes; how pictures become
images (`resize` the centre square to this side, `crop` its centre); `temperature`, `scores` and
`origin`."""


def write_exported(
    path: Path,
    student: Student,
    deployment: Deployment,
    to: Format,
    precision: Precision = "float32",
    uint8: bool = False,
    calibration: NDArray[np.uint8] | None = None,
) -> None:
    """Write the file of a student.

    Args:
        path: the file; its folder exists.
        student: in eval mode; it stays as it is.
        deployment: what is known of it.
        to, precision: see `Format` and `Precision`.
        uint8: whether the file takes images as bytes, which it divides by 255, instead of float32.
        calibration: images (N, C, H, W), by which the ranges of activations in int8 are found.
            Other precisions need none.

    Raises:
        InputError: PyTorch cannot export the network, or not into one file.
    """
    form = _form(student, precision)
    temperature = deployment.temperature or 1.0
    module = Answering(form, deployment.prediction, temperature, uint8).eval()
    height, width = deployment.size or _default_size(student)
    kind = torch.uint8 if uint8 else torch.float32
    example = torch.zeros(3, deployment.channels, height, width, dtype=kind)
    name = student.spec["architecture"]["name"]
    program = _program(name, module, example, any_size=deployment.size is None)
    sides = next(it.meta["val"] for it in program.graph.nodes if it.name == "images").shape[2:]
    if all(isinstance(it, int) for it in sides):
        deployment = replace(deployment, size=(int(sides[0]), int(sides[1])))
    made = {"precision": precision, "exported_by": f"ensdistill {__version__}"}
    deployment = replace(deployment, origin={**deployment.origin, **made})
    known = {KEY: deployment.to_json(), "usage": _usage(deployment, uint8)}
    if to == "torch":
        _write_torch(path, program, known)
        return
    model = _onnx_model(name, program, precision)
    if precision == "int8":
        assert calibration is not None
        model = _quantised(model, calibration, uint8)
    _write_onnx(path, model, known)


def _usage(deployment: Deployment, uint8: bool) -> str:
    height, width = deployment.size or ("H", "W")
    return USAGE.format(
        version=__version__,
        type="uint8" if uint8 else "float32",
        most=255 if uint8 else 1,
        shape=f"(B, {deployment.channels}, {height}, {width})",
    )


# --- what is exported ---------------------------------------------------------------------------


class InFewerBits(nn.Module):
    """The part of a form that is computed in float16 or int8.

    Args:
        network: (B, …) → logits or features.
        half: whether it is float16, between float32.
    """

    def __init__(self, network: nn.Module, half: bool):
        super().__init__()
        self.half_precision = half
        self.in_fewer_bits = network.half() if half else network

    def forward(self, x: Tensor) -> Tensor:
        return self.in_fewer_bits(x.half() if self.half_precision else x).float()


def _form(student: Student, precision: Precision) -> nn.Module:
    """What computes logits (M, B, K) in a file.

    Members of a BatchEnsemble share their weights but in int8, where each has its own: products of
    int8 weights are not int8.
    """
    student = student.predictor()
    if isinstance(student, BatchEnsemble) and precision != "int8":
        student = copy.deepcopy(student).eval().requires_grad_(False)
        form: nn.Module = MemberByMember(student.network, student.members)
    else:
        form = inference_forms(student)[0]
    if precision == "float32":
        return form
    half = precision == "float16"
    # Samples need their float32: a flow is integrated, and they differ by little.
    if isinstance(form, Sampled):
        form.body = InFewerBits(form.body, half)
    elif isinstance(form, FlowMatching):
        backbone = form.network.get_submodule("backbone")
        form.network.backbone = InFewerBits(backbone, half)
    else:
        form = InFewerBits(form, half)
    return form


def _default_size(student: Student) -> tuple[int, int]:
    """Of the images of a network outside a study: what its library says, or any."""
    if not any(isinstance(it, LibraryNetwork) for it in student.network.modules()):
        return 32, 32
    options = student.spec["architecture"].get("options") or {}
    side = options.get("img_size") or options.get("image_size") or 224
    return tuple(side) if isinstance(side, list | tuple) else (side, side)


# --- PyTorch's format ---------------------------------------------------------------------------


def _program(name: str, module: nn.Module, example: Tensor, any_size: bool) -> ExportedProgram:
    """A module's operations, for any number of images; of any size where the network takes them."""
    sides = {0: Dim("batch"), **({2: Dim.AUTO, 3: Dim.AUTO} if any_size else {})}
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of constants that are no buffers
            program = torch.export.export(module, (example,), dynamic_shapes=(sides,))
    except Exception as error:  # whatever a network does that cannot be traced
        raise _impossible(name, error) from error
    program.example_inputs = None
    return program


def _write_torch(path: Path, program: ExportedProgram, known: dict[str, str]) -> None:
    """Without what the exporter says of this machine's source code."""
    for node in program.graph.nodes:
        for key in ("stack_trace", "source_fn_stack", "torch_fn", "nn_module_stack"):
            node.meta.pop(key, None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of weights that are parts of others
        torch.export.save(program, path, extra_files=known)


def _impossible(name: str, error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0]
    return InputError(f"{name}: PyTorch cannot export this network ({reason})")


# --- ONNX ---------------------------------------------------------------------------------------


def _onnx_model(name: str, program: ExportedProgram, precision: Precision) -> Any:
    """The same as operators of ONNX.

    Constants that weights make, such as those of members, are left to who opens the file; but in
    int8 all are made, for only weights that stand in the file are quantised.
    """
    from onnx_ir.passes.common import DeduplicateInitializersPass
    from onnxscript import optimizer

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exported = torch.onnx.export(
                program,
                input_names=["images"],
                output_names=list(OUTPUTS),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
    except Exception as error:
        raise _impossible(name, error) from error
    assert exported is not None
    most = MOST_BYTES if precision == "int8" else MOST_CONSTANT
    optimizer.optimize(exported.model, input_size_limit=most, output_size_limit=most)
    DeduplicateInitializersPass(size_limit=MOST_BYTES)(exported.model)
    return exported.model_proto


def _write_onnx(path: Path, model: Any, known: dict[str, str]) -> None:
    """Checked, and without what the exporter says of this machine's source code."""
    import onnx

    for part in (model, model.graph):
        del part.metadata_props[:]
    for it in [*model.graph.node, *model.graph.initializer, *model.graph.value_info]:
        it.ClearField("doc_string")
        del it.metadata_props[:]
    model.doc_string = known["usage"]
    onnx.helper.set_model_props(model, known)
    if model.ByteSize() > MOST_BYTES:
        raise InputError(f"{path}: ONNX files hold at most 2 GB; export --to torch, or with --half")
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def _quantised(model: Any, images: NDArray[np.uint8], uint8: bool) -> Any:
    """Convolutions and matrix products of the network in int8, its other operations in float32.

    Weights have a scale per channel out, activations one each, by the least and the greatest that
    calibration images gave. Weights have 7 bits: processors without VNNI add two products in 16.
    Products with several matrices at once, as of a packed linear layer, stay float32: ONNX Runtime
    1.27 and older refuse scales per channel there.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            parts = np.array_split(images, math.ceil(len(images) / 50))
            self.batches: Iterator[NDArray[Any]] = iter(parts)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self.batches, None)
            if batch is None:
                return None
            return {"images": batch if uint8 else batch.astype(np.float32) / np.float32(255)}

    several = {it.name for it in model.graph.initializer if len(it.dims) == 3}
    chosen = [
        node.name
        for node in model.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
        and several.isdisjoint(node.input)
        and any("in_fewer_bits" in it.value for it in node.metadata_props)
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "quantised.onnx")
        quantize_static(
            onnx.shape_inference.infer_shapes(model),
            path,
            Reader(),
            nodes_to_quantize=chosen,
            op_types_to_quantize=["Conv", "Gemm", "MatMul"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        return onnx.load(path)
