"""Images, folders and archives for tests, and images.h5 made of them."""

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from ensdistill import InputError
from ensdistill.downloads import ARCHIVES, Archive
from ensdistill.images import write_images


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def hash_of(*parts):
    """A seed for each combination of names and numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def photographs(*shape, count=4):
    """Pieces of a photograph (N, C, H, W)."""
    channels, height, width = shape
    whole = load_sample_images().images[1].transpose(2, 0, 1)[:channels]
    corners = range(60, 60 + 20 * count, 20)
    return np.stack([whole[:, i : i + height, i : i + width] for i in corners])


def encode(pixels, ending="png", **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    if ending == "webp":
        options = {"lossless": True, "exact": True, **options}
    known = {"jpg": "JPEG", "tif": "TIFF", "jp2": "JPEG2000"}
    picture.save(buffer, known.get(ending, ending.upper()), **options)
    return buffer.getvalue()


def write_tree(root, files):
    for name, data in files.items():
        path = Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def write_tar(path, files, mode="w"):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return str(path)


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(path)


def per_class(**classes):
    """Files of a tree with the same image in train/<class>/0.png and test/<class>/0.png."""
    return {
        f"{s}/{label}/0.png": data for label, data in classes.items() for s in ("train", "test")
    }


def good_tree():
    """Two classes of four training images and one test image, no two of them equal."""
    return {
        f"{split}/{label}/{i}.png": encode(noise(40, 30, seed=100 * (split == "test") + 10 * k + i))
        for k, label in enumerate(("cat", "dog"))
        for split, count in (("train", 4), ("test", 1))
        for i in range(count)
    }


def md5(data):
    return hashlib.md5(data).hexdigest()


def publish(monkeypatch, path, content):
    """Write a file that stands for the official archive of its name."""
    path.write_bytes(content)
    monkeypatch.setitem(ARCHIVES, path.name, Archive("http://127.0.0.1/", md5(content)))
    return str(path)


def make(output, **options):
    chosen = {"source": "folder", "train": None, "validation": 1, "test": None, "seed": 0}
    if options.get("source", "folder") == "folder":
        chosen["size"] = None
    write_images(output, attributes={}, **{**chosen, **options})


def fails(output, **options):
    """The one sentence with which `write_images` refuses, having left nothing behind."""
    before = sorted(output.parent.rglob("*"))
    with pytest.raises(InputError) as caught:
        make(output, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert "<_io" not in message
    assert sorted(output.parent.rglob("*")) == before
    return message


def message(call, *arguments, **options):
    """The one sentence of an InputError."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


TEACHER_PARTS = {
    "student": {"name": "single"},
    "members": 1,
    "architecture": {"name": "resnet8", "width": 4},
    "objective": {"name": "labels"},
    "perturbation": {"name": "none"},
    "prediction": "mixture",
}
"""As `Study.parts` returns those of a small teacher."""

MINE = """
from torch import nn
import sizes


class Net(nn.Module):
    def __init__(self, num_classes, channels, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(channels, width, 3), nn.BatchNorm2d(width)
        self.late, self.head = nn.Conv2d(width, width, 3), nn.Linear(width, num_classes)

    def forward(self, x):
        return self.head(self.late(self.norm(self.conv(x)).relu()).relu().mean((2, 3)))


def build(num_classes, in_channels, width=sizes.WIDTH):
    return Net(num_classes, in_channels, width)


def of_classes(num_classes):
    return Net(num_classes, 3, 4)


def of_all(**given):
    return Net(given["num_classes"], given["in_channels"], given.get("width", 3))


def fixed():
    return Net(4, 3, 5)


def wrong(num_classes):
    return [num_classes]


def fails(num_classes):
    raise KeyError("no such thing\\nat all")


text = "not a function"
"""
"""A file of own networks, which imports a package beside it."""
