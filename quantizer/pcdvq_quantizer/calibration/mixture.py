"""Calibration windows of two kinds: what a model reads, and what it says when it is asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from pcdvq_quantizer.calibration.conversations import (
    Packed,
    all_prompts,
    converse,
    passages_as_answers,
)
from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.generate import all_openings, generate_documents
from pcdvq_quantizer.calibration.text import (
    load_tokenizer,
    read_documents,
    sample_windows,
    tokenize,
)
from pcdvq_quantizer.chat import Chat
from pcdvq_quantizer.limits import Limits
from pcdvq_quantizer.plan import SELF, Plan
from pcdvq_quantizer.progress import Progress

TEXT, CHAT = 0, 1
HELD_WINDOWS = 1  # of each kind
OpenModel = Callable[[], AbstractContextManager[PreTrainedModel]]
# Of the windows, those that hold requests and answers, by whether there is a chat template.
CHAT_SHARE = {True: 0.5, False: 0.25}


@dataclass(frozen=True)
class Windows:
    """Calibration text.

    Attributes:
        tokens: int64 [S, T].
        kinds: int64 [S], `TEXT` or `CHAT`.
        weights: fp32 [S, T], what an error at each token costs.
        said: bool [S, T], where it is the model that says the next token; in text all are.
        held: bool [S], windows that nothing is learnt from: the quantized model is measured there.
    """

    tokens: Tensor
    kinds: Tensor
    weights: Tensor
    said: Tensor
    held: Tensor

    @property
    def learnt(self) -> Tensor:
        """int64 [L, T], the windows that something is learnt from."""
        return self.tokens[~self.held]

    def spread(self, weights: Tensor) -> Tensor:
        """`weights` [L, T] of tokens of `learnt` for all windows, [S, T]: 0 in those held out."""
        return torch.zeros(self.tokens.shape).masked_scatter(~self.held[:, None], weights)


@dataclass(frozen=True)
class Wanted:
    """What calibration text is asked for.

    Attributes:
        calibration: SELF, or of `read_documents`.
        windows: S.
        length: T, tokens of a window.
        seed: of all that is random.
        held: windows of each kind to hold out, on top.
        readers: limits of the models that read the windows.
        owner: the model that the tokenizer belongs to.
    """

    calibration: str
    windows: int
    length: int
    seed: int
    held: int = 0
    readers: tuple[Limits, ...] = ()
    owner: str = ""

    def check_tokens(self, texts: Sequence[list[int]], tokenizer: PreTrainedTokenizerBase) -> None:
        """Raise PCDVQError if `texts` hold token ids that a reader has no embedding for."""
        for each in self.readers:
            each.check_tokens(texts, tokenizer, self.owner)


def calibration_windows(plan: Plan, model: LayeredModel, progress: Progress) -> Windows:
    """The calibration text that `plan.options` ask for.

    Raises:
        PCDVQError: there is no tokenizer, or the text cannot be used.
    """
    options, name = plan.options, plan.source.name
    limits = Limits.of(name, plan.source.config)
    length = limits.fit_window(options.sequence_length, "--sequence-length", 0, progress.note)
    wanted = Wanted(
        options.calibration, options.samples, length, options.seed, HELD_WINDOWS, (limits,), name
    )
    open_model: OpenModel | None = model.whole
    if options.calibration != SELF and (reason := _why_silent(model)):
        progress.note(
            f"{name} {reason}: passages of the calibration text stand for its answers to requests"
        )
        open_model = None
    return mixed_windows(wanted, load_tokenizer(plan.source), open_model, progress)


def _why_silent(model: LayeredModel) -> str | None:
    """Why `model` cannot answer requests here, None if it can."""
    if not model.predicts:
        return "stores no output head"
    if not model.fits:
        return f"as a whole does not fit into memory ({model.bytes / 2**30:.0f} GiB)"
    return None


def mixed_windows(
    wanted: Wanted,
    tokenizer: PreTrainedTokenizerBase,
    open_model: OpenModel | None,
    progress: Progress,
) -> Windows:
    """Windows of text and of conversations, evenly mixed; fewer where the text is short.

    Args:
        open_model: the whole model for a while, which writes its answers, and the text for SELF.
            None: it cannot, and passages of the text stand for answers.

    Raises:
        PCDVQError: the text cannot be used, or holds tokens that a model has no embedding for.
    """
    chat = Chat(tokenizer, progress.note)
    asked = round(CHAT_SHARE[chat.has_template] * wanted.windows)
    read = wanted.windows - asked + wanted.held
    documents: list[list[int]] = []
    text: Tensor | None = None
    if wanted.calibration != SELF:
        documents = tokenize(tokenizer, read_documents(wanted.calibration))
        text = sample_windows(tokenizer, documents, read, wanted.length)
        wanted.check_tokens(text.tolist(), tokenizer)
        asked = round(asked * max(1, len(text) - wanted.held) / (wanted.windows - asked))
    # Nothing is measured on what a base model makes of requests.
    answers = wanted.held if asked and chat.has_template else 0
    asked += answers
    wanted.check_tokens(all_prompts(chat) if asked else [], tokenizer)
    if open_model is None:
        conversations = passages_as_answers(chat, documents, asked, wanted.length, wanted.seed)
    else:
        own = read * wanted.length if wanted.calibration == SELF else 0
        wanted.check_tokens(all_openings(tokenizer) if own else [], tokenizer)
        progress.start("Writing calibration text", own + asked * wanted.length)
        with open_model() as model, torch.no_grad():
            if own:
                documents = generate_documents(model, tokenizer, own, wanted.seed, progress)
            conversations = converse(model, chat, asked, wanted.length, wanted.seed, progress)
    if text is None:
        text = sample_windows(tokenizer, documents, read, wanted.length)
    windows = _mix((TEXT, Packed.all_alike(text), wanted.held), (CHAT, conversations, answers))
    wanted.check_tokens(windows.tokens.tolist(), tokenizer)
    return windows


def _mix(*kinds: tuple[int, Packed, int]) -> Windows:
    """Windows of all (kind, windows, how many of them to hold out), each kind spread evenly."""
    parts = [
        Windows(
            each.tokens,
            torch.full((len(each.tokens),), kind),
            each.weights,
            each.said,
            _held(len(each.tokens), held),
        )
        for kind, each, held in kinds
    ]
    places = [(torch.arange(len(each.kinds)) + 0.5) / max(1, len(each.kinds)) for each in parts]
    order = torch.cat(places).argsort(stable=True)
    fields = zip(*(vars(each).values() for each in parts), strict=True)
    return Windows(*(torch.cat(each)[order] for each in fields))


def _held(windows: int, count: int) -> Tensor:
    """bool [windows], `count` of them spread over all; none where there are few."""
    held = torch.zeros(windows, dtype=torch.bool)
    if windows > 2 * count:
        held[torch.linspace(0, windows - 1, count + 2)[1:-1].long()] = True
    return held
