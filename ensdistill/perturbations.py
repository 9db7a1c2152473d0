"""Where the teachers are asked: (step) → x̃ = clip(x + η·ε, 0, 1), at which they disagree.

A perturbation looks at a `Step` alone. Its options, such as η (in units of the pixel range), are
keyword arguments. It returns images (B, C, H, W), or those of each teacher (M, B, C, H, W), or x
itself where nothing moves. Random numbers for each image are drawn by `drawn`: several processes
that train together then see what one would.

Output-diversified sampling (ODS): Tashiro, Song and Ermon, "Diversity can be Transferred"
(NeurIPS 2020). ConfODS: Nam et al. (NeurIPS 2021, §3). TDiv–SDiv: Nam et al., "Improving Ensemble
Distillation With Weight Averaging and Diversifying Perturbation" (ICML 2022).
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ensdistill.distributed import drawn, gathered, part_of
from ensdistill.students import Step, Student, any_teacher


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

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
        >>> with torch.no_grad():
        ...     _ = network[1].weight.copy_(torch.tensor([[1.0, 1, 1, 1], [0, 0, 0, 0]]))
        >>> w = torch.tensor([[1.0, 0.0]])  # to raise the first class, every pixel must grow
        >>> ods_direction(network, torch.zeros(1, 1, 2, 2), 1.0, w).flatten().tolist()
        [1.0, 1.0, 1.0, 1.0]
    """
    return _ods([network], x, temperature, w, generator)[0][0]


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

    Example:
        >>> network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2, bias=False))
        >>> x = torch.zeros(1, 1, 2, 2)  # where both classes have the probability ½
        >>> round(conf_ods_direction(network, x, 1.0).norm().item(), 4)  # ½ · √4
        1.0
    """
    epsilon, probs = _ods([network], x, temperature, w, generator)
    return epsilon[0] * probs[0].amax(1).view(-1, 1, 1, 1)


def _ods(
    networks: Sequence[nn.Module],
    x: Tensor,
    temperature: float,
    w: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """ε_ODS of each network (n, B, C, H, W) and the probabilities (n, B, K) at which it was taken.

    w (B, K) is drawn for each network unless given.
    """
    # One network after the other: graphs of several at once were measured to be slower on a CPU,
    # where they do not fit the caches.
    gradients: list[Tensor] = []
    every = []
    for network in networks:
        leaf, logits = _answer(network, x)
        probs = (logits.detach().to(x.dtype) / temperature).softmax(1)
        own = w
        if own is None:
            own = drawn(probs, lambda it: it.uniform_(-1, 1, generator=generator))
        # g = Jᵀv, v = p∘(w − wᵀp)/τ. Only its direction counts, so v may be shifted and scaled:
        # w relative to the top class survives p ≈ one-hot, max|v| = 1 survives bfloat16.
        own = own - own.gather(1, probs.argmax(1, keepdim=True))
        v = probs * (own - (probs * own).sum(1, keepdim=True))
        v = v / _largest(v, (1,))
        gradients += torch.autograd.grad(logits, leaf, v.to(logits.dtype))
        every.append(probs)
    return _unit(gradients), torch.stack(every)


def tdiv_sdiv_direction(
    teachers: Sequence[nn.Module],
    student: Student | None,
    x: Tensor,
    pair: tuple[int, int],
) -> Tensor:
    """TDiv–SDiv: where two teachers differ and the members that they teach agree.

    ε = √D · g/‖g‖₂ with g = ∇_x ℓ, ℓ = H(p_jᵀ, p_iᵀ) − H(p_jˢ, p_iˢ), H(p, q) = −Σ_k p_k ln q_k,
    p_j held constant, τ = 1 [Nam et al. 2022, §3.2, and their code].

    Args:
        teachers: (B, C, H, W) → (B, K), in eval mode.
        student: has as many members; it is asked in eval mode. None for the teachers' part alone.
        x: images (B, C, H, W) in [0, 1].
        pair: i and j.

    Returns:
        ε (B, C, H, W), each image of norm √D, or 0 where the gradient is 0.

    Example:
        >>> one, other = (nn.Sequential(nn.Flatten(), nn.Linear(4, 2)) for _ in range(2))
        >>> x = torch.rand(3, 1, 2, 2)
        >>> moved = tdiv_sdiv_direction([one, other], None, x, (0, 1))
        >>> moved.flatten(1).norm(dim=1).round().tolist()
        [2.0, 2.0, 2.0]
    """
    first, second = pair
    with torch.no_grad():
        others = [teachers[second](x)]
    leaf, answer = _answer(teachers[first], x)
    logits = [answer]
    if student is not None:
        was_training = student.training
        student.eval()
        with torch.enable_grad():
            own = student(leaf)
        student.train(was_training)
        logits, others = [*logits, own[first]], [*others, own[second]]
    v = torch.stack([_surplus(i, j, x.dtype) for i, j in zip(logits, others, strict=True)])
    v = v / _largest(v, (0, -1))
    signed = [sign * it.to(z.dtype) for sign, it, z in zip((1, -1), v, logits, strict=False)]
    return _unit(torch.autograd.grad(logits, leaf, signed))[0]


def _answer(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The images as a leaf, and a network's logits there, with a graph."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        return leaf, network(leaf)


def _surplus(logits: Tensor, others: Tensor, dtype: torch.dtype) -> Tensor:
    """p_i − p_j (B, K) of two logits: the gradient of H(p_j, p_i) with respect to the first."""
    one, other = (it.detach().to(dtype).softmax(-1) for it in (logits, others))
    surplus, top = one - other, (one + other).argmax(-1, keepdim=True)
    # Near one-hot the top class's difference is rounding error; all differences add up to 0.
    rest = surplus.scatter(-1, top, 0.0)
    return rest.scatter(-1, top, -rest.sum(-1, keepdim=True))


def _largest(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The largest size along some dimensions, which are kept; never 0, so that one may divide."""
    return values.abs().amax(dims, keepdim=True).clamp_min(torch.finfo(values.dtype).tiny)


