"""What to measure and how."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pcdvq_kernels.errors import PCDVQError

TASKS = ("perplexity", "kl", "lambada", "chat", "cloze", "patterns")
BACKENDS = ("hf", "vllm")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of one evaluation, checked when made.

    Attributes:
        tasks: some of `TASKS`.
        text: UTF-8 text file for perplexity and kl.
        lambada: JSONL file for lambada and cloze: a field `text` per line.
        requests: JSONL file for chat: a field `text` per line and, if wanted, `kind` and `id`; None
            is the requests of this package.
        windows: number of windows, from the beginning of the text.
        window: tokens per window, fewer where the model reads fewer.
        limit: number of lines of `lambada`, from its beginning, of requests, and of patterns.
        bos: put the beginning-of-sequence token before every window and line.
        reference: the original model, for kl and chat and to compare lambada, cloze and patterns
            item by item; None: for kl and chat the one the checkpoint's report names, and the
            others are compared only where one of these is asked for.
        backend: `hf` (transformers) or `vllm`.
        dtype: to compute in; `auto` is fp32 on a CPU and the model's own on a GPU for `hf`, vLLM's
            choice for `vllm`.
        packed: compute on the packed codes where `hf` would otherwise dequantize them first.
    """

    tasks: tuple[str, ...] = ("perplexity",)
    text: Path | None = None
    lambada: Path | None = None
    requests: Path | None = None
    windows: int = 40
    window: int = 2048
    limit: int = 500
    bos: bool = False
    reference: str | None = None
    backend: str = "hf"
    dtype: str = "auto"
    packed: bool = False

    def __post_init__(self) -> None:
        """Raise PCDVQError for options that name nothing or do not go together."""
        for value, offered in (
            *((task, TASKS) for task in self.tasks or ("",)),
            (self.backend, BACKENDS),
            (self.dtype, DTYPES),
        ):
            if value not in offered:
                raise PCDVQError(f"{value!r} is not offered; choose from {', '.join(offered)}")
        for option, number, least in (
            ("windows", self.windows, 1),
            ("window", self.window, 2),
            ("limit", self.limit, 1),
        ):
            if number < least:
                raise PCDVQError(f"--{option} is {number}; give {least} or more")
        if self.reads_text and self.text is None:
            raise PCDVQError("perplexity and kl read a text; name it with --text FILE")
        if self.reads_passages and self.lambada is None:
            raise PCDVQError("lambada and cloze read a JSONL file; name it with --lambada FILE")
        if "kl" in self.tasks and self.backend != "hf":
            raise PCDVQError("kl needs whole distributions; measure it with --backend hf")

    @property
    def reads_text(self) -> bool:
        return "perplexity" in self.tasks or "kl" in self.tasks

    @property
    def reads_passages(self) -> bool:
        return "lambada" in self.tasks or "cloze" in self.tasks

    @property
    def compares(self) -> bool:
        """Whether the original model is measured too."""
        by_item = {"lambada", "cloze", "patterns"}.intersection(self.tasks)
        needed = {"kl", "chat"}.intersection(self.tasks)
        return bool(needed or (by_item and self.reference is not None))
