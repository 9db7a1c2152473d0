"""A study of one's own: its configuration, guessed from the images, and its Snakefile."""

import importlib.util
import json
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unicodedata import normalize

import yaml

from ensdistill import InputError
from ensdistill.devices import visible_cards
from ensdistill.files import write_text
from ensdistill.survey import Survey, survey
from ensdistill.workflow import folder

SMALL = 64
"""Pixels of the shorter side up to which pictures are not called photographs."""
IMAGE_EPOCHS = 24_000
"""Images × epochs, of 32×32 pixels or fewer, on which a CPU trains a first study (5 teachers and 6
students, resnet8) in well under an hour."""
EPOCHS = (20, 60)
"""As few and as many as are proposed."""
SNAKEFILE = """\
# The workflow is that of the installed package `ensdistill`; the configuration is beside this file.
#
#     snakemake --cores all
from ensdistill.workflow import snakefile


configfile: f"{workflow.basedir}/config.yaml"


module study:
    snakefile:
        snakefile()
    config:
        config


use rule * from study


onstart:
    study.onstart()


onerror:
    study.onerror()


onsuccess:
    study.onsuccess()
"""
CONFIGURATION = """\
# yaml-language-server: $schema={schema}
#
# Every key is described in that schema (editors show it), with its default; what is not written
# here has that default. What was guessed from the images says so: change it.

# The studies that `snakemake` without targets makes.
run: [{name}]

studies:
  # {found}.
  {name}:
    images:
      source: folder
      path: {path}
{images}
    corruptions: {{images: {corrupted}}} # test images that are corrupted, each in 95 ways
{architecture}
    student_seeds: 2 # students of each method; more make narrower intervals
    augmentation: {{crop_padding: 4, flip: true}} # flip: false where left and right matter
    teacher: &recipe
{recipe}
      learning_rate: 0.1
    student: *recipe
    distillation: {{alpha: 0.9, temperature: 1.0, eta: 2/255}} # as for 500 images of CIFAR-10
    methods: # without this section the paper's six
      kd: {{label: KD, paper: kd}}
      kd_conf_ods: {{label: KD+ConfODS, perturbation: conf_ods, paper: kd_conf_ods}}
      latent_be_tdiv_sdiv:
        {{label: LatentBE+TDiv–SDiv, student: latent_batch_ensemble, perturbation: tdiv_sdiv}}
"""


class Guess(NamedTuple):
    """What a key is set to, and why."""

    value: int | str
    reason: str


@dataclass(frozen=True)
class NewStudy:
    """What was written, and why."""

    study: str
    """Its name."""
    files: list[str]
    """What was written."""
    found: Survey | None
    """What the images are; None without images."""
    guesses: dict[str, Guess]
    """What was decided by that, by key."""


def new_study(
    place: str | os.PathLike[str], images: str | os.PathLike[str] | None = None
) -> NewStudy:
    """Write the configuration, the Snakefile and the profile of a study of one's own.

    Args:
        place: a folder; it need not exist.
        images: what `own_images` reads; without them the study of scikit-learn's digits is made.

    Raises:
        InputError: the folder has a workflow already or cannot be written to, or the images cannot
            be a study's; nothing is written then.
    """
    place = Path(place)
    for known in ("config.yaml", "Snakefile"):
        if (place / known).exists():
            raise InputError(f"{place / known}: is there already; choose another folder")
    if images is None:
        name, found, guesses, configuration = "digits", None, {}, default_study()
    else:
        name, found = study_name(place.absolute().name), survey(images)
        guesses = guessed(found, gpu=bool(visible_cards()))
        configuration = configured(name, Path(images).absolute(), found, guesses)
    written = {
        "config.yaml": configuration,
        "profiles/default/profile.yaml": read("profiles/default/profile.yaml"),
        "Snakefile": SNAKEFILE,
    }
    try:
        for file, text in written.items():
            write_text(place / file, text)
    except OSError as error:
        raise InputError(f"{error.filename}: {error.strerror}") from error
    return NewStudy(name, [str(place / file) for file in written], found, guesses)


def read(name: str) -> str:
    """A text file of the workflow."""
    return (folder() / name).read_text(encoding="utf-8")


