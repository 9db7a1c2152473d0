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
    path, known = _place(schema, first["loc"])
    place = "config.yaml"
    if path[:1] == ["studies"] and len(path) > 1:
        place, path = f"{place}, study {path[1]!r}", path[2:]
    # Which of several types did not fit is pydantic's affair.
    key = re.sub(r"\.?(str|list\[str\](\.\d+)?|\[key\])$", "", ".".join(path))
    if first["type"] == "extra_forbidden":
        close = difflib.get_close_matches(path[-1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{place}: unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{place}: the key {key!r} is missing"
    if first["type"] == "union_tag_not_found":
        return f"{place}: {key}: the key 'name' is missing"
    if first["type"] == "union_tag_invalid":
        given = first["ctx"]["tag"]
        names = first["ctx"]["expected_tags"].replace("'", "")
        return f"{place}: {key}: unknown name {_short(given)}; known are {names}"
    if first["type"] == "value_error":
        message = str(first["ctx"]["error"])
    else:
        message = re.split(" or (?:instance of|object to) | after validation", first["msg"])[0]
        message = f"{message[0].lower()}{message[1:]}, not {_short(first['input'])}"
    return f"{place}: {key + ': ' if key else ''}{message}"


def _short(value: Any) -> str:
    """A value as JSON, cut: a few aliases in YAML can stand for more than the memory holds."""
    pieces = json.JSONEncoder(default=str, ensure_ascii=False).iterencode(value)
    given = "".join(islice(pieces, 51))
    return given if len(given) <= 50 else f"{given[:50]}…"


def _place(schema: Mapping[str, Any], loc: tuple[str | int, ...]) -> tuple[list[str], list[str]]:
    """The keys that lead to a complaint, and the keys that the schema knows in its section.

    pydantic's location also names the section that was chosen of several; that is no key.
    """
    path, node, section = [], schema, schema
    for part in map(str, loc):
        section = node
        if part in node.get("discriminator", {}).get("mapping", {}):
            node = {"$ref": node["discriminator"]["mapping"][part]}
        else:
            path.append(part)
            by_pattern = node.get("patternProperties", {}).values()
            node = node.get("properties", {}).get(part) or next(iter(by_pattern), {})
        # A section may also be given by its name alone, or be null.
        for part in (node, *node.get("anyOf", ())):
            if "$ref" in part or "discriminator" in part:
                node = schema["$defs"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
    return path, list(section.get("properties", {}))
