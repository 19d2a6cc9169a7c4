"""An extension of griffe: docstrings are plain text with code in backticks, and the site reads them as Markdown."""

import re
from typing import Any

import griffe

CODE = re.compile(r"(`[^`]*`)")
TREE = re.compile(r"(?:^.*\n)?(?:^.*[├└].*(?:\n|\Z))+", re.MULTILINE)


class EscapeDocstrings(griffe.Extension):
    """Keeps shapes, as in E[x] [C, C], from being links, what stands in <> from being HTML, and trees in their lines."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Escape the docstring of one object."""
        if obj.docstring:
            parts = CODE.split(obj.docstring.value)
            text = "".join(part if part.startswith("`") else escaped(part) for part in parts)
            obj.docstring.value = TREE.sub(lambda tree: re.sub("(?m)^", "    ", tree[0]), text)


def escaped(text: str) -> str:
    """Text without links and tags."""
    return re.sub(r"\](\s*)\[", r"]\1\\[", text.replace("<", "&lt;"))
