"""images.h5 as studies of photographs have it, for tests."""

import io

import h5py
import numpy as np
from PIL import Image

from tests.builders import noise


def store(file, split, pixels, labels, chunk=None):
    """A split as pixels (N, C, H, W), so many to a chunk; one chunk for all unless told."""
    chunks = (chunk or len(pixels), *pixels.shape[1:])
    options = {"compression": "gzip", "shuffle": True, "fletcher32": True}
    file.create_dataset(f"{split}/images", data=pixels, chunks=chunks, **options)
    file[f"{split}/labels"] = np.asarray(labels, np.int64)


def store_files(file, split, files, labels, **attributes):
    """A split as the files that its images came in."""
    content = np.frombuffer(b"".join(files), np.uint8)
    stored = file.create_dataset(f"{split}/files", data=content, chunks=(100,), fletcher32=True)
    file[f"{split}/offsets"] = np.cumsum([0, *map(len, files)])
    stored.attrs.update(attributes)
    file[f"{split}/labels"] = np.asarray(labels, np.int64)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def sorted_file(path, count=24, classes=4, side=6, chunk=4, train_side=None):
    """images.h5 with noise, sorted by class; every pixel of an image tells its place."""
    labels = np.sort(np.arange(count) % classes)
    with h5py.File(path, "w") as file:
        for split, seed in (("train", 0), ("val", 1), ("test", 2)):
            own = train_side if split == "train" and train_side else side
            store(file, split, noise(count, 3, own, own, seed=seed), labels, chunk)
        file.attrs.update(
            classes='["a", "b", "c", "d"]', mean="[0.5, 0.5, 0.5]", std="[0.3, 0.3, 0.3]"
        )
    return path
