"""Runs one decoder layer in stages, so that each linear sees already quantized ones before it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor, nn

from pcdvq_quantizer.calibration.decoder import Call
from pcdvq_quantizer.experts import Experts


class _Stop(Exception):
    """Ends a forward pass whose rest is not needed."""


@dataclass
class Stage:
    """Linears of a decoder layer that read the same activation, such as q, k and v.

    Attributes:
        linears: their names within the layer, in the order they run; or that of all experts.
        inputs: what they read in the original model, S of fp32 [T, K].
        residual: where the stage is one linear whose output is added to the residual stream: the
            stream before, in the original model, S of fp32 [T, H]. Otherwise None.
    """

    linears: tuple[str, ...]
    inputs: list[Tensor]
    residual: list[Tensor] | None = None


def forward_layer(layer: nn.Module, call: Call, sequence: Tensor) -> Tensor:
    """Output [1, T, H] of `layer` for one sequence [T, H].

    Raises:
        PCDVQError: the layer leaves something for others beside its output.
    """
    before = _lengths(call)
    output = layer(sequence[None], *call.args, **call.kwargs)
    if _lengths(call) != before:
        raise PCDVQError(
            f"{type(layer).__name__} keeps keys or values for layers after it, which calibration "
            "does not handle; use --calibration none"
        )
    return output[0] if isinstance(output, tuple) else output


def inputs_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """All that a module is called with, by position or by name."""
    return (*args, *kwargs.values())


def _lengths(call: Call) -> list[int]:
    return [len(x) for x in inputs_of(call.args, call.kwargs) if isinstance(x, dict | list)]


def run_original(
    layer: nn.Module, call: Call, hidden: Tensor, linears: list[str]
) -> tuple[Tensor, list[Stage]]:
    """Run the unquantized layer.

    Args:
        layer: the decoder layer.
        call: its other arguments.
        hidden: fp32 [S, T, H].
        linears: names within the layer of the linears to quantize, experts by that of `Experts`.

    Returns:
        (output fp32 [S, T, H]; the stages in the order they run).

    Raises:
        PCDVQError: which linears run, or in what order, depends on the text.
    """
    outputs: list[Tensor] = []
    stages: list[Stage] = []
    with _Trace(layer, linears) as trace:
        for sequence in hidden:
            outputs.append(forward_layer(layer, call, sequence))
            found = trace.stages(sequence, outputs[-1], stages)
            if not stages:
                stages = found
                continue
            if [stage.linears for stage in found] != [stage.linears for stage in stages]:
                raise text_decides()
            for stage, more in zip(stages, found, strict=True):
                stage.inputs += more.inputs
                if stage.residual is not None and more.residual is not None:
                    stage.residual += more.residual
    return torch.cat(outputs), stages


def text_decides() -> PCDVQError:
    """Which linears run, or in what order, is not the same for all sequences."""
    return PCDVQError(
        "the linear layers that run depend on the text (experts of a kind that is not known?), "
        "which calibration does not handle; use --calibration none"
    )


class _Trace:
    """Records what the linears and the direct children of a layer read and give."""

    def __init__(self, layer: nn.Module, linears: list[str]) -> None:
        self._layer = layer
        self._linears = linears
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._child_inputs: list[Tensor] = []

    def __enter__(self) -> _Trace:
        self._handles = [
            self._layer.get_submodule(name).register_forward_hook(
                self._linear_hook(name), with_kwargs=True
            )
            for name in self._linears
        ]
        for child in self._layer.children():
            hook = child.register_forward_pre_hook(self._child_hook, with_kwargs=True)
            self._handles.append(hook)
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _linear_hook(self, name: str) -> Callable[..., None]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            x = inputs_of(args, kwargs)[0]
            # Experts are a stage of their own, whoever else reads the same.
            x = x.detach() if isinstance(module, Experts) else x
            self._seen.append((name, x, output))

        return hook

    def _child_hook(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = inputs_of(args, kwargs)[:1]
        self._child_inputs += [arg for arg in first if isinstance(arg, Tensor)]

    def stages(self, sequence: Tensor, output: Tensor, known: list[Stage]) -> list[Stage]:
        """Stages of the forward pass just made, from `sequence` [T, H] to `output` [1, T, H].

        Which of them add to the residual stream is looked up in those `known`, if any.
        """
        groups: list[tuple[list[str], Tensor, Tensor]] = []
        names_seen = [name for name, _, _ in self._seen]
        if len(set(names_seen)) < len(names_seen):
            raise PCDVQError(
                f"{max(names_seen, key=names_seen.count)} runs more than once in a decoder layer, "
                "which calibration does not handle; use --calibration none"
            )
        for name, x, y in self._seen:
            if groups and x is groups[-1][1]:
                groups[-1][0].append(name)
            else:
                groups.append(([name], x, y))
        # The residual stream is seen wherever the layer norms it, and at the layer's end.
        states = [*self._child_inputs, output]
        stages, stream = [], sequence[None]
        for number, (names, x, y) in enumerate(groups):
            stage = Stage(tuple(names), [x.flatten(0, -2)])
            # Layers may go without the batch dimension in between.
            fits = len(names) == 1 and y.numel() == stream.numel()
            after = stream + y.view_as(stream) if fits else None
            if after is not None:
                if number < len(known):
                    adds = known[number].residual is not None
                else:
                    adds = any(_equal(after, state) for state in states)
                if adds:
                    stage.residual = [stream[0]]
                    stream = after
            stages.append(stage)
        self._seen.clear()
        self._child_inputs.clear()
        return stages


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.numel() == b.numel() and torch.allclose(a, b.view_as(a), rtol=1e-5, atol=1e-5)


@dataclass
class Replay:
    """Runs the layer on the quantized model's hidden states, up to one stage after another.

    Results that can no longer change are kept, so all stages together cost about one forward pass:
    outputs of linears, and of direct children of the layer (attention, MLP) once they are done.

    Attributes:
        layer, call: as in `run_original`.
        hidden: fp32 [S, T, H], what comes in.
        stages: of `run_original`.
        residual: the residual stream before the next linear that adds to it, S of fp32 [T, H].
    """

    layer: nn.Module
    call: Call
    hidden: Tensor
    stages: list[Stage]
    residual: list[Tensor] = field(init=False)
    _kept: dict[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.residual = list(self.hidden)

    def inputs(self, index: int) -> Iterator[Tensor]:
        """Inputs fp32 [T, K] of stage `index`; the stages before must be quantized."""
        for args in self.arguments(index):
            yield args[0].flatten(0, -2)

    def arguments(self, index: int) -> Iterator[tuple[Tensor, ...]]:
        """What the modules of stage `index` are called with, for each sequence."""
        target = self.layer.get_submodule(self.stages[index].linears[0])
        caught: list[tuple[Tensor, ...]] = []

        def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(inputs_of(args, kwargs))
            raise _Stop

        handle = target.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            for number in range(len(self.hidden)):
                with contextlib.suppress(_Stop):
                    self._run(number, index)
                yield caught.pop()
        finally:
            handle.remove()
        self._drop_inner()

    def output(self) -> Tensor:
        """The layer's output, fp32 [S, T, H], with all its linears quantized."""
        count = len(self.stages)
        return torch.cat([self._run(number, count) for number in range(len(self.hidden))])

    def _run(self, number: int, index: int) -> Tensor:
        """Forward of sequence `number`, keeping what the stages before `index` give."""
        fixed = {name for stage in self.stages[:index] for name in stage.linears}
        pending = {name for stage in self.stages[index:] for name in stage.linears}
        children = [name for name, _ in self.layer.named_children()]
        done = [c for c in children if _holds(c, fixed) and not _holds(c, pending)]
        adds = {s.linears[0] for s in self.stages[:index] if s.residual is not None}
        replaced = []
        for name in dict.fromkeys([*fixed, *done]):  # a linear may be a direct child
            module = self.layer.get_submodule(name)
            module.forward = self._keep(name, module.forward, number, name in adds)
            replaced.append(module)
        try:
            return forward_layer(self.layer, self.call, self.hidden[number])
        finally:
            for module in replaced:
                del module.forward

    def _keep(self, name: str, forward: Any, number: int, adds: bool) -> Any:
        """`forward` of module `name` that runs once for sequence `number`."""
        kept = self._kept.setdefault(name, [])

        def run(*args: Any, **kwargs: Any) -> Any:
            if len(kept) == number:
                kept.append(forward(*args, **kwargs))
                if adds:
                    stream = self.residual[number]
                    self.residual[number] = stream + kept[number].view_as(stream)
            return kept[number]

        return run

    def _drop_inner(self) -> None:
        """Forget outputs of linears inside a child whose own output is kept."""
        for name in [name for name in self._kept if "." in name]:
            if name.partition(".")[0] in self._kept:
                del self._kept[name]


def _holds(child: str, linears: set[str]) -> bool:
    return any(linear == child or linear.startswith(f"{child}.") for linear in linears)
