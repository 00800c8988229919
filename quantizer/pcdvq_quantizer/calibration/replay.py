"""Runs one decoder layer in stages, so that each linear sees already quantized ones before it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pcdvq_quantizer.calibration.decoder import Call


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass(frozen=True)
class Stage:
    """Linears of a decoder layer that read the same activation, such as q, k and v.

    Attributes:
        linears: their names within the layer, in the order they run.
    """

    linears: tuple[str, ...]


def run_original(
    layer: nn.Module, call: Call, hidden: Tensor, linears: list[str]
) -> tuple[Tensor, list[Stage], list[list[Tensor]]]:
    """Run the unquantized layer.

    Args:
        layer: the decoder layer.
        call: its other arguments.
        hidden: fp32 [S, T, H].
        linears: names within the layer of the linears to quantize.

    Returns:
        (output fp32 [S, T, H]; the stages in order; for each stage the inputs, S of fp32 [T, K]).
    """
    names = {id(layer.get_submodule(name)): name for name in linears}
    seen: list[tuple[str, Tensor]] = []
    handles = [
        layer.get_submodule(name).register_forward_pre_hook(
            lambda module, args: seen.append((names[id(module)], args[0]))
        )
        for name in linears
    ]
    stages: list[Stage] = []
    inputs: list[list[Tensor]] = []
    outputs = []
    try:
        for sequence in hidden:
            seen.clear()
            outputs.append(forward_layer(layer, call, sequence))
            stages, first_inputs = _stages(seen)
            inputs.append([x.flatten(0, -2) for x in first_inputs])
    finally:
        for handle in handles:
            handle.remove()
    return torch.cat(outputs), stages, [list(each) for each in zip(*inputs, strict=True)]


def _stages(seen: list[tuple[str, Tensor]]) -> tuple[list[Stage], list[Tensor]]:
    groups: list[list[str]] = []
    inputs: list[Tensor] = []
    for name, x in seen:
        if inputs and x is inputs[-1]:
            groups[-1].append(name)
        else:
            groups.append([name])
            inputs.append(x)
    return [Stage(tuple(group)) for group in groups], inputs


def forward_layer(layer: nn.Module, call: Call, sequence: Tensor) -> Tensor:
    """Output [1, T, H] of `layer` for one sequence [T, H]."""
    output = layer(sequence[None], *call.args, **call.kwargs)
    return output[0] if isinstance(output, tuple) else output


@dataclass
class Replay:
    """Runs the layer on the quantized model's hidden states, up to one stage after another.

    Results that can no longer change are kept, so all stages together cost about one forward pass:
    outputs of linears, and of direct children of the layer (attention, MLP) once they are done.
    """

    layer: nn.Module
    call: Call
    hidden: Tensor
    stages: list[Stage]
    _kept: dict[str, list[Any]] = field(default_factory=dict)

    def inputs(self, index: int) -> Iterator[Tensor]:
        """Inputs fp32 [T, K] of stage `index`; the stages before must be quantized."""
        target = self.layer.get_submodule(self.stages[index].linears[0])

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            caught.append(args[0])
            raise _Stop

        handle = target.register_forward_pre_hook(stop)
        try:
            for number in range(len(self.hidden)):
                caught: list[Tensor] = []
                try:
                    self._run(number, index)
                except _Stop:
                    pass
                yield caught[0].flatten(0, -2)
        finally:
            handle.remove()
        self._drop_inner(index)

    def output(self) -> Tensor:
        """The layer's output, fp32 [S, T, H], with all its linears quantized."""
        return torch.cat(
            [self._run(number, len(self.stages)) for number in range(len(self.hidden))]
        )

    def _run(self, number: int, index: int) -> Tensor:
        """Forward of sequence `number`, keeping the outputs of stage `index` - 1."""
        fixed = [name for stage in self.stages[: max(index, 0)] for name in stage.linears]
        done = {
            name
            for name, child in self.layer.named_children()
            if any(linear.startswith(name + ".") for linear in fixed)
            and all(
                linear in fixed
                for stage in self.stages
                for linear in stage.linears
                if linear.startswith(name + ".")
            )
        }
        replaced = []
        for name in [*fixed, *done]:
            module = self.layer.get_submodule(name)
            module.forward = self._keep(name, module.forward, number)
            replaced.append(module)
        try:
            return forward_layer(self.layer, self.call, self.hidden[number])
        finally:
            for module in replaced:
                del module.forward

    def _keep(self, name: str, forward: Any, number: int) -> Any:
        kept = self._kept.setdefault(name, [])

        def run(*args: Any, **kwargs: Any) -> Any:
            if len(kept) == number:
                kept.append(forward(*args, **kwargs))
            return kept[number]

        return run

    def _drop_inner(self, index: int) -> None:
        """Forget outputs of linears inside a child whose own output is kept."""
        for name in [name for name in self._kept if "." in name]:
            if name.partition(".")[0] in self._kept:
                del self._kept[name]
