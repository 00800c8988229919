"""What an evaluation found, and how it was made."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pcdvq_kernels.checkpoint import read_json_bytes
from pcdvq_kernels.errors import PCDVQError
from pydantic import TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table

from pcdvq_quantizer.evaluation.chat import ChatFigures
from pcdvq_quantizer.evaluation.data import DataFile
from pcdvq_quantizer.evaluation.scores import Accuracy, KLDivergence, Perplexity

Row = tuple[str, str, str, str]  # measure, value, standard error, of what
PACKAGES = ("vllm-pcdvq", "torch", "transformers", "vllm")


@dataclass(frozen=True)
class Protocol:
    """How it was measured; None for what was not.

    Attributes:
        text: of perplexity and kl.
        window: tokens per window, all but the first scored.
        windows: number of windows.
        lambada: of lambada and cloze.
        lines: number of lines.
        bos: whether a BOS token came before each window and line.
        requests: of chat.
        answer_tokens: most tokens of an answer.
        chat_template: whether requests were put into the model's own; else they were plain text.
    """

    text: DataFile | None
    window: int | None
    windows: int | None
    lambada: DataFile | None
    lines: int | None
    bos: bool
    requests: DataFile | None = None
    answer_tokens: int | None = None
    chat_template: bool | None = None


@dataclass(frozen=True)
class EvaluationReport:
    """All figures of one evaluation; `None` for a task that was not asked for.

    Attributes:
        model: what the user called it.
        backend: `hf` or `vllm`.
        dtype: computed in.
        weights: `packed` (PCDVQ kernels), or `dense`.
        seconds: in all, loading included.
        versions: of the packages that took part.
        model_sha256: of the model's weights, as `identity.weights_sha256` has it; None in files of
            before that was recorded.
    """

    model: str
    backend: str
    dtype: str
    weights: str
    protocol: Protocol
    perplexity: Perplexity | None
    kl: KLDivergence | None
    lambada: Accuracy | None
    seconds: float
    versions: dict[str, str]
    model_sha256: str | None = None
    chat: ChatFigures | None = None
    cloze: Accuracy | None = None
    patterns: Accuracy | None = None

    @classmethod
    def is_in(cls, file: Path) -> bool:
        """Whether `file` holds such a report."""
        try:
            cls.read(file)
        except PCDVQError:
            return False
        return True

    @classmethod
    def read(cls, file: Path) -> EvaluationReport:
        """The report that `pcdvq eval --json` wrote to `file`.

        Raises:
            PCDVQError: it cannot be read or is something else.
        """
        try:
            return TypeAdapter(cls).validate_json(read_json_bytes(file))
        except OSError as error:
            raise PCDVQError(
                f"--eval: cannot read {file} ({error.strerror}); name a file of pcdvq eval --json"
            ) from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PCDVQError(
                f"--eval: {file} was not written by pcdvq eval --json ({where}: {first['msg']})"
            ) from None

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    def print_table(self, console: Console) -> None:
        table = Table(box=None, padding=(0, 2, 0, 0))
        table.add_column("measure")
        table.add_column("value", justify="right", no_wrap=True)
        table.add_column("+-", justify="right", no_wrap=True)
        table.add_column("of", overflow="fold")
        for row in (*self.rows(), *self.kind_rows()):
            table.add_row(*row)
        console.print(table)
        bos = ", BOS before each" if self.protocol.bos else ""
        console.print(
            f"{self.model}: {self.backend}, {self.dtype}, {self.weights} weights{bos}, "
            f"{self.seconds:.0f} s; +- is one standard error",
            highlight=False,
            soft_wrap=True,
        )

    def rows(self) -> list[Row]:
        """(measure, value, standard error, of what) of every figure."""
        rows: list[Row] = []
        text, lines = self.protocol.text, self.protocol.lambada
        windows = f"{self.protocol.windows} windows of {self.protocol.window} tokens"
        if (found := self.perplexity) and text:
            error = _error(found.perplexity_stderr, 3)
            rows.append(("perplexity", f"{found.perplexity:.3f}", error, f"{text.file}, {windows}"))
        if (kl := self.kl) and text:
            of = f"{text.file}, {windows}; from {kl.reference}"
            rows.append(("KL, nats", f"{kl.kl:.5f}", _error(kl.kl_stderr, 5), of))
            rows.append(("same top token", f"{100 * kl.top1_agreement:.2f} %", "", "as above"))
            rows.append(("original's perplexity", f"{kl.reference_perplexity:.3f}", "", "as above"))
        rows += self._chat_rows()
        for measure, share, file in (
            ("last word", self.lambada, lines and lines.file),
            ("last word of four", self.cloze, lines and lines.file),
            ("patterns, one of four", self.patterns, "generated"),
        ):
            if share and file:
                rows += _accuracy_rows(measure, share, file)
        return rows

    def _chat_rows(self) -> Iterator[Row]:
        chat, requests = self.chat, self.protocol.requests
        if chat is None or requests is None:
            return
        found, least = chat.all, "at least " if chat.bound else ""
        template = "" if self.protocol.chat_template else ", without a chat template"
        of = f"{requests.file}, {found.answers} answers of {chat.reference}{template}"
        yield "chat KL, nats", f"{least}{found.kl:.4f}", _error(found.kl_stderr, 4), of
        first = _error(found.first_kl_stderr, 4)
        yield "  of first tokens", f"{least}{found.first_kl:.4f}", first, "as above"
        yield "  same top token", f"{100 * found.agreement:.1f} %", "", "as above"

    def kind_rows(self) -> list[Row]:
        """The same of answers by kind of request."""
        kinds = self.chat.kinds if self.chat else {}
        return [
            (
                f"  {kind}",
                f"{found.kl:.4f}",
                _error(found.kl_stderr, 4),
                f"{found.answers} answers; first tokens {found.first_kl:.4f}, same top token "
                f"{100 * found.agreement:.1f} %",
            )
            for kind, found in kinds.items()
        ]


def _accuracy_rows(measure: str, found: Accuracy, file: str) -> Iterator[Row]:
    error = f"{100 * found.accuracy_stderr:.1f} %"
    yield measure, f"{100 * found.accuracy:.1f} %", error, f"{file}, {found.lines} lines"
    if pair := found.paired:
        yield (
            "less the original's",
            f"{100 * pair.difference:+.2f} %",
            f"{100 * pair.difference_stderr:.2f} %",
            f"{100 * pair.reference_accuracy:.1f} %, same lines; {pair.only_model} "
            f"right only here, {pair.only_reference} only there",
        )


def installed_versions() -> dict[str, str]:
    """Versions of `PACKAGES`, as far as they are installed."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _error(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
