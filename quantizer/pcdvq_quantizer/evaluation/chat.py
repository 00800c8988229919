"""How far a model's answers to requests are from its original's."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

import torch

from pcdvq_quantizer.continuation import is_loop
from pcdvq_quantizer.evaluation.data import Sequence
from pcdvq_quantizer.evaluation.hf_model import Comparison
from pcdvq_quantizer.evaluation.scores import standard_error

ANSWER_TOKENS = 40
BATCH = 16


@dataclass(frozen=True)
class AnswerFigures:
    """A model on the answers that its original gives, each token after the original's.

    Attributes:
        kl: KL(original || model), mean over all tokens of answers, nats.
        kl_stderr: its standard error over answers; None for one answer.
        first_kl: at the first token of an answer.
        first_kl_stderr: its standard error; None for one answer.
        agreement: share of tokens for which both hold the same one for the likeliest.
        first_agreement: the same, of first tokens.
        answers: number of answers.
        tokens: number of their tokens.
    """

    kl: float
    kl_stderr: float | None
    first_kl: float
    first_kl_stderr: float | None
    agreement: float
    first_agreement: float
    answers: int
    tokens: int

    @classmethod
    def of(cls, comparisons: list[Comparison]) -> AnswerFigures:
        """Summarize one comparison for each answer."""
        kls = [comparison.kl.double() for comparison in comparisons]
        lengths = [len(kl) for kl in kls]
        tokens = sum(lengths)
        mean = torch.cat(kls).mean().item()
        # Of a ratio of sums over answers.
        spread = [
            (kl.sum().item() - mean * length) * len(kls) / tokens
            for kl, length in zip(kls, lengths, strict=True)
        ]
        first = [kl[0].item() for kl in kls]
        same = [comparison.agreement for comparison in comparisons]
        return cls(
            kl=mean,
            kl_stderr=standard_error(spread),
            first_kl=fmean(first),
            first_kl_stderr=standard_error(first),
            agreement=torch.cat(same).mean().item(),
            first_agreement=fmean(each[0].item() for each in same),
            answers=len(kls),
            tokens=tokens,
        )


@dataclass(frozen=True)
class ChatFigures:
    """Answers to requests, all together and by kind of request.

    Attributes:
        all: of all requests.
        kinds: of each kind of request.
        reference: name of the original, whose answers they are.
        bound: whether KL figures are lower bounds: the likeliest tokens alone were known.
        seconds: time it took, answering included and loading left out.
    """

    all: AnswerFigures
    kinds: dict[str, AnswerFigures]
    reference: str
    bound: bool
    seconds: float


def figures_by_kind(kinds: list[str], comparisons: list[Comparison]) -> dict[str, AnswerFigures]:
    """The figures of each kind, in the order in which they first come."""
    order = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
    pairs = sorted(zip(kinds, comparisons, strict=True), key=lambda pair: order[pair[0]])
    return {
        kind: AnswerFigures.of([comparison for _, comparison in group])
        for kind, group in groupby(pairs, key=lambda pair: pair[0])
    }


def answer_sequences(prompts: list[list[int]], answers: list[list[int]]) -> list[Sequence]:
    """Sequences of which the answer is scored."""
    return [
        Sequence(torch.tensor(prompt + answer), len(answer))
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def what_is_odd(answers: list[list[int]], ends: set[int]) -> str | None:
    """A sentence about answers that say little, where many are such."""
    empty = sum(answer[0] in ends for answer in answers)
    loops = sum(map(is_loop, answers))
    if 2 * (empty + loops) <= len(answers):
        return None
    return (
        f"of {len(answers)} answers of the original {empty} are empty and {loops} go in circles: "
        "figures of chat say little about this model"
    )
