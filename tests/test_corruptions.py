"""Each kind of corruption against its definition, computed here in another way."""

import colorsys
import io
import math
from functools import partial

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage, stats

from ensdistill import corruptions
from ensdistill.corruptions import KINDS, SEVERITIES, corrupt
from ensdistill.filters import enlarged, moved, plasma, water
from tests.builders import noise, photographs

RANDOM = [
    "gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "glass_blur", "motion_blur",
    "snow", "frost", "fog", "elastic_transform", "spatter",
]  # fmt: skip


def constant(value, *, count=1, side=64, channels=3):
    return np.full((count, channels, side, side), value, np.uint8)


def distance(first, second):
    """Mean squared difference."""
    return ((first.astype(float) - second) ** 2).mean()


# --- all kinds -------------------------------------------------------------------------------


def test_the_kinds_are_those_of_the_official_archives():
    assert KINDS == [
        "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur",
        "motion_blur", "zoom_blur", "snow", "frost", "fog", "brightness", "contrast",
        "elastic_transform", "pixelate", "jpeg_compression", "speckle_noise", "gaussian_blur",
        "spatter", "saturate",
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 64, 64), (1, 28, 20)])
def test_copies_grow_apart_with_severity(shape):
    images = photographs(*shape, count=16)
    distances = np.array(
        [
            [distance(corrupt(images, kind, severity), images) for severity in SEVERITIES]
            for kind in KINDS
        ]
    )
    assert (np.diff(distances.mean(0)) > 0).all()
    steady = ["gaussian_noise", "shot_noise", "impulse_noise", "speckle_noise", "defocus_blur"]
    steady += ["zoom_blur", "gaussian_blur", "brightness", "contrast"]
    assert (np.diff(distances[np.isin(KINDS, steady)]) > 0).all()
    # What is grey has no saturation, and enlarged pixels survive pixelation.
    exempt = ["saturate", "pixelate"] if shape[0] == 1 else []
    assert ((distances > 0).all(1) | np.isin(KINDS, exempt)).all()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 7, 7), (3, 33, 47), (1, 250, 4), (3, 1, 9)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_and_constant_images_are_taken(kind, shape):
    images = np.zeros((3, *shape), np.uint8)
    images[0], images[1] = noise(*shape), 255
    for severity in (1, 4):
        some = images[: 1 if max(shape) > 99 else 3]
        with np.errstate(all="raise", under="ignore"):
            copies = corrupt(some, kind, severity)
        assert copies.shape == some.shape
        assert copies.dtype == np.uint8


def test_copies_are_made_by_the_seed_alone_and_numpys_generator_is_not_touched():
    images = photographs(3, 32, 32)
    np.random.seed(5)  # noqa: NPY002
    wanted = np.random.normal(size=3)  # noqa: NPY002
    np.random.seed(5)  # noqa: NPY002
    first = [corrupt(images, kind, 2) for kind in KINDS]
    np.testing.assert_array_equal(np.random.normal(size=3), wanted)  # noqa: NPY002
    for kind, copies in zip(KINDS, first, strict=True):
        np.testing.assert_array_equal(corrupt(images, kind, 2), copies)


@pytest.mark.parametrize("kind", KINDS)
def test_images_and_seeds_differ_in_what_is_random_alone(kind):
    same = photographs(3, 32, 32, count=1).repeat(2, axis=0)
    first, second = corrupt(same, kind, 3)
    assert (first != second).any() == (kind in RANDOM)
    assert (corrupt(same, kind, 3, seed=1)[0] != first).any() == (kind in RANDOM)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_corrupted_some_at_a_time(kind, monkeypatch):
    images = photographs(3, 32, 40, count=5)
    together = corrupt(images, kind, 2)
    monkeypatch.setattr(corruptions, "TOGETHER", 2 * 32 * 40)  # 2, 2, 1
    apart = corrupt(images, kind, 2)
    if kind in RANDOM:  # drawn in another order
        assert distance(apart, images) == pytest.approx(distance(together, images), rel=1)
    else:
        np.testing.assert_array_equal(apart, together)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in RANDOM])
def test_small_grey_images_are_enlarged_corrupted_and_reduced(kind):
    """Four times by Kronecker's product, and as RGB; back by means over blocks and channels."""
    images = photographs(1, 8, 8)
    large = np.kron(images, np.ones((1, 3, 4, 4), np.uint8))
    blocks = corrupt(large, kind, 2).reshape(4, 3, 8, 4, 8, 4).mean((1, 3, 5))
    np.testing.assert_allclose(corrupt(images, kind, 2)[:, 0], blocks, atol=1)


