"""Evaluation data as tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.chat import EVALUATION, Request, bundled, requests_of
from pcdvq_quantizer.texts import read_bytes, records_of, text_of

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
    content, source = _read(path)
    ids = _encode(tokenizer, text_of(content, path))
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
    for where, text in islice(records_of(content, path), limit):
        context, _, word = text.rpartition(" ")
        if not context.strip() or not word.strip():
            raise _no_last_word(where)
        passages.append(Passage(where, context, word))
    return source, passages


def _no_last_word(where: str) -> PCDVQError:
    return PCDVQError(
        f"{where} has no last word to predict: its text needs a space with words on both sides"
    )


def read_requests(path: Path | None, limit: int) -> tuple[DataFile, list[Request]]:
    """The first `limit` requests of a JSONL file, None: of this package's; see `requests_of`.

    Raises:
        PCDVQError: unreadable, not UTF-8, empty, or a line that is no request.
    """
    path = path or bundled(EVALUATION)
    content, source = _read(path)
    return source, list(islice(requests_of(content, path), limit))


def _read(path: Path) -> tuple[bytes, DataFile]:
    content = read_bytes(path)
    return content, DataFile(path.name, hashlib.sha256(content).hexdigest())


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose: no warning that a text is longer than the model's context.
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _prefix(tokenizer: PreTrainedTokenizerBase, bos: bool) -> list[int]:
    if not bos:
        return []
    if tokenizer.bos_token_id is None:
        raise PCDVQError("--bos: the model's tokenizer has no BOS token; leave the option out")
    return [tokenizer.bos_token_id]
