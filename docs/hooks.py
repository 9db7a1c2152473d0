"""What MkDocs does beside Markdown: generated pages, links into the repository, formulas.

MkDocs calls the functions by their names (`hooks:` of mkdocs.yml).
"""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

REPOSITORY = Path(__file__).parents[1]
KINDS = {"(": "inline", "[": "block"}
"""Of formulas, by their delimiter."""
TYPES = {"string": "text", "integer": "whole number", "boolean": "`true`, `false`"}
"""What readers call what a schema calls so."""


def on_files(files, config):
    """Pages that are made of other files."""
    pages = {
        "configuration.md": configuration(json.loads(_text("config.schema.json"))),
        "contributing.md": _from_root("CONTRIBUTING.md"),
        "changelog.md": _from_root("CHANGELOG.md"),
        "reference/command.md": command(),
    }
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links to the repository's files: to their reference page, or to where the code is kept."""

    def replaced(link: re.Match[str]) -> str:
        text, path = link[1], link[2].removeprefix("../")
        name = path.removeprefix("ensdistill/").removesuffix(".py")
        if f"reference/{name}.md" in files.src_uris:
            return f"[{text}](reference/{name}.md)"
        if config.repo_url:
            return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})"
        return text if "`" in text else f"`{text}`"

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./(?:(?!\.md\b)[^)#])+)\)", replaced, markdown)


def on_page_content(content, page, config, files):
    """Formulas become MathML, which browsers draw by themselves."""
    formula = r'(<(span|div) class="arithmatex">)\\([(\[])(.*?)\\[)\]](?=</\2>)'

    def drawn(found: re.Match[str]) -> str:
        return found[1] + convert(html.unescape(found[4]), display=KINDS[found[3]])

    return re.sub(formula, drawn, content, flags=re.DOTALL)


def _text(path: str) -> str:
    return (REPOSITORY / path).read_text(encoding="utf-8")


def _from_root(path: str) -> str:
    """A page of the root, whose links are seen from docs/."""
    if not (REPOSITORY / path).exists():
        return f"# {Path(path).stem.title()}\n"
    text = re.sub(r"\]\(docs/", "](", _text(path))
    return re.sub(r"\]\((?=(?:tests|ensdistill)/)", "](../", text)


# --- config.yaml -----------------------------------------------------------------------------


def configuration(schema: dict[str, Any]) -> str:
    """The page of all keys, by section, of the schema of config.yaml."""
    sections = {"Configuration": schema, **schema["$defs"]}
    order = _reached(schema, sections)
    lines = [
        "# Configuration",
        "",
        "Every key of `config.yaml`, made of `config.schema.json`, which editors use to complete "
        "them. What is not written in `config.yaml` has the default. A key without a default must "
        "be given. Steps η may be written as fractions (`1/255`).",
        "",
    ]
    for name in order:
        section = sections[name]
        lines += [f"## {_title(name)} {{#{_anchor(name)}}}", ""]
        lines += [_paragraph(section.get("description", "")), ""]
        lines += ["| key | values | default | what |", "|:--|:--|:--|:--|"]
        required = section.get("required", [])
        for key, known in section["properties"].items():
            default = "–" if key in required else _default(known)
            cells = [
                f'<code id="{_anchor(name)}-{key}">{key}</code>',
                _kinds(known),
                default,
                _paragraph(known.get("description", "")),
            ]
            lines.append("| " + " | ".join(it.replace("|", "\\|") for it in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _reached(schema: dict[str, Any], sections: dict[str, Any]) -> list[str]:
    """Names of sections, each after the one that first speaks of it."""
    found, waiting = [], ["Configuration"]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            found.append(name)
            waiting += list(_references(sections[name]["properties"]))
    return found


def _references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for key, value in node.items():
            if key not in ("default", "discriminator"):
                yield from _references(value)
    elif isinstance(node, list):
        for value in node:
            yield from _references(value)


def _title(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=ODS)(?=Each)", " ", name)


def _anchor(name: str) -> str:
    return name.lower()


def _paragraph(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _default(known: dict[str, Any]) -> str:
    """A default as config.yaml has it; of a section nothing, as its keys have theirs."""
    value = known.get("default")
    if value is None or isinstance(value, dict) or (value and isinstance(value, list)):
        return ""
    return f"`{value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}`"


def _kinds(known: dict[str, Any]) -> str:
    """Types and ranges of a key's values, with links to sections."""
    if "$ref" in known:
        name = known["$ref"].rpartition("/")[2]
        return f"[{_title(name)}](#{_anchor(name)})"
    choices = known.get("anyOf") or known.get("oneOf")
    if choices:
        kinds = [_kinds(it) for it in choices if it.get("type") != "null"]
        return ", ".join(dict.fromkeys(kinds))
    if "const" in known or "enum" in known:
        values = known.get("enum", [known.get("const")])
        return ", ".join(f"`{it}`" for it in values)
    kind = TYPES.get(known.get("type", ""), known.get("type", ""))
    if kind == "array":
        return f"list of {_kinds(known.get('items', {}))}".removesuffix(" of ")
    if kind == "object":
        inner = known.get("patternProperties") or {"": known.get("additionalProperties")}
        (value,) = inner.values()
        return f"by name: {_kinds(value)}" if isinstance(value, dict) else "keys"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {known[key]:g}" for key, sign in bounds.items() if key in known]
    return " ".join([kind, ", ".join(limits)]).strip()


# --- the command -----------------------------------------------------------------------------


def command() -> str:
    """The page of the command line, of what `--help` prints."""
    import typer

    from ensdistill.cli import app

    root = typer.main.get_command(app)
    lines = [
        "# The command `ensdistill`",
        "",
        root.help or "",
        "",
        "Exit status: 0 done; 1 an input is wrong, one sentence says which; 2 wrong usage; 3 done, "
        "but some of the images could not be read. `ensdistill --install-completion` lets the "
        "shell complete all of it.",
        "",
    ]
    for name, sub in getattr(root, "commands", {}).items():
        arguments = [it.metavar for it in sub.params if it.param_type_name == "argument"]
        usage = " ".join(["ensdistill", name, *arguments, "[OPTIONS]"])
        lines += [f"## {name}", "", "```sh", usage, "```", "", sub.help, ""]
        lines += ["| | what | default |", "|:--|:--|:--|"]
        lines += [_parameter(it) for it in sub.params]
        lines.append("")
    return "\n".join(lines)


def _parameter(it: Any) -> str:
    """A row of an argument or an option."""
    named = [it.metavar] if it.param_type_name == "argument" else it.opts
    value = "" if it.default in (None, False, "", ()) else f"`{it.default}`"
    cells = ", ".join(f"`{name}`" for name in named), it.help or "", "" if it.required else value
    if it.required and it.param_type_name == "option":
        cells = *cells[:2], "must be given"
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
