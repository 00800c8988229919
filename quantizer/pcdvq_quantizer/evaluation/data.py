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


def read_last_words(
    path: Path, tokenizer: PreTrainedTokenizerBase, limit: int, bos: bool
) -> tuple[DataFile, list[Sequence]]:
    """The first `limit` records of a JSONL file; scored is what follows the last space of `text`.

    Raises:
        PCDVQError: unreadable, not UTF-8, empty, or a line that is not such an object.
    """
    content, source = _read(path)
    prefix = _prefix(tokenizer, bos)
    sequences = []
    for where, text in islice(records_of(content, path), limit):
        context, _, word = text.rpartition(" ")
        ids, known = _encode(tokenizer, text), len(_encode(tokenizer, context))
        if not context.strip() or not word.strip() or not 0 < known < len(ids):
            raise PCDVQError(
                f"{where} has no last word to predict: its text needs a space with "
                "words on both sides"
            )
        sequences.append(Sequence(torch.tensor(prefix + ids), len(ids) - known))
    return source, sequences


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