def study_name(text: str) -> str:
    """A name that config.yaml takes, from any text.

    >>> study_name("flowers ü"), study_name("花")
    ('flowers_u', 'study')
    """
    plain = normalize("NFKD", text).encode("ascii", "ignore").decode()
    name = re.sub(r"\W+", "_", plain).strip("_")
    return name if re.match("[A-Za-z]", name) else f"study_{name}".rstrip("_")


def schema() -> str:
    """The address of the configuration's schema, for editors."""
    return (folder() / "config.schema.json").as_uri()


def default_study() -> str:
    """The workflow's own config.yaml, with its first study alone."""
    text = read("config.yaml")
    whole: Any = yaml.compose(text, yaml.SafeLoader)
    (studies,) = (value for key, value in whole.value if key.value == "studies")
    first, *lines = text.splitlines()[: last_line(studies.value[0][1])]
    return "\n".join([first.replace("config.schema.json", schema()), *lines, ""])


def last_line(node: yaml.Node) -> int:
    """The number of the last line of a part of a YAML file that has values."""
    inner = [part for _, part in node.value] if isinstance(node, yaml.MappingNode) else []
    return max(map(last_line, inner)) if inner else node.end_mark.line + 1


def guessed(found: Survey, gpu: bool) -> dict[str, Guess]:
    """What keys of a study are set to, in the order of config.yaml."""
    guesses = network(found, gpu)
    classes, left = len(found.classes), sum(found.classes.values())
    # As rule `images` chooses: those for testing, then those for validation.
    if not found.test:
        test = max(classes, left // 5)
        guesses["test"] = Guess(test, "a fifth, chosen by a seed")
        left -= test
    reason = "as they say"
    validation = found.validation
    if not validation:
        validation, reason = min(5000, max(classes, round(0.15 * left))), "chosen by a seed"
        left -= validation
    guesses["validation"] = Guess(validation, f"{reason}; for temperatures and the best epoch")
    side = int(guesses["size"].value) if "size" in guesses else found.sides[0]
    most = IMAGE_EPOCHS * min(1, 2 * (32 / side) ** 2)
    train = left
    if not gpu and most / EPOCHS[0] < 0.8 * left:
        train = max(classes, int(most / EPOCHS[0]))
        guesses["train"] = Guess(train, f"of {left:,}, few enough for a CPU; else all")
    epochs = EPOCHS[1] if gpu else max(EPOCHS[0], min(EPOCHS[1], int(most / train)))
    guesses["epochs"] = Guess(epochs, "more where there is a GPU, or time")
    batch = max(8, min(128, 2 ** round(math.log2(train / 8))))
    guesses["batch_size"] = Guess(batch, f"of {train:,} training images")
    return guesses


def network(found: Survey, gpu: bool) -> dict[str, Guess]:
    """Architecture and size of images; no size where pictures are taken as they are."""
    _, middle, _ = found.sides
    if middle > SMALL and gpu and importlib.util.find_spec("timm"):
        return {
            "architecture": Guess("timm:resnet18", "for photographs; there is a GPU, and timm"),
            "size": Guess(224, "as usual for photographs"),
            "resize": Guess(256, "before the crop"),
        }
    small = Guess("resnet20", "for a GPU") if gpu else Guess("resnet8", "small, for a CPU")
    if middle > SMALL:
        size = Guess(SMALL, "of photographs; more pixels take a GPU")
    elif not found.size:
        size = Guess(max(8, middle // 8 * 8), "near the median of the shorter sides")
    elif found.size[0] == found.size[1]:
        size = Guess(found.size[0], "as they are")
    else:
        return {"architecture": small}
    return {"architecture": small, "size": size}


def configured(name: str, path: Path, found: Survey, guesses: dict[str, Guess]) -> str:
    """The text of a config.yaml."""

    def lines(indent: int, *keys: str) -> str:
        known = [(key, *guesses[key]) for key in keys if key in guesses]
        return "\n".join(f"{' ' * indent}{key}: {value} # {why}" for key, value, why in known)

    return CONFIGURATION.format(
        schema=schema(),
        name=name,
        found=found,
        path=json.dumps(str(path), ensure_ascii=False),
        images=lines(6, "size", "resize", "train", "validation", "test"),
        corrupted=min(found.test or guesses["test"].value, 100),
        architecture=lines(4, "architecture"),
        recipe=lines(6, "epochs", "batch_size"),
    )
