"""What weights files say of themselves, read without PyTorch."""

import json
import os
from typing import Any

from ensdistill.files import reading

WEIGHTS = "weights of this package"
"""What a sentence about a damaged file calls it."""


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What a weights file says of itself.

    Raises:
        InputError: there is no such file, or the system cannot read it.
        DamagedFile: it is damaged, or holds no weights of this package.
    """
    from safetensors import deserialize  # what only predicts from exported files lacks it

    with reading(path, WEIGHTS) as file:
        content = file.read()
        deserialize(content)  # checks all of it
        return header_of(content)


def header_of(content: bytes) -> dict[str, Any]:
    """The same of a file's content, which is that of safetensors."""
    length = int.from_bytes(content[:8], "little")
    return dict(json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["ensdistill"]))
