"""Examples of docstrings as code: without fences Markdown takes `>>>` for quotations."""

import re

from griffe import Extension

EXAMPLE = re.compile(r"^( *)>>> .*\n?(?:^ *\S.*\n?)*", re.MULTILINE)


class Doctests(Extension):
    """Puts what stands from a `>>>` to the next empty line between fences."""

    def on_object(self, *, obj, **_):
        if obj.docstring:
            obj.docstring.value = EXAMPLE.sub(
                lambda it: f"{it[1]}```pycon\n{it[0].rstrip()}\n{it[1]}```\n", obj.docstring.value
            )
