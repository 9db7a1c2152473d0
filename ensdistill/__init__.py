"""Distil deep ensembles into BatchEnsemble networks that keep their uncertainty.

Reproduces "Diversity Matters When Learning From Ensembles" (Nam et al., NeurIPS 2021).
"""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ensdistill.api import convert, distil, load, predict, save

__all__ = ["DamagedFile", "InputError", "convert", "distil", "load", "predict", "save"]

__version__ = "0.2.0"


class InputError(Exception):
    """Something given from outside is unusable; one sentence names what and where.

    What cannot be printed, as in names of files from outside, is written out, line ends too.
    """

    def __init__(self, sentence: str):
        signs = (sign if sign.isprintable() else repr(sign)[1:-1] for sign in sentence)
        super().__init__("".join(signs))


class DamagedFile(InputError):
    """A file that this workflow made is not what it was; made again it will be.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason

    def __reduce__(self) -> tuple[type, tuple[str | os.PathLike[str], str]]:
        """As other processes of a pool get it."""
        return type(self), (self.path, self.reason)


def __getattr__(name: str) -> Any:
    """The functions of api.py, imported when they are first asked for: PyTorch takes seconds."""
    if name not in __all__:
        raise AttributeError(f"module 'ensdistill' has no attribute {name!r}")
    if name == "convert":  # a module that can be called, as an import of it would put it here
        from importlib import import_module

        return import_module("ensdistill.convert")
    from ensdistill import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
