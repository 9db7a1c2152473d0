"""What made a file: digests of parameters and of the code that a stage can reach.

Nothing here changes a number, so this module is no part of any stage's code digest.
"""

import ast
import hashlib
import json
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ensdistill import __version__

PACKAGE = Path(__file__).parent
UNCOUNTED = {
    "ensdistill",
    "ensdistill.digests",
    "ensdistill.files",
    "ensdistill.hdf5",
    "ensdistill.jobs",
    "ensdistill.launching",
    "ensdistill.locks",
    "ensdistill.own_data",
    "ensdistill.state",
}
"""Modules that say what ran, how it failed and goes on, but do not change what is computed."""


def attributes(**known: Any) -> dict[str, Any]:
    """What a result file says of itself: `known`, their digest, and the versions that made it."""
    canonical = json.dumps(known, sort_keys=True, default=str)
    return {
        **known,
        "digest": hashlib.sha256(canonical.encode()).hexdigest(),
        "ensdistill": __version__,
        "torch": version("torch"),
    }


def text_digest(*paths: str | os.PathLike[str]) -> str:
    """A digest of the names and contents of text files, wherever they are."""
    known = {Path(path).name: Path(path).read_text(encoding="utf-8") for path in paths}
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()


def code_digest(script: str | os.PathLike[str], **chosen: Collection[str]) -> str:
    """A digest of a script and the library code it can reach, blind to comments and docstrings.

    Followed are the names that a definition mentions, from the script's imports through this
    package, so that a changed formula reruns just the stages that use it.

    Args:
        script: a Python file that imports from `ensdistill`.
        **chosen: what the script takes by its name at run time, of a registry (a dictionary
            written out at the top of a module: `STUDENTS=["single"]`) or of a module imported as
            a whole (`analysis=["sweep_logits"]`; of a subpackage `results=["scores.table"]`). The
            other entries do not count, so one more of them changes no digest.

    Raises:
        KeyError: something chosen does not exist.
    """
    root, walk = _Module(Path(script).read_text(encoding="utf-8")), _Walk(chosen)
    walk.follow(root, root.tree.body)
    walk.reached["", ""] = ast.dump(root.tree)
    text = "\n".join(f"{key}{walk.reached[key]}" for key in sorted(walk.reached))
    return hashlib.sha256(text.encode()).hexdigest()


class _Walk:
    """Collects the definitions that can be reached, by module and name."""

    def __init__(self, chosen: Mapping[str, Collection[str]]):
        self.chosen = chosen
        self.reached: dict[tuple[str, str], str] = {}
        self.modules: dict[str, _Module] = {}

    def module(self, name: str) -> "_Module":
        if name not in self.modules:
            path = _path(name)
            self.modules[name] = _module(path, path.read_text(encoding="utf-8"))
        return self.modules[name]

    def follow(self, owner: "_Module", nodes: Sequence[ast.AST]) -> None:
        """Reach what some code of a module mentions of other modules."""
        for name in _names(nodes) & owner.imports.keys():
            source, symbol = owner.imports[name]
            if source in UNCOUNTED:
                continue
            if symbol is not None:
                self.reach(source, symbol)
                continue
            for used in self._used_of_module(name, source, nodes):
                part, _, last = used.rpartition(".")
                self.reach(f"{source}.{part}" if part else source, last)

    def _used_of_module(self, name: str, source: str, nodes: Sequence[ast.AST]) -> Collection[str]:
        """What is named after a dot; where the module stands alone what is chosen of it, or all."""
        known = self.module(source).definitions.keys()
        parts = [part for node in nodes for part in ast.walk(node)]
        alone = sum(isinstance(part, ast.Name) and part.id == name for part in parts)
        dotted = [
            part.attr
            for part in parts
            if isinstance(part, ast.Attribute)
            and isinstance(part.value, ast.Name)
            and part.value.id == name
        ]
        rest = self.chosen.get(name, known) if alone > len(dotted) else ()
        return known & set(dotted) | set(rest)

    def reach(self, name: str, symbol: str) -> None:
        """Count a definition, and what it mentions."""
        if (name, symbol) in self.reached:
            return
        owner = self.module(name)
        if symbol in owner.imports and symbol not in owner.definitions:
            self.follow(owner, [ast.Name(symbol)])
            return
        nodes: Sequence[ast.AST] = owner.definitions[symbol]
        if symbol in self.chosen:
            entries = _entries(nodes)
            nodes = [entries[key] for key in sorted(self.chosen[symbol])]
        self.reached[name, symbol] = "\n".join(map(_dump, nodes))
        self.follow(owner, nodes)
        for used in _names(nodes) & owner.definitions.keys():
            self.reach(name, used)


def _path(name: str) -> Path:
    """The file of a module of this package, or of a subpackage."""
    place = PACKAGE.joinpath(*name.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def _entries(nodes: Sequence[Any]) -> dict[str, ast.AST]:
    """The values of a dictionary that is written out, by key."""
    (node,) = nodes
    return {
        ast.literal_eval(key): value
        for key, value in zip(node.value.keys, node.value.values, strict=True)
    }


class _Module:
    """The parsed top level of a file: its definitions and its imports from this package."""

    def __init__(self, text: str):
        self.tree = _parse(text)
        self.definitions: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, tuple[str, str | None]] = {}
        for node in self.tree.body:
            for name in _defined_names(node):
                self.definitions.setdefault(name, []).append(node)
        for part in ast.walk(self.tree):
            if isinstance(part, ast.ImportFrom) and (part.module or "").startswith("ensdistill"):
                assert part.module
                for alias in part.names:
                    inner = f"{part.module}.{alias.name}"
                    submodule = _path(inner).exists()
                    source = inner if submodule else part.module
                    self.imports[alias.asname or alias.name] = (
                        source,
                        None if submodule else alias.name,
                    )


# What follows is asked of the same code for every script that reaches it.


@cache
def _module(path: Path, text: str) -> _Module:
    return _Module(text)


_dump = cache(ast.dump)


def _names(nodes: Sequence[ast.AST]) -> set[str]:
    """Every name that code mentions, alone or after a dot."""
    return set().union(*map(_names_in, nodes))


@cache
def _names_in(node: ast.AST) -> frozenset[str]:
    return frozenset(
        part.id if isinstance(part, ast.Name) else part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Name | ast.Attribute)
    )


def _defined_names(node: ast.stmt) -> list[str]:
    """The names whose meaning a top-level statement decides."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Import | ast.ImportFrom):
        return []
    targets: Sequence[ast.AST]
    if isinstance(node, ast.Assign):
        targets = node.targets
    elif isinstance(node, ast.AnnAssign | ast.AugAssign):
        targets = [node.target]
    else:  # a loop, a condition, a call such as a registration: all that it names
        targets = [node]
    return [part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)]


@cache
def _parse(text: str) -> ast.Module:
    """Code without strings that stand alone: docstrings of modules, functions, constants."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            body[:] = [
                part
                for part in body
                if not (
                    isinstance(part, ast.Expr)
                    and isinstance(part.value, ast.Constant)
                    and isinstance(part.value.value, str)
                )
            ]
    return tree
