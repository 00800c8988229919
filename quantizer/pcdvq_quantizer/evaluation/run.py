"""One evaluation: a model and data in, a report out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Protocol as Interface
from typing import TypeVar

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from pcdvq_quantizer.chat import Chat, Request
from pcdvq_quantizer.evaluation.chat import (
    ANSWER_TOKENS,
    BATCH,
    AnswerFigures,
    ChatFigures,
    answer_sequences,
    figures_by_kind,
    what_is_odd,
)
from pcdvq_quantizer.evaluation.choices import PATTERNS, make_patterns, read_cloze
from pcdvq_quantizer.evaluation.data import (
    DataFile,
    Sequence,
    read_passages,
    read_requests,
    read_windows,
)
from pcdvq_quantizer.evaluation.files import ModelFiles, find_reference
from pcdvq_quantizer.evaluation.hf_model import HFModel
from pcdvq_quantizer.evaluation.options import EvaluateOptions
from pcdvq_quantizer.evaluation.report import EvaluationReport, Protocol, installed_versions
from pcdvq_quantizer.evaluation.scores import (
    Accuracy,
    KLDivergence,
    Perplexity,
    accuracy,
    pair,
    perplexity,
    standard_error,
)
from pcdvq_quantizer.evaluation.vllm_model import VLLMModel
from pcdvq_quantizer.identity import weights_sha256
from pcdvq_quantizer.limits import check_vocabulary
from pcdvq_quantizer.progress import Progress

Score = TypeVar("Score")
Item = TypeVar("Item")


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
        chat = _measure_answers(job, scorer, original) if job.prompts and original else None
        shares = {each.task: _measure_items(job, each, scorer, original) for each in job.items}
        return EvaluationReport(
            model=model,
            backend=options.backend,
            dtype=scorer.dtype,
            weights="packed" if job.packed else "dense",
            protocol=job.protocol(),
            perplexity=found,
            kl=kl,
            lambada=shares.get("lambada"),
            seconds=round(time.monotonic() - started, 2),
            versions=installed_versions(),
            model_sha256=weights_sha256(job.files.source),
            chat=chat,
            cloze=shares.get("cloze"),
            patterns=shares.get("patterns"),
        )


@dataclass(frozen=True)
class _Items:
    """Lines that a model has right or wrong.

    Attributes:
        task: what they are measured for.
        lines: the sequences of each line: one whose end is to be predicted, or one for each option,
            the right one first.
        reference_lines: the same as the reference's tokenizer cuts them; none without one.
    """

    task: str
    lines: list[list[Sequence]]
    reference_lines: list[list[Sequence]]


@dataclass(frozen=True)
class _Prompts:
    """Requests, as the original is asked them."""

    source: DataFile
    requests: list[Request]
    chat: Chat
    prompts: list[list[int]]


@dataclass(frozen=True)
class _Job:
    """Everything that is known before weights are loaded."""

    files: ModelFiles
    reference: ModelFiles | None
    options: EvaluateOptions
    text: DataFile | None
    windows: list[Sequence]
    lambada: DataFile | None
    items: list[_Items]
    prompts: _Prompts | None
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
        lengths = [len(window.tokens) for window in self.windows]
        for each in self.items:
            for line in (*each.lines, *each.reference_lines):
                lengths += [len(sequence.tokens) for sequence in line]
        if self.prompts:
            lengths += [len(prompt) + ANSWER_TOKENS for prompt in self.prompts.prompts]
        return max(lengths)

    def protocol(self) -> Protocol:
        return Protocol(
            text=self.text,
            window=self.windows[0].scored + 1 if self.text else None,
            windows=len(self.windows) if self.text else None,
            lambada=self.lambada,
            lines=len(self.items[0].lines) if self.lambada else None,
            bos=self.options.bos,
            requests=self.prompts.source if self.prompts else None,
            answer_tokens=ANSWER_TOKENS if self.prompts else None,
            chat_template=self.prompts.chat.has_template if self.prompts else None,
        )

    def score(
        self, what: str, items: list[Item], score: Callable[[Item], Score]
    ) -> tuple[list[Score], float]:
        """The scores of `items`, and the seconds they took."""
        started = time.monotonic()
        scores = []
        self.progress.start(what, len(items))
        for item in items:
            scores.append(score(item))
            self.progress.advance(1)
        return scores, round(time.monotonic() - started, 2)


def _read_job(model: str, options: EvaluateOptions, progress: Progress) -> _Job:
    files = ModelFiles.find(model)
    reference = find_reference(files, options.reference) if options.compares else None
    if reference is not None and {"kl", "chat"} & set(options.tasks):
        check_vocabulary(files.limits.vocabulary, reference.limits.vocabulary)
    tokenizer = files.tokenizer()
    text: DataFile | None = None
    windows: list[Sequence] = []
    models = [each for each in (files, reference) if each]
    if options.reads_text and options.text:
        window = options.window
        spare = int(options.bos) + (options.backend == "vllm")  # which generates a token, too
        for each in models:
            window = each.limits.fit_window(window, "--window", spare, progress.note)
        text, windows = read_windows(options.text, tokenizer, window, options.windows, options.bos)
    theirs = reference.tokenizer() if reference is not None else None
    lambada, items = _read_items(options, tokenizer, theirs)
    prompts = _read_prompts(options, theirs, progress) if theirs is not None else None
    job = _Job(files, reference, options, text, windows, lambada, items, prompts, progress)
    _check_tokens(job, tokenizer, theirs)
    return job


def _check_tokens(
    job: _Job, tokenizer: PreTrainedTokenizerBase, theirs: PreTrainedTokenizerBase | None
) -> None:
    """Raise PCDVQError if a model cannot read what it is given, as its tokenizer has cut it."""
    lines = [line for items in job.items for line in items.lines]
    for each in filter(None, (job.files, job.reference)):
        each.check_length(job.longest)
        each.limits.check_tokens(_tokens(job.windows), tokenizer, job.files.name)
    job.files.limits.check_tokens(_tokens(chain(*lines)), tokenizer, job.files.name)
    if job.reference is None or theirs is None:
        return
    lines = [line for items in job.items for line in items.reference_lines]
    job.reference.limits.check_tokens(_tokens(chain(*lines)), theirs, job.reference.name)
    for each in (job.files, job.reference):
        prompts = job.prompts.prompts if job.prompts else []
        each.limits.check_tokens(prompts, theirs, job.reference.name)


def _tokens(sequences: Iterable[Sequence]) -> Iterator[list[int]]:
    return (sequence.tokens.tolist() for sequence in sequences)


def _read_prompts(
    options: EvaluateOptions, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> _Prompts | None:
    """The requests in the template of the reference's `tokenizer`, None if they are not needed."""
    if "chat" not in options.tasks:
        return None
    source, requests = read_requests(options.requests, options.limit)
    chat = Chat(tokenizer, progress.note)
    prompts = [chat.prompt(request.text) for request in requests]
    return _Prompts(source, requests, chat, prompts)


