"""Calibration text that needs nothing but the model: it continues a varied set of openings."""

from __future__ import annotations

from itertools import count, product

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pcdvq_quantizer.progress import Progress

BATCH = 64
NEW_TOKENS = 192
TOP_K = 64
TEMPERATURES = (0.8, 1.0)

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
OPENINGS = (
    "= {subject} =\n\nThis article is about {subject}. ",
    "{subject}, explained in detail.\n\n",
    "News report: {subject}. On Monday,",
    "Chapter 1\n\nIt began with {subject}.",
)
REQUESTS = (
    "Write a long and detailed encyclopedia article about {subject}.",
    "Tell me about {subject}, with names, places and dates.",
    "Explain {subject} step by step, with examples.",
    "Write a story that has to do with {subject}.",
)


def prompts(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the openings: plain text, and requests where there is a chat template."""
    plain = [
        tokenizer(opening.format(subject=subject))["input_ids"]
        for subject, opening in product(SUBJECTS, OPENINGS)
    ]
    if tokenizer.chat_template is None:
        return plain
    chat = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": request.format(subject=subject)}],
            add_generation_prompt=True,
            return_dict=True,
        )["input_ids"]
        for subject, request in product(SUBJECTS, REQUESTS)
    ]
    return [each for pair in zip(plain, chat, strict=True) for each in pair]


def generate_documents(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    seed: int,
    progress: Progress,
) -> list[list[int]]:
    """Texts sampled from `model`, openings included.

    Args:
        tokens: how many in all; texts are added until there are as many.
        progress: advanced by the number of tokens.

    Returns:
        Token ids of each text, without padding and end-of-text.
    """
    openings = prompts(tokenizer)
    size = min(BATCH, -(-tokens // NEW_TOKENS))
    order = torch.randperm(len(openings), generator=torch.Generator().manual_seed(seed)).tolist()
    documents: list[list[int]] = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for round in count():
            batch = [openings[order[(round * size + i) % len(order)]] for i in range(size)]
            written = _continue(model, tokenizer, batch, TEMPERATURES[round % len(TEMPERATURES)])
            documents += written
            tokens -= sum(map(len, written))
            progress.advance(sum(map(len, written)))
            if tokens <= 0:
                return documents
    raise AssertionError


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: list[list[int]],
    temperature: float,
) -> list[list[int]]:
    """`batch`, each continued until the model ends it or NEW_TOKENS came."""
    width = max(map(len, batch))
    end = tokenizer.eos_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    output = model.generate(
        padded.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=True,
        temperature=temperature,
        top_k=TOP_K,  # top_p would sort the vocabulary at every step
        max_new_tokens=NEW_TOKENS,
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
