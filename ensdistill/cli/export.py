"""`ensdistill export`: a student as one file that needs nothing of this package."""

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ensdistill import InputError

if TYPE_CHECKING:
    from ensdistill.export import Precision


class Format(StrEnum):
    """Of the file."""

    ONNX = "onnx"
    TORCH = "torch"


def export(
    student: Annotated[
        Path,
        typer.Argument(
            help="Its weights, such as results/digits/students/kd/0/weights.safetensors; "
            "a teacher's do too.",
            metavar="STUDENT",
        ),
    ],
    to: Annotated[
        Format,
        typer.Option(
            "--to", help="`onnx` (a .onnx file) or `torch` (a .pt2 file of torch.export)."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file.", metavar="FILE")],
    half: Annotated[bool, typer.Option("--half", help="The network in float16.")] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8",
            help="Convolutions and matrix products in int8, calibrated on up to 500 validation "
            "images of the study; ONNX alone.",
        ),
    ] = False,
    uint8: Annotated[
        bool,
        typer.Option("--uint8", help="The file takes images as bytes, not as float32 in [0, 1]."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the comparison as JSON.")] = False,
) -> None:
    """Write a student as one file, and compare what it says with PyTorch.

    The file holds the network with all its members, pixel normalisation, temperature, class names
    and the rule by which pictures become images. Its input is `images` (B, C, H, W), its outputs
    are `probabilities` (B, K), `member_probabilities` (B, M, K), `entropy` (B) and
    `mutual_information` (B).

    Without `--half` and `--int8` no probability may differ by more than 1e-5 from PyTorch's; else
    nothing is written. With them the change in NLL on the study's test images is printed.

    Example: `ensdistill export results/digits/students/kd/0/weights.safetensors --to onnx -o
    student.onnx`
    """
    if half and int8:
        raise InputError("--half and --int8 exclude each other")
    from ensdistill.parity import export_student

    precision: Precision = "float16" if half else "int8" if int8 else "float32"
    report = export_student(student, output, to.value, precision, uint8)
    typer.echo(json.dumps(report) if as_json else _text(report))


def _text(report: dict[str, Any]) -> str:
    lines = [
        f"{report['file']}: {report['bytes'] / 1e6:.3g} MB, {report['precision']}, images "
        f"{report['input']}",
        f"largest difference to PyTorch of a probability: {report['largest_difference']:.1e}, of a "
        f"member's: {report['largest_member_difference']:.1e} ({report['images']} "
        f"{report['images_of']} images)",
    ]
    if "nll" in report:
        for name, decimals, unit in (("nll", 4, ""), ("accuracy", 2, " %")):
            ours, theirs = report[name], report[f"{name}_torch"]
            lines.append(
                f"{name.upper() if name == 'nll' else name}: {ours:.{decimals}f}{unit}, PyTorch's "
                f"{theirs:.{decimals}f}{unit} (change {ours - theirs:+.{decimals}f})"
            )
    return "\n".join(lines)
