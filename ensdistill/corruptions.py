"""The corruptions of ImageNet-C [Hendrycks & Dietterich 2019], for images of any size.

Written from the paper and its constants, on NumPy, SciPy and Pillow alone. Where ImageNet-C fits
224 pixels only (`motion_blur`, `elastic_transform`), this follows Michaelis et al. (2019), who made
the kinds independent of the size. Three kinds differ from ImageNet-C on purpose:

- `frost` lays procedural textures over the image. ImageNet-C's six photographs of frost come
  without a licence. The textures have the photographs' mean colours and contrasts.
- `motion_blur` continues an image beyond its edge by the outermost pixels; it does not lose light.
- `saturate` leaves images without colour as they are.

The function of each kind takes images (N, H, W, 3) float32 in [0, 1], a generator and the constants
of one severity, and returns the corrupted images, which may lie outside [0, 1].

Sources:
    Hendrycks, D. and Dietterich, T. (2019). Benchmarking Neural Network Robustness to Common
        Corruptions and Perturbations. ICLR. arXiv:1903.12261.
    Michaelis, C. et al. (2019). Benchmarking Robustness in Object Detection: Autonomous Driving
        when Winter is Coming. arXiv:1907.07484.
"""

import io
import math
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.signal import fftconvolve

from ensdistill.filters import (
    FROST,
    Generator,
    Images,
    enlarged,
    frost_textures,
    moved,
    plasma,
    smoothed,
    water,
)

