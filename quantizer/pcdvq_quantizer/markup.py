"""Names in Markdown: they come from checkpoints and files that may be anybody's."""

from __future__ import annotations

import re

from pcdvq_kernels.errors import printable

_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
# Underscores within words mean nothing, and most names have some.
_SPECIAL = re.compile(r"[&<>\\`*\[\]|~$#]|(?<!\w)_|_(?!\w)")


def plain(text: str) -> str:
    """`text` as Markdown that reads as `text` and does nothing, in a line or a cell of a table."""
    return _SPECIAL.sub(lambda found: _ENTITIES.get(found[0], "\\" + found[0]), printable(text))


def fenced(lines: list[str], language: str) -> str:
    """A code block of `lines`, whatever is in them."""
    code = "\n".join(map(printable, lines))
    longest = max(map(len, re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{code}\n{fence}"
