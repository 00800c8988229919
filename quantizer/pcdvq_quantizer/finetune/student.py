"""The quantized model as one that can be trained: codes fixed, row scales and norms free."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from pcdvq_kernels.checkpoint import ROW_SCALE, Checkpoint
from pcdvq_kernels.codebook import Codebook
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from pcdvq_quantizer.hf import PCDVQLinear

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class ScaledLinear(nn.Module):
    """y = R (Q H S) x + b: the dense Q H S, fp32 [N, K], is constant, R is a parameter [N]."""

    levels: Tensor

    def __init__(self, levels: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("levels", levels, persistent=False)
        self.row_scale = nn.Parameter(scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.linear(x, self.levels) * self.row_scale
        return y if self.bias is None else y + self.bias


@dataclass(frozen=True)
class Trainable:
    """A parameter of the student: stored value = start + unit * delta, rounded to `dtype`.

    Attributes:
        name: of its tensor in the checkpoint.
        parameter: fp32 [n], in the student.
        start: fp32 [n], its value in the checkpoint.
        unit: fp32 [n]; the gain it has at the start, so that delta is a relative change.
        dtype: it is stored in.
    """

    name: str
    parameter: nn.Parameter
    start: Tensor
    unit: Tensor
    dtype: torch.dtype

    @classmethod
    def make(
        cls, name: str, parameter: nn.Parameter, unit: Tensor, dtype: torch.dtype
    ) -> Trainable:
        return cls(name, parameter, parameter.detach().clone(), unit, dtype)

    def stored(self, delta: Tensor) -> Tensor:
        """The tensor to store, `dtype` [n], for relative changes fp32 [n]."""
        return (self.start + self.unit * delta).to(self.dtype)


class Student:
    """A checkpoint's model whose trainable parameters are one vector of relative changes.

    The model always computes with values as they would be stored: rounding is passed over by the
    gradient, and what is measured is what the checkpoint will do.

    Attributes:
        model: fp32; only the trainable parameters require gradients.
        trainables: row scales and norm weights.
    """

    def __init__(self, model: PreTrainedModel, checkpoint: Checkpoint) -> None:
        """Make `model`, loaded from `checkpoint` in fp32 with packed layers, trainable."""
        self.model = model.eval().requires_grad_(False)
        self.trainables = [*_open_row_scales(model, checkpoint), *_open_norms(model, checkpoint)]

    @property
    def size(self) -> int:
        """Number of trainable values."""
        return sum(trainable.start.numel() for trainable in self.trainables)

    @torch.no_grad()
    def set(self, delta: Tensor) -> None:
        """Give the model the values for relative changes fp32 [size]."""
        for trainable, part in self._parts(delta):
            trainable.parameter.copy_(trainable.stored(part))

    def take_gradient(self) -> Tensor:
        """Gradient with respect to the relative changes, fp32 [size]; clears the model's."""
        parts = []
        for trainable in self.trainables:
            found = trainable.parameter.grad
            # None: the text does not reach it (a vision tower's norm, an expert not chosen).
            parts.append(torch.zeros_like(trainable.unit) if found is None else found)
            trainable.parameter.grad = None
        return torch.cat(
            [part * each.unit for part, each in zip(parts, self.trainables, strict=True)]
        )

    def tensors(self, delta: Tensor) -> dict[str, Tensor]:
        """Tensors to store for relative changes fp32 [size], by their names in the checkpoint."""
        return {each.name: each.stored(part).cpu() for each, part in self._parts(delta)}

    def share_frozen(self, other: PreTrainedModel) -> None:
        """Use the memory of `other` for frozen parameters that are equal there."""
        theirs = dict(other.named_parameters())
        for name, mine in self.model.named_parameters():
            same = theirs.get(name)
            if same is None or mine.requires_grad or mine.dtype != same.dtype:
                continue
            if torch.equal(mine, same):
                mine.data = same.data

    def recompute_layers(self) -> None:
        """Let each decoder layer forget what its backward pass needs and compute it again."""
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module.forward = partial(recompute, module.forward, use_reentrant=False)

    def _parts(self, delta: Tensor) -> list[tuple[Trainable, Tensor]]:
        sizes = [trainable.start.numel() for trainable in self.trainables]
        return list(zip(self.trainables, delta.split(sizes), strict=True))


def _open_row_scales(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Trainable]:
    """Put a `ScaledLinear` in the place of each packed linear."""
    found = []
    for name, module in list(model.named_modules()):
        if not isinstance(module, PCDVQLinear):
            continue
        scale = module.row_scale.float()
        module.row_scale = torch.ones_like(scale)
        book = checkpoint.codebooks[checkpoint.layers[name].codebook]
        tables = book.directions.to(scale.device), book.magnitudes.to(scale.device)
        dense = module.dequantize(Codebook(book.spec, *tables), torch.float32)
        bias = None if dense.bias is None else dense.bias.data
        linear = ScaledLinear(dense.weight.data, scale, bias)
        model.set_submodule(name, linear)
        unit = scale.clone()
        found.append(Trainable.make(f"{name}.{ROW_SCALE}", linear.row_scale, unit, torch.bfloat16))
    return found


def _open_norms(model: PreTrainedModel, checkpoint: Checkpoint) -> list[Trainable]:
    """Free the vectors of norms, as far as they are stored under the names they have here."""
    found = []
    for path, module in model.named_modules():
        if "norm" not in type(module).__name__.lower():
            continue
        for key, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{key}"
            info = checkpoint.tensors.get(name)
            if info is None or info.dtype not in DTYPES or info.shape != parameter.shape:
                continue
            unit = _unit(module, key, parameter) if parameter.dim() == 1 else None
            if unit is not None:
                parameter.requires_grad_()
                found.append(Trainable.make(name, parameter, unit, DTYPES[info.dtype]))
    return found


@torch.no_grad()
def _unit(module: nn.Module, key: str, parameter: nn.Parameter) -> Tensor | None:
    """The gain of a norm's weight, or the size of its bias; None for norms of more inputs.

    The gain is the weight, or 1 + weight (Gemma): with a weight of zero, the latter still passes
    its input on.
    """
    if key != "weight":
        return parameter.square().mean().sqrt().expand_as(parameter).clone()
    zeros = {name: torch.zeros_like(value) for name, value in module.named_parameters()}
    ramp = torch.linspace(1, 2, parameter.numel(), device=parameter.device)
    try:
        passed = functional_call(module, zeros, (ramp[None],))
    except (TypeError, RuntimeError):
        return None
    return parameter + float(passed.abs().max() > 0)
