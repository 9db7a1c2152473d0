"""Distil deep ensembles into BatchEnsemble networks that keep their uncertainty.

Reproduces "Diversity Matters When Learning From Ensembles" (Nam et al., NeurIPS 2021).
"""

import os

__version__ = "0.1.0"


class InputError(Exception):
    """Something given from outside is unusable; one sentence names what and where."""


class DamagedFile(InputError):
    """A file that this workflow made is not what it was; made again it will be.

    Args:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{path}: {reason}")
        self.path = path
