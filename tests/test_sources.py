import hashlib
import io
import pickle
import struct
import tarfile
import warnings
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from ensdistill import InputError
from ensdistill.downloads import SOURCES
from ensdistill.folders import ImageFolder
from ensdistill.images import read_description, read_images
from ensdistill.sources import folder, svhn, tinyimagenet
from tests.builders import (
    encode,
    fails,
    good_tree,
    hash_of,
    make,
    md5,
    noise,
    per_class,
    publish,
    write_tar,
    write_tree,
    write_zip,
)


def read_folder(path, size=None):
    data = folder(path=path, size=size)
    return data.train[0], data.test[0]


def only_image(data, name="0.png", size=None, *, tmp_path):
    """Pixels (C, H, W) of a folder's one training image."""
    path = write_tree(tmp_path / "one", {f"{s}/only/{name}": data for s in ("train", "test")})
    (train,), _ = read_folder(path, size)
    return train


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


def test_a_large_compressed_tar_in_any_order_is_read_in_one_go(tmp_path):
    """A step back in a .tar.gz decompresses from its start: hours for a hundred thousand images."""
    files, expected = colour_tree()
    path = write_tar(tmp_path / "x.tar.gz", files, "w:gz")
    names = [place.removeprefix(f"{path}/") for place, *_ in ImageFolder(path).read()]
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


def pgm(values, most, plain=False):
    """A PGM of values 0 … most, 256 and more, in two bytes each or as text."""
    header = f"P{2 if plain else 5} {values.shape[1]} {values.shape[0]} {most}\n".encode()
    return header + (
        " ".join(map(str, values.ravel())).encode() if plain else values.astype(">u2").tobytes()
    )


def packed_12_bit_tiff(values):
    """A grey TIFF of 12 bits a pixel, two pixels in three bytes, as microscopes write it."""
    bits = "".join(f"{value:012b}" for value in values.ravel())
    data = int(bits, 2).to_bytes(len(bits) // 8, "big")
    height, width = values.shape
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8 + 2 + 9 * 12 + 4)]
    tags += [(277, 1), (278, height), (279, len(data))]
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + directory + bytes(4) + data


RAMP = np.arange(256).reshape(16, 16)
WIDE = {
    "png": lambda: encode((RAMP * 257).astype(np.uint16)),
    "tif": lambda: encode((RAMP * 257).astype(np.uint16), "tif"),
    "white is zero.tif": lambda: encode(
        ((255 - RAMP) * 257).astype(np.uint16), "tif", tiffinfo={262: 0}
    ),
    "12 bit.tif": lambda: packed_12_bit_tiff(
        np.rint(RAMP * 4095 / 255 + 0.49).astype(int).clip(0, 4095)
    ),
    "pgm": lambda: pgm(RAMP * 257, 65535),
    "plain.pgm": lambda: pgm(RAMP * 257, 65535, plain=True),
    "12 bit.pgm": lambda: pgm(np.rint(RAMP * 4095 / 255 + 0.49).astype(int).clip(0, 4095), 4095),
}


@pytest.mark.parametrize("what", WIDE)
def test_12_and_16_bit_grey_is_scaled_to_8_bits(tmp_path, what):
    name = f"0.{what.rpartition('.')[2]}"
    np.testing.assert_array_equal(only_image(WIDE[what](), name, tmp_path=tmp_path), [RAMP])


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
    "empty file named png": (
        good_tree() | {"test/dog/0.png": b""},
        "test/dog/0.png: not an image of a known format (it is empty)",
    ),
    "class missing from test": (without("test/dog"), "class 'dog' is in train/ but not in test/"),
    "class missing from train": (without("train/cat"), "class 'cat' is in test/ but not in train/"),
    "no test images": (without("test/"), "tree: holds no images in test/<class>/"),
    "classes without images": (
        {f"{s}/cat/notes.txt": b"" for s in ("train", "test")},
        "tree: holds no images in train/<class>/; skipped: no images (2)",
    ),
    "images without classes": (
        {"train/0.png": encode(noise(4, 4))},
        "holds no images in train/<class>/; skipped: in no class (1)",
    ),
    "pointer of Git LFS": (
        good_tree() | {"test/dog/0.png": b"version https://git-lfs.github.com/spec/v1\noid x\n"},
        "test/dog/0.png: not an image of a known format (it is only a pointer to a file that was",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE_TREES)
def test_an_unusable_folder_is_refused_in_one_sentence(tmp_path, what):
    files, expected = UNUSABLE_TREES[what]
    path = write_tree(tmp_path / "tree", files)
    message = fails(tmp_path / "images.h5", path=path)
    assert expected in message
    assert path in message


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


# --- official archives ------------------------------------------------------------------------


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
    archive = publish(monkeypatch, tmp_path / cls.filename, content)
    output = tmp_path / "images.h5"
    make(output, source=source, archives=[archive], validation=3)
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


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn", "tinyimagenet"])
@pytest.mark.parametrize("harm", ["shorter", "longer", "missing"])
def test_another_archive_than_the_official_one_is_refused(tmp_path, monkeypatch, source, harm):
    content = b"official"
    archives = [publish(monkeypatch, tmp_path / name, content) for name in SOURCES[source].archives]
    last = Path(archives[-1])
    if harm == "missing":
        last.unlink()
    else:
        last.write_bytes(content[:-1] if harm == "shorter" else content + b"x")
    message = fails(tmp_path / "images.h5", source=source, archives=archives)
    why = "no such file" if harm == "missing" else f"not the official {last.name}"
    assert message == f"{last}: {why}"


