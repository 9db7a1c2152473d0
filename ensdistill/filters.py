"""Filters and procedural textures of which the corruptions are made."""

import math
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Images = NDArray[np.floating[Any]]
Generator = np.random.Generator


def smoothed(x: Images, sigma: float) -> Images:
    """Images (N, H, W) or (N, H, W, C), smoothed over H and W."""
    sigmas = (0, sigma, sigma, 0)[: x.ndim]
    return ndimage.gaussian_filter(x, sigmas, mode="nearest", truncate=4)


def moved(x: Images, angles: NDArray, radius: int, sigma: float) -> Images:
    """Images (N, H, W, …), each blurred in one direction with half a normal density.

    `angles` (N,) are in degrees. Beyond its edge an image goes on as its outermost pixels.
    """
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2)).astype(np.float32)
    weights /= weights.sum()
    height, width = x.shape[1:3]
    margin = 2 * radius
    padded = np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0))[: x.ndim], mode="edge")
    blurred = np.zeros_like(x)
    for image, source, angle in zip(blurred, padded, np.deg2rad(angles), strict=True):
        tops, lefts = (
            margin + np.ceil(steps * part - 0.5).astype(int)
            for part in (np.sin(angle), np.cos(angle))
        )
        for weight, top, left in zip(weights, tops, lefts, strict=True):
            image += weight * source[top : top + height, left : left + width]
    return blurred


def enlarged(x: Images, factor: float) -> Images:
    """The centre of images (N, H, W, …), enlarged by linear interpolation."""
    for axis in (1, 2):
        size = x.shape[axis]
        kept = math.ceil(size / factor)
        places = (size - kept) // 2 + np.arange(size) * (kept - 1) / (round(kept * factor) - 1)
        low = places.astype(int)
        high = np.minimum(low + 1, size - 1)
        part = np.expand_dims((places - low).astype(np.float32), [*range(1, x.ndim - axis)])
        x = (1 - part) * x.take(low, axis) + part * x.take(high, axis)
    return x


def plasma(rng: Generator, count: int, side: int, decay: float) -> Images:
    """Fractal height maps (count, S, S) from 0 to 1, S being the next power of two from `side` on.

    Midpoint displacement on a torus: the centres of squares, then those of their edges, become the
    mean of the four nearest known points plus noise, whose amplitude falls by decay² when distances
    halve. [Fournier, Fussell and Carpenter (1982). Computer Rendering of Stochastic Models.
    Communications of the ACM 25(6).]
    """
    step = 1 << (side - 1).bit_length()
    heights = np.zeros((count, step, step), np.float32)
    amplitude = 1.0

    def midpoints(*neighbours: NDArray) -> NDArray:
        noise = 2 * rng.random(neighbours[0].shape, np.float32) - 1
        return sum(neighbours) / 4 + amplitude * noise

    while step > 1:
        corners, half = heights[:, ::step, ::step], step // 2
        right, below = np.roll(corners, -1, 2), np.roll(corners, -1, 1)
        centres = midpoints(corners, right, below, np.roll(right, -1, 1))
        heights[:, half::step, half::step] = centres
        heights[:, ::step, half::step] = midpoints(corners, right, centres, np.roll(centres, 1, 1))
        heights[:, half::step, ::step] = midpoints(corners, below, centres, np.roll(centres, 1, 2))
        step, amplitude = half, amplitude / decay**2
    heights -= heights.min((1, 2), keepdims=True)
    return heights / heights.max((1, 2), keepdims=True)


FROST = (
    ((0.31, 0.59, 0.65), 0.07),
    ((0.79, 0.81, 0.84), 0.09),
    ((0.79, 0.81, 0.84), 0.09),
    ((0.54, 0.60, 0.65), 0.11),
    ((0.44, 0.48, 0.53), 0.17),
    ((0.28, 0.37, 0.41), 0.16),
)
"""Mean colour and standard deviation of each texture, as ImageNet-C's six photographs have them
(the second and the third are the same photograph)."""


@cache
def frost_textures() -> Images:
    """Textures (6, 256, 256) of mean 0 and variance 1: clouds, coarse needles, fine needles."""
    rng = np.random.default_rng(0)
    textures = []
    for cloud in plasma(rng, len(FROST), 256, 1.4):
        noise = rng.standard_normal((4, *cloud.shape), np.float32)
        needles = moved(noise, rng.uniform(0, 360, 4), 12, 8).max(0, keepdims=True)
        layers = [cloud, enlarged(needles, 4)[0], enlarged(needles, 1.2)[0]]
        texture = sum((layer - layer.mean()) / layer.std() for layer in layers)
        textures.append(texture / texture.std())
    return np.stack(textures)


def water(level: NDArray) -> NDArray:
    """How strongly drops, where the level (H, W) is positive, shine: 0 … 1, lit from one side.

    The distance from the drops' edges becomes a height map, whose histogram is equalised; its
    slope in one direction is the light. Zero throughout without a drop.
    """
    drops = level > 0
    edges = drops & ~ndimage.binary_erosion(drops, border_value=1)
    if not edges.any():
        return np.zeros_like(level)
    distance = np.minimum(ndimage.distance_transform_edt(~edges), 20)
    smooth = ndimage.uniform_filter(distance, 3, mode="mirror")
    values = smooth.round(6).astype(int)  # whole ones, but for the errors of running sums
    below = np.bincount(values.ravel()).cumsum()
    first = below[below > 0][0]
    height = np.rint(255 * (below - first) / max(1, values.size - first))[values]
    slope = ndimage.correlate(height, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]), mode="mirror")
    light = level * ndimage.uniform_filter(np.clip(slope, 0, 255), 3, mode="mirror")
    return light / (light.max() or 1)
