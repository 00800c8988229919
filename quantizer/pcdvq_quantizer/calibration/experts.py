"""Quantizing the experts of a decoder layer, each on the tokens routed to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pcdvq_quantizer.calibration.parallel import ALONE, Processes
from pcdvq_quantizer.calibration.statistics import Inputs, InputStatistics
from pcdvq_quantizer.experts import Expert, Experts

# Below, the moments of an expert's own tokens say less than those of all tokens of its layer.
FEW_TOKENS = 256
CHUNK_TOKENS = 1024


@dataclass(frozen=True)
class Routed:
    """What the experts of a decoder layer read, tokens of all sequences of this process.

    Attributes:
        original: fp32 [T, H], in the original model.
        quantized: fp32 [T, H], in the model quantized so far.
        index: int64 [T, top_k], the experts of each token in the latter.
        weights: fp32 [T, top_k], their weights.
    """

    original: Tensor
    quantized: Tensor
    index: Tensor
    weights: Tensor


def quantize_experts(
    name: str,
    experts: Experts,
    routed: Routed,
    quantize: Callable[[list[str], InputStatistics], None],
    processes: Processes = ALONE,
) -> list[int]:
    """Quantize each of `experts`, named `name`, gate and up before down.

    The moments of down weigh tokens as the router does. An expert that few tokens are routed to is
    calibrated as if all were.

    Args:
        quantize: quantizes linear layers of these names, which read inputs of these moments, and
            gives the modules what they decode to.

    Returns:
        The experts with few tokens.
    """
    few = []
    counts = routed.index.flatten().bincount(minlength=len(experts)).cpu()
    processes.sum(counts)
    for number, expert in enumerate(experts):
        assert isinstance(expert, Expert)
        token, choice = torch.where(routed.index == number)
        original, x = routed.original, routed.quantized
        weights = torch.ones(len(x), 1, device=x.device)
        if counts[number] < FEW_TOKENS:
            few.append(number)
        else:
            original, x, weights = original[token], x[token], routed.weights[token, choice, None]
        wanted = expert.activations(original) * weights
        gate, up, down = (f"{name}.{number}.{part}" for part in expert.names)
        quantize([gate, up], _moments(original, x, processes))
        found = expert.activations(x) * weights
        quantize([down], _moments(wanted, found, processes))
    return few


def _moments(original: Tensor, quantized: Tensor, processes: Processes) -> InputStatistics:
    chunks = zip(original.split(CHUNK_TOKENS), quantized.split(CHUNK_TOKENS), strict=True)
    return InputStatistics.gather((Inputs(*pair) for pair in chunks), processes)
