"""Calibration text from a file or a dataset, and windows of it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pcdvq_quantizer.sources import Source, reason
from pcdvq_quantizer.texts import (
    JSONL_SUFFIXES,
    find_file,
    read_bytes,
    records_of,
    text_field,
    text_of,
)

MAX_DOCUMENTS = 100_000  # of a dataset, which may be larger than memory


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer of `source`.

    Raises:
        PCDVQError: it has none.
    """
    with tempfile.TemporaryDirectory() as scratch:
        source.copy_files(Path(scratch))
        (Path(scratch) / "config.json").write_text(json.dumps(source.config), encoding="utf-8")
        try:
            return AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise PCDVQError(
                f"{source.name} has no tokenizer that transformers can load "
                f"({reason(error)}); add its tokenizer files, or quantize "
                "with --calibration none"
            ) from error


def read_documents(calibration: str) -> list[str]:
    """The documents of a text file (one), a JSONL file (field `text`), or a `datasets` name.

    Raises:
        PCDVQError: it is not found, not text, empty, or has no such field.
    """
    path = find_file(calibration)
    if path is None:
        documents = list(islice(_dataset(calibration), MAX_DOCUMENTS))
    elif path.suffix.lower() in JSONL_SUFFIXES:
        documents = [text for _, text in records_of(read_bytes(path), path)]
    else:
        documents = [text_of(read_bytes(path), path)]
    if not any(document.strip() for document in documents):
        raise PCDVQError(f"calibration text {calibration} is empty; give one with text in it")
    return documents


def _dataset(name: str) -> Iterator[str]:
    try:
        import datasets
    except ImportError:
        raise PCDVQError(
            f"calibration {name!r} is not a file, and reading a dataset of that name needs "
            "`pip install datasets`"
        ) from None
    repository, _, config = name.partition(":")
    try:
        records = datasets.load_dataset(
            repository, config or None, split="train", streaming=True, trust_remote_code=False
        )
        for record in records:
            yield text_field(record, name)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise PCDVQError(
            f"calibration {name!r} is neither a file nor a dataset that can be read "
            f"({str(error).strip().splitlines()[0]}); name datasets as NAME or NAME:CONFIG"
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, documents: list[str]) -> list[list[int]]:
    """Token ids of each document, without special tokens."""
    # verbose: no warning that a text is longer than the model's context.
    return [
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in documents
    ]


def sample_windows(
    tokenizer: PreTrainedTokenizerBase, documents: list[list[int]], samples: int, length: int
) -> Tensor:
    """Windows spread evenly over `documents`, laid end to end.

    Args:
        documents: token ids.
        samples: S, windows wanted; fewer are given where the text is short.
        length: T, tokens of a window.

    Returns:
        int64 [at most S, T]; each window starts with the BOS token where the tokenizer adds one.

    Raises:
        PCDVQError: the text is shorter than one window.
    """
    end = tokenizer.eos_token_id
    separator = [] if end is None or len(documents) == 1 else [end]
    stream = [token for document in documents for token in (*document, *separator)]
    start = _leading_tokens(tokenizer)
    body = length - len(start)
    count = len(stream) // body
    if count == 0:
        raise PCDVQError(
            f"calibration text has {len(stream)} tokens, less than one window of {length}; give "
            "more text or a smaller --sequence-length"
        )
    windows = torch.tensor(stream[: count * body]).view(count, body)
    chosen = windows[torch.linspace(0, count - 1, min(samples, count)).round().long()]
    return torch.cat([torch.tensor(start).long().expand(len(chosen), -1), chosen], dim=1)


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer puts it before every text, else []."""
    bos = tokenizer.bos_token_id
    tokens = tokenizer("a")["input_ids"]
    return [bos] if bos is not None and tokens[:1] == [bos] else []
