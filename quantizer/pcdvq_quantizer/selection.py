"""Which tensors of a model are quantized."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pcdvq_quantizer.embeddings import find_embeddings
from pcdvq_quantizer.experts import experts_of, separate_experts
from pcdvq_quantizer.served import Heads, find_unserved
from pcdvq_quantizer.sources import Source

MIN_FEATURES = 8
# Output heads are left in their own precision, unless asked for with the embeddings; routers are
# tiny, and vLLM never quantizes them.
DEFAULT_SKIP = ("lm_head", "*.lm_head", "*.gate", "*.router", "*.shared_expert_gate")


@dataclass(frozen=True)
class Selection:
    """Result of `select_layers`.

    Attributes:
        layers: names of the layers to quantize, in stored order: linear layers and the two below.
        skipped: matrix-shaped parameters left as they are, with the reason.
        embedding: the input embedding, where it is quantized.
        head: the output head, where it is quantized; a tied one has no tensors of its own.
        left: linear modules of the model that are not quantized, with or without stored tensors.
    """

    layers: list[str]
    skipped: dict[str, str]
    embedding: str | None = None
    head: str | None = None
    left: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        """The layers that are neither input embedding nor output head."""
        return [name for name in self.layers if name not in self.embeddings]

    @property
    def stored_embeddings(self) -> list[str]:
        return [name for name in self.layers if name in self.embeddings]

    @property
    def embeddings(self) -> list[str]:
        return [name for name in (self.embedding, self.head) if name is not None]

    def skipped_lines(self) -> list[str]:
        """`describe_skipped` of what this selection skips."""
        return describe_skipped(self.skipped)


def describe_skipped(skipped: dict[str, str]) -> list[str]:
    """One line for each kind of parameter in `Selection.skipped`; numbered ones count together."""
    kinds = Counter(
        (re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name), reason) for name, reason in skipped.items()
    )
    return [
        f"{name} ({reason})" if count == 1 else f"{name} ({count} of them: {reason})"
        for (name, reason), count in kinds.items()
    ]


def select_layers(
    source: Source,
    skip: tuple[str, ...] = DEFAULT_SKIP,
    embeddings: bool = False,
    spec: CodebookSpec | None = None,
    max_tp: int = 1,
) -> Selection:
    """Find the linear layers of `source` that the format can hold and the plugin serves.

    Args:
        source: the model.
        skip: patterns of layer names to leave as they are.
        embeddings: whether input embedding and output head are quantized too, skipped or not.
        spec: layout of the linear layers' codes; None for a method that splits any rows.
        max_tp: tensor-parallel size to keep possible.

    Raises:
        PCDVQError: the architecture is unknown, or nothing of it can be quantized.
    """
    architecture = ", ".join(source.config.get("architectures") or ["unknown architecture"])
    model = _build_empty(source.config, architecture)
    separate_experts(model, source.shapes)
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    roles = find_embeddings(model) if embeddings else (None, None)
    layers, skipped = [], {}
    for tensor, shape in source.shapes.items():
        name, _, suffix = tensor.rpartition(".")
        if len(shape) < 2:
            continue
        wanted = suffix == "weight" and name in roles
        if not wanted and (suffix != "weight" or name not in linears):
            skipped[tensor if suffix != "weight" else name] = "not a linear layer"
        elif not wanted and any(fnmatchcase(name, pattern) for pattern in skip):
            skipped[name] = "skipped by name"
        elif shape[1] % 8 or min(shape) < MIN_FEATURES:
            skipped[name] = (
                f"shape {list(shape)}: input size must be a multiple of 8, both sizes >= 8"
            )
        else:
            layers.append(name)
    unserved = _tied_with_bias(roles, layers, source)
    rows = {name: source.shapes[f"{name}.weight"][0] for name in layers if name not in roles}
    unserved |= find_unserved(linears, rows, spec, Heads.of(source.config), max_tp)
    layers = [name for name in layers if name not in unserved]
    skipped |= unserved
    # Experts are served as one layer.
    whole = {experts_of(name) for name in skipped} - {None}
    for name in [name for name in layers if experts_of(name) in whole]:
        layers.remove(name)
        skipped[name] = "another layer of the experts is skipped"
    if not set(layers).difference(roles):
        reasons = sorted({f"{name}: {reason}" for name, reason in skipped.items()})[:3]
        raise PCDVQError(
            f"nothing to quantize in {source.name} ({architecture}); for instance "
            f"{'; '.join(reasons)}. PCDVQ quantizes the torch.nn.Linear layers of causal LMs"
        )
    embedding, head = (name if name in layers else None for name in roles)
    left = tuple(sorted(linears.difference(layers)))
    return Selection(layers, skipped, embedding, head, left)


def _tied_with_bias(
    roles: tuple[str | None, str | None], layers: list[str], source: Source
) -> dict[str, str]:
    """The input embedding and why it stays, if the head that is tied to it keeps it so."""
    embedding, head = roles
    if embedding in layers and head not in layers and f"{head}.bias" in source.shapes:
        return {embedding: "the output head is tied to it and has a bias"}
    return {}


def hf_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The transformers configuration that a config.json describes."""
    fields = {key: _infinities(value) for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **fields)


def _infinities(value: Any) -> Any:
    """`value` with the floats that JSON lacks, which transformers writes as objects."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return [_infinities(each) for each in value] if isinstance(value, list) else value


def _build_empty(config: dict[str, Any], architecture: str) -> PreTrainedModel:
    """The model that `config` describes, without its weights."""
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config(config))
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise PCDVQError(
            f"{architecture} is not a causal language model that this transformers release knows "
            f"({str(error).splitlines()[0]}); upgrade transformers or choose another model"
        ) from error
