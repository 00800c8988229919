"""The model card of a checkpoint."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData
from pcdvq_kernels.checkpoint import open_checkpoint

from pcdvq_quantizer.inspection import describe_rate
from pcdvq_quantizer.sources import Source

TEMPLATE = """---
{{ card_data }}
---

# {{ model }}, PCDVQ {{ bits }} bits per weight

{{ model }} quantized with [PCDVQ](https://arxiv.org/abs/2506.05432) for vLLM: groups of weights
are stored as a direction index and a magnitude index.

| | |
| --- | --- |
| quantized | {{ rate }} |
| counted in bits per weight | codes, row scales, signs, codebooks |
| codebooks | {{ codebooks }} |
| size of all tensors | {{ mib }} MiB |
| left unquantized | {{ skipped }} |

```bash
pip install vllm-pcdvq
vllm serve <this directory or repository> --quantization pcdvq
```
"""


def write_model_card(directory: Path, source: Source) -> None:
    """Write README.md for the checkpoint in `directory`, with figures read from its files."""
    checkpoint = open_checkpoint(directory)
    base_model = source.name if source.name.count("/") == 1 else None
    data = ModelCardData(
        base_model=base_model,
        base_model_relation="quantized" if base_model else None,
        library_name="vllm",
        pipeline_tag="text-generation",
        tags=["pcdvq", "quantized"],
    )
    card = ModelCard.from_template(
        data,
        template_str=TEMPLATE,
        model=Path(source.name).name,
        bits=f"{checkpoint.bits_per_weight:.2f}",
        rate=describe_rate(checkpoint),
        codebooks=", ".join(checkpoint.codebooks),
        mib=f"{sum(tensor.bytes for tensor in checkpoint.tensors.values()) / 2**20:.1f}",
        skipped=", ".join(checkpoint.config.modules_to_not_convert) or "none",
    )
    card.save(directory / "README.md")
