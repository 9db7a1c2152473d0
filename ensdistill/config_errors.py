"""What is wrong with a configuration, in one sentence of the user's words."""

import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ensdistill import InputError

TAG = "tag:yaml.org,2002:"
READ_AS = {"bool": "true or false", "int": "a number", "float": "a number", "null": "nothing"}
READ_AS |= {"timestamp": "a date"}
"""What YAML takes some words for."""


def check_files(paths: Iterable[str | os.PathLike[str]]) -> None:
    """Refuse YAML files that would be misread without a word: Snakemake lets the last key win.

    Files that do not exist are passed over. Nothing in a file is run, and aliases are not followed,
    so that a small file stays small. `<<` and the keys that override what it brings are allowed.

    Raises:
        InputError: a file is no YAML, has a key twice in one section, or a key that is no text; one
            sentence with the lines.
    """
    for path in filter(os.path.exists, paths):
        try:
            document = yaml.compose(Path(path).read_text(encoding="utf-8-sig"), yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            hint = "; indent by spaces" if "'\\t'" in str(error.problem) else ""
            raise InputError(f"{path}, line {line}: {error.problem}{hint}") from None
        except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            raise InputError(f"{path}: not to be read as YAML ({reason})") from None
        if not isinstance(document, yaml.MappingNode):
            raise InputError(f"{path}: has no keys at its top, such as 'run' and 'studies'")
        _check_keys(path, document)


def _check_keys(path: str | os.PathLike[str], document: yaml.Node | None) -> None:
    """Look at every section of a file once."""
    waiting, seen = [document], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen or not isinstance(node, yaml.CollectionNode):
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += reversed(node.value)
            continue
        waiting += [value for _, value in reversed(node.value)]
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line, kind = key.start_mark.line + 1, key.tag.removeprefix(TAG)
            if kind == "merge":
                continue
            if kind != "str":
                read_as = READ_AS.get(kind, "no text")
                hint = f": write {json.dumps(key.value)}" if kind in READ_AS else ""
                given = f"{key.value!r} " if kind in READ_AS else ""
                raise InputError(f"{path}, line {line}: the key {given}is read as {read_as}{hint}")
            if key.value in lines:
                both = f"in lines {lines[key.value]} and {line}"
                raise InputError(f"{path}: the key {key.value!r} is given twice, {both}")
            lines[key.value] = line


def sentence(error: ValidationError, schema: Mapping[str, Any], place: str = "config.yaml") -> str:
    """The first of pydantic's complaints, in the user's words; a misspelt key comes first.

    Args:
        error: of validating the whole configuration.
        schema: the configuration's JSON schema, which says what keys there are.
        place: where it was written.
    """
    first = min(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
    path, known = _place(schema, first["loc"])
    if path[:1] == ["studies"] and len(path) > 1:
        place, path = f"{place}, study {path[1]!r}", path[2:]
    # Which of several types did not fit is pydantic's affair.
    key = re.sub(r"\.?(str|bool|list\[str\](\.\d+)?|\[key\])$", "", ".".join(path))
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
        given = _short(first["input"])
        if first["type"] == "string_type" and not isinstance(first["input"], list | dict):
            given = given.strip('"') + "; write it in quotes"  # of a date, which JSON does not have
        message = f"{message[0].lower()}{message[1:]}, not {given}"
        if first["type"] == "bool_type":
            message += "; write true or false"
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
        elif part.isdigit() and "properties" in node:  # of a list that may be one section
            path += [part] if part != "0" else []
        elif part.isdigit() and "items" in node:
            path.append(part)
            node = node["items"]
        else:
            path.append(part)
            by_pattern = node.get("patternProperties", {}).values()
            node = node.get("properties", {}).get(part) or next(iter(by_pattern), {})
        # A section may also be given by its name alone, or be null, and so may a list of them; a
        # list that may be one section is taken for that.
        choices = (node, *node.get("anyOf", ()))
        node = next((it for it in choices if "items" in it), node)
        for part in choices:
            if "$ref" in part or "discriminator" in part:
                node = schema["$defs"][part["$ref"].rsplit("/", 1)[1]] if "$ref" in part else part
    return path, list(section.get("properties", {}))