SMALLEST = 32
"""Side in pixels; smaller images are enlarged before they are corrupted, or blurs would leave
nothing of them."""
TOGETHER = 2**18
"""How many pixels of enlarged images are corrupted at a time, which bounds the memory."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def corrupt(
    images: NDArray[np.uint8], kind: str, severity: int, seed: int = 0
) -> NDArray[np.uint8]:
    """Corrupted copies of images (N, C, H, W), C being 1 or 3.

    Severities are ImageNet-C's, meant for 224 pixels, so copies of CIFAR-10's images are not
    CIFAR-10-C, whose severities were chosen for 32. Images below 32 pixels are enlarged by a whole
    factor, corrupted and reduced by averaging; grey ones become RGB and their channels' mean. So
    `saturate` leaves grey ones as they are, and `pixelate` may leave small ones.

    Args:
        kind: one of `KINDS`.
        severity: 1 … 5.
        seed: of what is random about it; the same seed makes the same copies.
    """
    copies = np.empty_like(images)
    for part, corrupted in corrupt_parts(images.__getitem__, images.shape, kind, severity, seed):
        copies[part] = corrupted
    return copies


def corrupt_parts(
    read: Callable[[slice], NDArray[np.uint8]],
    shape: tuple[int, ...],
    kind: str,
    severity: int,
    seed: int,
) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """The copies that `corrupt` makes, few at a time: their places, and they themselves.

    Args:
        read: gives the images at some places.
        shape: (N, C, H, W) of all of them; the other arguments are as of `corrupt`.
    """
    count, channels, height, width = shape
    function, constants = CORRUPTIONS[kind]
    rng = np.random.default_rng([seed, KINDS.index(kind), severity])
    factor = math.ceil(SMALLEST / min(height, width))
    step = max(1, TOGETHER // (height * width * factor**2))
    for start in range(0, count, step):
        place = slice(start, min(start + step, count))
        part = read(place).transpose(0, 2, 3, 1).astype(np.float32) / 255
        part = part.repeat(factor, axis=1).repeat(factor, axis=2).repeat(3 // channels, axis=3)
        corrupted = np.clip(function(part, rng, *constants[severity - 1]), 0, 1)
        blocks = corrupted.reshape(-1, height, factor, width, factor, channels, 3 // channels)
        means = np.rint(255 * blocks.mean(axis=(2, 4, 6)))
        yield place, means.transpose(0, 3, 1, 2).astype(np.uint8)


# --- noise ------------------------------------------------------------------------------------


def gaussian_noise(x: Images, rng: Generator, deviation: float) -> Images:
    """Noise of a standard deviation."""
    return x + deviation * rng.standard_normal(x.shape, np.float32)


def shot_noise(x: Images, rng: Generator, photons: float) -> Images:
    """Poisson noise: so many photons for a value of 1."""
    return rng.poisson(photons * x) / np.float32(photons)


def impulse_noise(x: Images, rng: Generator, share: float) -> Images:
    """A share of the values becomes 0 or 1."""
    hit = rng.random(x.shape, np.float32) < share
    return np.where(hit, rng.random(x.shape, np.float32) < 0.5, x)


def speckle_noise(x: Images, rng: Generator, deviation: float) -> Images:
    """Noise in proportion to the value."""
    return x + x * deviation * rng.standard_normal(x.shape, np.float32)


# --- blur -------------------------------------------------------------------------------------


def defocus_blur(x: Images, rng: Generator, radius: int, sigma: float) -> Images:
    """The mean over a disk, whose edge is smoothed with σ."""
    side = max(8, radius)
    steps = np.arange(-side, side + 1)
    disk = (steps[:, None] ** 2 + steps**2 <= radius**2) / 1.0
    # Smoothed by 3 × 3 pixels, or by 5 × 5.
    reach = 1 if radius <= 8 else 2
    weights = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    for axis in (0, 1):
        disk = ndimage.correlate1d(disk, weights, axis, mode="mirror")
    padded = np.pad(x, ((0, 0), (side, side), (side, side), (0, 0)), mode="reflect")
    kernel = (disk / disk.sum()).astype(np.float32)[None, ..., None]
    return fftconvolve(padded, kernel, mode="valid", axes=(1, 2))


def gaussian_blur(x: Images, rng: Generator, sigma: float) -> Images:
    """Convolution with a normal density."""
    return smoothed(x, sigma)


def glass_blur(x: Images, rng: Generator, sigma: float, reach: int, rounds: int) -> Images:
    """Pixels take the values of random near ones, between two smoothings.

    Each round goes from the last pixel to the first, and each pixel takes the value that its source
    has then: the old one if the source comes before it, otherwise the new one. (ImageNet-C's code
    swaps two views of an array, which has this effect too.)
    """
    count, height, width, _ = x.shape
    inside = np.zeros((height, width), bool)
    inside[reach + 1 : height - reach + 1, reach + 1 : width - reach + 1] = True
    own = np.arange(count * height * width)
    places = own
    for _ in range(rounds):
        down, across = rng.integers(-reach, reach, size=(2, count, height, width))
        source = own + (inside * (down * width + across)).ravel()
        last = own  # where the chain of new values, that each pixel begins, has come to
        while (onward := source[last] > last).any():
            last = np.where(onward, source[last], last)
        places = places[source[last]]
    return smoothed(smoothed(x, sigma).reshape(-1, 3)[places].reshape(x.shape), sigma)


def motion_blur(x: Images, rng: Generator, radius: int, sigma: float) -> Images:
    """A camera that moves at a random angle of −45° … 45°."""
    return moved(x, rng.uniform(-45, 45, len(x)), radius, sigma)


def zoom_blur(x: Images, rng: Generator, end: float, step: float) -> Images:
    """The mean of an image and its enlargements by 1 … end (not included)."""
    factors = np.arange(1, end, step)
    return (x + sum(enlarged(x, factor) for factor in factors)) / np.float32(len(factors) + 1)


# --- weather ----------------------------------------------------------------------------------


def snow(x: Images, rng: Generator, *constants: float) -> Images:
    """Flakes that fall at a random angle before a paler image."""
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    noise = rng.standard_normal(x.shape[:3], np.float32)
    flakes = enlarged(mean + deviation * noise, zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    falling = moved(flakes, rng.uniform(-135, -45, len(x)), int(radius), sigma)[..., None]
    grey = (x @ LUMA)[..., None]
    pale = kept * x + (1 - kept) * np.maximum(x, 1.5 * grey + 0.5)
    return pale + falling + falling[:, ::-1, ::-1]


def frost(x: Images, rng: Generator, kept: float, share: float) -> Images:
    """A piece of a procedural texture of frost laid over the image."""
    textures = frost_textures()
    side = textures.shape[1]
    layers = np.empty_like(x)
    for layer in layers:
        chosen = rng.integers(len(FROST))
        # Beyond its edge a texture goes on as its mirror image.
        rows, columns = (
            np.abs((start + np.arange(size)) % (2 * side) - side + 0.5).astype(int)
            for start, size in zip(rng.integers(2 * side, size=2), x.shape[1:3], strict=True)
        )
        colour, deviation = FROST[chosen]
        piece = textures[chosen][np.ix_(rows, columns)][..., None]
        layer[:] = np.clip(np.array(colour, np.float32) + deviation * piece, 0, 1)
    return kept * x + share * layers


def fog(x: Images, rng: Generator, share: float, decay: float) -> Images:
    """A fractal cloud is added, and the sum brought back to the image's own maximum."""
    count, height, width, _ = x.shape
    cloud = plasma(rng, count, max(height, width), decay)
    top = x.max((1, 2, 3), keepdims=True)
    return (x + share * cloud[:, :height, :width, None]) * top / (top + share)


