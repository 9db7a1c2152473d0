"""Seeded choices of images for a split, the classes' shares kept, and groups kept whole."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError

TRIES = 10
"""Orders of the groups that are tried, of which the best one counts."""


def choose(
    labels: NDArray[np.int64],
    groups: NDArray[np.str_] | None,
    count: int,
    seed: int,
    what: str,
    classes: Sequence[str],
) -> NDArray[np.bool_]:
    """As `stratified`; if images have groups, as `by_groups`."""
    if groups is None:
        return stratified(labels, count, seed, what, classes)
    return by_groups(labels, groups, count, seed, what, classes)


def by_groups(
    labels: NDArray[np.int64],
    groups: NDArray[np.str_],
    count: int,
    seed: int,
    what: str,
    classes: Sequence[str],
) -> NDArray[np.bool_]:
    """A mask of about `count` images: all those of groups that are chosen by seed.

    Every class is among them and among the others. Of several random orders each group is taken
    that brings the images of each class nearer to their share Σ (n_k − w_k)² / w_k, after groups
    of classes of which there are none yet; the order that comes nearest is kept.

    Args:
        groups: (N,), of each image.
        what: what the images are for, in messages.
        classes: names of the classes.

    Raises:
        InputError: there is no such choice, or none with at least half and at most one and a half
            times as many images as wanted.
    """
    names, group = np.unique(groups, return_inverse=True)
    sizes = np.zeros((len(names), len(classes)), np.int64)
    np.add.at(sizes, (group, labels), 1)
    wanted = sizes.sum(0) * count / len(labels)
    refused = f"{count} {what} images cannot be chosen from {len(labels)} by whole groups"
    if count >= len(labels):
        raise InputError(f"{count} {what} images are wanted, but there are only {len(labels)}")
    for label, number in enumerate((sizes > 0).sum(0)):
        if number < 2:
            held = f": all of {str(names[sizes[:, label].argmax()])!r}" if number else ""
            raise InputError(
                f"{refused} with every class in both parts: images of {classes[label]!r} are in "
                f"{number} group{'' if number == 1 else 's'}{held}"
            )
    rng, best = np.random.default_rng(seed), None
    for _ in range(TRIES):
        chosen = _whole_groups(sizes, wanted, rng.permutation(len(names)))
        have = sizes[chosen].sum(0)
        distance = _distance(have, wanted)
        if have.all() and (best is None or distance < best[0]):
            best = distance, chosen, have.sum()
    if best is None:
        raise InputError(f"{refused} with every class in both parts")
    if not count / 2 <= best[2] <= 1.5 * count:
        raise InputError(f"{refused}: the nearest number is {best[2]}")
    return best[1][group]


def _whole_groups(
    sizes: NDArray[np.int64], wanted: NDArray[np.float64], order: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """A mask of groups (G,), by their images of each class (G, K)."""
    chosen = np.zeros(len(sizes), bool)
    have, left = np.zeros(len(wanted), np.int64), sizes.sum(0)

    def take(one: int) -> bool:
        """Whether a group could be taken: others of its classes are left."""
        if chosen[one] or not (left > sizes[one]).all():
            return False
        chosen[one] = True
        np.add(have, sizes[one], out=have)
        np.subtract(left, sizes[one], out=left)
        return True

    for label in np.argsort((sizes > 0).sum(0), kind="stable"):  # the rarest classes first
        if not have[label]:
            any(take(one) for one in order if sizes[one, label])
    for one in order:
        if _distance(have + sizes[one], wanted) < _distance(have, wanted):
            take(one)
    return chosen


def _distance(have: NDArray[np.int64], wanted: NDArray[np.float64]) -> float:
    return float(((have - wanted) ** 2 / wanted).sum())


def stratified(
    labels: NDArray[np.int64],
    count: int,
    seed: int,
    what: str,
    classes: Sequence[str],
    *,
    rest: bool = True,
) -> NDArray[np.bool_]:
    """A mask of `count` images, chosen by seed, with the classes' shares kept.

    Every class is among them.

    Args:
        what: what the images are for, in messages.
        classes: names of the classes.
        rest: whether the other images are used too, so that every class must be among those.
    """
    from sklearn.model_selection import train_test_split

    sizes = np.bincount(labels, minlength=len(classes))
    total, least, parts = len(labels), int(sizes.argmin()), 1 + rest
    there = (
        f"there {'is' if sizes[least] == 1 else 'are'} only {sizes[least]} of {classes[least]!r}"
    )
    if count >= total:
        raise InputError(f"{count} {what} images are wanted, but there are only {total}")
    if sizes[least] < parts:
        raise InputError(
            f"{count} {what} images cannot be chosen from {total} with every class "
            f"{'in both parts' if rest else 'among them'}: {there}"
        )
    if min(count, total - count if rest else count) < len(classes):
        raise InputError(
            f"{count} {what} images cannot be chosen from {total} images of {len(classes)} "
            f"classes with every class {'in both parts' if rest else 'among them'}"
        )
    mask = np.zeros(total, dtype=bool)
    if sizes[least] > 1 and total - count >= len(classes):
        _, chosen = train_test_split(
            np.arange(total), test_size=count, random_state=seed, stratify=labels
        )
        mask[chosen] = True
        return mask
    rng = np.random.default_rng(seed)
    for label, number in enumerate(_shares(sizes, count)):
        mask[rng.permutation(np.flatnonzero(labels == label))[:number]] = True
    return mask


def _shares(sizes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """How many of each class make `count`: proportional to sizes, at least one."""
    exact = sizes * count / sizes.sum()
    shares = np.maximum(exact.astype(int), 1)
    while (lack := count - shares.sum()) != 0:
        # The class that is furthest from its exact share takes one more, or gives one.
        gaps = (exact - shares) * np.sign(lack)
        gaps[(shares == sizes) if lack > 0 else (shares == 1)] = -np.inf
        shares[gaps.argmax()] += np.sign(lack)
    return shares
