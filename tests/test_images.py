import hashlib
import http.server
import io
import pickle
import shutil
import socket
import tarfile
import threading
import time
import warnings
import zipfile
from itertools import chain
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from torchvision import datasets

from ensdistill import InputError, images
from ensdistill.images import download, folder, read_description, read_images, write_images

SPLITS = ("train", "val", "test")
DIGITS = np.round(load_digits().images * 255 / 16).astype(np.uint8)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encode(pixels, ending="png", **options):
    picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    if ending == "webp":
        options = {"lossless": True, "exact": True, **options}
    picture.save(buffer, {"jpg": "JPEG", "tif": "TIFF"}.get(ending, ending.upper()), **options)
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


def read_folder(path, size=None):
    data = folder(path=path, size=size)
    return data.train[0], data.test[0]


def only_image(data, name="0.png", size=None, *, tmp_path):
    """Pixels (C, H, W) of a folder's one training image."""
    path = write_tree(tmp_path / "one", {f"{s}/only/{name}": data for s in ("train", "test")})
    (train,), _ = read_folder(path, size)
    return train


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


# --- digits ----------------------------------------------------------------------------------


def digits_file(path, seed=0, **options):
    make(path, source="digits", **{"validation": 200, "test": 597, "seed": seed, **options})
    return {split: read_images(path, split) for split in SPLITS}


def indices(split):
    """Which of scikit-learn's digits the images of a split are."""
    known = {image.tobytes(): i for i, image in enumerate(DIGITS)}
    assert len(known) == len(DIGITS)
    return [known[image.tobytes()] for image in split[0]]


def test_digits_are_scikit_learns_rescaled_split_without_remainder_and_stratified(tmp_path):
    splits = digits_file(tmp_path / "images.h5")
    found = {split: indices(pair) for split, pair in splits.items()}
    assert sorted(chain.from_iterable(found.values())) == list(range(1797))
    assert {split: len(there) for split, there in found.items()} == {
        "train": 1000,
        "val": 200,
        "test": 597,
    }
    shares = np.bincount(load_digits().target) / 1797
    for split, (pixels, labels) in splits.items():
        assert pixels.dtype == np.uint8
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(pixels[:, 0], DIGITS[found[split]])
        np.testing.assert_array_equal(labels, load_digits().target[found[split]])
        assert np.abs(np.bincount(labels) - shares * len(labels)).max() < 2


def test_digits_are_split_by_the_seed_alone(tmp_path):
    first, again, other = (
        digits_file(tmp_path / f"{name}.h5", seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    for split in SPLITS:
        assert indices(first[split]) == indices(again[split])
        assert set(indices(first[split])) != set(indices(other[split]))


def test_a_training_subset_is_of_the_wanted_size_and_avoids_validation(tmp_path):
    splits = digits_file(tmp_path / "images.h5", train=100)
    found = {split: set(indices(pair)) for split, pair in splits.items()}
    assert len(found["train"]) == 100
    assert not found["train"] & (found["val"] | found["test"])
    for split, (_, labels) in splits.items():
        np.testing.assert_array_equal(labels, load_digits().target[indices(splits[split])])
    assert set(splits["train"][1]) == set(range(10))


def test_mean_and_std_are_those_of_the_training_pixels(tmp_path):
    splits = digits_file(tmp_path / "images.h5")
    known = read_description(tmp_path / "images.h5")
    assert known["classes"] == [str(digit) for digit in range(10)]
    assert known["shape"] == (1, 8, 8)
    pixels = splits["train"][0] / 255
    np.testing.assert_allclose(known["mean"], [pixels.mean()], rtol=1e-12)
    np.testing.assert_allclose(known["std"], [pixels.std()], rtol=1e-12)


def test_mean_and_std_are_per_channel_and_std_is_never_zero(tmp_path):
    picture = noise(6, 6, 3)
    picture[..., 2] = 7
    files = per_class(a=encode(picture), b=encode(picture)) | {
        f"train/{label}/{i}.png": encode(picture) for label in "ab" for i in (1, 2)
    }
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "tree", files), validation=2)
    known = read_description(tmp_path / "images.h5")
    scaled = picture.reshape(-1, 3) / 255
    np.testing.assert_allclose(known["mean"], scaled.mean(0), rtol=1e-12)
    np.testing.assert_allclose(known["std"], [*scaled.std(0)[:2], 1 / 255], rtol=1e-12)


