"""The teachers' answers at perturbed images, batch by batch by hand."""

import numpy as np
import pytest
import torch

from ensdistill.analysis import SETS, perturbed_logits
from ensdistill.networks import build_network
from ensdistill.perturbations import PERTURBATIONS

ETA, TAU, SEED = 0.05, 2.0, 3


@pytest.fixture(scope="module")
def teachers():
    torch.manual_seed(0)
    networks = [build_network("resnet8", 5, in_channels=1, width=4) for _ in range(3)]
    return [network.eval().requires_grad_(False) for network in networks]


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (22, 1, 8, 8), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def arrays(teachers, images):
    return perturbed_logits(teachers, images, eta=ETA, temperature=TAU, seed=SEED, batch_size=8)


@pytest.mark.parametrize("name", SETS)
def test_every_set_is_the_images_moved_by_one_source_per_batch(arrays, teachers, images, name):
    generator = torch.Generator().manual_seed(SEED)
    logits, moved = [], []
    for start in (0, 8, 16):
        x = images[start : start + 8].float() / 255
        if name != "clean":
            source = teachers[torch.randint(3, (), generator=generator).item()]
            epsilon = PERTURBATIONS[name](source, x, TAU, generator=generator)
            x = torch.clamp(x + ETA * epsilon, 0, 1)
        with torch.no_grad():
            logits.append(torch.stack([teacher(x) for teacher in teachers], dim=1))
        moved.append(x)
    expected = torch.cat(logits).numpy()
    np.testing.assert_allclose(arrays[f"{name}/logits"], expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        arrays[f"{name}/examples"], torch.cat(moved)[:8].numpy(), rtol=1e-5, atol=1e-6
    )


def test_the_seed_decides(arrays, teachers, images):
    settings = {"eta": ETA, "temperature": TAU, "batch_size": 8}
    again = perturbed_logits(teachers, images, seed=SEED, **settings)
    other = perturbed_logits(teachers, images, seed=SEED + 1, **settings)
    for name in SETS:
        key = f"{name}/logits"
        np.testing.assert_array_equal(arrays[key], again[key])
        assert (name == "clean") == np.array_equal(arrays[key], other[key])
