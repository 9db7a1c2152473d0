"""A finished student in the folder of its study, made without any training, for tests."""

import json
import re
from pathlib import Path

import h5py
import numpy as np
import torch

from ensdistill.digests import attributes
from ensdistill.hdf5 import write_hdf5
from ensdistill.predictions import PREDICTIONS
from ensdistill.students import build_student, predict
from ensdistill.weights import origin, save_student
from tests.builders import noise
from tests.stores import store

CLASSES = ["cat", "dog", "Köttur, грач"]


def deploy(
    folder,
    student="batch_ensemble",
    *,
    members=2,
    channels=3,
    size=(8, 8),
    evaluation=None,
    prediction=None,
    classes=CLASSES,
    validation=200,
    spread=3.0,
    temperature=2.0,
    **options,
):
    """Make `<folder>/images.h5`, the weights of a student with random weights, and its logits.

    Labels of validation and test images are drawn from its own probabilities scaled by
    `temperature`, so that T* is about that, and its calibration is right.

    Args:
        student: a key of `STUDENTS`; `options` are its own.
        evaluation: how the study resized images, of which (H, W) is `size`.
        prediction: attributes that say what logits mean; of a mixture unless told.
        validation: images in val, and in test.
        spread: standard deviation of the logits, so that probabilities are not all alike.

    Returns:
        the path of the weights.
    """
    folder, generator = Path(folder), np.random.default_rng(1)
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    architecture = {
        "name": "resnet8",
        "width": 4,
        "num_classes": len(classes),
        "in_channels": channels,
        "mean": [0.5] * channels,
        "std": [0.25] * channels,
    }
    made = build_student(student, architecture, members, **options)
    images = {
        split: pictures_of(validation, channels, *size, seed=seed)
        for seed, split in enumerate(("train", "val", "test"))
    }
    with torch.no_grad():
        scale = spread / predict(made, torch.from_numpy(images["train"])).std((0, 2)).mean()
        for name, tensor in made.network.named_parameters():
            if re.search(r"(head|out)\.(weight|bias)$", name):
                tensor *= scale
    known = prediction or {"prediction": "mixture"}
    header = attributes(study="tiny", method="kd", replicate=0, members=members, **known)
    weights = folder / "students/kd/0/weights.safetensors"
    save_student(weights, made, header)
    logits = {}
    with h5py.File(folder / "images.h5", "w") as file:
        for split in images:
            found = predict(made, torch.from_numpy(images[split]))
            probs = PREDICTIONS[known["prediction"]].stored(found, known).probs()
            labels = drawn(probs ** (1 / temperature), generator)
            store(file, split, images[split], labels)
            logits |= {f"{split}/logits": found, f"{split}/labels": labels}
        facts = {"classes": classes, "mean": [0.5] * channels, "std": [0.25] * channels}
        if evaluation:
            facts["evaluation"] = evaluation
        for key, value in facts.items():
            file.attrs[key] = json.dumps(value)
    write_hdf5(folder / "logits/students/kd/0.h5", logits, attributes(**origin(weights)))
    return weights


def pictures_of(count, channels, height, width, seed=0):
    """Noise (N, C, H, W) of a colour for each, so that a network tells images apart."""
    colours = np.random.default_rng(seed).random((count, channels, 1, 1))
    return (noise(count, channels, height, width, seed=seed) * colours).astype(np.uint8)


def drawn(weights, generator):
    """Labels (N,) drawn with probabilities in proportion to `weights` (N, K)."""
    shares = np.cumsum(weights, axis=1) / weights.sum(1, keepdims=True)
    return (generator.random((len(shares), 1)) > shares[:, :-1]).sum(1)
