"""Students in exported files, asked without this package's networks.

An `.onnx` file is computed by ONNX Runtime, without PyTorch; a `.pt2` file by PyTorch alone. What
made them is in export.py.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ensdistill import InputError
from ensdistill.deployment import Answers, Deployment

KEY = "ensdistill"
"""Of the deployment, as JSON, in a file's metadata."""


class OnnxStudent:
    """A student of an `.onnx` file, computed by ONNX Runtime on the CPU.

    Threads are as many as OMP_NUM_THREADS says, or else as the processor has cores.

    Raises:
        InputError: there is no such file, it holds no student, or ONNX Runtime is not installed.
    """

    def __init__(self, path: str | os.PathLike[str]):
        try:
            import onnxruntime
        except ImportError:
            raise InputError(
                f"{path}: is computed by ONNX Runtime: pip install 'ensdistill[predict]'"
            ) from None
        _check_exists(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors, which come as exceptions too
        threads = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
        options.intra_op_num_threads = int(threads) if threads.isdecimal() else 0
        try:
            self.session = onnxruntime.InferenceSession(
                os.fspath(path),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,  # it prints, and tries the same again
            )
            metadata = self.session.get_modelmeta().custom_metadata_map
            self.takes_bytes = self.session.get_inputs()[0].type == "tensor(uint8)"
        except Exception as error:  # its classes have no base but Exception
            raise _damaged(path, error) from error
        self.path, self.deployment = path, _deployment(path, metadata.get(KEY, ""))

    def __call__(self, images: NDArray[np.uint8]) -> Answers:
        """As of `deployment.Predictor`.

        Raises:
            InputError: it takes no such images, or answers something else.
        """
        given = images if self.takes_bytes else images.astype(np.float32) / np.float32(255)
        try:
            outputs = self.session.run(None, {"images": given})
        except MemoryError:
            raise
        except Exception as error:
            size = "×".join(map(str, images.shape[:1:-1]))
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.path}: takes no pictures of {size} pixels ({reason})"
            ) from error
        if [it.shape for it in outputs] != self._shapes(len(images)):
            raise InputError(f"{self.path}: is damaged, or no exported student (other outputs)")
        return _answers(outputs, self.deployment)

    def _shapes(self, images: int) -> list[tuple[int, ...]]:
        """Of what it must answer."""
        members, classes = self.deployment.members, len(self.deployment.classes)
        return [(images, classes), (images, members, classes), (images,), (images,)]


class TorchExported:
    """A student of a `.pt2` file, computed by PyTorch.

    PyTorch reads such files with pickle: open none from a source that you do not trust.

    Args:
        path: the file.
        device: where it computes.

    Raises:
        InputError: there is no such file, or it holds no student.
    """

    def __init__(self, path: str | os.PathLike[str], device: str = "cpu"):
        import torch
        from torch.export.passes import move_to_device_pass

        _check_exists(path)
        kept = {KEY: ""}
        try:
            program = torch.export.load(path, extra_files=kept)
        except Exception as error:  # whatever its readers say of bytes that they do not know
            raise _damaged(path, error) from error
        self.deployment, self.device = _deployment(path, kept[KEY]), device
        if device != "cpu":
            program = move_to_device_pass(program, device)
        image = next(it for it in program.graph.nodes if it.name == "images")
        self.takes_bytes = image.meta["val"].dtype == torch.uint8
        self.module = program.module()

    def __call__(self, images: NDArray[np.uint8]) -> Answers:
        """As of `deployment.Predictor`."""
        import torch

        given = torch.from_numpy(images).to(self.device)
        with torch.inference_mode():
            found = self.module(given if self.takes_bytes else given.float() / 255)
        return _answers([it.cpu().numpy() for it in found], self.deployment)


def _answers(outputs: Sequence[NDArray[Any]], deployment: Deployment) -> Answers:
    found = Answers(*(it.astype(np.float64) for it in outputs))
    one = deployment.members == 1 and deployment.prediction["prediction"] == "mixture"
    return found._replace(mutual_information=None) if one else found


def _check_exists(path: str | os.PathLike[str]) -> None:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")


def _deployment(path: str | os.PathLike[str], text: str) -> Deployment:
    try:
        return Deployment.from_json(text)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: says nothing of a student of this package") from error


def _damaged(path: str | os.PathLike[str], error: Exception) -> InputError:
    reason = str(error).strip().partition("\n")[0]
    return InputError(f"{path}: is damaged, or no exported student ({reason})")
