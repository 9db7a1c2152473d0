"""What an ensemble of teachers, and its students, say around images: the paper's analyses.

Everything that needs a network is here and ends in arrays; `ensdistill.reports` makes numbers of
them.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ensdistill.hdf5 import Blocks, in_blocks
from ensdistill.loading import in_batches
from ensdistill.perturbations import PERTURBATIONS, ods_direction
from ensdistill.stored_images import StoredImages
from ensdistill.students import Step, Student, teacher_logits

EXAMPLES = 8
"""How many perturbed images are kept to be looked at."""

JACOBIAN_ELEMENTS = 2**22
"""Elements of a batch of Jacobians that are computed at once; bounds the memory."""

Arrays = dict[str, NDArray[np.float32]]
Images = Tensor | StoredImages
Options = Mapping[str, Any]


def perturbed_logits(
    teachers: Sequence[nn.Module],
    images: Images,
    *,
    perturbations: Mapping[str, Options],
    held_out: Images | None = None,
    seed: int = 0,
    batch_size: int = 256,
) -> Mapping[str, NDArray[np.float32] | Blocks]:
    """The teachers' logits on images as they are and under every perturbation.

    As in training, the source of ODS and ConfODS is drawn anew for each batch. Teachers are always
    compared at the same input: where a perturbation gives each of them its own, image n is taken at
    the input of teacher n mod M. No student takes part, so that of TDiv–SDiv the teachers' part is
    left.

    Args:
        teachers: M frozen networks in eval mode, (B, C, H, W) → (B, K).
        images: uint8 (N, C, H, W).
        perturbations: options by name.
        held_out: uint8 (H, C, H, W), for a perturbation that takes other images than these: each
            batch gets the next ones, the first again after the last.
        seed: of all draws.

    Returns:
        `clean/logits` and `<perturbation>/logits` float32 (N, M, K); `clean/examples` and
        `<perturbation>/examples` float32, the first 8 images in [0, 1] as the networks saw them.
        Of a perturbation that takes held-out images at most H instead of N: each counts once.
        Logits of many images are `Blocks`.
    """
    arrays = {}
    for name, options in {"clean": {"name": "none"}, **perturbations}.items():
        examples: list[Tensor] = []
        moved = _perturbed(teachers, images, options, seed, batch_size, held_out)
        answers = map(partial(_shown, teachers, examples), moved)
        arrays[f"{name}/logits"] = in_blocks(answers, len(images))
        arrays[f"{name}/examples"] = torch.cat(examples).numpy()
    return arrays


def _shown(teachers: Sequence[nn.Module], examples: list[Tensor], x: Tensor) -> NDArray[np.float32]:
    """Logits (B, M, K) on images, of which some are put to the examples."""
    examples.append(x[: EXAMPLES - sum(map(len, examples))].cpu())
    return _answers(teachers, x).numpy()


def sweep_logits(
    teachers: Sequence[nn.Module],
    images: Images,
    *,
    etas: Sequence[float],
    perturbations: Mapping[str, Options],
    seed: int = 0,
    batch_size: int = 256,
) -> Arrays:
    """The teachers' logits under every perturbation at each of several sizes η.

    A perturbation's directions are the same at all sizes. Arguments as `perturbed_logits`; each of
    the perturbations has the option `eta`.

    Returns:
        `<perturbation>/logits` float32 (len(etas), N, M, K).
    """
    arrays = {}
    for name, options in perturbations.items():
        sizes = []
        for eta in etas:
            batches = _perturbed(teachers, images, {**options, "eta": eta}, seed, batch_size)
            sizes.append(torch.cat([_answers(teachers, x) for x in batches]))
        arrays[f"{name}/logits"] = torch.stack(sizes).numpy()
    return arrays


def _perturbed(
    teachers: Sequence[nn.Module],
    images: Images,
    options: Options,
    seed: int,
    batch_size: int,
    held_out: Images | None = None,
) -> Iterator[Tensor]:
    """Batches (B, C, H, W) of perturbed images in [0, 1]; the same draws for the same seed."""
    options = dict(options)
    perturbation = PERTURBATIONS[options.pop("name")]
    device = _device(teachers)
    generator = torch.Generator(device).manual_seed(seed)
    host = torch.Generator().manual_seed(seed)
    each = torch.arange(len(images), device=device).split(batch_size)
    for places, batch in zip(each, in_batches(images, batch_size, device), strict=True):
        others = None if held_out is None else _taken(held_out, places).float() / 255
        x = batch.float() / 255
        moved = perturbation(
            Step(None, teachers, x, None, 1.0, generator, host, held_out=others), **options
        )
        if held_out is not None and moved is others:
            moved = moved[places < len(held_out)]
        if moved.ndim == 5:  # an input for each teacher
            moved = moved[places % len(moved), places - places[0]]
        yield moved


def _taken(images: Images, places: Tensor) -> Tensor:
    """Those at the places, again from the first after the last."""
    places = places % len(images)
    if isinstance(images, Tensor):
        return images[places]
    return torch.from_numpy(images.read(places.cpu().numpy())).to(places.device)


def _device(networks: Sequence[nn.Module]) -> torch.device:
    return next(networks[0].parameters()).device


def transfer_logits(
    networks: Sequence[nn.Module],
    images: Images,
    *,
    eta: float,
    temperature: float,
    seed: int = 0,
    batch_size: int = 256,
) -> Arrays:
    """What every network says where ODS from every network leads [Nam et al. 2021, Fig. 6].

    All sources share the same w for the same image, so that their directions compare. It is about
    ODS alone, whatever else a study has: whether others disagree where one network leads can be
    asked of directions that one network gives. Noise and held-out images have no such source, TDiv
    has two, ODS-each one for every teacher; and ConfODS takes shorter steps in the same directions.

    Args:
        networks: P frozen networks in eval mode.
        images: uint8 (N, C, H, W).
        eta, temperature, seed: as `perturbed_logits`.

    Returns:
        `clean/logits` (N, P, K); `ods/logits` (P, N, P, K), first axis the source; `cosines`
        (N, P, P) between the directions of every two sources; `random_cosines` (N, P) between
        each source's and a Gaussian direction. All float32.
    """
    device = _device(networks)
    generator = torch.Generator(device).manual_seed(seed)
    clean, moved, cosines, random_cosines = [], [], [], []
    for batch in in_batches(images, batch_size, device):
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


def logit_jacobians(
    student: Student, x: Tensor, *, mean: bool = False, classes: slice = slice(None)
) -> Tensor:
    """Jacobians of every member's logits, or of their mean, with respect to the image.

    Vectorised over images, members and classes; classes in chunks that bound the memory. A student
    that takes all images at once, such as MIMO, is given the same one for all its members.

    Args:
        student: frozen, in eval mode, so that images do not mix.
        x: images (B, C, H, W) in [0, 1].
        mean: of the members' mean logits, all at the same image; what they share, such as the
            network from whose features logits are sampled, is then passed once.
        classes: of these K classes; all unless told.

    Returns:
        (B, M, K, C·H·W); M = 1 for a single network or the mean.
    """
    shared = mean or student.mixes_members
    with torch.enable_grad():
        each = x.expand(1 if shared else student.members, *x.shape).clone().requires_grad_()
        logits = student(each[0] if shared else each)
        logits = logits.mean(0, keepdim=True) if mean else logits
    # Where a member's logits depend on its own image alone, one vector per class serves all.
    members, count = len(logits) if shared else 1, logits.shape[-1]
    one_hot = torch.eye(members * count, dtype=logits.dtype, device=x.device)
    one_hot = one_hot.unflatten(0, (members, count))[:, classes].flatten(0, 1)
    chunk = max(1, JACOBIAN_ELEMENTS // each.numel())
    gradients = [
        torch.autograd.grad(
            logits,
            each,
            part.unflatten(1, (members, 1, count)).expand(-1, *logits.shape[:2], -1),
            retain_graph=True,
            is_grads_batched=True,
        )[0]
        for part in one_hot.split(chunk)
    ]
    by_class = torch.cat(gradients).flatten(3).unflatten(0, (members, -1))
    return by_class.permute(3, 0, 2, 1, 4).flatten(1, 2)


def jacobian_distances(
    teachers: Sequence[Student], students: Mapping[str, Student], images: Tensor
) -> Arrays:
    """How near the logit Jacobians of students are to those of their teachers.

    Distilling at x + η·ε approximates matching Jacobians [Nam et al. 2021, §3.2]. A student
    that is a single network is compared with every teacher; so is the mean of one whose members
    are not as many as the teachers, such as samples of logits.

    Args:
        teachers: M frozen teachers in eval mode.
        students: by name; in eval mode, on the same device.
        images: uint8 (N, C, H, W).

    Returns:
        `<name>/error` (N, M): ‖J_S − J_T‖_F / ‖J_T‖_F of member j and teacher j, and
        `<name>/cosine` (N, M): the cosine of the angle between them. float32; 0/0 is NaN.
    """
    x = images[:1].float() / 255
    num_classes, of_class = teachers[0](x).shape[-1], len(teachers) * x.numel()
    at_once = min(num_classes, max(1, JACOBIAN_ELEMENTS // of_class))
    parts: dict[str, list[Tensor]] = {}
    for batch in images.split(max(1, JACOBIAN_ELEMENTS // (num_classes * of_class))):
        x = batch.float() / 255
        sums: dict[str, list[tuple[Tensor, ...]]] = {name: [] for name in students}
        for start in range(0, num_classes, at_once):
            some = slice(start, start + at_once)
            jacobians = [logit_jacobians(teacher, x, classes=some) for teacher in teachers]
            of_teachers = torch.cat(jacobians, 1).flatten(2)
            length = of_teachers.norm(dim=2)
            for name, student in students.items():
                mean = student.members not in (1, len(teachers))
                own = logit_jacobians(student, x, mean=mean, classes=some).flatten(2)
                own = own.expand_as(of_teachers)
                product = (own * of_teachers).sum(2)
                gap = (own - of_teachers).norm(dim=2)
                sums[name].append((gap, product, own.norm(dim=2), length))
        for name, of_classes in sums.items():
            gaps, products, owns, lengths = zip(*of_classes, strict=True)
            length = _norm(lengths)
            parts.setdefault(f"{name}/error", []).append((_norm(gaps) / length).cpu())
            cosine = sum(products[1:], products[0]) / (_norm(owns) * length)
            parts.setdefault(f"{name}/cosine", []).append(cosine.cpu())
    return {name: torch.cat(part).numpy() for name, part in parts.items()}


def _norm(parts: Sequence[Tensor]) -> Tensor:
    """Norm of a whole from those of its parts."""
    return parts[0] if len(parts) == 1 else torch.stack([*parts]).norm(dim=0)


@torch.inference_mode()
def _answers(networks: Sequence[nn.Module], x: Tensor) -> Tensor:
    """Logits (B, M, K) of several networks, on the CPU."""
    return teacher_logits(networks, x).transpose(0, 1).cpu()
