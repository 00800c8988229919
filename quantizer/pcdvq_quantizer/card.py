"""The model card of a checkpoint."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCard, ModelCardData
from pcdvq_kernels.checkpoint import REPORT_FILE, read_json
from pcdvq_kernels.vptq.checkpoint import VPTQCheckpoint

from pcdvq_quantizer.checkpoints import open_any_checkpoint
from pcdvq_quantizer.evaluation.report import EvaluationReport
from pcdvq_quantizer.inspection import describe_checkpoint, describe_left

MIB = 2**20
TEMPLATE = """---
{{ card_data }}
---

# {{ model }}, {{ method.name }}, linear layers at {{ bits }} bits per weight

{{ model }} quantized with [{{ method.name }}]({{ method.paper }}) for vLLM: {{ method.codes }}

| | |
| --- | --- |
| quantized | {{ rate }} |
| counted in bits per weight | {{ method.counted }} |
| codebooks | {{ codebooks }} |
| size of quantized layers | {{ packed_mib }} MiB ({{ dense_mib }} MiB at 16 bits per weight) |
| size of all tensors | {{ mib }} MiB |
| left unquantized | {{ skipped }} |

```bash
pip install vllm-pcdvq
vllm serve <this directory or repository>{{ method.options }}
```
{% if commands %}
Made with

```bash
{{ commands }}
```
{% endif %}{% if figures %}
| model | measure | value | +- | of |
| --- | --- | --- | --- | --- |
{% for row in figures %}| {{ row | join(" | ") }} |
{% endfor %}
(`pcdvq eval`; +- is one standard error.)
{% endif %}"""


class _Method(NamedTuple):
    """What the card says of a method; `options` are of `vllm serve`."""

    name: str
    paper: str
    codes: str
    counted: str
    options: str


PCDVQ = _Method(
    "PCDVQ",
    "https://arxiv.org/abs/2506.05432",
    "groups of weights\nare stored as a direction index and a magnitude index.",
    "codes, row scales, signs, codebooks",
    " --quantization pcdvq",
)
VPTQ = _Method(
    "VPTQ",
    "https://arxiv.org/abs/2409.17066",
    "vectors of weights\nare stored as the index of a centroid of their layer.",
    VPTQCheckpoint.counted,
    "",
)


def write_model_card(directory: Path, evaluations: Sequence[Path] = ()) -> None:
    """Write README.md for the checkpoint in `directory`, with figures read from its files.

    Args:
        directory: a whole checkpoint.
        evaluations: files of `pcdvq eval --json`, whose figures the card then has too.

    Raises:
        PCDVQError: the checkpoint or a file is not what it should be.
    """
    checkpoint = open_any_checkpoint(directory)
    method = VPTQ if isinstance(checkpoint, VPTQCheckpoint) else PCDVQ
    report = directory / REPORT_FILE
    record = read_json(report) if report.exists() else {}
    source = _public(record.get("model", directory.absolute().name))
    base_model = source if "/" in source else None
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[method.name.lower(), "quantized"],
    )
    layers = checkpoint.layers.values()
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model=Path(source).name,
        method=method,
        bits=f"{checkpoint.bits_per_weight:.2f}",
        rate=describe_checkpoint(checkpoint),
        codebooks=", ".join(checkpoint.codebooks),
        packed_mib=f"{sum(layer.bytes for layer in layers) / MIB:.1f}",
        dense_mib=f"{sum(2 * layer.weights for layer in layers) / MIB:.1f}",
        mib=f"{sum(tensor.bytes for tensor in checkpoint.tensors.values()) / MIB:.1f}",
        skipped=", ".join(describe_left(checkpoint)) or "none",
        commands="\n".join(_commands(record)),
        figures=[row for file in evaluations for row in _figures(EvaluationReport.read(file))],
    )
    card.save(directory / "README.md")


def _public(name: str) -> str:
    """A hub id as it is, the last part of a path: the others are nobody's business."""
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return name if is_id and not Path(name).exists() else Path(name).name


def _commands(record: dict[str, Any]) -> Iterator[str]:
    """What to type to make the checkpoint that `record` is about again, as far as it is known."""
    if options := record.get("options"):
        yield _command(["quantize", _public(record["model"]), "OUT"], options)
    if tuning := record.get("finetune"):
        yield _command(["finetune", "OUT", "OUT"], tuning["options"]) + " --overwrite"


def _command(arguments: list[str], options: dict[str, Any]) -> str:
    """A `pcdvq` command with all its options: defaults may change."""
    words = ["pcdvq", *arguments]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        elif isinstance(value, list):
            words += [word for each in value for word in (flag, each)]
        elif value is not None:
            words += [flag, f"{value:g}" if isinstance(value, float) else _public(str(value))]
    return shlex.join(words)


def _figures(report: EvaluationReport) -> Iterator[tuple[str, ...]]:
    for row in report.rows():
        yield (_public(report.model), *row)
