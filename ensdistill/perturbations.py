"""Where the teachers are asked: (step) → x̃ = clip(x + η·ε, 0, 1), at which they disagree.

A perturbation looks at a `Step` alone. Its options, such as η (in units of the pixel range), are
keyword arguments. It returns images of the shape of x, or x itself where nothing moves.

Output-diversified sampling (ODS): Tashiro, Song and Ermon, "Diversity can be Transferred"
(NeurIPS 2020). ConfODS: Nam et al. (NeurIPS 2021, §3).
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ensdistill.students import Step


def ods_direction(
    network: nn.Module,
    x: Tensor,
    temperature: float,
    w: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Output-diversified sampling: ε = √D · g/‖g‖₂ with g = ∇_x wᵀ softmax(T̂(x)/τ).

    Papers write ε with unit norm [Tashiro et al. 2020; Nam et al. 2021, §3]; the
    authors' code scales it by √D, D = C·H·W, which gives the published results. So η is the
    root-mean-square step per pixel, comparable with Gaussian noise of standard deviation η.

    Args:
        network: maps (B, C, H, W) to logits (B, K); in eval mode, or images of a batch mix.
        x: images (B, C, H, W) in [0, 1].
        temperature: τ > 0.
        w: (B, K) directions in output space; drawn from U(−1, 1) unless given.
        generator: source of w.

    Returns:
        ε (B, C, H, W), each image of norm √D, or 0 where the gradient is 0.
    """
    return _ods(network, x, temperature, w, generator)[0]


def conf_ods_direction(
    network: nn.Module,
    x: Tensor,
    temperature: float,
    w: Tensor | None = None,
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Confidence-weighted ODS: ε = C_max · ε_ODS, C_max = max_k softmax(T̂(x)/τ)_k.

    Nam et al. 2021, §3. Confident images, on which the teachers agree, move furthest.
    Arguments and shapes as `ods_direction`; each image of norm C_max·√D, or 0.
    """
    epsilon, probs = _ods(network, x, temperature, w, generator)
    return epsilon * probs.amax(1).view(-1, 1, 1, 1)


def _ods(
    network: nn.Module,
    x: Tensor,
    temperature: float,
    w: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """ε_ODS and the softmax probabilities (B, K) at which it was taken."""
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        logits = network(x)
    probs = (logits.detach().to(x.dtype) / temperature).softmax(1)
    if w is None:
        w = torch.empty_like(probs).uniform_(-1, 1, generator=generator)
    # g = Jᵀv, v = p∘(w − wᵀp)/τ. Only its direction counts, so v may be shifted and scaled:
    # w relative to the top class survives p ≈ one-hot, max|v| = 1 survives bfloat16.
    w = w - w.gather(1, probs.argmax(1, keepdim=True))
    v = probs * (w - (probs * w).sum(1, keepdim=True))
    v = v / v.abs().amax(1, keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    (gradient,) = torch.autograd.grad(logits, x, v.to(logits.dtype))
    largest = gradient.abs().amax((1, 2, 3), keepdim=True)
    # Scaled first, so that squares of a tiny gradient do not vanish.
    unit = gradient / torch.where(largest > 0, largest, 1)
    norm = unit.square().sum((1, 2, 3), keepdim=True).sqrt()
    return unit * x[0].numel() ** 0.5 / torch.where(norm > 0, norm, 1), probs


def none(step: Step) -> Tensor:
    """x̃ = x itself."""
    return step.x


def gaussian(step: Step, *, eta: float) -> Tensor:
    """x̃ with ε ~ N(0, I): the baseline that needs no teacher."""
    return _moved(step, eta, lambda x: torch.empty_like(x).normal_(generator=step.generator))


def ods(step: Step, *, eta: float, temperature: float) -> Tensor:
    """x̃ with `ods_direction` of one teacher, drawn uniformly for the whole batch.

    One teacher serves all members: a direction that diversifies it diversifies the others too
    [Nam et al. 2021, §3].
    """
    source = _source(step)
    return _moved(
        step, eta, lambda x: ods_direction(source, x, temperature, generator=step.generator)
    )


def conf_ods(step: Step, *, eta: float, temperature: float) -> Tensor:
    """x̃ with `conf_ods_direction` of one teacher, drawn as for `ods`."""
    source = _source(step)
    return _moved(
        step, eta, lambda x: conf_ods_direction(source, x, temperature, generator=step.generator)
    )


def _moved(step: Step, eta: float, direction: Callable[[Tensor], Tensor]) -> Tensor:
    """clip(x + η·ε, 0, 1), shape of x; x itself where η is 0."""
    return (step.x + eta * direction(step.x)).clamp(0, 1) if eta else step.x


def _source(step: Step) -> nn.Module:
    """A teacher, drawn uniformly; on the host, so that a GPU need not wait."""
    return step.teachers[int(torch.randint(len(step.teachers), (), generator=step.host))]


PERTURBATIONS: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "gaussian": gaussian,
    "ods": ods,
    "conf_ods": conf_ods,
}
"""By the names that config.yaml uses; their options and traits are in methods.py."""
