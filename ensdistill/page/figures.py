"""The figures of the page, with the captions of Snakemake's report."""

import base64
import io
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
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
    folder: Path, name: str, study: Mapping[str, Any], figures: Mapping[str, Mapping[str, str]]
) -> dict[str, Figure | None]:
    """Every figure by name, in the order of the page; None where it is not drawn yet.

    Args, errors: as `first_page`.
    """
    order = sorted(figures, key=lambda it: FIRST.index(it) if it in FIRST else len(FIRST))
    paths = {figure: folder / f"figures/{figure}.png" for figure in order}
    return {
        figure: _figure(path, name, study, figures[figure]) if path.exists() else None
        for figure, path in paths.items()
    }


def _figure(path: Path, name: str, study: Mapping[str, Any], said: Mapping[str, str]) -> Figure:
    html, alt = caption(path.stem, said["caption"], name, study)
    uri, width, height = embedded(path)
    return Figure(
        path.stem, said["title"], uri, width, height, html, f"{said['title']}: {alt}"
    )  # fmt: skip


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


def caption(
    name: str, text: str, study_name: str, study: Mapping[str, Any]
) -> tuple[str, str]:  # fmt: skip
    """A caption as HTML, and its first sentence as plain text.

    Args:
        name: of the figure.
        text: reStructuredText with Jinja, to which `snakemake` is what it is to Snakemake's report.
        study_name, study: the study and its configuration.

    Raises:
        InputError: it is no such text.
    """
    from docutils.core import publish_doctree, publish_from_doctree
    from docutils.utils import SystemMessage
    from docutils.writers.html5_polyglot import Writer
    from jinja2 import Environment, StrictUndefined, TemplateError

    job = SimpleNamespace(
        wildcards=SimpleNamespace(study=study_name), params=SimpleNamespace(study=study)
    )
    # No file, no raw HTML; what is wrong is raised, not printed into the page.
    settings = {"file_insertion_enabled": False, "raw_enabled": False, "halt_level": 2}
    settings |= {"report_level": 5, "initial_header_level": 4, "_disable_config": True}
    try:
        said = Environment(undefined=StrictUndefined).from_string(text).render(snakemake=job)
        tree = publish_doctree(said, settings_overrides=settings)
    except (TemplateError, SystemMessage) as error:
        raise InputError(f"report/{name}.rst: {' '.join(str(error).split())}") from error
    plain = " ".join(tree.astext().split())
    writer = Writer()
    publish_from_doctree(tree, writer=writer, settings_overrides=settings)
    return writer.parts["fragment"], first_sentence(plain)


def first_sentence(text: str) -> str:
    """Up to the first full stop that ends a sentence.

    >>> first_sentence("Nam et al. (2021, Fig. 3) found 0.5 of it. More follows.")
    'Nam et al. (2021, Fig. 3) found 0.5 of it.'
    """
    return re.split(r"(?<=[.!?])(?<!\bal\.)(?<!\bFig\.)(?<!\be\.g\.)\s+(?=\S)", text, maxsplit=1)[0]
