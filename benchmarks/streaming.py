"""How fast training reads photographs that do not fit into memory."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision import models, transforms
from torchvision.datasets import ImageFolder

from benchmarks.rows import Bench
from benchmarks.workloads import Call, threads
from ensdistill import images as images_module
from ensdistill import sources
from ensdistill.batches import training_batches
from ensdistill.images import write_images
from ensdistill.stored_images import StoredImages

SIDE, CLASSES, EACH, BATCH = 224, 10, 64, 64
AUGMENTED: dict[str, tuple[dict[str, object], list[Callable]]] = {
    "flip": ({"crop_padding": 0, "flip": True}, [transforms.RandomHorizontalFlip()]),
    "parts": (
        {"crop_padding": 0, "flip": True, "random_resized_crop": [0.08, 1.0]},
        [transforms.RandomResizedCrop(SIDE), transforms.RandomHorizontalFlip()],
    ),
}
"""Of ours, and torchvision's."""


def streaming(bench: Bench) -> None:
    """Ours from pixels and from files over ImageFolder in a DataLoader, and over memory."""
    names = [
        *(
            f"streaming_{form}_{change}_{readers}"
            for form in ("pixels", "files")
            for change in AUGMENTED
            for readers in (1, 2)
        ),
        *(f"streaming_resnet18_{form}" for form in ("pixels", "files")),
    ]
    if not bench.wants(*names):
        return
    device = bench.device  # sets the number of threads
    with tempfile.TemporaryDirectory() as folder, threads(1):
        stores = written(Path(folder))
        for form, stored in stores.items():
            for change, (ours, theirs) in AUGMENTED.items():
                for readers in (1, 2):
                    against_torchvision(bench, form, change, readers, stored, ours, theirs, folder)
            against_memory(bench, form, stored, device)


def written(folder: Path) -> dict[str, StoredImages]:
    """Photographs as JPEG files in a folder, and images.h5 of them in either form."""
    rng = np.random.default_rng(0)
    photographs = [Image.fromarray(it) for it in load_sample_images().images]
    for number in range(CLASSES * (EACH + 4)):
        photograph = photographs[number % 2]
        side = int(rng.integers(100, 400))
        left, top = (int(rng.integers(it - side + 1)) for it in photograph.size)
        piece = photograph.crop((left, top, left + side, top + side)).resize((SIDE, SIDE))
        split = "train" if number % (EACH + 4) < EACH else "test"
        path = folder / split / f"class{number // (EACH + 4)}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        piece.save(path, quality=90)
    settings = {"source": "folder", "path": str(folder), "size": SIDE, "train": None, "seed": 0}
    stores = {}
    for form, most in (("pixels", 2**40), ("files", 0)):
        path = folder / f"{form}.h5"
        with patch.object(images_module, "MOST_PIXELS", most), patch.object(sources, "KEPT", 0):
            write_images(path, validation=CLASSES, test=None, attributes={}, **settings)
        stores[form] = StoredImages(path, "train")
        assert stores[form].encoded == (form == "files")
    return stores


def against_torchvision(bench, form, change, readers, stored, ours, theirs, folder) -> None:
    def calls() -> tuple[Call, Call]:
        steps = transforms.Compose([*theirs, transforms.ToTensor()])
        dataset = ImageFolder(f"{folder}/train", steps)
        loader = DataLoader(dataset, BATCH, shuffle=True, drop_last=True, num_workers=readers)

        def epoch_of_theirs() -> None:
            for _ in loader:
                pass

        return epoch_of_ours(stored, ours), epoch_of_theirs

    with read_by(readers):
        bench.compare(
            f"streaming_{form}_{change}_{readers}",
            f"an epoch of augmented batches from {form} / ImageFolder in a DataLoader",
            calls,
            shape=f"{len(stored)} images of {SIDE}×{SIDE}, readers: {readers}",
            rounds=5,
        )


@contextmanager
def read_by(readers: int) -> Iterator[None]:
    with patch("ensdistill.loading.readers", lambda: readers):
        yield


def epoch_of_ours(images: StoredImages | torch.Tensor, augmentation: dict) -> Call:
    labels = torch.zeros(len(images), dtype=torch.long)
    batches = training_batches(images, labels, BATCH, **augmentation)
    generator = torch.Generator().manual_seed(0)

    def epoch() -> None:
        for _ in batches.epoch(generator):
            pass

    return epoch


def against_memory(bench: Bench, form: str, stored: StoredImages, device: torch.device) -> None:
    """Of a network that takes far longer than its images."""
    count, size = 192, 16
    few = stored.choose(np.random.default_rng(0).permutation(len(stored))[:count])
    torch.manual_seed(0)
    network = models.resnet18(num_classes=CLASSES).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, fused=True)

    def epoch_of(images: StoredImages | torch.Tensor) -> Call:
        labels = torch.zeros(count, dtype=torch.long, device=device)
        batches = training_batches(images, labels, size, **AUGMENTED["parts"][0])

        def epoch() -> None:
            for x, y in batches.epoch(torch.Generator(device).manual_seed(0)):
                F.cross_entropy(network(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()

        return epoch

    def calls() -> tuple[Call, Call]:
        pixels = torch.from_numpy(few.read(np.arange(count))).to(device)
        return epoch_of(few), epoch_of(pixels)

    bench.compare(
        f"streaming_resnet18_{form}",
        f"an epoch of ResNet-18 from {form} / from memory",
        calls,
        shape=f"{count} images of {SIDE}×{SIDE}, batches of {size}, readers: 1",
        rounds=3,
    )
