"""Evaluation data as tokens."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.chat import EVALUATION, Request, bundled, parse_requests

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class DataFile:
    """A file that was read: its name and the SHA-256 of its bytes."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Sequence:
    """Tokens whose last `scored` ones are predicted, each from all before it.

    Attributes:
        tokens: int64 [T].
        scored: in [1, T - 1].
    """

    tokens: Tensor
    scored: int


def read_windows(
    path: Path, tokenizer: PreTrainedTokenizerBase, window: int, windows: int, bos: bool
) -> tuple[DataFile, list[Sequence]]:
    """The first `windows` non-overlapping windows of `window` tokens of a text file.

    The text is tokenized as a whole, without special tokens. A BOS token, if asked for, comes on
    top, so that the same tokens are scored with it and without: all of a window but its first.

    Raises:
        PCDVQError: unreadable, not UTF-8, or shorter than one window.
    """
    text, source = _read(path)
    ids = _encode(tokenizer, text)
    if len(ids) < window:
        raise PCDVQError(
            f"{path} has {len(ids)} tokens, less than one window of {window}; give a longer text "
            "or a smaller --window"
        )
    prefix = _prefix(tokenizer, bos)
    count = min(windows, len(ids) // window)
    starts = range(0, count * window, window)
    return source, [
        Sequence(torch.tensor(prefix + ids[start : start + window]), window - 1) for start in starts
    ]


@dataclass(frozen=True)
class Passage:
    """A line of a JSONL file: its text up to the last space, and the word after that."""

    where: str
    context: str
    word: str

    def sequence(self, tokenizer: PreTrainedTokenizerBase, bos: bool) -> Sequence:
        """The passage, of which the last word is scored; errors as `ending`."""
        return self.ending(self.word, tokenizer, bos)

    def ending(self, word: str, tokenizer: PreTrainedTokenizerBase, bos: bool) -> Sequence:
        """The passage with `word` as its last one, which is scored.

        Raises:
            PCDVQError: the tokenizer makes nothing of the word.
        """
        prefix = _prefix(tokenizer, bos)
        ids, known = _encode(tokenizer, f"{self.context} {word}"), _encode(tokenizer, self.context)
        if not 0 < len(known) < len(ids):
            raise _no_last_word(self.where)
        return Sequence(torch.tensor(prefix + ids), len(ids) - len(known))


def read_passages(path: Path, limit: int) -> tuple[DataFile, list[Passage]]:
    """The first `limit` lines of a JSONL file.

    Raises:
        PCDVQError: unreadable, not UTF-8, empty, or a line that is not such an object or one word.
    """
    content, source = _read(path)
    passages = []
    for number, line in enumerate(content.splitlines()[:limit], 1):
        where = f"{path} line {number}"
        context, _, word = _text_field(line, where).rpartition(" ")
        if not context.strip() or not word.strip():
            raise _no_last_word(where)
        passages.append(Passage(where, context, word))
    if not passages:
        raise PCDVQError(f'{path} is empty; give a line {{"text": ...}} for each passage')
    return source, passages


def _no_last_word(where: str) -> PCDVQError:
    return PCDVQError(
        f"{where} has no last word to predict: its text needs a space with words on both sides"
    )


def read_requests(path: Path | None) -> tuple[DataFile, list[Request]]:
    """The requests of a JSONL file, None: those of this package; see `chat.parse_requests`.

    Raises:
        PCDVQError: unreadable, not UTF-8, empty, or a line that is no request.
    """
    content, source = _read(path or bundled(EVALUATION))
    return source, parse_requests(content, source.file if path is None else str(path))


def _read(path: Path) -> tuple[str, DataFile]:
    try:
        content = path.read_bytes()
        return content.decode(), DataFile(path.name, hashlib.sha256(content).hexdigest())
    except OSError as error:
        raise PCDVQError(f"{path} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise PCDVQError(f"{path} is not UTF-8 text ({error}); convert it") from error


def _text_field(line: str, where: str) -> str:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise PCDVQError(f"{where} is not JSON ({error}); give one object per line") from error
    text = value.get("text") if isinstance(value, dict) else None
    if not isinstance(text, str):
        found = ", ".join(value) if isinstance(value, dict) else type(value).__name__
        raise PCDVQError(f"{where} has no string field `text` (found: {found}); rename the field")
    return text


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose: no warning that a text is longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: bool) -> list[int]:
    if not bos:
        return []
    if tokenizer.bos_token_id is None:
        raise PCDVQError("--bos: the model's tokenizer has no BOS token; leave the option out")
    return [tokenizer.bos_token_id]
