"""Docstrings here are a sentence and lines in columns; Markdown has to keep those lines."""

from __future__ import annotations

from typing import Any

import griffe


class Columns(griffe.Extension):
    """Puts all but the first paragraph of each docstring in a block of its own."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is None:
            return
        first, _gap, rest = obj.docstring.value.strip().partition("\n\n")
        lines = first.splitlines()
        if len(lines) > 1 and any("  " in line.strip() for line in lines[1:]):
            first, rest = lines[0], "\n".join((*lines[1:], "", rest))
        if rest.strip():
            obj.docstring.value = f"{first}\n\n```text\n{rest.rstrip()}\n```"
