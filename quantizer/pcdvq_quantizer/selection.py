"""Which tensors of a model are quantized."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from pcdvq_quantizer.sources import Source

MIN_FEATURES = 8
# Output heads are left in their own precision; routers are tiny, and vLLM never quantizes them.
DEFAULT_SKIP = ("lm_head", "*.lm_head", "*.gate", "*.router", "*.shared_expert_gate")


@dataclass(frozen=True)
class Selection:
    """Result of `select_layers`.

    Attributes:
        layers: names of the linear layers to quantize, in stored order.
        skipped: matrix-shaped parameters left as they are, with the reason.
    """

    layers: list[str]
    skipped: dict[str, str]

    def skipped_lines(self) -> list[str]:
        """One line for each kind of skipped parameter; numbered ones are counted together."""
        kinds = Counter(
            (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), reason)
            for name, reason in self.skipped.items()
        )
        return [
            f"{name} ({reason})" if count == 1 else f"{name} ({count} of them: {reason})"
            for (name, reason), count in kinds.items()
        ]


def select_layers(source: Source, skip: tuple[str, ...] = DEFAULT_SKIP) -> Selection:
    """Find the linear layers of `source` that the format can hold.

    Raises:
        PCDVQError: the architecture is unknown, or nothing of it can be quantized.
    """
    architecture = ", ".join(source.config.get("architectures") or ["unknown architecture"])
    linears = _linear_names(source.config, architecture)
    layers, skipped = [], {}
    for tensor, shape in source.shapes.items():
        name, _, suffix = tensor.rpartition(".")
        if len(shape) < 2:
            continue
        if suffix != "weight" or name not in linears:
            skipped[tensor if suffix != "weight" else name] = "not a linear layer"
        elif any(fnmatchcase(name, pattern) for pattern in skip):
            skipped[name] = "skipped by name"
        elif shape[1] % 8 or min(shape) < MIN_FEATURES:
            skipped[name] = (
                f"shape {list(shape)}: input size must be a multiple of 8, both sizes >= 8"
            )
        else:
            layers.append(name)
    if not layers:
        reasons = sorted({f"{name}: {reason}" for name, reason in skipped.items()})[:3]
        raise PCDVQError(
            f"nothing to quantize in {source.name} ({architecture}); for instance "
            f"{'; '.join(reasons)}. PCDVQ quantizes the torch.nn.Linear layers of causal LMs"
        )
    return Selection(layers, skipped)


def _linear_names(config: dict[str, Any], architecture: str) -> set[str]:
    """Names of the `nn.Linear` modules of the model that `config` describes."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    try:
        hf_config = AutoConfig.for_model(config["model_type"], **fields)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(hf_config)
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise PCDVQError(
            f"{architecture} is not a causal language model that this transformers release knows "
            f"({str(error).splitlines()[0]}); upgrade transformers or choose another model"
        ) from error
    return {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
