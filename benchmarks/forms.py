"""Where the two forms of a BatchEnsemble layer cost the same; see batch_ensemble.py."""

import torch
from torch import Tensor

from benchmarks.rows import Bench
from benchmarks.workloads import MEMBERS, Call
from ensdistill.batch_ensemble import BatchEnsembleConv2d, scales_activations

LAYERS = {
    (16, 8): (16, 64, 256),
    (16, 32): (4, 8, 16, 64),
    (32, 16): (8, 16, 64),
    (64, 8): (16, 32, 64, 128),
    (128, 8): (16, 32, 64, 128),
    (256, 8): (8, 16, 64, 128),
    (320, 16): (4, 16),
    (640, 8): (4, 16),
}
"""Images of a student's batch by the channels and the side of a 3×3 layer: of ResNet-32 and
WRN-28-10, and between them."""


def forms(bench: Bench) -> None:
    """Forward and backward of a layer: M weights / scaled activations, and which is chosen."""
    for (channels, side), batches in LAYERS.items():
        for images in batches:
            numbers = MEMBERS * images * channels * side**2
            weights = MEMBERS * channels**2 * 9
            scales = scales_activations(numbers, weights, bench.device.type)
            bench.compare(
                f"form_{channels}_{side}_{images}",
                "layer that scales activations / that makes M weights, "
                f"chosen: {'scales' if scales else 'makes'}",
                lambda case=(channels, side, images): both_forms(*case, bench.device),
                rounds=5 if channels > 64 else 11,
                precision="fp32",
                shape=f"{channels} channels, {images} images of {side}×{side}, M = {MEMBERS}",
            )


def both_forms(channels: int, side: int, images: int, device: torch.device) -> tuple[Call, Call]:
    """A 3×3 layer forward and backward in either form: scaled activations, M weights."""
    torch.manual_seed(0)
    layer = BatchEnsembleConv2d(channels, channels, 3, MEMBERS, padding=1).to(device)
    layer.to(memory_format=torch.channels_last)
    shape = (MEMBERS * images, channels, side, side)
    x, gradient = (
        torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    x.requires_grad_()
    wanted = [x, *layer.parameters()]

    def scaled() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer._scaled(x), wanted, gradient)

    def explicit() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer._explicit(x), wanted, gradient)

    return scaled, explicit