# --- noise -----------------------------------------------------------------------------------

QUANTILES = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)


def clipped_noise(value, deviation):
    """Mean square of normal noise on a value, the sum clipped to 0 … 1."""
    return ((np.clip(value + deviation * QUANTILES, 0, 1) - value) ** 2).mean()


def clipped_counts(value, photons):
    counts = np.arange(200)
    shares = stats.poisson.pmf(counts, photons * value)
    return shares @ (np.minimum(counts / photons, 1) - value) ** 2


NOISE = {
    "gaussian_noise": (clipped_noise, [0.08, 0.12, 0.18, 0.26, 0.38]),
    "shot_noise": (clipped_counts, [60, 25, 12, 5, 3]),
    "impulse_noise": (
        lambda value, share: share * (value**2 + (1 - value) ** 2) / 2,
        [0.03, 0.06, 0.09, 0.17, 0.27],
    ),
    "speckle_noise": (
        lambda value, deviation: clipped_noise(value, value * deviation),
        [0.15, 0.2, 0.35, 0.45, 0.6],
    ),
}


@pytest.mark.parametrize("kind", NOISE)
@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("value", [51, 153])
def test_noise_has_its_variance(kind, severity, value):
    images = constant(value, count=10)
    copies = corrupt(images, kind, severity)
    mean_square, constants = NOISE[kind]
    wanted = 255**2 * mean_square(value / 255, constants[severity - 1])
    assert distance(copies, images) == pytest.approx(wanted + 1 / 12, rel=0.03)
    channels = copies.astype(float).transpose(1, 0, 2, 3).reshape(3, -1)
    assert np.abs(np.corrcoef(channels)[np.triu_indices(3, 1)]).max() < 0.03  # each has its own


