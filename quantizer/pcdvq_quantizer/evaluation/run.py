"""One evaluation: a model and data in, a report out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol as Interface
from typing import TypeVar

from torch import Tensor

from pcdvq_quantizer.evaluation.data import DataFile, Sequence, read_last_words, read_windows
from pcdvq_quantizer.evaluation.files import ModelFiles, find_reference
from pcdvq_quantizer.evaluation.hf_model import HFModel
from pcdvq_quantizer.evaluation.options import EvaluateOptions
from pcdvq_quantizer.evaluation.report import EvaluationReport, Protocol, installed_versions
from pcdvq_quantizer.evaluation.scores import (
    KLDivergence,
    LastWord,
    Perplexity,
    last_word,
    pair_last_words,
    perplexity,
    standard_error,
)
from pcdvq_quantizer.evaluation.vllm_model import VLLMModel
from pcdvq_quantizer.identity import weights_sha256
from pcdvq_quantizer.progress import Progress

Score = TypeVar("Score")


class Scorer(Interface):
    """A model that is measured."""

    @property
    def dtype(self) -> str:
        """Computed in."""

    def log_likelihoods(self, sequence: Sequence) -> Tensor:
        """Log-likelihood of each scored token, fp32 [scored]."""

    def is_likeliest(self, sequence: Sequence) -> bool:
        """Whether each scored token is the likeliest one."""


def evaluate(
    model: str, options: EvaluateOptions, progress: Progress | None = None
) -> EvaluationReport:
    """Measure `model`: a PCDVQ or VPTQ checkpoint or an unquantized one; directory, hub id, .gguf.

    All input is read and checked before any weight is loaded.

    Raises:
        PCDVQError: the model, its reference or a file cannot be read or does not fit.
    """
    started = time.monotonic()
    job = _read_job(model, options, progress or Progress())
    with _open_scorer(job) as scorer:
        original = None
        if job.reference is not None:
            original = HFModel.load(job.reference, options.dtype, packed=False)
        found, kl = _measure_windows(job, scorer, original)
        words = _measure_lines(job, scorer, original) if job.lines else None
        return EvaluationReport(
            model=model,
            backend=options.backend,
            dtype=scorer.dtype,
            weights="packed" if job.packed else "dense",
            protocol=job.protocol(),
            perplexity=found,
            kl=kl,
            lambada=words,
            seconds=round(time.monotonic() - started, 2),
            versions=installed_versions(),
            model_sha256=weights_sha256(job.files.source),
        )


@dataclass(frozen=True)
class _Job:
    """Everything that is known before weights are loaded."""

    files: ModelFiles
    reference: ModelFiles | None
    options: EvaluateOptions
    text: DataFile | None
    windows: list[Sequence]
    lambada: DataFile | None
    lines: list[Sequence]
    reference_lines: list[Sequence]  # as the reference's tokenizer cuts them
    progress: Progress

    @property
    def packed(self) -> bool:
        """Whether kernels compute on the packed codes."""
        if self.options.backend == "vllm":
            return self.files.is_pcdvq or self.files.is_vptq
        return self.files.is_pcdvq and self.options.packed

    @property
    def reference_name(self) -> str:
        return self.reference.name if self.reference else ""

    @property
    def longest(self) -> int:
        sequences = (*self.windows, *self.lines, *self.reference_lines)
        return max(len(sequence.tokens) for sequence in sequences)

    def protocol(self) -> Protocol:
        return Protocol(
            text=self.text,
            window=self.windows[0].scored + 1 if self.text else None,
            windows=len(self.windows) if self.text else None,
            lambada=self.lambada,
            lines=len(self.lines) if self.lambada else None,
            bos=self.options.bos,
        )

    def score(
        self, what: str, sequences: list[Sequence], score: Callable[[Sequence], Score]
    ) -> tuple[list[Score], float]:
        """The scores of `sequences`, and the seconds they took."""
        started = time.monotonic()
        scores = []
        self.progress.start(what, len(sequences))
        for sequence in sequences:
            scores.append(score(sequence))
            self.progress.advance(1)
        return scores, round(time.monotonic() - started, 2)


def _read_job(model: str, options: EvaluateOptions, progress: Progress) -> _Job:
    files = ModelFiles.find(model)
    reference = find_reference(files, options.reference) if options.compares else None
    tokenizer = files.tokenizer()
    text: DataFile | None = None
    lambada: DataFile | None = None
    windows: list[Sequence] = []
    lines: list[Sequence] = []
    reference_lines: list[Sequence] = []
    models = [each for each in (files, reference) if each]
    if options.reads_text and options.text:
        window = options.window
        spare = int(options.bos) + (options.backend == "vllm")  # which generates a token, too
        for each in models:
            window = each.limits.fit_window(window, "--window", spare, progress.note)
        text, windows = read_windows(options.text, tokenizer, window, options.windows, options.bos)
    if "lambada" in options.tasks and options.lambada:
        lambada, lines = read_last_words(options.lambada, tokenizer, options.limit, options.bos)
        if reference is not None:
            _, reference_lines = read_last_words(
                options.lambada, reference.tokenizer(), options.limit, options.bos
            )
    job = _Job(files, reference, options, text, windows, lambada, lines, reference_lines, progress)
    for each in models:
        each.check_length(job.longest)
        each.limits.check_tokens(_tokens(windows), tokenizer, files.name)
    files.limits.check_tokens(_tokens(lines), tokenizer, files.name)
    if reference is not None:
        reference.limits.check_tokens(
            _tokens(reference_lines), reference.tokenizer(), reference.name
        )
    return job


def _tokens(sequences: list[Sequence]) -> Iterator[list[int]]:
    return (sequence.tokens.tolist() for sequence in sequences)


@contextmanager
def _open_scorer(job: _Job) -> Iterator[HFModel | VLLMModel]:
    if job.options.backend == "hf":
        yield HFModel.load(job.files, job.options.dtype, job.packed)
        return
    engine = VLLMModel(job.files, job.options.dtype, job.longest)
    try:
        yield engine
    finally:
        engine.close()


def _measure_windows(
    job: _Job, scorer: HFModel | VLLMModel, original: HFModel | None
) -> tuple[Perplexity | None, KLDivergence | None]:
    """Perplexity and kl, as far as asked for; kl brings the other along in one pass."""
    tokens = sum(window.scored for window in job.windows)
    if not job.windows:
        return None, None
    if original is None or "kl" not in job.options.tasks or not isinstance(scorer, HFModel):
        return _measure_perplexity(job, scorer, tokens), None
    pairs, seconds = job.score("kl", job.windows, lambda window: scorer.compare(original, window))
    kls = [pair.kl for pair in pairs]
    kl = KLDivergence(
        kl=fmean(kls),
        kl_stderr=standard_error(kls),
        top1_agreement=fmean(pair.agreement for pair in pairs),
        reference=job.reference_name,
        reference_perplexity=perplexity(
            [pair.reference_nll for pair in pairs], tokens, seconds
        ).perplexity,
        windows=len(pairs),
        tokens=tokens,
        seconds=seconds,
        reference_sha256=weights_sha256(job.reference.source) if job.reference else None,
    )
    if "perplexity" not in job.options.tasks:
        return None, kl
    return perplexity([pair.nll for pair in pairs], tokens, seconds), kl


def _measure_perplexity(job: _Job, scorer: Scorer, tokens: int) -> Perplexity:
    nlls, seconds = job.score(
        "perplexity", job.windows, lambda window: -scorer.log_likelihoods(window).mean().item()
    )
    return perplexity(nlls, tokens, seconds)


def _measure_lines(job: _Job, scorer: Scorer, original: HFModel | None) -> LastWord:
    correct, seconds = job.score("lambada", job.lines, scorer.is_likeliest)
    paired = None
    if original is not None:
        theirs, _ = job.score("lambada, original", job.reference_lines, original.is_likeliest)
        paired = pair_last_words(correct, theirs, job.reference_name)
    return last_word(correct, seconds, paired)
