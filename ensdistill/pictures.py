"""Pixels of one picture, whatever the format of its file.

What is done to each:

- EXIF orientation: turned upright.
- Grey of 12 or 16 bits: scaled to 8 bits, the format's largest value to 255; where white is zero
  (TIFF) it is turned over. Colour of 16 bits: the upper 8 bits, as Pillow reads them. Pixels of 32
  bits, whose range is unknown, are refused.
- One bit, grey, grey with transparency: grey. Palettes, RGB, CMYK (without its colour profile) and
  all else: RGB.
- Transparency is dropped: a pixel has the colour that the file gives it, even where that is not
  seen.
- Of several frames or pages the first. Colour profiles are not applied.
"""

import io
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from ensdistill import InputError

BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262
"""Tags of TIFF."""
ORIENTATION = 274
"""Tag of EXIF."""
TURNED = range(5, 9)
"""Orientations at which height and width change places."""
POINTERS = (b"version https://git-lfs", b"/annex/objects/")
"""How files of Git LFS and git-annex begin that stand for others."""
LONGEST_SIDE = 2**14
"""Pixels of a side to which pictures are resized or cropped; Pillow reads hardly larger ones."""
GREY_MODES = {"1", "L", "LA", "La"}
FRANK = {"BMP", "JPEG", "MPO", "PNG", "PPM", "TIFF", "WEBP"}
"""Formats of which the header says what mode their pixels have."""
Image.init()
FORMATS = [name for name in Image.ID if name != "EPS"]
"""What Pillow reads by itself; to read PostScript it would run Ghostscript, that is, a program."""


def decode(name: str, data: bytes) -> Image.Image:
    """A whole picture in mode L or RGB, upright.

    Args:
        name: of the file, for messages.
        data: its content.

    Raises:
        InputError: it is damaged, or no picture that can be read.
    """
    with _opened(name, data) as opened:
        format, tags = opened.format, getattr(opened, "tag_v2", {})
        picture = ImageOps.exif_transpose(opened)
        picture.load()
    # Pillow gives 16-bit PGM, of whatever maximum, as 32-bit pixels 0 … 65,535.
    if picture.mode.startswith("I;16") or (picture.mode == "I" and format == "PPM"):
        most = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535
        values = np.asarray(picture).astype(np.int64) * 255 // most
        white = tags.get(PHOTOMETRIC) == 0  # TIFF's WhiteIsZero, which Pillow leaves as it is
        return Image.fromarray((255 - values if white else values).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise InputError(f"{name}: has 32-bit pixels, whose range is unknown; save it as 8-bit")
    mode = "L" if picture.mode in GREY_MODES else "RGB"
    return picture if picture.mode == mode else picture.convert(mode)


def mode_of(name: str, data: bytes) -> str:
    """The mode, L or RGB, that `decode` gives; by the header alone where that says it."""
    with _opened(name, data) as opened:
        format, mode = opened.format, opened.mode
    if format not in FRANK or mode in ("I", "F"):
        return decode(name, data).mode
    return "L" if mode in GREY_MODES or mode.startswith("I;16") else "RGB"


def size_of(name: str, data: bytes) -> tuple[int, int]:
    """Its (H, W), upright, by the header.

    Raises:
        InputError: it is no picture that can be read.
    """
    with _opened(name, data) as opened:
        width, height = opened.size
        turned = opened.getexif().get(ORIENTATION) in TURNED
    return (width, height) if turned else (height, width)


def pixels(
    data: bytes, *, resize: int | None, crop: int | None, mode: str, name: str = "an image"
) -> NDArray[np.uint8]:
    """Pixels (C, H, W) of a file.

    Args:
        data: the file's content.
        resize: side of the centre square that is taken, by bicubic interpolation; None for the
            whole picture as it is.
        crop: side of the square that is then cut from its centre; None for all.
        mode: L for one channel, RGB for three.
        name: of the file, for messages.

    Raises:
        InputError: it is damaged, or no picture that can be read.
    """
    picture = squared(decode(name, data), resize)
    return centre(as_array([picture], mode)[0], crop)


def is_side(value: object) -> bool:
    """Whether it can be the number of pixels of a side.

    >>> [is_side(it) for it in (8, 0, 2**40, "8", 8.0, None)]
    [True, False, False, False, False, False]
    """
    return isinstance(value, int | np.integer) and 1 <= int(value) <= LONGEST_SIDE


def squared(picture: Image.Image, side: int | None) -> Image.Image:
    """The centre square, with its side resized; None for the picture as it is."""
    return ImageOps.fit(picture, (side, side), Image.Resampling.BICUBIC) if side else picture


def centre(images: NDArray[np.uint8], crop: int | None) -> NDArray[np.uint8]:
    """The centres (…, crop, crop) of square images (…, S, S); None for all of them.

    Where S − crop is odd, one row and column more is cut off below and on the right.
    """
    start = (images.shape[-1] - crop) // 2 if crop else 0
    part = slice(start, start + crop if crop else None)
    return images[..., part, part]


def as_array(pictures: Iterable[Image.Image], mode: str) -> NDArray[np.uint8]:
    """Pictures of one size as (N, C, H, W), in mode L or RGB."""
    images = np.stack([np.asarray(picture.convert(mode)) for picture in pictures])
    return images[:, None] if mode == "L" else images.transpose(0, 3, 1, 2)


@contextmanager
def _opened(name: str, data: bytes) -> Iterator[Image.Image]:
    """Pillow's picture, of which only the header was read, and one sentence if it is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=FORMATS) as opened:
                yield opened
    except UnidentifiedImageError as error:
        pointer = data.startswith(POINTERS)
        why = "only a pointer to a file that was not fetched" if pointer else "empty"
        why = f" (it is {why})" if pointer or not data else ""
        raise InputError(f"{name}: not an image of a known format{why}") from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise nearly anything
        raise InputError(f"{name}: not a readable image ({error})") from error
