"""What an ensemble of teachers, and its students, say around images: the paper's analyses.

Everything that needs a network is here and ends in arrays; `ensdistill.evaluation` makes numbers
of them.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill.networks import member_logits
from ensdistill.perturbations import PERTURBATIONS, draw_direction, ods_direction, perturb

SETS = ("clean", *PERTURBATIONS)

EXAMPLES = 8
"""How many perturbed images are kept to be looked at."""

JACOBIAN_ELEMENTS = 2**22
"""Elements of a batch of Jacobians that are computed at once; bounds the memory."""

Arrays = dict[str, NDArray[np.float32]]


def perturbed_logits(
    teachers: Sequence[nn.Module],
    images: Tensor,
    *,
    eta: float,
    temperature: float,
    seed: int = 0,
    batch_size: int = 256,
) -> Arrays:
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
            logits.append(_answers(teachers, x))
            examples.append(x[: EXAMPLES - sum(map(len, examples))].cpu())
        arrays[f"{name}/logits"] = torch.cat(logits).numpy()
        arrays[f"{name}/examples"] = torch.cat(examples).numpy()
    return arrays


def sweep_logits(
    teachers: Sequence[nn.Module],
    images: Tensor,
    *,
    etas: Sequence[float],
    temperature: float,
    seed: int = 0,
    batch_size: int = 256,
) -> Arrays:
    """The teachers' logits under every perturbation at each of several sizes η.

    A perturbation's directions are the same at all sizes. Arguments as `perturbed_logits`.

    Returns:
        `<perturbation>/logits` float32 (len(etas), N, M, K).
    """
    arrays = {}
    for name in PERTURBATIONS:
        generator = torch.Generator(images.device).manual_seed(seed)
        logits = []
        for batch in images.split(batch_size):
            x = batch.float() / 255
            epsilon = draw_direction(name, teachers, x, temperature, generator)
            logits.append(
                torch.stack([_answers(teachers, (x + eta * epsilon).clamp(0, 1)) for eta in etas])
            )
        arrays[f"{name}/logits"] = torch.cat(logits, dim=1).numpy()
    return arrays


def transfer_logits(
    networks: Sequence[nn.Module],
    images: Tensor,
    *,
    eta: float,
    temperature: float,
    seed: int = 0,
    batch_size: int = 256,
) -> Arrays:
    """What every network says where ODS from every network leads [Nam et al. 2021, Fig. 6].

    All sources share the same w for the same image, so that their directions compare.

    Args:
        networks: P frozen networks in eval mode.
        images: uint8 (N, C, H, W), on their device.
        eta, temperature, seed: as `perturbed_logits`.

    Returns:
        `clean/logits` (N, P, K); `ods/logits` (P, N, P, K), first axis the source; `cosines`
        (N, P, P) between the directions of every two sources; `random_cosines` (N, P) between
        each source's and a Gaussian direction. All float32.
    """
    generator = torch.Generator(images.device).manual_seed(seed)
    clean, moved, cosines, random_cosines = [], [], [], []
    for batch in images.split(batch_size):
        x = batch.float() / 255
        clean.append(_answers(networks, x))
        w = torch.empty(len(x), clean[-1].shape[-1], device=x.device)
        w.uniform_(-1, 1, generator=generator)
        directions = [ods_direction(network, x, temperature, w) for network in networks]
        moved.append(
            torch.stack([_answers(networks, (x + eta * e).clamp(0, 1)) for e in directions])
        )
        units = nn.functional.normalize(torch.stack(directions, 1).flatten(2), dim=2)
        cosines.append((units @ units.mT).cpu())
        noise = torch.empty_like(units[:, 0]).normal_(generator=generator)
        random_cosines.append((units @ nn.functional.normalize(noise)[:, :, None])[..., 0].cpu())
    return {
        "clean/logits": torch.cat(clean).numpy(),
        "ods/logits": torch.cat(moved, dim=1).numpy(),
        "cosines": torch.cat(cosines).numpy(),
        "random_cosines": torch.cat(random_cosines).numpy(),
    }


def logit_jacobians(network: nn.Module, x: Tensor) -> Tensor:
    """Jacobians of every member's logits with respect to the image.

    Vectorised over images, members and classes; classes in chunks that bound the memory.

    Args:
        network: frozen, in eval mode, so that images do not mix.
        x: images (B, C, H, W) in [0, 1].

    Returns:
        (B, M, K, C·H·W); M = 1 for a plain network.
    """
    members = getattr(network, "ensemble_size", 1)
    with torch.enable_grad():
        rows = x.repeat(members, 1, 1, 1).requires_grad_()
        logits = network(rows)
    classes = logits.shape[1]
    one_hot = torch.eye(classes, dtype=logits.dtype, device=x.device)
    chunk = max(1, JACOBIAN_ELEMENTS // rows.numel())
    gradients = [
        # A row's logits depend on that row alone: one vector per class serves all rows.
        torch.autograd.grad(
            logits,
            rows,
            part[:, None].expand(-1, len(rows), -1),
            retain_graph=True,
            is_grads_batched=True,
        )[0]
        for part in one_hot.split(chunk)
    ]
    jacobians = torch.cat(gradients).flatten(2)
    return jacobians.view(classes, members, len(x), -1).permute(2, 1, 0, 3)


def jacobian_distances(
    teachers: Sequence[nn.Module], students: Mapping[str, nn.Module], images: Tensor
) -> Arrays:
    """How near the logit Jacobians of students are to those of their teachers.

    Distilling at x + η·ε approximates matching Jacobians [Nam et al. 2021, §3.2]. A student
    that is a single network is compared with every teacher.

    Args:
        teachers: M frozen networks in eval mode.
        students: networks of M members, or one, by name; in eval mode, on the same device.
        images: uint8 (N, C, H, W).

    Returns:
        `<name>/error` (N, M): ‖J_S − J_T‖_F / ‖J_T‖_F of member j and teacher j, and
        `<name>/cosine` (N, M): the cosine of the angle between them. float32; 0/0 is NaN.
    """
    x = images[:1].float() / 255
    one = len(teachers) * member_logits(teachers[0], x).shape[-1] * x.numel()
    parts: dict[str, list[Tensor]] = {}
    for batch in images.split(max(1, JACOBIAN_ELEMENTS // one)):
        x = batch.float() / 255
        of_teachers = torch.cat([logit_jacobians(teacher, x) for teacher in teachers], 1).flatten(2)
        length = of_teachers.norm(dim=2)
        for name, student in students.items():
            own = logit_jacobians(student, x).flatten(2).expand_as(of_teachers)
            error = (own - of_teachers).norm(dim=2) / length
            cosine = (own * of_teachers).sum(2) / (own.norm(dim=2) * length)
            parts.setdefault(f"{name}/error", []).append(error.cpu())
            parts.setdefault(f"{name}/cosine", []).append(cosine.cpu())
    return {name: torch.cat(part).numpy() for name, part in parts.items()}


@torch.inference_mode()
def _answers(networks: Iterable[nn.Module], x: Tensor) -> Tensor:
    """Logits (B, M, K) of several networks, on the CPU."""
    return torch.cat([member_logits(network, x) for network in networks]).transpose(0, 1).cpu()
