"""Calibration text that needs nothing but the model: it continues a varied set of openings."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import cycle, islice

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pcdvq_quantizer.chat import bundled
from pcdvq_quantizer.continuation import continue_texts
from pcdvq_quantizer.progress import Progress

BATCH = 64
NEW_TOKENS = 192
TEMPERATURES = (0.8, 1.0)
MAX_COMPRESSION = (
    2.4  # of zlib; prose of this length has 1.5 to 2.2, text that goes in circles more
)
OPENINGS = "calibration/openings.txt"  # beginnings of texts of many kinds, one a line


def prompts(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    """Token ids of all openings in random order, then again in another, without end."""
    generator = torch.Generator().manual_seed(seed)
    openings = all_openings(tokenizer)
    while True:
        for index in torch.randperm(len(openings), generator=generator).tolist():
            yield openings[index]


def all_openings(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of all that `prompts` gives."""
    text = bundled(OPENINGS).read_text(encoding="utf-8")
    return [tokenizer(line)["input_ids"] for line in text.splitlines()]


def generate_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    progress: Progress,
) -> list[list[int]]:
    """Texts sampled from `model`, openings included, without those that repeat themselves.

    Args:
        tokens: how many in all; texts are added until there are as many.
        progress: advanced by the number of tokens.

    Returns:
        Token ids of each text, without end-of-text.
    """
    openings = prompts(tokenizer, seed)
    ends = {tokenizer.eos_token_id} - {None}
    documents: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for temperature in cycle(TEMPERATURES):
            batch = list(islice(openings, min(BATCH, -(-tokens // NEW_TOKENS))))
            more = continue_texts(model, batch, ends, NEW_TOKENS, temperature)
            texts = [opening + _open(new, ends) for opening, new in more]
            written = without_loops(tokenizer, texts)
            documents += written
            tokens -= sum(map(len, written))
            progress.advance(sum(map(len, written)))
            if tokens <= 0:
                return documents
    raise AssertionError


def _open(text: list[int], ends: set[int]) -> list[int]:
    return text[:-1] if text[-1] in ends else text


def without_loops(tokenizer: PreTrainedTokenizerBase, texts: list[list[int]]) -> list[list[int]]:
    """Those of `texts` that do not repeat themselves, or where they are few the better half."""

    def compression(ids: list[int]) -> float:
        text = tokenizer.decode(ids).encode()
        return len(text) / len(zlib.compress(text))

    ranked = sorted((compression(ids), index) for index, ids in enumerate(texts))
    half = -(-len(texts) // 2)
    good = [
        index
        for rank, (ratio, index) in enumerate(ranked)
        if rank < half or ratio <= MAX_COMPRESSION
    ]
    return [texts[index] for index in sorted(good)]
