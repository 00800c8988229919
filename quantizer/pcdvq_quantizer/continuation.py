"""Continuing texts with a model, many at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedModel

from pcdvq_quantizer.limits import Limits

TOP_K = 64
LEAST_REPEATS = 3  # of what comes again and again


def continue_texts(
    model: PreTrainedModel,
    batch: list[list[int]],
    ends: Iterable[int],
    new_tokens: int,
    temperature: float | None = None,
) -> list[tuple[list[int], list[int]]]:
    """What `model` makes of each text of `batch`: until one ends, or the model's context is full.

    Args:
        batch: token ids, none of them empty.
        ends: tokens that end a text; the one that did is the last of its continuation.
        new_tokens: the most that are added.
        temperature: to sample with from the likeliest tokens; None: the likeliest one each time.

    Returns:
        (the text, cut where it leaves no room to go on; token ids that follow, at least one).
    """
    limits = Limits.of(model.name_or_path, model.config)
    context = limits.context or math.inf
    width = max(map(len, batch))
    new_tokens = int(min(new_tokens, max(context - width, context // 2, 1)))
    batch = [row[: int(min(len(row), max(1, context - new_tokens)))] for row in batch]
    stops = sorted(set(ends) | set(_ids(model.generation_config.eos_token_id)))
    width = max(map(len, batch))
    # It is masked: any that has an embedding will do.
    pad = next((token for token in stops if token < (limits.vocabulary or math.inf)), 0)
    padded = torch.tensor([[pad] * (width - len(row)) + row for row in batch])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature is not None:  # top_p would sort the vocabulary at every step
        sampling = {"do_sample": True, "temperature": temperature, "top_k": TOP_K, "top_p": 1.0}
    output = model.generate(
        padded.to(model.device),
        attention_mask=mask.to(model.device),
        **sampling,
        repetition_penalty=1.0,  # texts are the model's own, whatever its makers advise
        max_new_tokens=new_tokens,
        eos_token_id=stops or None,
        pad_token_id=pad,
    )
    found = (_until(row, set(stops)) for row in output[:, width:].tolist())
    return list(zip(batch, found, strict=True))


def is_loop(text: list[int]) -> bool:
    """Whether the same tokens come again and again through the second half of `text`."""
    for period in range(1, len(text) // LEAST_REPEATS + 1):
        repeats = max(LEAST_REPEATS, -(-len(text) // (2 * period)))
        if text[-repeats * period :] == text[-period:] * repeats:
            return True
    return False


def _until(row: list[int], stops: set[int]) -> list[int]:
    length = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:length]


def _ids(token: int | list[int] | None) -> list[int]:
    return token if isinstance(token, list) else [] if token is None else [token]
