"""Requests of many kinds with the model's own answers, as calibration text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pcdvq_quantizer.chat import CALIBRATION, Chat, bundled, requests_of
from pcdvq_quantizer.continuation import continue_texts, is_loop
from pcdvq_quantizer.progress import Progress

BATCH = 48
ANSWER_TOKENS = 96  # so that beginnings of answers are not rare
# Of the first answer to a request, the second, and so on, again and again; None: the likeliest.
TEMPERATURES = (None, 0.8, 1.0)
# What an error costs before each of the first tokens of an answer, where others cost 1.
DECISIVE, DECISIVE_TOKENS = 4.0, 4
LEAST_GOOD = 0.25  # of answers; of a model with fewer, the others are taken too


@dataclass(frozen=True)
class Conversation:
    """A request and its answer.

    Attributes:
        tokens: with what the template puts around them.
        begin: number of tokens before the answer.
        end: number of tokens up to the end of the answer.
    """

    tokens: list[int]
    begin: int
    end: int

    @classmethod
    def of(cls, chat: Chat, prompt: list[int], answer: list[int]) -> Conversation:
        """Of `answer`, and what follows in the template where a token of it ends it."""
        tail = answer[-1:]
        if answer[-1] in chat.ends:
            tail = chat.closing(answer[-1])
        return cls(prompt + answer[:-1] + tail, len(prompt), len(prompt) + len(answer))

    @property
    def weights(self) -> list[float]:
        """What an error costs: more where the answer begins, whose tokens decide about the rest."""
        weights = [1.0] * len(self.tokens)
        for place in range(self.begin - 1, min(self.begin - 1 + DECISIVE_TOKENS, len(weights))):
            weights[place] = DECISIVE
        return weights

    @property
    def said(self) -> list[bool]:
        """Whether the token after each one is of the answer."""
        return [self.begin <= place + 1 < self.end for place in range(len(self.tokens))]


@dataclass(frozen=True)
class Packed:
    """Conversations in windows; each window begins where a conversation does, as a model is used.

    Attributes:
        tokens: int64 [S, T].
        weights: fp32 [S, T], of `Conversation`.
        said: bool [S, T], of `Conversation`.
    """

    tokens: Tensor
    weights: Tensor
    said: Tensor

    @classmethod
    def all_alike(cls, tokens: Tensor) -> Packed:
        """Text of which no part is more than another."""
        return cls(tokens, torch.ones(tokens.shape), torch.ones(tokens.shape, dtype=torch.bool))


def pack(conversations: Iterable[Conversation], windows: int, length: int) -> Packed:
    """At most `windows` of `length` tokens; what is too long for the last of a window is cut."""
    rows: list[Packed] = []
    row: list[Conversation] = []
    for each in conversations:
        if len(rows) == windows:
            break
        row.append(each)
        if sum(len(part.tokens) for part in row) >= length:
            rows.append(_window(row, length))
            row = []
    parts = zip(*(vars(each).values() for each in rows or [_window([], length)]), strict=True)
    return Packed(*(torch.cat(each) for each in parts))


def _window(conversations: list[Conversation], length: int) -> Packed:
    """One window, or none without conversations."""

    def flat(parts: Iterable[list[Any]], dtype: torch.dtype) -> Tensor:
        return torch.tensor([each for part in parts for each in part][:length], dtype=dtype).view(
            -1, length
        )

    return Packed(
        flat((each.tokens for each in conversations), torch.int64),
        flat((each.weights for each in conversations), torch.float32),
        flat((each.said for each in conversations), torch.bool),
    )


def converse(
    model: PreTrainedModel, chat: Chat, windows: int, length: int, seed: int, progress: Progress
) -> Packed:
    """Requests with what `model` answers, without answers that are empty or go in circles.

    Args:
        chat: the model's template, which is put around them.
        windows: how many.
        length: tokens of a window.
        progress: advanced by the number of tokens; told if the model answers badly.
    """
    prompts = [chat.prompt(text) for text in shuffled_requests(seed)]
    good: list[Conversation] = []
    bad: list[Conversation] = []
    asked, packed = 0, pack([], windows, length)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        while (missing := windows - len(packed.tokens)) > 0:
            first = asked % len(prompts)
            batch = prompts[first : first + min(BATCH, -(-missing * length // ANSWER_TOKENS))]
            temperature = TEMPERATURES[asked // len(prompts) % len(TEMPERATURES)]
            answers = continue_texts(model, batch, chat.ends, ANSWER_TOKENS, temperature)
            for prompt, answer in answers:
                said = answer[0] not in chat.ends and not is_loop(answer)
                (good if said else bad).append(Conversation.of(chat, prompt, answer))
            asked += len(batch)
            if bad and asked >= len(prompts) and len(good) < LEAST_GOOD * asked:
                progress.note(
                    f"of {asked} answers of this model {len(bad)} are empty or go in circles; "
                    "they are calibration text all the same"
                )
                good, bad = good + bad, []
            packed = pack(good, windows, length)
            progress.advance((len(packed.tokens) - windows + missing) * length)
    return packed


def passages_as_answers(
    chat: Chat, documents: list[list[int]], windows: int, length: int, seed: int
) -> Packed:
    """What `converse` gives, of a model that is not at hand: passages of `documents` answer."""
    stream = [token for document in documents for token in document]
    requests = shuffled_requests(seed)

    def conversations() -> Iterator[Conversation]:
        for number in count():
            start = number * ANSWER_TOKENS % max(1, len(stream) - ANSWER_TOKENS)
            answer = stream[start : start + ANSWER_TOKENS] + sorted(chat.ends)[:1]
            prompt = chat.prompt(requests[number % len(requests)])
            yield Conversation.of(chat, prompt, answer)

    return pack(conversations(), windows, length)


def all_prompts(chat: Chat) -> list[list[int]]:
    """Token ids of all requests of this package that are not for evaluation."""
    return [chat.prompt(text) for text in shuffled_requests(0)]


def shuffled_requests(seed: int) -> list[str]:
    """The requests of this package that are not for evaluation, in random order."""
    path = bundled(CALIBRATION)
    requests = list(requests_of(path.read_bytes(), path))
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(seed))
    return [requests[index].text for index in order.tolist()]
