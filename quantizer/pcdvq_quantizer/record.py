"""What a run has recorded about itself in a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pcdvq_kernels.checkpoint import REPORT_FILE, read_json
from pcdvq_kernels.errors import CheckpointError
from pydantic import BaseModel, Field, PositiveInt, ValidationError

from pcdvq_quantizer.layer import LayerError

# A record may be anybody's, and its names and reasons are shown.
Printable = Annotated[str, Field(pattern=r"^[ -~]{1,300}$")]


class FinetuneRecord(BaseModel):
    """What is read of the section that `pcdvq finetune` adds."""

    options: dict[str, Any] = {}


class RunRecord(BaseModel):
    """What is read of `REPORT_FILE`; nothing where there is no such file.

    Attributes:
        model: what the user called the original.
        model_sha256: of its weights, as `identity.weights_sha256` has it.
        options: of `pcdvq quantize`.
        errors: of every quantized layer.
        skipped: layers left as they were, with the reason.
        original_bytes: of all tensors of the original.
        finetune: of `pcdvq finetune`.
    """

    model: str | None = None
    model_sha256: str | None = None
    options: dict[str, Any] = {}
    errors: dict[str, LayerError] = {}
    skipped: dict[Printable, Printable] = {}
    original_bytes: PositiveInt | None = None
    finetune: FinetuneRecord | None = None


class WholeRecord(RunRecord):
    """A record that has errors."""

    errors: dict[str, LayerError]


Record = TypeVar("Record", bound=RunRecord)


def read_report(directory: Path) -> dict[str, Any]:
    """`REPORT_FILE` of the checkpoint in `directory`, {} where there is none.

    Raises:
        CheckpointError: it cannot be read.
    """
    path = directory / REPORT_FILE
    return read_json(path) if path.exists() else {}


def read_run(directory: Path) -> RunRecord:
    """What a run has recorded in `directory`.

    Raises:
        CheckpointError: the record cannot be read, or is something else.
    """
    return parse_record(RunRecord, read_report(directory), directory / REPORT_FILE)


def parse_record(kind: type[Record], report: dict[str, Any], path: Path) -> Record:
    """Check `report`, which `path` holds.

    Raises:
        CheckpointError: it is something else.
    """
    try:
        return kind.model_validate(report)
    except (ValidationError, OverflowError) as error:
        where, reason = "a number", str(error)
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            where, reason = ".".join(map(str, first["loc"])) or "the file", first["msg"]
        raise CheckpointError(
            f"{path} is not the record of a run, or not a record of this release ({where}: "
            f"{reason}). Quantize again, or delete it: it tells what was done and measured while "
            "quantizing, and nothing else"
        ) from None