# --- folders and archives --------------------------------------------------------------------

# As text "a-b/" sorts before "a/", as a path after it.
CLASSES = ["a", "a-b", "b"]


def colour_tree(ending="png"):
    """Files, and the pixels in the order in which they must come."""
    pictures = {
        (split, label, f"{i}.{ending}"): noise(5, 4, 3, seed=hash_of(split, label, i))
        for split in ("train", "test")
        for label in reversed(CLASSES)
        for i in (2, 0, 1)
    }
    files = {"/".join(place): encode(pixels, ending) for place, pixels in pictures.items()}
    arrays = [
        np.stack(
            [pictures[place].transpose(2, 0, 1) for place in sorted(pictures) if split in place]
        )
        for split in ("train", "test")
    ]
    return files, arrays


def hash_of(*parts):
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")


def split_off(files, prefix):
    return {name: data for name, data in files.items() if name.startswith(prefix)}


def prefixed(files):
    return {f"./data/v1/{name}": data for name, data in files.items()}


def linked(root, files):
    """A tree whose splits, and whose class a, are links to folders elsewhere."""
    write_tree(root / "elsewhere", files)
    (root / "elsewhere/train/a").rename(root / "class_a")
    (root / "elsewhere/train/a").symlink_to(root / "class_a")
    (root / "tree").mkdir()
    for split in ("train", "test"):
        (root / "tree" / split).symlink_to(root / "elsewhere" / split)
    return str(root / "tree")


def many_archives(root, files):
    write_tar(root / "1.tar", split_off(files, "test/"))
    write_zip(root / "2.zip", split_off(files, "train/b/"))
    write_tar(root / "3.tar.gz", split_off(files, "train/a"), "w:gz")
    return root


