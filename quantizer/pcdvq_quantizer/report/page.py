"""The page itself."""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from pcdvq_quantizer.codebooks import codebooks_at_hand
from pcdvq_quantizer.codecs import describe_codecs
from pcdvq_quantizer.files import check_page, write_page
from pcdvq_quantizer.inspection import describe_checkpoint, figure
from pcdvq_quantizer.report import plots
from pcdvq_quantizer.report.evaluations import Evaluations, read_evaluations
from pcdvq_quantizer.report.record import CheckpointRecord, read_record
from pcdvq_quantizer.selection import describe_skipped

GENERATOR = "pcdvq report"
UNKNOWN = "a model without a name"
TEMPLATE = "page.html.j2"


def write_report(
    directory: Path, output: Path | None = None, evaluations: tuple[Path, ...] = ()
) -> Path:
    """Write the page about the checkpoint in `directory`; the same input gives the same bytes.

    Args:
        directory: the checkpoint.
        output: the file, by default `directory` with `.html` appended. A page of an earlier call
            is replaced, no other file.
        evaluations: files of `pcdvq eval --json`, of this and of other models.

    Returns:
        `output`.

    Raises:
        PCDVQError: the checkpoint, its record of errors or an evaluation cannot be read, or
            `output` cannot be written or is something else.
    """
    directory = Path(os.path.abspath(directory))
    record = read_record(directory)
    output = output or directory.with_name(f"{directory.name}.html")
    place = check_page(output, "--output", f"page of {GENERATOR}", _is_page)
    page = _render(record, read_evaluations(list(evaluations), record.run))
    write_page(place, page, "--output")
    return output


def _is_page(path: Path) -> bool:
    with path.open("rb") as file:
        return f'<meta name="generator" content="{GENERATOR}">'.encode() in file.read(1000)


def _render(record: CheckpointRecord, evaluations: Evaluations | None) -> str:
    checkpoint = record.checkpoint
    codebooks = codebooks_at_hand()
    original = record.run.model or UNKNOWN
    numbered = bool(record.numbered)
    fields: dict[str, Any] = {
        "generator": GENERATOR,
        "title": f"{checkpoint.directory.name}: {Path(original).name} in PCDVQ",
        "directory": checkpoint.directory.name,
        "rate": describe_checkpoint(checkpoint),
        "facts": _facts(record),
        "errors": numbered and Markup(plots.plot_errors(record)),
        "has_output_error": all(each.error.output is not None for each in record.numbered),
        "rates": numbered and Markup(plots.plot_rates(record)),
        "codecs": describe_codecs(checkpoint.config.codebooks.values()),
        "direction_share": f"{100 * record.direction_share:.1f} %",
        "directions": numbered and Markup(plots.plot_directions(record)),
        "distortion": Markup(plots.plot_distortion(record, codebooks)),
        "e8_missing": not any(book.codebook.spec.codec == "e8" for book in codebooks),
        "weight_error": figure(record.weight_error, 4),
        "figure": figure,
        "bits": f"{checkpoint.bits_per_weight:.3f}",
        "perplexities": evaluations and Markup(plots.plot_perplexities(evaluations)),
        "protocol": evaluations and evaluations.protocol,
        "measured": [*evaluations.references, *evaluations.quantized] if evaluations else [],
        "unanswered": evaluations and not any(each.answers for each in evaluations.quantized),
        "layers": record.layers,
        "skipped": describe_skipped(record.run.skipped),
    }
    source = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined)
    return environment.from_string(source).render(fields) + "\n"


def _facts(record: CheckpointRecord) -> list[tuple[str, str]]:
    checkpoint, mib = record.checkpoint, 2**20
    books = checkpoint.config.codebooks.items()
    facts = [
        ("original", record.run.model or UNKNOWN),
        ("codebooks", ", ".join(f"{id} ({spec.bits:g} bits)" for id, spec in books)),
        ("bits per weight, linear layers", f"{checkpoint.bits_per_weight:.3f}"),
    ]
    if checkpoint.config.embeddings:
        bits = f"{checkpoint.bits_per_weight_with_embeddings:.3f}"
        facts.append(("bits per weight, with embeddings", bits))
    sizes = f"{record.original_bytes / mib:.1f} MiB", f"{record.stored_bytes / mib:.1f} MiB"
    facts += [("size at 16 bits", sizes[0]), ("size now", sizes[1])]
    return facts + [(name.replace("_", " "), f"{x}") for name, x in record.run.options.items()]