def _unit(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients (B, C, H, W) scaled to norm √D per image, or 0 where they are 0; stacked."""
    # A single one keeps its memory format, and with it the order of the sums.
    gradient = torch.stack([*gradients]) if len(gradients) > 1 else gradients[0][None]
    each = (-3, -2, -1)
    largest = gradient.abs().amax(each, keepdim=True)
    # Scaled first, so that squares of a tiny gradient do not vanish.
    unit = gradient / torch.where(largest > 0, largest, 1)
    norm = unit.square().sum(each, keepdim=True).sqrt()
    return unit * gradient[0, 0].numel() ** 0.5 / torch.where(norm > 0, norm, 1)


def none(step: Step) -> Tensor:
    """x̃ = x itself."""
    return step.x


def gaussian(step: Step, *, eta: float) -> Tensor:
    """x̃ with ε ~ N(0, I): the baseline that needs no teacher."""
    return _moved(step, eta, lambda x: drawn(x, lambda it: it.normal_(generator=step.generator)))


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


def ods_each(step: Step, *, eta: float, temperature: float) -> Tensor:
    """x̃ (M, B, C, H, W) with `ods_direction` of every teacher: teacher j is asked at its own.

    What Nam et al. (2021, §3) call ideal and leave out, as it costs M gradients instead of one.
    """

    def directions(x: Tensor) -> Tensor:
        return _ods(step.teachers, x, temperature, None, step.generator)[0]

    return _moved(step, eta, directions)


def tdiv_sdiv(step: Step, *, eta: float, sdiv: bool) -> Tensor:
    """x̃ with `tdiv_sdiv_direction` of two teachers, drawn uniformly for the whole batch.

    Without `sdiv`, or where no student is asked, by the teachers' part alone.
    """
    student, pair = step.student if sdiv else None, step.decide(_pair)
    return _moved(step, eta, lambda x: tdiv_sdiv_direction(step.teachers, student, x, pair))


def mixup(step: Step, *, beta: float) -> Tensor:
    """x̃ = (1 − λ)·x + λ·x_π, λ ~ Beta(β, β) per batch, π a permutation [Zhang et al. 2018]."""
    share = step.decide(lambda it: np.random.default_rng(_seed(it)).beta(beta, beta))
    whole = gathered(step.x)
    order = torch.randperm(len(whole), generator=step.generator, device=whole.device)
    return step.x.lerp(whole[order[part_of(len(whole))]], share)


def held_out(step: Step) -> Tensor:
    """Images that no network was trained on, instead of x; as many as the step has of them."""
    assert step.held_out is not None
    return step.held_out


def _moved(step: Step, eta: float, direction: Callable[[Tensor], Tensor]) -> Tensor:
    """clip(x + η·ε, 0, 1), shape of ε; x itself where η is 0."""
    return (step.x + eta * direction(step.x)).clamp(0, 1) if eta else step.x


def _source(step: Step) -> nn.Module:
    """A teacher, drawn uniformly; on the host, so that a GPU need not wait."""
    return step.teachers[step.decide(any_teacher)]


def _pair(step: Step) -> tuple[int, int]:
    """Two different teachers, drawn uniformly."""
    first, second = torch.randperm(len(step.teachers), generator=step.host)[:2].tolist()
    return first, second


def _seed(step: Step) -> int:
    return int(torch.randint(2**63 - 1, (), generator=step.host))


PERTURBATIONS: dict[str, Callable[..., Tensor]] = {
    "none": none,
    "gaussian": gaussian,
    "ods": ods,
    "conf_ods": conf_ods,
    "ods_each": ods_each,
    "tdiv_sdiv": tdiv_sdiv,
    "mixup": mixup,
    "held_out": held_out,
}
"""By the names that config.yaml uses; their options and traits are in options.py."""
