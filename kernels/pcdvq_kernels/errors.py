"""Errors a user can act on."""

MOST_CHARACTERS = 1000


class PCDVQError(ValueError):
    """Bad input; the message names the value, the limit and the remedy.

    Names in a message come from files that may be anybody's: what a terminal would obey or could
    not encode is escaped, and a long message is cut.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(_short(message)))


class CheckpointError(PCDVQError):
    """A checkpoint that cannot be served."""


def _short(text: str) -> str:
    if len(text) > MOST_CHARACTERS:
        half = MOST_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return text


def printable(text: str) -> str:
    """`text` in one line, with escapes for what a terminal would obey or could not encode."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