PACKINGS = {
    "directory": write_tree,
    "directory with a prefix": lambda root, files: write_tree(root, prefixed(files)),
    "directory of links": linked,
    "tar": lambda root, files: write_tar(root / "x.tar", files),
    "tar.gz": lambda root, files: write_tar(root / "x.tar.gz", files, "w:gz"),
    "tgz": lambda root, files: write_tar(root / "x.tgz", files, "w:gz"),
    "tar.bz2": lambda root, files: write_tar(root / "x.tar.bz2", files, "w:bz2"),
    "tar.xz": lambda root, files: write_tar(root / "x.tar.xz", files, "w:xz"),
    "zip": lambda root, files: write_zip(root / "x.zip", files),
    "tar with a prefix": lambda root, files: write_tar(root / "x.tar", prefixed(files)),
    "zip with a prefix": lambda root, files: write_zip(root / "x.zip", prefixed(files)),
    "directory of archives": lambda root, files: str(many_archives(root, files)),
    "list of archives": lambda root, files: list(
        map(str, sorted(many_archives(root, files).iterdir(), reverse=True))
    ),
    "list of folders": lambda root, files: [
        f"{write_tree(root, files)}/{split}" for split in ("test", "train")
    ],
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_packing_gives_the_same_arrays_in_the_same_order(tmp_path, packing):
    files, expected = colour_tree()
    data = folder(path=PACKINGS[packing](tmp_path, files), size=None)
    assert data.classes == CLASSES
    for (pixels, labels), wanted in zip((data.train, data.test), expected, strict=True):
        np.testing.assert_array_equal(pixels, wanted)
        assert pixels.dtype == np.uint8
        assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
        assert labels.dtype == np.int64
    assert data.sha256 == folder(path=write_tree(tmp_path / "plain", files), size=None).sha256
    assert not data.official_validation


def test_the_checksum_sees_a_changed_pixel_and_a_changed_name(tmp_path):
    files, _ = colour_tree()
    changed = files | {"train/a/0.png": encode(noise(5, 4, 3, seed=99))}
    renamed = {name.replace("train/a/0", "train/a/9"): data for name, data in files.items()}
    digests = {
        folder(path=write_tree(tmp_path / str(i), tree), size=None).sha256
        for i, tree in enumerate((files, changed, renamed))
    }
    assert len(digests) == 3


@pytest.mark.parametrize("ending", ["png", "PNG", "webp", "bmp", "tif", "ppm", "gif"])
def test_lossless_formats_give_the_pixels_that_were_written(tmp_path, ending):
    pixels = noise(9, 7, 3)
    if ending == "gif":
        pixels[:] = pixels[..., :1] & 0xF0  # few colours, grey ones: GIF has a palette
    data = encode(pixels, ending.lower())
    read = only_image(data, f"0.{ending}", tmp_path=tmp_path)
    np.testing.assert_array_equal(np.broadcast_to(read, (3, 9, 7)), pixels.transpose(2, 0, 1))


def test_jpeg_is_read_to_within_its_loss(tmp_path):
    ramp = np.tile(np.arange(0, 128, 4, dtype=np.uint8), (32, 1))
    read = only_image(encode(ramp, "jpg", quality=95), "0.jpeg", tmp_path=tmp_path)
    assert np.abs(read[0].astype(int) - ramp).max() <= 4


def test_a_large_compressed_tar_in_any_order_is_read_in_one_go(tmp_path, monkeypatch):
    """A step back in a .tar.gz decompresses from its start: hours for a hundred thousand images."""
    files, expected = colour_tree()
    path = write_tar(tmp_path / "x.tar.gz", files, "w:gz")
    names = [name.removeprefix(f"{path}/") for name, _ in images._files([Path(path)])]
    assert names == list(files) != sorted(files)
    np.testing.assert_array_equal(read_folder(path)[0], expected[0])


HIDDEN = [
    "train/a/.DS_Store",
    "train/a/._0.png",
    "__MACOSX/train/a/._0.png",
    "train/.ipynb_checkpoints/0.png",
    "test/.hidden/0.png",
    "train/a/Thumbs.db",
    "train/a/readme.txt",
    "train/a/png",
    "train/0.png",
    "readme.png",
    "validation/c/0.png",
]


@pytest.mark.parametrize("packing", ["directory", "tar", "zip"])
def test_what_is_no_image_of_a_class_is_skipped(tmp_path, packing):
    files, expected = colour_tree()
    clutter = dict.fromkeys(HIDDEN, b"not an image")
    data = folder(path=PACKINGS[packing](tmp_path, clutter | files), size=None)
    assert data.classes == CLASSES
    np.testing.assert_array_equal(data.train[0], expected[0])
    np.testing.assert_array_equal(data.test[0], expected[1])


@pytest.mark.parametrize("write", [write_tar, write_zip])
def test_member_names_that_point_outside_write_nothing(tmp_path, write):
    files, expected = colour_tree()
    outside = {"/train/a/1.png": files.pop("train/a/1.png")}
    outside |= {"../../train/a/2.png": files.pop("train/a/2.png"), "train/../9.png": b"x"}
    path = write(tmp_path / "below/x.archive", files | outside)
    before = sorted(tmp_path.parent.rglob("*"))
    train, _ = read_folder(path)
    np.testing.assert_array_equal(train, expected[0])
    assert sorted(tmp_path.parent.rglob("*")) == before
    assert not Path("/train").exists()


def test_links_inside_archives_are_skipped(tmp_path):
    files, expected = colour_tree()
    write_tar(tmp_path / "x.tar", files)
    with tarfile.open(tmp_path / "x.tar", "a") as archive:
        link = tarfile.TarInfo("train/a/9.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    write_zip(tmp_path / "x.zip", files)
    with zipfile.ZipFile(tmp_path / "x.zip", "a") as archive:
        entry = zipfile.ZipInfo("train/a/9.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/hostname")
    for name in ("x.tar", "x.zip"):
        np.testing.assert_array_equal(read_folder(str(tmp_path / name))[0], expected[0])


# --- pixel formats ---------------------------------------------------------------------------


def in_mode(mode):
    """An image of a mode, and the RGB pixels it stands for."""
    rgb, alpha = noise(6, 5, 3, seed=1), noise(6, 5, seed=2)
    grey = rgb[..., 0]
    if mode == "RGBA":
        return Image.fromarray(np.dstack([rgb, alpha])), rgb
    if mode == "LA":
        return Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]), grey
    if mode == "1":
        return Image.fromarray(grey > 127), np.where(grey > 127, 255, 0)
    if mode == "P":
        picture = Image.fromarray(grey % 4)
        picture = Image.frombytes("P", picture.size, picture.tobytes())
        colours = noise(4, 3, seed=3)
        picture.putpalette(colours.tobytes())
        return picture, colours[grey % 4]
    if mode == "CMYK":
        # Without black, CMY is the complement of RGB.
        ink = np.dstack([255 - rgb, np.zeros_like(grey)])
        return Image.frombytes("CMYK", (5, 6), ink.tobytes()), rgb
    return Image.fromarray(grey if mode == "L" else rgb), grey if mode == "L" else rgb


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1"])
def test_every_mode_beside_a_colour_image_becomes_three_channels(tmp_path, mode):
    picture, meant = in_mode(mode)
    ending = "tif" if mode == "CMYK" else "png"
    colour = noise(6, 5, 3)
    files = {"train/a/0.png": encode(colour), f"train/a/1.{ending}": encode(picture, ending)}
    path = write_tree(tmp_path / "tree", files | {"test/a/0.png": encode(noise(6, 5))})
    train, test = read_folder(path)
    meant = meant if meant.ndim == 3 else np.dstack([meant] * 3)
    np.testing.assert_array_equal(train, np.stack([colour, meant]).transpose(0, 3, 1, 2))
    np.testing.assert_array_equal(test[0], np.stack([noise(6, 5)] * 3))


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_grey_images_alone_become_one_channel(tmp_path, mode):
    picture, meant = in_mode(mode)
    np.testing.assert_array_equal(only_image(encode(picture), tmp_path=tmp_path), [meant])


