"""What is taken away from a study: its best student, and the cards that there are."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ensdistill.page.answer import Answer

DEPLOYED = ("README.md", "model.onnx", "weights.safetensors")
"""Files of a card's folder that the page links."""


@dataclass(frozen=True)
class Takeaway:
    """The best student, and what has been made ready."""

    system: str
    weights: str | None
    """Of its first seed, from the study's folder; None if they are not there."""
    cards: dict[str, list[str]]
    """Names of files by folder, from the study's."""


def takeaway(folder: Path, study: Mapping[str, Any], answers: Sequence[Answer]) -> Takeaway | None:
    """What the page offers; None as long as no student is known to be the best.

    Args: as `first_page`, and its answers, the best student's first.
    """
    if not answers:
        return None
    names = {label: f"students/{name}" for name, label in study["methods"].items()}
    names |= {it["label"]: f"judged/{name}" for name, it in study.get("judge", {}).items()}
    weights = f"{names.get(answers[0].system)}/0/weights.safetensors"
    cards = {}
    for card in sorted(folder.glob("deployed/*/*/README.md")):
        present = [name for name in DEPLOYED if card.with_name(name).exists()]
        cards[card.parent.relative_to(folder).as_posix()] = present
    return Takeaway(answers[0].system, weights if (folder / weights).exists() else None, cards)
