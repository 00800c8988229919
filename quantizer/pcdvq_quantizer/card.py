"""The model card of a checkpoint."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from jinja2 import Environment, StrictUndefined
from pcdvq_kernels.errors import printable
from pcdvq_kernels.vptq.checkpoint import VPTQCheckpoint

from pcdvq_quantizer.checkpoints import AnyCheckpoint, open_any_checkpoint
from pcdvq_quantizer.codecs import describe_codecs
from pcdvq_quantizer.contents import README
from pcdvq_quantizer.evaluation.report import EvaluationReport
from pcdvq_quantizer.files import whole_file
from pcdvq_quantizer.inspection import describe_checkpoint, describe_left
from pcdvq_quantizer.markup import fenced, plain
from pcdvq_quantizer.record import RunRecord, read_run
from pcdvq_quantizer.redaction import redacted

MIB = 2**20
TEMPLATE = """---
{{ card_data }}
---

# {{ model | plain }}, {{ method.name }}, linear layers at {{ bits }} bits per weight

{{ model | plain }} quantized with [{{ method.name }}]({{ method.paper }}) for vLLM:

{% for line in codecs %}- {{ line | plain }}
{% endfor %}
| | |
| --- | --- |
| quantized | {{ rate | plain }} |
| counted in bits per weight | {{ method.counted }} |
| codebooks | {{ codebooks | plain }} |
| size of quantized layers | {{ packed_mib }} MiB ({{ dense_mib }} MiB at 16 bits per weight) |
| size of all tensors | {{ mib }} MiB |
| left unquantized | {{ skipped | plain }} |

```bash
pip install vllm-pcdvq
vllm serve <this directory or repository>{{ method.options }}
```
{% if commands %}
Made with

{{ commands }}
{% endif %}{% if figures %}
| model | measure | value | +- | of |
| --- | --- | --- | --- | --- |
{% for row in figures %}| {{ row | map("plain") | join(" | ") }} |
{% endfor %}
(`pcdvq eval`; +- is one standard error.)
{% endif %}"""


class _Method(NamedTuple):
    """What the card says of a method; `options` are of `vllm serve`."""

    name: str
    paper: str
    counted: str
    options: str


PCDVQ = _Method(
    "PCDVQ",
    "https://arxiv.org/abs/2506.05432",
    "codes, row scales, signs, codebooks",
    " --quantization pcdvq",
)
VPTQ = _Method(
    "VPTQ",
    "https://arxiv.org/abs/2409.17066",
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
    record = read_run(directory)
    source = _public(record.model or directory.resolve().name)
    base_model = source if "/" in source else None
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=[method.name.lower(), "quantized"],
    )
    layers = checkpoint.layers.values()
    commands = list(_commands(record))
    environment = Environment(undefined=StrictUndefined, keep_trailing_newline=True)
    environment.filters["plain"] = plain
    card = environment.from_string(TEMPLATE).render(
        card_data=data.to_yaml(),
        model=Path(source).name,
        method=method,
        bits=f"{checkpoint.bits_per_weight:.2f}",
        codecs=_codecs(checkpoint),
        rate=describe_checkpoint(checkpoint),
        codebooks=", ".join(checkpoint.codebooks),
        packed_mib=f"{sum(layer.bytes for layer in layers) / MIB:.1f}",
        dense_mib=f"{sum(2 * layer.weights for layer in layers) / MIB:.1f}",
        mib=f"{sum(tensor.bytes for tensor in checkpoint.tensors.values()) / MIB:.1f}",
        skipped=", ".join(describe_left(checkpoint)) or "none",
        commands=fenced(commands, "bash") if commands else "",
        figures=[row for file in evaluations for row in _figures(EvaluationReport.read(file))],
    )
    with whole_file(directory / README) as scratch:
        scratch.write_text(card.rstrip() + "\n", encoding="utf-8")


def _codecs(checkpoint: AnyCheckpoint) -> list[str]:
    """What the codes of `checkpoint` stand for."""
    if isinstance(checkpoint, VPTQCheckpoint):
        return ["vectors of weights are stored as the index of a centroid of their layer."]
    return describe_codecs(checkpoint.config.codebooks.values())


def _public(name: str) -> str:
    """A hub id as it is, the last part of a path: the others are nobody's business."""
    try:
        validate_repo_id(name)
        is_id = "/" in name and not os.path.lexists(name)
    except HFValidationError:
        is_id = False
    return name if is_id else Path(name).name or "MODEL"


def _commands(record: RunRecord) -> Iterator[str]:
    """What to type to make the checkpoint that `record` is about again, as far as it is known."""
    if record.options:
        yield _command(["quantize", _public(record.model or "MODEL"), "OUT"], record.options)
    if record.finetune:
        yield _command(["finetune", "OUT", "OUT"], record.finetune.options) + " --overwrite"


def _command(arguments: list[str], options: dict[str, Any]) -> str:
    """A `pcdvq` command with all its options: defaults may change."""
    words = ["pcdvq", *arguments]
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] * value
        elif isinstance(value, list):
            words += [word for each in value for word in (flag, str(each))]
        elif value is not None:
            words += [flag, f"{value:g}" if isinstance(value, float) else _public(str(value))]
    return shlex.join(printable(word) for word in redacted(words))


def _figures(report: EvaluationReport) -> Iterator[tuple[str, ...]]:
    for row in report.rows():
        yield (_public(report.model), *row)