def test_one_colour_image_in_the_test_split_gives_both_splits_three_channels(tmp_path):
    files = {"train/a/0.png": encode(noise(6, 5)), "test/a/0.png": encode(noise(6, 5, 3))}
    train, test = read_folder(write_tree(tmp_path / "tree", files))
    np.testing.assert_array_equal(train[0], np.stack([noise(6, 5)] * 3))
    np.testing.assert_array_equal(test[0], noise(6, 5, 3).transpose(2, 0, 1))


@pytest.mark.parametrize("ending", ["png", "tif"])
def test_16_bit_grey_is_scaled_to_8_bits(tmp_path, ending):
    wide = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    assert wide.min() == 0
    assert wide.max() == 65535
    read = only_image(encode(wide, ending), f"0.{ending}", tmp_path=tmp_path)
    np.testing.assert_array_equal(read, [np.arange(256).reshape(16, 16)])


def test_32_bit_images_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"0\.tif: has 32-bit pixels"):
        only_image(encode(np.ones((4, 4), np.float32), "tif"), "0.tif", tmp_path=tmp_path)


@pytest.mark.parametrize(
    ("orientation", "turn"),
    [
        (1, lambda a: a),
        (2, np.fliplr),
        (3, lambda a: np.rot90(a, 2)),
        (6, lambda a: np.rot90(a, 3)),
    ],
)
def test_exif_orientation_turns_the_image_upright(tmp_path, orientation, turn):
    exif = Image.Exif()
    exif[0x0112] = orientation
    read = only_image(encode(noise(4, 6, 3), exif=exif), tmp_path=tmp_path)
    np.testing.assert_array_equal(read.transpose(1, 2, 0), turn(noise(4, 6, 3)))


