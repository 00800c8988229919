"""From scores of tokens to figures."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp, isfinite, nan, sqrt
from statistics import fmean, stdev


@dataclass(frozen=True)
class Perplexity:
    """exp(mean negative log-likelihood of the scored tokens).

    Attributes:
        perplexity: the figure.
        perplexity_stderr: standard error over windows (delta method); None for one window.
        nll: mean negative log-likelihood, nats per token.
        windows: number of windows.
        tokens: number of scored tokens.
        seconds: time it took, loading left out; of one pass for perplexity and kl together.
    """

    perplexity: float
    perplexity_stderr: float | None
    nll: float
    windows: int
    tokens: int
    seconds: float


@dataclass(frozen=True)
class KLDivergence:
    """KL(reference || model) of the next-token distributions.

    Attributes:
        kl: mean over the scored tokens, nats.
        kl_stderr: standard error over windows; None for one window.
        top1_agreement: share of tokens whose likeliest next token is the same.
        reference: name of the reference model.
        reference_perplexity: of the reference on the same windows.
        windows: number of windows.
        tokens: number of scored tokens.
        seconds: time it took, loading left out; of one pass for perplexity and kl together.
        reference_sha256: of the reference's weights, as of the model's in `EvaluationReport`.
    """

    kl: float
    kl_stderr: float | None
    top1_agreement: float
    reference: str
    reference_perplexity: float
    windows: int
    tokens: int
    seconds: float
    reference_sha256: str | None = None


@dataclass(frozen=True)
class PairedAccuracy:
    """The same lines by the model and by its original.

    Attributes:
        reference: name of the original.
        reference_accuracy: its share of lines.
        both: number of lines that both have right.
        only_model: that only the model has right.
        only_reference: that only the original has right.
        difference: accuracy of the model less that of the original.
        difference_stderr: its standard error, from pairs: less than that of either accuracy where
            the models mostly agree.
    """

    reference: str
    reference_accuracy: float
    both: int
    only_model: int
    only_reference: int
    difference: float
    difference_stderr: float


@dataclass(frozen=True)
class Accuracy:
    """Share of lines that a model has right.

    In lambada each token of the last word must be the likeliest one, in cloze and patterns the
    right word must be likelier than each of three others.

    Attributes:
        accuracy: the share.
        accuracy_stderr: its standard error.
        correct: number of such lines.
        lines: number of lines.
        seconds: time it took, loading left out.
        paired: comparison with the original, where that was measured too.
    """

    accuracy: float
    accuracy_stderr: float
    correct: int
    lines: int
    seconds: float
    paired: PairedAccuracy | None = None


def perplexity(nlls: list[float], tokens: int, seconds: float) -> Perplexity:
    """Summarize the mean NLL of each window; windows have equally many tokens."""
    nll, error = fmean(nlls), standard_error(nlls)
    figure = exp(nll)
    return Perplexity(figure, error and figure * error, nll, len(nlls), tokens, seconds)


def accuracy(correct: list[bool], seconds: float, paired: PairedAccuracy | None = None) -> Accuracy:
    """Summarize which lines are right."""
    share = fmean(correct)
    error = sqrt(share * (1 - share) / len(correct))
    return Accuracy(share, error, sum(correct), len(correct), seconds, paired)


def pair(model: list[bool], original: list[bool], reference: str) -> PairedAccuracy:
    """Compare which lines are right; both lists are of the same lines."""
    pairs = list(zip(model, original, strict=True))
    only_model, only_original = pairs.count((True, False)), pairs.count((False, True))
    count = len(pairs)
    difference = (only_model - only_original) / count
    variance = (only_model + only_original) / count - difference**2
    return PairedAccuracy(
        reference=reference,
        reference_accuracy=fmean(original),
        both=pairs.count((True, True)),
        only_model=only_model,
        only_reference=only_original,
        difference=difference,
        difference_stderr=sqrt(variance / count),
    )


def standard_error(values: list[float]) -> float | None:
    """Standard error of the mean of independent `values`; None for one value, NaN for such ones."""
    if len(values) < 2:
        return None
    return stdev(values) / sqrt(len(values)) if all(map(isfinite, values)) else nan
