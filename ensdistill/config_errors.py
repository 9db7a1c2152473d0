"""What is wrong with a configuration, in one sentence of the user's words."""

import difflib
import json
import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from pydantic import ValidationError


def sentence(error: ValidationError, schema: Mapping[str, Any]) -> str:
    """The first of pydantic's complaints, in the user's words; a misspelt key comes first.

    Args:
        error: of validating the whole configuration.
        schema: the configuration's JSON schema, which says what keys there are.
    """
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path = [str(part) for part in first["loc"]]
    place = "config.yaml"
    if path[:1] == ["studies"] and len(path) > 1:
        place, path = f"{place}, study {path[1]!r}", path[2:]
    # Which of several types did not fit is pydantic's affair.
    key = re.sub(r"\.?(str|list\[str\](\.\d+)?|\[key\])$", "", ".".join(path))
    if first["type"] == "extra_forbidden":
        known = _keys_at(schema, [str(part) for part in first["loc"][:-1]])
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{place}: unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{place}: the key {key!r} is missing"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        # By the piece: a few aliases in YAML can stand for more than the memory holds.
        pieces = json.JSONEncoder(default=str, ensure_ascii=False).iterencode(first["input"])
        given = "".join(islice(pieces, 51))
        given = given if len(given) <= 50 else f"{given[:50]}…"
        message = re.split(" or instance of | after validation", first["msg"])[0]
        message = f"{message[0].lower()}{message[1:]}, not {given}"
    return f"{place}: {key + ': ' if key else ''}{message}"


def _keys_at(schema: Mapping[str, Any], path: list[str]) -> list[str]:
    """The keys that the schema knows at a place in the configuration."""
    node = schema
    for part in path:
        by_pattern = node.get("patternProperties", {}).values()
        node = node.get("properties", {}).get(part) or next(iter(by_pattern))
        if "$ref" in node:
            node = schema["$defs"][node["$ref"].rsplit("/", 1)[1]]
    return list(node.get("properties", {}))