@pytest.mark.parametrize("shape", [(8, 16), (16, 8), (8, 8)])
@pytest.mark.parametrize("size", [8, 4, 12])
def test_size_resizes_the_short_side_and_crops_the_centre(tmp_path, shape, size):
    pixels = noise(*shape, 3) // 2 + 64  # so that nothing is clipped between two passes
    height, width = (side * size // 8 for side in shape)
    resized = np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - size) // 2, (width - size) // 2
    read = only_image(encode(pixels), size=size, tmp_path=tmp_path).transpose(1, 2, 0)
    np.testing.assert_allclose(
        read.astype(int), resized[top : top + size, left : left + size], atol=1
    )


def test_size_makes_different_sizes_equal(tmp_path):
    files = per_class(a=encode(noise(4, 6, 3)), b=encode(noise(7, 5, 3)))
    path = write_tree(tmp_path / "tree", files)
    assert read_folder(path, size=4)[0].shape == (2, 3, 4, 4)
    with pytest.raises(InputError, match=r"differ in size \(5×7, 6×4 …\): set images.size"):
        read_folder(path)


# --- unusable sources ------------------------------------------------------------------------


def good_tree():
    """Two classes of four training images and one test image."""
    files = per_class(cat=encode(noise(40, 30, seed=1)), dog=encode(noise(40, 30, seed=2)))
    for i in (1, 2, 3):
        files |= {
            f"train/{label}/{i}.png": encode(noise(40, 30, seed=i)) for label in ("cat", "dog")
        }
    return files


def without(prefix):
    return {name: data for name, data in good_tree().items() if not name.startswith(prefix)}


def truncated(name):
    return good_tree() | {name: good_tree()[name][:-200]}


UNUSABLE_TREES = {
    "truncated image": (truncated("train/cat/1.png"), "train/cat/1.png: not a readable image"),
    "text named png": (
        good_tree() | {"test/dog/0.png": b"hello"},
        "test/dog/0.png: not an image of a known format",
    ),
    "empty file named png": (good_tree() | {"test/dog/0.png": b""}, "test/dog/0.png: not an image"),
    "class missing from test": (without("test/dog"), "class 'dog' is in train/ but not in test/"),
    "class missing from train": (without("train/cat"), "class 'cat' is in test/ but not in train/"),
    "no test images": (without("test/"), "tree: holds no images in test/<class>/"),
    "classes without images": (
        {f"{s}/cat/notes.txt": b"" for s in ("train", "test")},
        "tree: holds no images in train/<class>/",
    ),
    "images without classes": ({"train/0.png": encode(noise(4, 4))}, "holds no images in train/"),
}


@pytest.mark.parametrize("what", UNUSABLE_TREES)
def test_an_unusable_folder_is_refused_in_one_sentence(tmp_path, what):
    files, expected = UNUSABLE_TREES[what]
    path = write_tree(tmp_path / "tree", files)
    message = fails(tmp_path / "images.h5", path=path)
    assert expected in message
    assert path in message


def test_the_good_folder_is_not_refused(tmp_path):
    make(tmp_path / "images.h5", path=write_tree(tmp_path / "tree", good_tree()), validation=2)
    assert [len(read_images(tmp_path / "images.h5", split)[1]) for split in SPLITS] == [6, 2, 2]


@pytest.mark.parametrize("make_it", [lambda path: None, Path.mkdir], ids=["missing", "empty"])
def test_a_missing_or_empty_folder_is_refused(tmp_path, make_it):
    make_it(tmp_path / "tree")
    assert str(tmp_path / "tree") in fails(tmp_path / "images.h5", path=str(tmp_path / "tree"))


def archive_of(packing, tmp_path):
    return Path(PACKINGS[packing](tmp_path, good_tree()))


