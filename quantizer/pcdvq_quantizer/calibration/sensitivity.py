"""How much the model's predictions suffer from rounding each linear layer.

To second order, changing the weight W of a layer by dW raises the divergence from the model's own
predictions by half the sum over sequences of (G . dW)^2, where G is the gradient to W of the
log-probability of labels drawn from these predictions (the Fisher information as curvature). For a
rounding error without direction, of variance e s_n^2 in row n (s_n the row's root mean square, e
the codec's error on N(0, 1)), that is e / 2 * sum_n s_n^2 |G_n|^2. Error feedback leaves the share
det(H)^(1/K) / (tr(H) / K) of it. This is RSAVQ's guidance of bits by Fisher curvature (Riemannian
Sensitivity-Aware VQ, 2025) with layers in place of channels.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.gradients import run_back
from pcdvq_quantizer.calibration.replay import inputs_of
from pcdvq_quantizer.calibration.statistics import Inputs, InputStatistics
from pcdvq_quantizer.progress import Progress

DAMPING = 0.01  # of the mean diagonal of H, before its determinant is taken


def measure_sensitivity(
    model: LayeredModel, tokens: Tensor, linears: list[str], seed: int, progress: Progress
) -> dict[tuple[str, ...], float]:
    """Expected rise of the loss per unit of relative error of each layer.

    Args:
        tokens: int64 [S, T]; a few thousand tokens will do.
        linears: names of the layers.
        seed: of the labels, which are drawn from the model's predictions.

    Returns:
        Layers that read the same activation, such as q, k and v, to their loss (nats, summed over
        tokens) per relative error |W' - W|^2 / |W|^2.
    """
    sensitivity: dict[tuple[str, ...], float] = {}

    @contextmanager
    def observe(index: int, layer: nn.Module) -> Iterator[None]:
        prefix = model.layers[index]
        watch = _Watch(layer, prefix, [name for name in linears if name.startswith(f"{prefix}.")])
        yield
        sensitivity.update(watch.finish())
        progress.advance(1)

    run_back(model, tokens, seed, [], observe)
    return sensitivity


class _Watch:
    """Sees inputs and output gradients of the linears of one decoder layer."""

    def __init__(self, layer: nn.Module, prefix: str, names: list[str]) -> None:
        self._inputs: dict[tuple[str, ...], list[Tensor]] = {}
        self._last: tuple[Tensor, tuple[str, ...]] | None = None
        self._losses: dict[str, float] = defaultdict(float)
        self._handles = [
            layer.get_submodule(name.removeprefix(f"{prefix}.")).register_forward_hook(
                self._hook(name), with_kwargs=True
            )
            for name in names
        ]

    def _hook(self, name: str) -> Any:
        def forward(
            module: nn.Linear, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
        ) -> None:
            given = inputs_of(args, kwargs)[0]
            x = given.detach().flatten(0, -2)
            self._keep(name, given)
            variance = module.weight.square().mean(1)  # [N]

            def backward(gradient: Tensor) -> None:
                rows = (gradient.flatten(0, -2).T @ x).square().sum(1)  # |G_n|^2, [N]
                self._losses[name] += (rows * variance).sum().item() / 2

            if output.requires_grad:
                output.register_hook(backward)

        return forward

    def _keep(self, name: str, x: Tensor) -> None:
        """Note that `name` read `x`, as those before it may have done."""
        if self._last is not None and self._last[0] is x:
            before = self._last[1]
            kept = self._inputs[before]
            inputs = [kept.pop()]
            if not kept:
                del self._inputs[before]
            group = (*before, name)
        else:
            group, inputs = (name,), [x.detach().flatten(0, -2)]
        self._inputs.setdefault(group, []).extend(inputs)
        self._last = x, group

    def finish(self) -> dict[tuple[str, ...], float]:
        for handle in self._handles:
            handle.remove()
        self._last = None
        losses = {}
        for group, inputs in self._inputs.items():
            hessian = InputStatistics.gather(Inputs(x, x) for x in inputs).hessian
            losses[group] = sum(self._losses[name] for name in group) * _left_by_feedback(hessian)
        return losses


def _left_by_feedback(hessian: Tensor) -> float:
    """det(H)^(1/K) / (tr(H) / K): 1 for white inputs, less the more they are correlated."""
    mean = hessian.diagonal().mean()
    if not mean > 0:
        return 1.0
    damped = hessian / mean + DAMPING * torch.eye(len(hessian), dtype=hessian.dtype)
    return torch.exp(torch.logdet(damped) / len(damped)).item()
