"""Photographs' augmentation against torchvision's functions, one image at a time."""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from ensdistill.batches import TrainingBatches

N, SIDE = 10, 12


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (N, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


def one_epoch(images, batch_size=4, seed=0, first=0, crop_padding=0, flip=False, **more):
    """Pixels 0 … 255 by the place of their image; the first epoch of a seed."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(images))
    batches = TrainingBatches(images, labels, batch_size, crop_padding, flip, **more)
    found = {}
    for x, y in batches.epoch(generator, first):
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert x.dtype == torch.float32
        pixels = (x * 255).round()
        torch.testing.assert_close(x * 255, pixels, rtol=0, atol=1e-4)
        found |= dict(zip(y.tolist(), pixels.to(torch.uint8), strict=True))
    return found


def is_one_of(image, others):
    return any(torch.equal(image, it) for it in others)


@pytest.mark.parametrize("flip", [False, True])
def test_larger_images_are_cropped_at_all_places(images, flip):
    """Of 12×12 padded to 14×14 there are 5×5 crops of 10×10."""
    seen = set()
    padded = functional.pad(images, [1, 1, 1, 1])
    for seed in range(60):
        found = one_epoch(images, seed=seed, crop_padding=1, flip=flip, size=(10, 10))
        for place, image in found.items():
            crops = {
                (top, left, turned): functional.horizontal_flip(crop) if turned else crop
                for top in range(5)
                for left in range(5)
                for turned in ((False, True) if flip else (False,))
                for crop in [functional.crop(padded[place], top, left, 10, 10)]
            }
            seen |= {which for which, crop in crops.items() if torch.equal(crop, image)}
            assert is_one_of(image, crops.values())
    assert len(seen) == (50 if flip else 25)


def test_parts_are_resized_as_torchvision_does(images, monkeypatch):
    """Place and size of every part are noted, and the part is cut and resized by hand."""
    drawn = []
    make = v2.RandomResizedCrop.make_params

    def noted(self, given):
        drawn.append(make(self, given))
        return drawn[-1]

    monkeypatch.setattr(v2.RandomResizedCrop, "make_params", noted)
    generator = torch.Generator().manual_seed(0)
    batches = TrainingBatches(
        images, torch.arange(N), 5, 4, False, size=(8, 8), random_resized_crop=[0.2, 0.6]
    )
    for x, y in batches.epoch(generator):
        for image, place, box in zip(x, y, drawn, strict=True):
            part = functional.crop(images[place], **box)
            resized = functional.resize(part, [8, 8], antialias=True)
            torch.testing.assert_close(image * 255, resized.float(), rtol=0, atol=1e-4)
            # Sides are rounded to pixels.
            assert 0.15 <= box["height"] * box["width"] / SIDE**2 <= 0.7
        drawn.clear()


POLICIES = {
    "trivial_augment": ({"name": "trivial_augment"}, v2.TrivialAugmentWide()),
    "rand_augment": (
        {"name": "rand_augment", "operations": 1, "magnitude": 20},
        v2.RandAugment(1, 20),
    ),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_makes_of_an_image_what_torchvision_makes_of_it(images, name):
    """Whatever is drawn is among what torchvision draws for the same image in 2,000 trials."""
    options, policy = POLICIES[name]
    found = one_epoch(images[:3], batch_size=3, policy=options)
    torch.manual_seed(1)
    for place, image in found.items():
        assert is_one_of(image, (policy(images[place]) for _ in range(2000)))


@pytest.mark.parametrize(
    "more",
    [
        {"policy": POLICIES["trivial_augment"][0]},
        {"random_resized_crop": [0.1, 1.0], "flip": True},
        {"random_resized_crop": [0.1, 1.0], "policy": POLICIES["rand_augment"][0]},
    ],
    ids=str,
)
def test_each_image_has_its_own_draws_whatever_the_batch(images, more):
    whole = one_epoch(images, 2, **more)
    for batch_size in (1, 5, 10):
        other = one_epoch(images, batch_size, **more)
        assert all(torch.equal(whole[place], other[place]) for place in range(N))
    late = one_epoch(images, 2, first=3, **more)
    assert len(late) == 4
    assert all(torch.equal(whole[place], late[place]) for place in late)
    same = images[:1].expand(N, -1, -1, -1)
    different = {it.numpy().tobytes() for it in one_epoch(same, 10, **more).values()}
    assert len(different) > N / 2
    again = one_epoch(images, 2, seed=1, **more)
    assert not all(torch.equal(whole[place], again[place]) for place in range(N))


def test_the_global_generator_is_left_as_it_was(images):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    one_epoch(images, random_resized_crop=[0.1, 1.0])
    assert torch.equal(torch.rand(2), expected)


def test_images_of_one_channel_can_be_changed_too(images):
    found = one_epoch(images[:, :1], policy=POLICIES["trivial_augment"][0])
    assert np.mean([not torch.equal(it, images[place, :1]) for place, it in found.items()]) > 0.3
