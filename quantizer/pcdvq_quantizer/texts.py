"""Reading text that the user names: every text and JSONL file goes through here."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pcdvq_kernels.errors import PCDVQError

TEXT_FIELD = "text"
JSONL_SUFFIXES = (".jsonl", ".json")
# UTF-32's first, which begins with UTF-16's.
OTHER_ENCODINGS = {
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def find_file(name: str) -> Path | None:
    """The file that `name` names, None where it names none."""
    try:
        path = Path(name).expanduser()
        return path if path.is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, or no such user
        return None


def read_bytes(path: Path) -> bytes:
    """All bytes of a file.

    Raises:
        PCDVQError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise PCDVQError(f"{path} cannot be read: {error.strerror}; give a text file") from error


def text_of(content: bytes, path: Path) -> str:
    """The text that `content` of `path` holds: without a byte order mark, lines end in LF.

    Raises:
        PCDVQError: it is not UTF-8, holds NUL bytes, or is empty.
    """
    for mark, encoding in OTHER_ENCODINGS.items():
        if content.startswith(mark):
            raise PCDVQError(f"{path} is {encoding}, not UTF-8 text; convert it to UTF-8")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PCDVQError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, or give another file"
        ) from None
    if "\0" in text:
        raise PCDVQError(f"{path} holds NUL bytes: a binary file? Give text")
    if not text.strip():
        raise PCDVQError(f"{path} is empty; give a file with text in it")
    return with_plain_newlines(text)


def records_of(content: bytes, path: Path) -> Iterator[tuple[str, str]]:
    """(where it is, for messages; field `text`) of every line of a JSONL file but blank ones.

    Raises:
        PCDVQError: as `values_of`; a line is no JSON object with such a field.
    """
    for where, value in values_of(content, path):
        yield where, text_field(value, where)


def values_of(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    """(where it is, for messages; what it holds) of every line of a JSONL file but blank ones.

    Raises:
        PCDVQError: as `text_of`; a line is no JSON.
    """
    # Not by splitlines, which also cuts at characters that JSON strings may hold.
    for number, line in enumerate(text_of(content, path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise PCDVQError(
                f'{where} is not JSON ({error}); give one object per line: {{"{TEXT_FIELD}": ...}}'
            ) from None
        yield where, value


def text_field(record: Any, where: str, field: str = TEXT_FIELD, default: str | None = None) -> str:
    """The text in `field` of a record that is at `where`; lines end in LF.

    Args:
        default: what a record without the field has.

    Raises:
        PCDVQError: it has none, or one that holds half a character.
    """
    text = record.get(field, default) if isinstance(record, dict) else None
    if not isinstance(text, str):
        found = f"fields {', '.join(record)}" if isinstance(record, dict) else type(record).__name__
        remedy = "rename it"
        if text is not None:
            found, remedy = f"one of type {type(text).__name__}", "make it a string"
        raise PCDVQError(f"{where}: no string field {field!r} (found {found}); {remedy}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise PCDVQError(
            f"{where}: {field!r} holds half of a surrogate pair ({half}), which is no "
            "character; remove it"
        ) from None
    return with_plain_newlines(text)


def with_plain_newlines(text: str) -> str:
    """`text` with LF in the place of CR LF and CR, as Python reads text files."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_identity(calibration: str) -> dict[str, str | None]:
    """What makes two calibration texts the same: of a file, its contents."""
    path = find_file(calibration)
    if path is None:
        return {"calibration": calibration, "calibration_sha256": None}
    digest = hashlib.sha256(read_bytes(path)).hexdigest()
    return {"calibration": None, "calibration_sha256": digest}
