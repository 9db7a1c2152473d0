"""What people answered of test images: CIFAR-10H [Peterson et al. 2019]."""

import os

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError
from ensdistill.downloads import verify_answers
from ensdistill.files import reading


def read_answers(
    path: str | os.PathLike[str], labels: NDArray[np.int64], classes: int
) -> NDArray[np.float64]:
    """The shares of people who chose each class of each test image, (N, K).

    Args:
        path: the official archive.
        labels: of the test images, (N,), in their official order.
        classes: K.

    Raises:
        InputError: the archive is missing or damaged, or is of other images: people agree with the
            labels of fewer than half of them.
    """
    verify_answers(path)
    with reading(path, "an array", lambda error: isinstance(error, ValueError)) as file:
        answers = np.load(file, allow_pickle=False)
    if answers.shape != (len(labels), classes) or np.mean(answers.argmax(1) == labels) < 0.5:
        raise InputError(f"{path}: its answers are not about the study's test images")
    return answers