def spatter(x: Images, rng: Generator, *constants: float) -> Images:
    """Drops of water, of which each image has at least one, or splashes of mud."""
    mean, deviation, sigma, threshold, strength, mud = constants

    def liquid(count: int) -> Images:
        noise = rng.standard_normal((count, *x.shape[1:3]), np.float32)
        level = smoothed(mean + deviation * noise, sigma)
        return np.where(level < threshold, 0, level)

    if mud:
        cover = smoothed((liquid(len(x)) > 0).astype(np.float32), strength)
        cover = np.where(cover < 0.8, 0, cover)[..., None]
        return (1 - cover) * x + cover * np.array([63, 42, 20], np.float32) / 255
    cover = np.zeros(x.shape[:3], np.float32)
    while len(dry := np.flatnonzero(cover.max((1, 2)) == 0)):
        cover[dry] = [water(level) for level in liquid(len(dry))]
    return x + strength * cover[..., None] * np.array([175, 238, 238], np.float32) / 255


# --- digital ----------------------------------------------------------------------------------


def brightness(x: Images, rng: Generator, more: float) -> Images:
    """The value of HSV rises."""
    value = x.max(-1, keepdims=True)
    raised = np.minimum(value + more, 1)
    return np.divide(
        raised * x, value, out=np.broadcast_to(raised, x.shape).copy(), where=value > 0
    )


def saturate(x: Images, rng: Generator, factor: float, more: float) -> Images:
    """The saturation s of HSV becomes factor · s + more, except in images without colour.

    A grey pixel has the hue of red, by convention.
    """
    value = x.max(-1, keepdims=True)
    below = value - x
    depth = below.max(-1, keepdims=True)
    coloured = depth.max((1, 2, 3), keepdims=True) > 0
    below = np.where((depth == 0) & coloured, value * np.array([0, 1, 1], np.float32), below)
    saturation = np.divide(depth, value, out=np.zeros_like(value), where=value > 0)
    wanted = np.clip(factor * saturation + more, 0, 1)
    ratio = np.divide(wanted, saturation, out=wanted.copy(), where=saturation > 0)
    return value - ratio * below


def contrast(x: Images, rng: Generator, factor: float) -> Images:
    """Each channel is drawn to its mean."""
    means = x.mean((1, 2), keepdims=True)
    return means + factor * (x - means)