def tail_cuts(packing, path):
    """Lengths to which an archive is cut: anywhere, and for a tar between two members too."""
    end, cuts = path.stat().st_size, set()
    if packing == "tar":
        with tarfile.open(path) as archive:
            cuts = {member.offset for member in archive} | {archive.offset + 100}
            end = archive.offset  # what follows is empty
    return sorted(cuts | {1, 300, end // 3, end // 2, end - 20, end - 1})


@pytest.mark.parametrize("packing", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_a_truncated_archive_is_refused_wherever_it_ends(tmp_path, packing):
    path = archive_of(packing, tmp_path)
    whole = path.read_bytes()
    for cut in tail_cuts(packing, path):
        path.write_bytes(whole[:cut])
        message = fails(tmp_path / "images.h5", path=str(path))
        assert message.startswith(f"{path}: not a whole tar or zip archive"), cut


@pytest.mark.parametrize("packing", ["tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_a_damaged_archive_is_refused_unless_the_damage_does_not_matter(tmp_path, packing):
    path = archive_of(packing, tmp_path)
    whole, expected = path.read_bytes(), read_folder(str(path))
    messages = []
    for place in np.linspace(10, len(whole) - 10, 30).astype(int):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            for read, wanted in zip(read_folder(str(path)), expected, strict=True):
                np.testing.assert_array_equal(read, wanted)
        except InputError as error:
            messages.append(str(error))
    assert len(messages) >= 20
    assert all(str(path) in message and "\n" not in message for message in messages)


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "x.tar").write_text("hello" * 1000)
    message = fails(tmp_path / "images.h5", path=str(tmp_path / "x.tar"))
    assert message == (
        f"{tmp_path}/x.tar: not a whole tar or zip archive (file could not be opened successfully)"
    )


def test_an_encrypted_zip_is_refused(tmp_path):
    path = archive_of("zip", tmp_path)
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = -1
        while (place := content.find(signature, place + 1)) >= 0:
            content[place + flags] |= 1
    path.write_bytes(content)
    assert "is encrypted" in fails(tmp_path / "images.h5", path=str(path))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"validation": 9}, "has 8 training images, fewer than 9 for validation and 2 for"),
        ({"validation": 7}, "has 8 training images, fewer than 7 for validation and 2 for"),
        ({"validation": 2, "train": 7}, "fewer than 2 for validation and 7 for training"),
        ({"validation": 1}, "1 validation images cannot be chosen from 8 images of 2 classes"),
        ({"validation": 2, "test": 5}, "5 test images are wanted, but there are only 2"),
    ],
)
def test_too_few_images_are_refused(tmp_path, options, expected):
    path = write_tree(tmp_path / "tree", good_tree())
    assert expected in fails(tmp_path / "images.h5", path=path, **options)


def test_fewer_images_than_classes_are_refused(tmp_path):
    path = write_tree(tmp_path / "tree", per_class(a=encode(noise(4, 4)), b=encode(noise(4, 4))))
    assert "has 2 training images" in fails(tmp_path / "images.h5", path=path)


def test_more_digits_than_there_are_are_refused(tmp_path):
    message = fails(tmp_path / "images.h5", source="digits", test=1797)
    assert message == "1797 test images are wanted, but there are only 1797"