@pytest.mark.parametrize(("channels", "side", "values"), [(1, 64, 3), (1, 8, 48), (3, 8, 16)])
def test_noise_of_grey_and_enlarged_images_is_averaged(channels, side, values):
    images = constant(127, count=60000 // side**2, side=side, channels=channels)
    wanted = (255 * 0.12) ** 2 / values + 1 / 12
    assert distance(corrupt(images, "gaussian_noise", 2), images) == pytest.approx(wanted, rel=0.05)


# --- blur ------------------------------------------------------------------------------------


def by_loops(images, kernel, beyond):
    """Σ kernel[i, j] · image[h + i, w + j] at some pixels, and their places (h, w)."""
    height, width = images.shape[2:]
    radius = len(kernel) // 2
    places = [(0, 0), (1, width - 1), (height - 1, 3), (height // 2, width // 2), (7, 20)]
    wanted = np.zeros((len(places), *images.shape[:2]))
    for place, (h, w) in enumerate(places):
        for i in range(-radius, radius + 1):
            for j in range(-radius, radius + 1):
                pixel = images[..., beyond(h + i, height), beyond(w + j, width)]
                wanted[place] += kernel[radius + i, radius + j] * pixel
    return wanted, tuple(np.transpose(places))


def edge(index, size):
    return min(max(index, 0), size - 1)


def mirror(index, size):
    """… 2 1 0 1 2 …"""
    return edge(abs(index) if index < size else 2 * (size - 1) - index, size)


def normal(radius, sigma):
    weights = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    return weights / weights.sum()


@pytest.mark.parametrize("severity", SEVERITIES)
def test_gaussian_blur_is_a_convolution(severity):
    images, sigma = photographs(3, 36, 48), [1, 2, 3, 4, 6][severity - 1]
    weights = normal(4 * sigma, sigma)
    wanted, (rows, columns) = by_loops(images, np.outer(weights, weights), edge)
    found = corrupt(images, "gaussian_blur", severity)[..., rows, columns]
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), wanted, atol=0.51)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_defocus_blur_is_the_mean_over_a_disk_with_a_soft_edge(severity):
    radius, sigma = [(3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)][severity - 1]
    offsets = range(-max(8, radius), max(8, radius) + 1)
    disk = np.array([[float(math.hypot(i, j) <= radius) for j in offsets] for i in offsets])
    weights = normal(2 if radius > 8 else 1, sigma)
    # ImageNet-C's grid ends with the disks of radius 8 and 10, whose edges are mirrored there.
    kernel = ndimage.convolve(disk, np.outer(weights, weights), mode="mirror")
    images = noise(2, 3, 36, 48)
    wanted, (rows, columns) = by_loops(images, kernel / kernel.sum(), mirror)
    found = corrupt(images, "defocus_blur", severity)[..., rows, columns]
    np.testing.assert_allclose(np.moveaxis(found, -1, 0), wanted, atol=0.51)


@pytest.mark.parametrize("angle", [0, 30, -45, 90, -135, 200])
def test_moved_images_are_sums_along_a_line(angle):
    image, (radius, sigma) = photographs(3, 34, 40, count=1)[0].astype(float), (10, 3)
    weights = np.exp(-(np.arange(21) ** 2) / (2 * sigma**2))
    for h, w in [(0, 0), (33, 39), (12, 20), (2, 37)]:
        wanted = 0
        for step, weight in enumerate(weights / weights.sum()):
            # The nearest pixel; halves go down.
            i = math.ceil(step * math.sin(math.radians(angle)) - 0.5)
            j = math.ceil(step * math.cos(math.radians(angle)) - 0.5)
            wanted = wanted + weight * image[:, edge(h + i, 34), edge(w + j, 40)]
        found = moved(image.transpose(1, 2, 0)[None], np.array([angle]), radius, sigma)
        np.testing.assert_allclose(found[0, h, w], wanted, rtol=1e-6)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_motion_blur_goes_at_angles_from_minus_to_plus_45_degrees(severity):
    """By the line into which a point becomes."""
    radius, sigma = [(10, 3), (15, 5), (15, 8), (15, 12), (20, 15)][severity - 1]
    images = constant(0, count=150, side=99)
    images[:, :, 49, 49] = 255
    copies = corrupt(images, "motion_blur", severity)[:, 0].astype(float)
    rows, columns = np.indices((99, 99)) - 49.0
    down, across = (
        -(copies * offsets).sum((1, 2)) / copies.sum((1, 2)) for offsets in (rows, columns)
    )
    angles = np.degrees(np.arctan2(down, across))
    assert stats.kstest(angles, stats.uniform(-45, 90).cdf).pvalue > 0.01
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    length = weights @ steps / weights.sum()
    assert np.hypot(down, across).mean() == pytest.approx(length, rel=0.05)


@pytest.mark.parametrize("factor", [1, 1.07, 1.3, 2.5, 4.5])
@pytest.mark.parametrize("shape", [(32, 32), (33, 47), (40, 150)])
def test_enlarged_images_are_scipys(factor, shape):
    x = np.random.default_rng(0).random((1, *shape, 3), np.float32)
    starts, ends = [], []
    for size in shape:
        kept = math.ceil(size / factor)
        starts.append((size - kept) // 2)
        ends.append(starts[-1] + kept)
    piece = x[0, starts[0] : ends[0], starts[1] : ends[1]]
    wanted = ndimage.zoom(piece, (factor, factor, 1), order=1)[: shape[0], : shape[1]]
    np.testing.assert_allclose(enlarged(x, factor)[0], wanted, atol=1e-5)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_zoom_blur_is_a_mean_of_enlargements(severity):
    images = photographs(3, 36, 48)
    count, step = [(12, 0.01), (16, 0.01), (11, 0.02), (13, 0.02), (11, 0.03)][severity - 1]
    x = images.transpose(0, 2, 3, 1).astype(float)
    layers = [x, *(enlarged(x, 1 + i * step) for i in range(count))]
    found = corrupt(images, "zoom_blur", severity).transpose(0, 2, 3, 1)
    np.testing.assert_allclose(found, np.mean(layers, axis=0), atol=0.51)


@pytest.mark.parametrize(("reach", "rounds"), [(1, 2), (2, 3), (4, 2)])
def test_glass_blur_takes_pixels_one_after_another_from_the_last_to_the_first(
    monkeypatch, reach, rounds
):
    monkeypatch.setattr(corruptions, "smoothed", lambda x, sigma: x)
    x = np.arange(2 * 20 * 17 * 3, dtype=np.float32).reshape(2, 20, 17, 3)
    found = corruptions.glass_blur(x, np.random.default_rng(3), 1.0, reach, rounds)
    rng, wanted = np.random.default_rng(3), x.copy()
    for _ in range(rounds):
        down, across = rng.integers(-reach, reach, size=(2, 2, 20, 17))
        for image, i, j in zip(wanted, down, across, strict=True):
            for h in range(20 - reach, reach, -1):
                for w in range(17 - reach, reach, -1):
                    image[h, w] = image[h + i[h, w], w + j[h, w]]
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_glass_blur_smooths_before_and_after(severity):
    """On a ramp: smoothing leaves it, and displacements are averages of known ones."""
    sigma, reach, rounds = [(0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)][
        severity - 1
    ]
    images = np.broadcast_to(np.arange(0, 256, 4, dtype=np.uint8), (4, 3, 64, 64)).copy()
    deviations = (corrupt(images, "glass_blur", severity) - images.astype(float))[..., 20:44] / 4
    # The mean of −reach … reach − 1 is −1/2 for each pixel that is taken from another.
    assert -3 * rounds < deviations.mean() < -0.3
    assert deviations.std() > 0.1
    rough = corruptions.glass_blur(
        images.transpose(0, 2, 3, 1) / np.float32(255),
        np.random.default_rng(0),
        1e-3,
        reach,
        rounds,
    )
    rough = (255 * rough.transpose(0, 3, 1, 2) - images)[..., 20:44] / 4
    weights = normal(round(4 * sigma), sigma)
    # Smoothed noise keeps (Σ w²)² of its variance, were neighbours independent.
    assert deviations.std() < rough.std()
    assert deviations.std() > 0.7 * rough.std() * (weights**2).sum()


# --- weather ---------------------------------------------------------------------------------


SNOW = [
    (0.1, 0.3, 3, 0.5, 0.8),
    (0.2, 0.3, 2, 0.5, 0.7),
    (0.55, 0.3, 4, 0.9, 0.7),
    (0.55, 0.3, 4.5, 0.85, 0.65),
    (0.55, 0.3, 2.5, 0.85, 0.55),
]


@pytest.mark.parametrize("severity", SEVERITIES)
def test_snow_falls_before_a_paler_image(severity):
    mean, deviation, zoom, threshold, kept = SNOW[severity - 1]
    black = constant(0, count=60)
    copies = corrupt(black, "snow", severity)
    np.testing.assert_array_equal(copies, copies[..., ::-1, ::-1])  # and falls upwards
    assert copies.min() == pytest.approx(255 * (1 - kept) / 2, abs=0.51)
    rng = np.random.default_rng(1)
    flakes = [
        ndimage.zoom(rng.normal(mean, deviation, (30, 30)), zoom, order=1) for _ in range(200)
    ]
    flakes = np.concatenate([flake.ravel() for flake in flakes])
    wanted = (1 - kept) / 2 + 2 * np.where(flakes < threshold, 0, np.minimum(flakes, 1)).mean()
    assert copies.mean() == pytest.approx(255 * wanted, rel=0.08)


def test_snow_pales_by_luma():
    image = np.array([50, 100, 20], np.uint8)[None, :, None, None].repeat(64, 2).repeat(64, 3)
    pale = corrupt(image, "snow", 1)[0].reshape(3, -1).min(1)
    luma = 0.299 * 50 + 0.587 * 100 + 0.114 * 20
    wanted = 0.8 * np.array([50, 100, 20]) + 0.2 * (1.5 * luma + 127.5)
    np.testing.assert_allclose(pale, wanted, atol=0.51)


def test_snow_falls_downwards():
    """Flakes are longer in the direction in which they fall, −135° … −45°."""
    copies = corrupt(constant(0, count=60), "snow", 3)[:, 0].astype(float)
    down, across = (np.abs(np.diff(copies, axis=axis)).mean() for axis in (1, 2))
    assert across > 1.2 * down


@pytest.mark.parametrize("severity", SEVERITIES)
def test_frost_is_a_texture_laid_over_the_image(severity):
    kept, share = [(1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)][severity - 1]
    layers = corrupt(constant(0, count=200), "frost", severity).astype(float)
    over = corrupt(constant(90, count=200), "frost", severity)
    np.testing.assert_allclose(over, np.minimum(layers + kept * 90, 255), atol=1)
    # The mean colour of ImageNet-C's photographs, and their spread among and within pieces.
    np.testing.assert_allclose(layers.mean((0, 2, 3)) / 255 / share, [0.525, 0.61, 0.65], atol=0.05)
    means = layers.mean((1, 2, 3)) / 255 / share
    assert means.std() == pytest.approx(0.19, abs=0.04)
    assert (layers.std((2, 3)) / 255 / share).mean() == pytest.approx(0.1, abs=0.03)


def test_frost_goes_on_beyond_its_texture():
    layer = corrupt(constant(0, side=700), "frost", 1)[0, 0].astype(float)
    assert np.abs(np.diff(layer, axis=0)).max() < 90  # no seam
    np.testing.assert_array_equal(layer[:150, :150], layer[512:662, 512:662])  # after its mirror


@pytest.mark.parametrize("severity", SEVERITIES)
def test_fog_lies_between_none_and_all_of_its_share(severity):
    share = [1.5, 2, 2.5, 2.5, 3][severity - 1]
    copies = corrupt(constant(200, count=5), "fog", severity).reshape(5, -1)
    value = 200 / 255
    assert (copies.max(1) == 200).all()
    np.testing.assert_allclose(copies.min(1), 255 * value**2 / (value + share), atol=0.51)
    assert not corrupt(constant(0), "fog", severity).any()


@pytest.mark.parametrize("decay", [2, 1.4])
@pytest.mark.parametrize("side", [33, 64])
def test_plasma_is_a_mean_of_neighbours_and_noise_that_falls_with_their_distance(decay, side):
    heights = plasma(np.random.default_rng(0), 6, side, decay)
    assert heights.shape == (6, 64, 64)
    np.testing.assert_array_equal(heights.min((1, 2)), np.zeros(6))
    np.testing.assert_array_equal(heights.max((1, 2)), np.ones(6))

    def residuals(step):
        """Of centres of squares, then of the middles of two kinds of edges."""
        half, shift = step // 2, partial(np.roll, axis=(1, 2))
        corners = [shift(heights, (-i, -j)) for i in (0, step) for j in (0, step)]
        cross = [shift(heights, s) for s in [(half, 0), (-half, 0), (0, half), (0, -half)]]
        centres = shift(heights, (-half, -half)) - np.mean(corners, axis=0)
        around = heights - np.mean(cross, axis=0)
        rows, columns = around[:, ::step, half::step], around[:, half::step, ::step]
        return [centres[:, ::step, ::step], rows, columns]

    for fine, coarse in zip(residuals(2), residuals(4), strict=True):
        spread = (fine.std((1, 2)) / coarse.std((1, 2))).mean()
        assert spread == pytest.approx(1 / decay**2, rel=0.1)
        assert (
            stats.kstest(
                (fine / fine.std((1, 2), keepdims=True)).ravel(),
                stats.uniform(-(3**0.5), 2 * 3**0.5).cdf,
            ).pvalue
            > 0.001
        )


@pytest.mark.parametrize("severity", [1, 2, 3])
def test_spatter_is_pale_water_on_every_image(severity):
    strength = [0.6, 0.6, 0.5][severity - 1]
    copies = corrupt(constant(0, count=300, side=32), "spatter", severity).astype(float)
    np.testing.assert_allclose(copies.max((1, 2, 3)), strength * 238, atol=0.51)
    np.testing.assert_array_equal(copies[:, 1], copies[:, 2])
    np.testing.assert_allclose(copies[:, 0], copies[:, 1] * 175 / 238, atol=1)
    assert (copies == 0).mean() > 0.5


@pytest.mark.parametrize("severity", [4, 5])
def test_spatter_is_brown_mud_that_hides_what_is_behind(severity):
    copies = corrupt(constant(255, count=50), "spatter", severity).astype(float)
    cover = (255 - copies) / (255 - np.array([63, 42, 20]))[:, None, None]
    np.testing.assert_allclose(cover, cover[:, :1] * np.ones((1, 3, 1, 1)), atol=0.006)
    splashed = cover[cover > 0]
    assert splashed.min() > 0.795
    assert splashed.max() < 1.003
    # The share of normal noise, smoothed with σ = 1, that exceeds 0.65, is a half at severity 4.
    assert 0.1 < (cover > 0).mean() < 0.5 + 0.2 * (severity == 5)


def test_water_shines_on_the_slope_of_a_drop():
    """A disk: lit on one side, by symmetry about the diagonal from which the light comes."""
    rows, columns = np.indices((41, 41)) - 20
    level = np.where(np.hypot(rows, columns) <= 10, 0.7, 0)
    light = water(level)
    assert light.max() == 1
    np.testing.assert_allclose(light, light.T, atol=1e-6)
    assert not light[level == 0].any()
    upper, lower = light[:20][level[:20] > 0].mean(), light[21:][level[21:] > 0].mean()
    assert upper > 1.5 * lower or lower > 1.5 * upper
    assert not water(np.zeros((5, 5))).any()
    # A drop that the image's border cuts has no edge there.
    cut = water(np.where(columns < 0, 0.7, 0))
    np.testing.assert_allclose(cut, cut[:1].repeat(41, axis=0), atol=1e-6)


# --- digital ---------------------------------------------------------------------------------


def by_colorsys(images, change):
    """Images whose pixels change in HSV."""
    copies = np.empty(images.shape)
    for copy, image in zip(copies, images, strict=True):
        for place in np.ndindex(image.shape[1:]):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[:, *place] / 255))
            copy[:, *place] = np.array(colorsys.hsv_to_rgb(*change(hue, saturation, value)))
    return 255 * copies


