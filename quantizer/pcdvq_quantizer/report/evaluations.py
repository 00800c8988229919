"""Perplexities and answers from the files of `pcdvq eval --json`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pcdvq_kernels.checkpoint import read_quantization_config
from pcdvq_kernels.errors import CheckpointError, PCDVQError

from pcdvq_quantizer.checkpoints import open_any_checkpoint
from pcdvq_quantizer.evaluation.chat import AnswerFigures
from pcdvq_quantizer.evaluation.report import EvaluationReport
from pcdvq_quantizer.identity import weights_sha256
from pcdvq_quantizer.record import RunRecord
from pcdvq_quantizer.sources import open_source


@dataclass(frozen=True)
class Measured:
    """Perplexity of one model.

    Attributes:
        model: its name.
        perplexity: of the text of the protocol.
        stderr: its standard error.
        bits: per weight of its linear layers, None if unquantized.
        sha256: of its weights, as far as it is known.
        answers: its answers beside the original's, None if they were not measured.
    """

    model: str
    perplexity: float
    stderr: float | None
    bits: float | None
    sha256: str | None = None
    answers: AnswerFigures | None = None


@dataclass(frozen=True)
class Evaluations:
    """All models measured by one protocol, described by `protocol`; `quantized` by rising bits."""

    protocol: str
    quantized: list[Measured]
    references: list[Measured]


def read_evaluations(files: list[Path], run: RunRecord) -> Evaluations | None:
    """Read `files`, None if there are none.

    Args:
        files: as `pcdvq eval --json` writes them.
        run: names the unquantized model.

    Raises:
        PCDVQError: a file cannot be read, has no perplexity, names a model that is not there, or
            was measured in another way than the first.
    """
    reports = {file: _read(file) for file in files}
    if not reports:
        return None
    protocols = {file: _describe(report) for file, report in reports.items()}
    first = files[0]
    for file, protocol in protocols.items():
        if protocol != protocols[first]:
            raise PCDVQError(
                f"{first} was measured on {protocols[first]}, {file} on {protocol}; perplexities "
                "compare only on the same text: evaluate both alike"
            )
    measured = {
        (each.sha256 or each.model, each.bits): each for each in _measured(reports, run)
    }.values()
    quantized = sorted(
        (each for each in measured if each.bits is not None), key=lambda each: each.bits or 0
    )
    references = [each for each in measured if each.bits is None]
    return Evaluations(protocols[first], quantized, references)


def _read(file: Path) -> EvaluationReport:
    report = EvaluationReport.read(file)
    if report.perplexity is None or report.protocol.text is None:
        raise PCDVQError(
            f"--eval: {file} has no perplexity; make it with pcdvq eval --tasks perplexity"
        )
    return report


def _describe(report: EvaluationReport) -> str:
    protocol = report.protocol
    text = protocol.text
    bos = ", BOS before each" if protocol.bos else ""
    return (
        f"{protocol.windows} windows of {protocol.window} tokens of "
        f"{text and text.file} (SHA-256 {text and text.sha256[:12]}){bos}"
    )


def _measured(reports: dict[Path, EvaluationReport], run: RunRecord) -> list[Measured]:
    """One for each report; before them the originals that `kl` has measured along the way."""
    found, originals = [], []
    for file, report in reports.items():
        if figure := report.perplexity:
            bits = None if _is_original(report, run) else _find_bits(report, file)
            answers = report.chat.all if report.chat else None
            found.append(
                Measured(
                    report.model,
                    figure.perplexity,
                    figure.perplexity_stderr,
                    bits,
                    report.model_sha256,
                    answers,
                )
            )
        if kl := report.kl:
            originals.append(
                Measured(kl.reference, kl.reference_perplexity, None, None, kl.reference_sha256)
            )
    return originals + found


def _is_original(report: EvaluationReport, run: RunRecord) -> bool:
    """Whether `report` is about the model that `run` has quantized: by name only if need be."""
    if report.model_sha256 and run.model_sha256:
        return report.model_sha256 == run.model_sha256
    return run.model is not None and Path(report.model).name == Path(run.model).name


def _find_bits(report: EvaluationReport, file: Path) -> float | None:
    """Bits per weight of the model that `report` is about, found from here or beside `file`.

    Returns:
        None if it is unquantized.

    Raises:
        PCDVQError: it is in neither place.
    """
    path = Path(report.model).expanduser()
    if path.suffix == ".gguf":
        return None
    for directory in (path, file.parent / path, file.parent / path.name):
        if (directory / "config.json").is_file():
            model = open_source(str(directory))
            if report.model_sha256 in (None, weights_sha256(model)):
                quantized = read_quantization_config(directory)
                return open_any_checkpoint(directory).bits_per_weight if quantized else None
    raise CheckpointError(
        f"--eval: {file} is about {report.model}, which is neither here nor beside the file as it "
        f"was evaluated, so its bits per weight are unknown; put {path.name} there, or evaluate it "
        "again"
    )