@pytest.mark.parametrize("limit", [500, 1000], ids=["error", "warning"])
def test_a_decompression_bomb_is_refused(tmp_path, monkeypatch, limit):
    """Pillow raises beyond twice its limit of pixels, and only warns up to there."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    path = write_tree(tmp_path / "tree", good_tree())
    filters = list(warnings.filters)
    message = fails(tmp_path / "images.h5", path=path)
    assert message.startswith(f"{path}/test/cat/0.png: not a readable image")
    assert "decompression bomb" in message
    assert warnings.filters == filters


def test_a_failed_run_keeps_an_older_file(tmp_path):
    output = tmp_path / "images.h5"
    output.write_text("older")
    fails(output, path=str(tmp_path / "absent"))
    assert output.read_text() == "older"


# --- damaged images.h5 -----------------------------------------------------------------------


def damage(path, what):
    content = bytearray(path.read_bytes())
    if what == "missing":
        path.unlink()
    elif what == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif what == "empty":
        path.write_bytes(b"")
    elif what == "text":
        path.write_text("no images here")
    elif what == "flipped byte":
        with h5py.File(path) as file:
            places = [file[f"test/{name}"].id.get_chunk_info(0) for name in ("images", "labels")]
        for chunk in places:
            content[chunk.byte_offset + chunk.size // 2] ^= 0x01
        path.write_bytes(content)
    elif what == "no dataset":
        with h5py.File(path, "a") as file:
            del file["test"]


DAMAGES = ["missing", "truncated", "empty", "text", "flipped byte", "no dataset"]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_file_is_refused_by_name(tmp_path, what):
    path = tmp_path / "images.h5"
    digits_file(path)
    damage(path, what)
    with pytest.raises(InputError) as caught:
        read_images(path, "test")
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def damaged_attribute(path):
    with h5py.File(path, "a") as file:
        file.attrs["mean"] = "[0.1"


def absent_attribute(path):
    with h5py.File(path, "a") as file:
        del file.attrs["classes"]


def absent_split(path):
    with h5py.File(path, "a") as file:
        del file["train"]


@pytest.mark.parametrize("harm", [Path.unlink, damaged_attribute, absent_attribute, absent_split])
def test_a_damaged_description_is_refused_by_name(tmp_path, harm):
    path = tmp_path / "images.h5"
    digits_file(path)
    harm(path)
    with pytest.raises(InputError, match=r"images\.h5: "):
        read_description(path)


# --- CIFAR and its download ------------------------------------------------------------------


def md5(data):
    return hashlib.md5(data).hexdigest()


def fake_cifar(monkeypatch, cls=datasets.CIFAR10, label_key="labels", names=("cat", "dog")):
    """The content of a small archive that torchvision takes for the official one."""
    folder_name = cls.base_folder
    train = cls.train_list if cls is datasets.CIFAR100 else cls.train_list[:2]
    batches = {}
    for i, (name, _) in enumerate([*train, *cls.test_list]):
        labels = [int(label) for label in np.arange(10) % len(names)]
        batches[name] = {"data": noise(10, 3072, seed=i), label_key: labels}
    meta = {cls.meta["key"]: list(names)}
    files = {name: pickle.dumps(batch) for name, batch in batches.items()}
    files[cls.meta["filename"]] = pickle.dumps(meta)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(f"{folder_name}/{name}")
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    content = buffer.getvalue()
    monkeypatch.setattr(cls, "train_list", [[name, md5(files[name])] for name, _ in train])
    tests = [[name, md5(files[name])] for name, _ in cls.test_list]
    monkeypatch.setattr(cls, "test_list", tests)
    monkeypatch.setattr(cls, "meta", {**cls.meta, "md5": md5(files[cls.meta["filename"]])})
    monkeypatch.setattr(cls, "tgz_md5", md5(content))
    pixels = [batch["data"].reshape(-1, 3, 32, 32) for batch in batches.values()]
    labels = [batch[label_key] for batch in batches.values()]
    count = len(train)
    return content, {
        "train": (np.concatenate(pixels[:count]), np.concatenate(labels[:count])),
        "test": (pixels[count], np.array(labels[count])),
    }


@pytest.mark.parametrize(
    ("source", "cls", "label_key"),
    [("cifar10", datasets.CIFAR10, "labels"), ("cifar100", datasets.CIFAR100, "fine_labels")],
)
def test_cifar_keeps_the_official_order_and_validates_on_the_last_images(
    tmp_path, monkeypatch, source, cls, label_key
):
    content, expected = fake_cifar(monkeypatch, cls, label_key)
    archive, output = tmp_path / "archive.tar.gz", tmp_path / "images.h5"
    archive.write_bytes(content)
    make(output, source=source, archive=str(archive), validation=3)
    pixels, labels = expected["train"]
    for split, wanted in {
        "train": (pixels[:-3], labels[:-3]),
        "val": (pixels[-3:], labels[-3:]),
        "test": expected["test"],
    }.items():
        for read, meant in zip(read_images(output, split), wanted, strict=True):
            np.testing.assert_array_equal(read, meant)
    known = read_description(output)
    assert known["classes"] == ["cat", "dog"]
    np.testing.assert_allclose(known["std"], (pixels[:-3] / 255).std((0, 2, 3)), rtol=1e-12)
    with h5py.File(output) as file:
        assert file.attrs["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("harm", [lambda data: data[:-1], lambda data: data + b"x", None])
def test_another_archive_than_the_official_one_is_refused(tmp_path, monkeypatch, harm):
    content, _ = fake_cifar(monkeypatch)
    archive = tmp_path / "archive.tar.gz"
    if harm:
        archive.write_bytes(harm(content))
    message = fails(tmp_path / "images.h5", source="cifar10", archive=str(archive))
    assert message.startswith(f"{archive}: not the official cifar10 archive")


@pytest.fixture
def pauses(monkeypatch):
    found = []
    monkeypatch.setattr(time, "sleep", found.append)
    return found


@pytest.fixture
def server(monkeypatch, pauses):
    """A server on this machine that stands for CIFAR-10's: what it answers at each attempt."""
    answers, requests = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            requests.append(self.path)
            content = answers[min(len(pauses), len(answers) - 1)]
            if content is None:
                self.wfile.write(b"no HTTP at all\r\n\r\n")
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, args=(0.01,))
    thread.start()
    url = f"http://127.0.0.1:{listening.server_port}/cifar.tar.gz"
    monkeypatch.setattr(datasets.CIFAR10, "url", url)
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", md5(b"official"))
    yield answers, requests
    listening.shutdown()
    thread.join()
    listening.server_close()


