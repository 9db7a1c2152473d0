"""Plain text in Markdown and HTML, and what the pages in these have in common."""

import html
import re

STYLE = """
body { font: 13px/1.45 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
h1 { font-size: 1.25rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .3rem .45rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td:first-child { position: sticky; left: 0; background: #fff; }
thead th:first-child { left: 0; z-index: 1; }
thead th { border-block: 2px solid #222; position: sticky; top: 0; background: #fff; }
tbody:last-child tr:last-child td { border-bottom: 2px solid #222; }
tr.first-student td { border-top: 1px solid #999; }
tr.published td { padding-block: 0 .15rem; color: #666; font-size: .9em; }
tr.published td:first-child { padding-left: 1.4rem; }
.claims :is(th, td):nth-child(-n + 4) { text-align: left; }
.claims tbody th { padding-top: .9rem; border-bottom: 1px solid #ccc; }
.claims .supported td:nth-child(4) { color: #17692f; font-weight: 600; }
.claims .not-supported td:nth-child(4) { color: #b3261e; font-weight: 600; }
.claims .undecided td:nth-child(4) { color: #666; }
p { max-width: 60rem; color: #555; }
"""


def html_page(title: str, *body: str) -> str:
    """A page of its own."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
    return "\n".join([head, f"<style>{STYLE}</style>", *body, "</html>", ""])


def markdown(text: str) -> str:
    """Plain text in one line of Markdown; `<1.00` may stay, for only a letter makes it a tag."""
    return re.sub(r"[\\`*_\[\]|~&$]|<(?=[A-Za-z/!?])", r"\\\g<0>", " ".join(text.split()))


def unbroken(text: str) -> str:
    """Text that GitHub keeps on one line; tables are wide there."""
    return text.replace(" ", "\N{NO-BREAK SPACE}")


def markdown_table(lines: list[list[str]]) -> str:
    """Lines of cells; the second line says how columns are aligned."""
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def counted(count: int, noun: str, several: str = "") -> str:
    """As "1 network" or "2 networks"; `several` where an s does not make it so."""
    return f"{count:,} {noun if count == 1 else several or f'{noun}s'}"


def number(value: float, decimals: int, sign: str = "") -> str:
    """With a true minus, none before zero, and `sign` before positive numbers."""
    return f"{value:{sign}z,.{decimals}f}".replace("-", "−")
