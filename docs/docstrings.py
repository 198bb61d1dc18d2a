"""How the reference reads docstrings: lines `name: text` about a class's attributes become a list of them."""

from __future__ import annotations

import re
from typing import Any

from griffe import Class, Extension

FIELD = re.compile(r"(\w+): ")


class AttributeLists(Extension):
    """Puts the heading that Google's style has over such lines; griffe would take them for running text."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        """Rewrite the docstring of a class, if it has a paragraph that begins with the name of an attribute."""
        if cls.docstring:
            paragraphs = cls.docstring.value.split("\n\n")
            cls.docstring.value = "\n\n".join(_listed(paragraph, cls) for paragraph in paragraphs)


def _listed(paragraph: str, cls: Class) -> str:
    found = FIELD.match(paragraph)
    if found is None or found[1] not in cls.attributes:
        return paragraph
    return "\n".join(["Attributes:", *(f"    {line}" for line in paragraph.splitlines())])