def elastic_transform(x: Images, rng: Generator, alpha: float) -> Images:
    """Pixels are displaced by smoothed noise, in proportion to the image's size."""
    count, height, width, _ = x.shape
    noise = rng.uniform(-0.005 * height, 0.005 * height, (2, count, height, width))
    sigmas = (0, 0, 0.01 * height, 0.01 * width)
    shifts = alpha * ndimage.gaussian_filter(noise, sigmas, mode="reflect", truncate=3)
    grid = np.indices(x.shape[:3], np.float32)
    grid[1:] += shifts
    channels = [
        ndimage.map_coordinates(channel, grid, order=1, mode="reflect")
        for channel in np.moveaxis(x, -1, 0)
    ]
    return np.stack(channels, axis=-1)


def _each(x: Images, change: Callable[[Image.Image], Image.Image]) -> Images:
    """Each image as Pillow has it, changed."""
    pixels = np.rint(255 * x).astype(np.uint8)
    changed = [np.asarray(change(Image.fromarray(image))) for image in pixels]
    return np.stack(changed) / np.float32(255)


def pixelate(x: Images, rng: Generator, factor: float) -> Images:
    """Reduced by averaging, and enlarged without."""

    def change(image: Image.Image) -> Image.Image:
        small = (int(factor * image.width), int(factor * image.height))
        reduced = image.resize(small, Image.Resampling.BOX)
        return reduced.resize(image.size, Image.Resampling.NEAREST)

    return _each(x, change)


def jpeg_compression(x: Images, rng: Generator, quality: int) -> Images:
    """Compressed at a quality, and opened again."""

    def change(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return _each(x, change)


def _single(*values: float) -> list[tuple[float]]:
    return [(value,) for value in values]


CORRUPTIONS: dict[str, tuple[Callable[..., Images], list[tuple]]] = {
    "gaussian_noise": (gaussian_noise, _single(0.08, 0.12, 0.18, 0.26, 0.38)),
    "shot_noise": (shot_noise, _single(60, 25, 12, 5, 3)),
    "impulse_noise": (impulse_noise, _single(0.03, 0.06, 0.09, 0.17, 0.27)),
    "defocus_blur": (defocus_blur, [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)]),
    "glass_blur": (glass_blur, [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)]),
    "motion_blur": (motion_blur, [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)]),
    "zoom_blur": (
        zoom_blur,
        [(1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)],
    ),
    "snow": (
        snow,
        [
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ],
    ),
    "frost": (frost, [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)]),
    "fog": (fog, [(1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)]),
    "brightness": (brightness, _single(0.1, 0.2, 0.3, 0.4, 0.5)),
    "contrast": (contrast, _single(0.4, 0.3, 0.2, 0.1, 0.05)),
    "elastic_transform": (elastic_transform, _single(12.5, 16.25, 21.25, 25, 30)),
    "pixelate": (pixelate, _single(0.6, 0.5, 0.4, 0.3, 0.25)),
    "jpeg_compression": (jpeg_compression, _single(25, 18, 15, 10, 7)),
    "speckle_noise": (speckle_noise, _single(0.15, 0.2, 0.35, 0.45, 0.6)),
    "gaussian_blur": (gaussian_blur, _single(1, 2, 3, 4, 6)),
    "spatter": (
        spatter,
        [
            (0.65, 0.3, 4, 0.69, 0.6, False),
            (0.65, 0.3, 3, 0.68, 0.6, False),
            (0.65, 0.3, 2, 0.68, 0.5, False),
            (0.65, 0.3, 1, 0.65, 1.5, True),
            (0.67, 0.4, 1, 0.65, 1.5, True),
        ],
    ),
    "saturate": (saturate, [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)]),
}
"""Function and constants at severities 1 … 5 of each kind: the benchmark's 15, then its 4 for
validation."""
KINDS = list(CORRUPTIONS)
SEVERITIES = range(1, 6)