@pytest.fixture
def coloured():
    """A noisy image and a piece of a photograph, each with black, white and grey pixels."""
    images = np.concatenate([noise(1, 3, 32, 32), photographs(3, 32, 32, count=1)])
    images[:, :, 3, :4] = [0, 255, 77, 1]
    return images


@pytest.mark.parametrize("severity", SEVERITIES)
def test_brightness_raises_the_value(severity, coloured):
    more = severity / 10
    wanted = by_colorsys(coloured, lambda h, s, v: (h, s, min(v + more, 1)))
    np.testing.assert_allclose(corrupt(coloured, "brightness", severity), wanted, atol=0.51)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_saturate_changes_the_saturation(severity, coloured):
    factor, more = [(0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)][severity - 1]
    wanted = by_colorsys(coloured, lambda h, s, v: (h, min(factor * s + more, 1), v))
    np.testing.assert_allclose(corrupt(coloured, "saturate", severity), wanted, atol=0.51)
    for grey in (coloured[:, :1], coloured[:, :1].repeat(3, axis=1)):
        np.testing.assert_array_equal(corrupt(grey, "saturate", severity), grey)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_contrast_falls_about_each_channels_mean(severity, coloured):
    factor = [0.4, 0.3, 0.2, 0.1, 0.05][severity - 1]
    means = coloured.mean((2, 3), keepdims=True)
    wanted = means + factor * (coloured - means)
    np.testing.assert_allclose(corrupt(coloured, "contrast", severity), wanted, atol=0.51)