def test_a_download_with_the_right_checksum_is_whole(tmp_path, server, pauses):
    server[0].append(b"official")
    download("cifar10", tmp_path / "new/cifar10.tar.gz")
    assert (tmp_path / "new/cifar10.tar.gz").read_bytes() == b"official"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cifar10.tar.gz", "new"]
    assert pauses == []


def test_a_download_that_succeeds_at_last_is_whole(tmp_path, server, pauses):
    server[0].extend([b"offi", None, b"official"])
    download("cifar10", tmp_path / "cifar10.tar.gz")
    assert (tmp_path / "cifar10.tar.gz").read_bytes() == b"official"
    assert pauses == [2, 4]


@pytest.mark.parametrize("answer", [b"offi", b"another archive", b"", None])
def test_a_wrong_download_is_refused_after_three_attempts(tmp_path, server, pauses, answer):
    answers, requests = server
    answers.append(answer)
    with pytest.raises(InputError) as caught:
        download("cifar10", tmp_path / "cifar10.tar.gz")
    assert str(caught.value).startswith(f"{datasets.CIFAR10.url}: could not be downloaded (")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert len(pauses) == 2
    # torchvision asks for redirections first, then for the file.
    assert len(requests) == (3 if answer is None else 6)


def test_an_unreachable_server_is_one_sentence(tmp_path, monkeypatch, pauses):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setattr(datasets.CIFAR10, "url", f"http://127.0.0.1:{port}/cifar.tar.gz")
    with pytest.raises(InputError, match=r"could not be downloaded \(.*refused"):
        download("cifar10", tmp_path / "cifar10.tar.gz")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_download_keeps_an_older_file(tmp_path, server, pauses):
    server[0].append(b"wrong")
    shutil.copy(__file__, tmp_path / "cifar10.tar.gz")
    with pytest.raises(InputError):
        download("cifar10", tmp_path / "cifar10.tar.gz")
    assert (tmp_path / "cifar10.tar.gz").read_bytes() == Path(__file__).read_bytes()
