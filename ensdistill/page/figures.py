"""The figures of the page, with the captions of Snakemake's report."""

import base64
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdistill import InputError
from ensdistill.files import reading

FIRST = ("cost_quality", "de_curve", "reliability", "corruptions", "out_of_distribution")
"""The figures that readers ask for first, in this order; the others follow as they are listed."""


@dataclass(frozen=True)
class Figure:
    """A figure, ready to be embedded."""

    name: str
    title: str
    uri: str
    width: int
    height: int
    """In pixels."""
    caption: str
    """HTML."""
    alt: str
    """What it shows: the title, and the first sentence of the caption."""


def figures_of(
    folder: Path, titles: Mapping[str, str], captions: Path, job: object
) -> dict[str, Figure | None]:
    """Every figure by name, in the order of the page; None where it is not drawn yet.

    Args:
        folder, titles, captions: as `first_page` has them.
        job: what captions call `snakemake`.

    Raises:
        InputError: a figure is damaged, or a caption is missing or is no caption.
    """
    order = sorted(titles, key=lambda it: FIRST.index(it) if it in FIRST else len(FIRST))
    figures: dict[str, Figure | None] = dict.fromkeys(order)
    for name, title in titles.items():
        path = folder / f"figures/{name}.png"
        if path.exists():
            html, sentence = caption(captions / f"{name}.rst", job)
            figures[name] = Figure(name, title, *embedded(path), html, f"{title}: {sentence}")
    return figures


def embedded(path: str | os.PathLike[str]) -> tuple[str, int, int]:
    """A PNG as a data URI, width and height: as lossless WebP, a third of its size.

    Raises:
        DamagedFile: it is no image.
    """
    from PIL import Image

    with reading(path, "an image") as file, Image.open(file) as image:
        content = io.BytesIO()
        # More effort takes ten times as long and saves a tenth.
        image.save(content, "webp", lossless=True, quality=30, method=2)
        uri = f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"
        return uri, *image.size


def caption(path: str | os.PathLike[str], job: object) -> tuple[str, str]:
    """A caption as HTML, and its first sentence as plain text.

    Args:
        path: a file of reStructuredText with Jinja.
        job: what is called `snakemake` in it.

    Raises:
        InputError: there is no such file, or it is no such text.
    """
    from docutils.core import publish_doctree, publish_from_doctree
    from docutils.utils import SystemMessage
    from docutils.writers.html5_polyglot import Writer
    from jinja2 import Environment, StrictUndefined, TemplateError

    # No other file, no raw HTML; what is wrong is raised, not printed into the page.
    settings: dict[str, Any] = {"file_insertion_enabled": False, "raw_enabled": False}
    settings["_disable_config"] = True
    settings |= {"halt_level": 2, "report_level": 5}
    try:
        text = Path(path).read_text(encoding="utf-8")
        said = Environment(undefined=StrictUndefined).from_string(text).render(snakemake=job)
        tree = publish_doctree(said, settings_overrides=settings)
    except (OSError, ValueError, TemplateError, SystemMessage) as error:
        raise InputError(f"{path}: no caption ({' '.join(str(error).split())})") from error
    writer, plain = Writer(), " ".join(tree.astext().split())
    publish_from_doctree(tree, writer=writer, settings_overrides=settings)
    return writer.parts["fragment"], first_sentence(plain)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence.

    >>> first_sentence("Nam et al. (2021, Fig. 3) found 0.5 of it. More follows.")
    'Nam et al. (2021, Fig. 3) found 0.5 of it.'
    """
    return re.split(r"(?<=[.!?])(?<!\bal\.)(?<!\bFig\.)(?<!\be\.g\.)\s+(?=\S)", text, maxsplit=1)[0]
