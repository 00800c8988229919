"""Calibration text that needs nothing but the model: it continues a varied set of openings."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from importlib.resources import files
from itertools import cycle, islice, product

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pcdvq_quantizer.limits import Limits
from pcdvq_quantizer.progress import Progress

BATCH = 64
NEW_TOKENS = 192
TOP_K = 64
TEMPERATURES = (0.8, 1.0)
MAX_COMPRESSION = (
    2.4  # of zlib; prose of this length has 1.5 to 2.2, text that goes in circles more
)
OPENINGS = "calibration/openings.txt"  # beginnings of prose of many kinds, one a line
OPENINGS_PER_REQUEST = 3  # a chat template takes tokens that are the same in every text

SUBJECTS = (
    "the history of a small town",
    "a species of bird",
    "a battle of the nineteenth century",
    "a novel and its author",
    "a football season",
    "a chemical element",
    "a railway line",
    "a popular television series",
    "a mathematical theorem",
    "a river and its valley",
    "a famous singer",
    "an election",
    "a disease and its treatment",
    "a video game",
    "a computer program",
    "a tropical storm",
)
REQUESTS = (
    "Write a long and detailed encyclopedia article about {subject}.",
    "Tell me about {subject}, with names, places and dates.",
    "Explain {subject} step by step, with examples.",
    "Write a story that has to do with {subject}.",
)


def prompts(tokenizer: PreTrainedTokenizerBase, seed: int) -> Iterator[list[int]]:
    """Token ids of texts to continue, without end.

    They are the openings in random order, and where there is a chat template, a request in it after
    every `OPENINGS_PER_REQUEST` of them.
    """
    generator = torch.Generator().manual_seed(seed)
    openings = _shuffled(_openings(tokenizer), generator)
    if tokenizer.chat_template is None:
        yield from openings
    for request in _shuffled(_requests(tokenizer), generator):
        yield from islice(openings, OPENINGS_PER_REQUEST)
        yield request


def all_prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of all that `prompts` may give."""
    requests = [] if tokenizer.chat_template is None else _requests(tokenizer)
    return [*_openings(tokenizer), *requests]


def _openings(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    text = files("pcdvq_quantizer").joinpath(OPENINGS).read_text(encoding="utf-8")
    return [tokenizer(line)["input_ids"] for line in text.splitlines()]


def _requests(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    return [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request.format(subject=subject)}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for subject, request in product(SUBJECTS, REQUESTS)
    ]


def _shuffled(texts: list[list[int]], generator: torch.Generator) -> Iterator[list[int]]:
    """All of `texts` in random order, then again in another, without end."""
    while True:
        for index in torch.randperm(len(texts), generator=generator).tolist():
            yield texts[index]


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
        Token ids of each text, without padding and end-of-text.
    """
    openings = prompts(tokenizer, seed)
    documents: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for temperature in cycle(TEMPERATURES):
            batch = list(islice(openings, min(BATCH, -(-tokens // NEW_TOKENS))))
            written = without_loops(tokenizer, _continue(model, tokenizer, batch, temperature))
            documents += written
            tokens -= sum(map(len, written))
            progress.advance(sum(map(len, written)))
            if tokens <= 0:
                return documents
    raise AssertionError


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


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    temperature: float,
) -> list[list[int]]:
    """`batch`, each continued until the model ends it, NEW_TOKENS came, or its context is full."""
    limits = Limits.of(model.name_or_path, model.config)
    context = limits.context or math.inf
    new = int(min(NEW_TOKENS, max(1, context // 2)))
    batch = [row[: int(min(len(row), max(1, context - new)))] for row in batch]
    width = max(map(len, batch))
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    if pad >= (limits.vocabulary or math.inf):  # it is masked: any other will do
        pad = 0
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    output = model.generate(
        padded.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=temperature,
        top_k=TOP_K,  # top_p would sort the vocabulary at every step
        max_new_tokens=new,
        pad_token_id=pad,
    )
    ends = {end, pad, *_ids(model.generation_config.eos_token_id)}
    texts = []
    for opening, row in zip(batch, output[:, width:].tolist(), strict=True):
        length = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(opening + row[:length])
    return texts


def _ids(token: int | list[int] | None) -> list[int]:
    return token if isinstance(token, list) else [] if token is None else [token]
