"""One pass of the original model forwards and back, a decoder layer at a time.

What is taken back are the gradients of the log-probability of labels drawn from the model's own
predictions. Their second moments are the Fisher information: the curvature of the divergence from
these predictions.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pcdvq_quantizer.calibration.decoder import Call, LayeredModel
from pcdvq_quantizer.calibration.replay import forward_layer
from pcdvq_quantizer.files import save_whole

# Called with index and module of a decoder layer: while it runs, every sequence goes through it.
Observer = Callable[[int, nn.Module], AbstractContextManager[object]]


class Stack(Protocol):
    """Holds the inputs of decoder layers until the way back; a list does."""

    def append(self, hidden: Tensor, /) -> None: ...

    def pop(self) -> Tensor: ...


class DiskStack:
    """A stack of tensors in files of `directory`, gone as they are taken."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._count = 0

    def append(self, hidden: Tensor, /) -> None:
        save_whole({"hidden": hidden.cpu()}, self._path(self._count))
        self._count += 1

    def pop(self) -> Tensor:
        self._count -= 1
        path = self._path(self._count)
        hidden = load_file(path)["hidden"]
        path.unlink()
        return hidden

    def _path(self, number: int) -> Path:
        return self._directory / f"hidden-{number}.safetensors"


def run_back(
    model: LayeredModel, tokens: Tensor, seed: int, inputs: Stack, observe: Observer
) -> None:
    """Run `tokens` through `model`, then back from labels it draws.

    Args:
        tokens: int64 [S, T].
        seed: of the labels.
        inputs: holds S * T * H fp32 numbers for each decoder layer.
        observe: sees the layers on the way back, the last one first.
    """
    with torch.no_grad():
        hidden, calls = model.embed(tokens)
        for index, call in enumerate(calls):
            inputs.append(hidden)
            hidden = _run(model, index, call, hidden)
    generator = torch.Generator(model.device).manual_seed(seed)
    gradient = torch.stack([_head_gradient(model, row, generator) for row in hidden])
    for index in reversed(range(len(model.layers))):
        layer = model.load(index)
        with observe(index, layer):
            for number, row in enumerate(inputs.pop().to(model.device)):
                with torch.enable_grad():
                    leaf = row.clone().requires_grad_()
                    output = forward_layer(layer, calls[index], leaf)[0]
                (gradient[number],) = torch.autograd.grad(output, leaf, gradient[number])
        model.unload(index)


def _run(model: LayeredModel, index: int, call: Call, hidden: Tensor) -> Tensor:
    layer = model.load(index)
    output = torch.cat([forward_layer(layer, call, row) for row in hidden])
    model.unload(index)
    return output


def _head_gradient(model: LayeredModel, hidden: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient [T, H] of the log-probability of sampled labels to the last hidden states."""
    with torch.enable_grad():
        leaf = hidden.clone().requires_grad_()
        logits = model.logits(leaf)
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
    return torch.autograd.grad(loss, leaf)[0]