def test_svhn_has_its_ten_as_zero_and_validates_on_a_stratified_choice(tmp_path, monkeypatch):
    archives, expected, split_list = [], {}, {}
    for split, count in (("train", 40), ("test", 20)):
        pixels = noise(32, 32, 3, count, seed=count)
        digits = np.arange(count)[:, None] % 10 + 1
        buffer = io.BytesIO()
        savemat(buffer, {"X": pixels, "y": digits.astype(np.uint8)})
        content, name = buffer.getvalue(), f"{split}_32x32.mat"
        split_list[split] = ["http://127.0.0.1/", name, md5(content)]
        archives.append(publish(monkeypatch, tmp_path / f"svhn_{name}", content))
        expected[split] = pixels.transpose(3, 2, 0, 1), digits.ravel() % 10
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    data = svhn(archives=archives)
    for read, meant in zip((*data.train, *data.test), sum(expected.values(), ()), strict=True):
        np.testing.assert_array_equal(read, meant)
        assert read.dtype == (np.uint8 if read.ndim == 4 else np.int64)
    assert data.classes == list("0123456789")
    checksums = [hashlib.sha256(Path(archive).read_bytes()).hexdigest() for archive in archives]
    assert data.sha256.split() == checksums
    make(tmp_path / "images.h5", source="svhn", archives=archives, validation=10)
    _, labels = read_images(tmp_path / "images.h5", "val")
    assert sorted(labels) == list(range(10))


# --- Tiny ImageNet ---------------------------------------------------------------------------

TINY = "tiny-imagenet-200"
WNIDS = ["n09", "n10", "n2"]


def tiny_files():
    """A small archive's members, with a grey image, and the pixels in the order to come."""
    files = {
        f"{TINY}/wnids.txt": b"n2\nn10\nn09\n",
        f"{TINY}/words.txt": b"n09\tcat\n",
        f"{TINY}/test/images/test_0.JPEG": b"no labels",
        f"{TINY}/train/n09/n09_boxes.txt": b"n09_0.JPEG\t0\t0\t62\t62\n",
    }
    places = [f"train/{wnid}/images/{wnid}_{i}.JPEG" for wnid in WNIDS for i in (0, 2, 10)]
    # The annotations decide the class, whatever the number.
    tested = {"val_10": "n09", "val_3": "n10", "val_1": "n2", "val_2": "n2"}
    places += [f"val/images/{name}.JPEG" for name in tested]
    arrays = []
    for i, place in enumerate(places):
        smooth = np.tile(np.arange(64, dtype=np.uint8), (64, 1)) * (i % 4 + 1)
        grey = i in (1, len(places) - 1)
        data = encode(smooth if grey else np.dstack([smooth, smooth.T, 255 - smooth]), "jpg")
        files[f"{TINY}/{place}"] = data
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.mode == ("L" if grey else "RGB")
            arrays.append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
    annotations = [f"{name}.JPEG\t{wnid}\t0\t32\t44\t62\n" for name, wnid in tested.items()]
    files[f"{TINY}/val/val_annotations.txt"] = "".join(annotations).encode()
    return dict(reversed(files.items())), np.stack(arrays[:9]), np.stack(arrays[9:])


def write_tiny(tmp_path, monkeypatch, files):
    path = Path(write_zip(tmp_path / f"{TINY}.zip", files))
    return publish(monkeypatch, path, path.read_bytes())


def test_tinyimagenet_is_ordered_by_class_and_number_and_tests_on_annotated_images(
    tmp_path, monkeypatch
):
    files, train, test = tiny_files()
    archive = write_tiny(tmp_path, monkeypatch, files)
    data = tinyimagenet(archives=[archive])
    np.testing.assert_array_equal(data.train[0], train)
    np.testing.assert_array_equal(data.test[0], test)
    assert data.train[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.test[1].tolist() == [0, 1, 2, 2]
    assert [array.dtype for array in (*data.train, *data.test)] == [np.uint8, np.int64] * 2
    assert data.classes == WNIDS
    assert data.sha256 == hashlib.sha256(Path(archive).read_bytes()).hexdigest()
    assert not data.official_validation
    assert [path.name for path in tmp_path.iterdir()] == [f"{TINY}.zip"]


VAL = f"{TINY}/val/images/val_3.JPEG"
TRAIN = f"{TINY}/train/n10/images/n10_2.JPEG"
UNUSABLE_TINY = {
    "not annotated": (
        lambda files: {f"{TINY}/val/images/val_7.JPEG": files[VAL]},
        f"{TINY}/val/images/val_7.JPEG: has no line in val_annotations.txt",
    ),
    "annotated with an unknown class": (
        lambda files: {f"{TINY}/wnids.txt": b"n09\nn2\n"},
        "its class 'n10' is not in wnids.txt",
    ),
    "another size": (
        lambda files: {TRAIN: encode(noise(64, 63), "jpg")},
        f"{TRAIN}: is 63×64, not 64×64 pixels",
    ),
    "damaged": (lambda files: {VAL: files[VAL][:-300]}, f"{VAL}: not a readable image"),
    "no image": (lambda files: {TRAIN: b"hello"}, f"{TRAIN}: not an image of a known format"),
}


@pytest.mark.parametrize("what", UNUSABLE_TINY)
def test_an_unusable_tinyimagenet_is_refused_in_one_sentence(tmp_path, monkeypatch, what):
    change, expected = UNUSABLE_TINY[what]
    files, _, _ = tiny_files()
    archive = write_tiny(tmp_path, monkeypatch, files | change(files))
    message = fails(tmp_path / "images.h5", source="tinyimagenet", archives=[archive])
    assert message.startswith(f"{archive}/{TINY}/")
    assert expected in message
