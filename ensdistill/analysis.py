"""What an ensemble of teachers says at perturbed inputs."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill.networks import member_logits
from ensdistill.perturbations import PERTURBATIONS, perturb

SETS = ("clean", *PERTURBATIONS)

EXAMPLES = 8
"""How many perturbed images are kept to be looked at."""


def perturbed_logits(
    teachers: Sequence[nn.Module],
    images: Tensor,
    *,
    eta: float,
    temperature: float,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[str, NDArray[np.float32]]:
    """The teachers' logits on images as they are and under every perturbation.

    As in training, the source of ODS and ConfODS is drawn anew for each batch.

    Args:
        teachers: M frozen networks in eval mode.
        images: uint8 (N, C, H, W), on the teachers' device.
        eta: η, in units of the pixel range.
        temperature: τ.
        seed: of all draws.

    Returns:
        `clean/logits` and `<perturbation>/logits` float32 (N, M, K); `clean/examples` and
        `<perturbation>/examples` float32, the first 8 images in [0, 1] as the networks saw them.
    """
    arrays = {}
    for name in SETS:
        generator = torch.Generator(images.device).manual_seed(seed)
        logits, examples = [], []
        for batch in images.split(batch_size):
            x = batch.float() / 255
            if name != "clean":
                x = perturb(
                    name, teachers, x, eta=eta, temperature=temperature, generator=generator
                )
            with torch.inference_mode():
                answers = torch.cat([member_logits(teacher, x) for teacher in teachers])
            logits.append(answers.transpose(0, 1).cpu())
            examples.append(x[: EXAMPLES - sum(map(len, examples))].cpu())
        arrays[f"{name}/logits"] = torch.cat(logits).numpy()
        arrays[f"{name}/examples"] = torch.cat(examples).numpy()
    return arrays
