"""Experts as linear layers, under the names that checkpoints give them.

transformers holds the experts of a decoder layer as two 3-D parameters. Checkpoints of the models
below, and the format, have linear layers for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Naming:
    """What checkpoints call the parts of a mixture of experts.

    Attributes:
        block: the module of a decoder layer that holds router and experts; `mlp` in transformers.
        gate, up, down: the linear layers of an expert.
    """

    block: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


NAMINGS = {
    "mixtral": Naming("block_sparse_moe", "w1", "w3", "w2"),
    "qwen2_moe": Naming(),
    "qwen3_moe": Naming(),
}
_IN_EXPERTS = re.compile(r"(.+\.experts)\.\d+\.\w+")


def experts_of(layer: str) -> str | None:
    """The name of all experts together that linear layer `layer` is part of, None if of none."""
    match = _IN_EXPERTS.fullmatch(layer)
    return match and match[1]


class Expert(nn.Module):
    """down(act(gate(x)) * up(x)).

    Attributes:
        names: of gate, up and down on disk, and of the modules here.
    """

    def __init__(self, naming: Naming, sizes: tuple[int, int], act: nn.Module, like: Tensor):
        """Make an expert of `sizes` (hidden, inner), with the dtype and device of `like`."""
        super().__init__()
        self.names = naming.gate, naming.up, naming.down
        hidden, inner = sizes
        shapes = (hidden, inner), (hidden, inner), (inner, hidden)
        for name, (columns, rows) in zip(self.names, shapes, strict=True):
            linear = nn.Linear(columns, rows, bias=False, dtype=like.dtype, device=like.device)
            self.add_module(name, linear)
        self.act_fn = act

    def activations(self, x: Tensor) -> Tensor:
        """What down reads, [..., I], for x [..., H]."""
        gate, up, _ = (self.get_submodule(name) for name in self.names)
        return self.act_fn(gate(x)) * up(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.names[2])(self.activations(x))


class Experts(nn.ModuleList):
    """Takes the place of the fused experts of a decoder layer."""

    @classmethod
    def like(cls, fused: Any, naming: Naming) -> Experts:
        """Experts of the sizes of `fused`, without its weights."""
        count, hidden, inner = fused.down_proj.shape
        like = fused.down_proj
        return cls(Expert(naming, (hidden, inner), fused.act_fn, like) for _ in range(count))

    def forward(self, x: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """y [T, H]; x [T, H], experts of each token and their weights [T, top_k]."""
        y = torch.zeros_like(x)
        for number in top_k_index.unique().tolist():
            token, choice = torch.where(top_k_index == number)
            part = self[number](x[token]) * top_k_weights[token, choice, None]
            y.index_add_(0, token, part.to(y.dtype))
        return y


def separate_experts(model: PreTrainedModel, tensors: Iterable[str]) -> bool:
    """Put `Experts` in the place of the fused experts of `model`, under their names on disk.

    Args:
        tensors: names on disk; experts that are fused there too stay as they are, as do those of
            models that are not in `NAMINGS`.

    Returns:
        Whether there were any.
    """
    naming = NAMINGS.get(model.config.model_type)
    if naming is None:
        return False
    separated = False
    stored = {experts_of(tensor.rpartition(".")[0]) for tensor in tensors}
    for name, layer in list(model.named_modules()):
        if f"{name}.{naming.block}.experts" not in stored:
            continue
        block: Any = layer.mlp
        if not hasattr(block, "experts"):
            continue  # the configuration has another kind of layer here than the tensors
        separated = True
        block.experts = Experts.like(block.experts, naming)
        if naming.block != "mlp":
            del layer._modules["mlp"]
            layer.add_module(naming.block, block)
            layer.__dict__["mlp"] = block  # where the layer's forward pass finds it
    return separated


def without_fusing(conversions: list[Any]) -> list[Any]:
    """Conversions of transformers but those that fuse the experts which `separate_experts` parts.

    Args:
        conversions: its `WeightConverter`s and `WeightRenaming`s.
    """
    fused = "experts", *(naming.block for naming in NAMINGS.values())
    return [
        conversion
        for conversion in conversions
        if not any(word in pattern for pattern in conversion.source_patterns for word in fused)
    ]
