"""Batched augmentation against padding, slicing and mirroring one image at a time."""

import numpy as np
import pytest
import torch

from ensdistill.batches import TrainingBatches


def epochs(images, count=1, batch_size=4, crop_padding=2, flip=True, seed=0):
    """The batches (x, y) of each of some epochs; labels are the images' places."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(images))
    batches = TrainingBatches(images, labels, batch_size, crop_padding, flip)
    return [list(batches.epoch(generator)) for _ in range(count)]


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(9)
    return torch.randint(0, 256, (12, 3, 5, 7), dtype=torch.uint8, generator=generator)


def possible(image, padding, flip):
    """Every crop of the zero-padded image, as it is and mirrored."""
    padded = np.pad(image.numpy(), ((0, 0), (padding, padding), (padding, padding)))
    _, height, width = image.shape
    crops = {}
    for top in range(2 * padding + 1):
        for left in range(2 * padding + 1):
            crop = padded[:, top : top + height, left : left + width]
            crops[crop.tobytes()] = (top, left, False)
            if flip:
                crops[np.ascontiguousarray(crop[:, :, ::-1]).tobytes()] = (top, left, True)
    return crops


@pytest.mark.parametrize("flip", [False, True])
def test_each_image_is_one_of_its_crops_and_all_crops_come(images, flip):
    seen = set()
    for epoch in epochs(images, 60, crop_padding=1, flip=flip):
        for x, y in epoch:
            pixels = (x * 255).round().to(torch.uint8)
            for picture, label in zip(pixels, y.tolist(), strict=True):
                crops = possible(images[label], 1, flip)
                seen.add(crops[picture.contiguous().numpy().tobytes()])
    assert len(seen) == (18 if flip else 9)


def test_without_augmentation_images_are_unchanged(images):
    for x, y in epochs(images, crop_padding=0, flip=False)[0]:
        assert torch.equal(x, images[y].float() / 255)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_has_every_image_once_in_a_new_order(images):
    first, second = (torch.cat([y for _, y in epoch]).tolist() for epoch in epochs(images, 2))
    assert sorted(first) == sorted(second) == list(range(12))
    assert first != second


def test_an_epoch_entered_late_has_the_same_batches(images):
    batches = TrainingBatches(images, torch.arange(12), 4, 2, True)
    whole, late = (list(batches.epoch(torch.Generator().manual_seed(3), n)) for n in (0, 2))
    assert len(late) == 1
    assert all(torch.equal(*pair) for pair in zip(whole[2], late[0], strict=True))


def test_an_incomplete_batch_is_left_out_unless_it_is_the_only_one(images):
    assert [len(y) for _, y in epochs(images, batch_size=5)[0]] == [5, 5]
    assert [len(y) for _, y in epochs(images, batch_size=50)[0]] == [12]


def test_the_seed_decides(images):
    def first(seed):
        return epochs(images, seed=seed)[0][0][0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))