@pytest.mark.parametrize(("severity", "block"), [(2, 2), (5, 4)])
def test_pixelate_leaves_the_means_of_blocks(severity, block):
    images = photographs(3, 32, 40)
    means = images.reshape(4, 3, 32 // block, block, 40 // block, block).mean((3, 5))
    wanted = np.kron(means, np.ones((block, block)))
    np.testing.assert_allclose(corrupt(images, "pixelate", severity), wanted, atol=1)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_pixelate_leaves_so_many_pixels(severity):
    side = [19, 16, 12, 9, 8][severity - 1]  # of 32
    ramp = np.arange(32, dtype=np.uint8) * 8
    images = np.broadcast_to(ramp, (1, 3, 32, 32)).copy()
    for turned in (images, images.transpose(0, 1, 3, 2).copy()):
        assert len(np.unique(corrupt(turned, "pixelate", severity))) == side


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_compression_is_pillows(severity):
    images = photographs(3, 37, 50)
    for image, copy in zip(images, corrupt(images, "jpeg_compression", severity), strict=True):
        file = io.BytesIO()
        quality = [25, 18, 15, 10, 7][severity - 1]
        Image.fromarray(image.transpose(1, 2, 0)).save(file, "JPEG", quality=quality)
        np.testing.assert_array_equal(copy.transpose(1, 2, 0), np.asarray(Image.open(file)))


@pytest.mark.parametrize("severity", SEVERITIES)
@pytest.mark.parametrize("axis", [2, 3])
def test_elastic_transform_displaces_by_smoothed_noise(severity, axis):
    """Seen on a ramp, whose values tell places; its step is 2 grey levels per pixel."""
    side = 120
    images = constant(0, count=4, side=side)
    images += np.arange(0, 2 * side, 2, dtype=np.uint8).reshape((-1, 1) if axis == 2 else (1, -1))
    shifts = (corrupt(images, "elastic_transform", severity) - images.astype(float)) / 2
    inner = shifts[:, 0, 12:-12, 12:-12]
    strength = [12.5, 16.25, 21.25, 25, 30][severity - 1]
    weights = normal(4, 0.01 * side)  # truncated at 3 σ
    wanted = strength * 0.005 * side / 3**0.5 * (weights**2).sum()
    assert inner.std() == pytest.approx(wanted, rel=0.1)
    assert abs(inner.mean()) < 0.1 * wanted