def _read_items(
    options: EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    reference: PreTrainedTokenizerBase | None,
) -> tuple[DataFile | None, list[_Items]]:
    """The file of the tasks that have one, and the items of each task."""
    source: DataFile | None = None
    found: list[tuple[str, Callable[[PreTrainedTokenizerBase], list[list[Sequence]]]]] = []
    if "lambada" in options.tasks and options.lambada:
        source, passages = read_passages(options.lambada, options.limit)
        found.append(("lambada", lambda cut: [[p.sequence(cut, options.bos)] for p in passages]))
    if "cloze" in options.tasks and options.lambada:
        source, cloze = read_cloze(options.lambada, options.limit)
        found.append(("cloze", lambda cut: [c.sequences(cut, options.bos) for c in cloze]))
    if "patterns" in options.tasks:
        patterns = make_patterns(min(options.limit, PATTERNS))
        found.append(("patterns", lambda cut: [p.sequences(cut, options.bos) for p in patterns]))
    items = [
        _Items(task, cut(tokenizer), cut(reference) if reference else []) for task, cut in found
    ]
    return source, items


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
    kls = [pair.kl.mean().item() for pair in pairs]
    kl = KLDivergence(
        kl=fmean(kls),
        kl_stderr=standard_error(kls),
        top1_agreement=fmean(pair.agreement.mean().item() for pair in pairs),
        reference=job.reference_name,
        reference_perplexity=perplexity(
            [pair.reference_nll.mean().item() for pair in pairs], tokens, seconds
        ).perplexity,
        windows=len(pairs),
        tokens=tokens,
        seconds=seconds,
        reference_sha256=weights_sha256(job.reference.source) if job.reference else None,
    )
    if "perplexity" not in job.options.tasks:
        return None, kl
    return perplexity([pair.nll.mean().item() for pair in pairs], tokens, seconds), kl


def _measure_perplexity(job: _Job, scorer: Scorer, tokens: int) -> Perplexity:
    nlls, seconds = job.score(
        "perplexity", job.windows, lambda window: -scorer.log_likelihoods(window).mean().item()
    )
    return perplexity(nlls, tokens, seconds)


def _measure_answers(job: _Job, scorer: HFModel | VLLMModel, original: HFModel) -> ChatFigures:
    """The original's answers, then the model on them."""
    asked = job.prompts
    assert asked is not None
    batches = [asked.prompts[i : i + BATCH] for i in range(0, len(asked.prompts), BATCH)]
    found, answering = job.score(
        "answers of the original",
        batches,
        lambda batch: original.answers(batch, asked.chat.ends, ANSWER_TOKENS),
    )
    answers = [answer for batch in found for answer in batch]
    if odd := what_is_odd(answers, asked.chat.ends):
        job.progress.note(odd)
    sequences = answer_sequences(asked.prompts, answers)
    pairs, seconds = job.score("chat", sequences, lambda each: scorer.compare(original, each))
    return ChatFigures(
        all=AnswerFigures.of(pairs),
        kinds=figures_by_kind([request.kind for request in asked.requests], pairs),
        reference=job.reference_name,
        bound=isinstance(scorer, VLLMModel) and not scorer.knows_all,
        seconds=round(answering + seconds, 2),
    )


def _measure_items(job: _Job, items: _Items, scorer: Scorer, original: HFModel | None) -> Accuracy:
    correct, seconds = job.score(items.task, items.lines, lambda line: _is_right(scorer, line))
    paired = None
    if original is not None:
        theirs, _ = job.score(
            f"{items.task}, original", items.reference_lines, lambda line: _is_right(original, line)
        )
        paired = pair(correct, theirs, job.reference_name)
    return accuracy(correct, seconds, paired)


def _is_right(scorer: Scorer, line: list[Sequence]) -> bool:
    """Whether the only sequence's end is predicted, or the first one's is the likeliest."""
    if len(line) == 1:
        return scorer.is_likeliest(line[0])
    sums = [scorer.log_likelihoods(option).sum().item() for option in line]
    return sums[0] > max(sums[1:])
