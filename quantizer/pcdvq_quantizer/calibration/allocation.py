"""A rate for each layer under a budget of bits."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace
from pathlib import Path

from pcdvq_kernels.checkpoint import read_json
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.sensitivity import measure_sensitivity
from pcdvq_quantizer.codebooks import offered_rates
from pcdvq_quantizer.experts import experts_of
from pcdvq_quantizer.plan import PCDVQPlan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.writer import write_json_whole

RATES_FILE = "rates.json"
TOKENS = 4096  # that sensitivities are measured on


@dataclass(frozen=True)
class Unit:
    """Layers that must share a rate, such as q, k and v.

    Attributes:
        layers: their names.
        bits: stored bits at each rate offered, rising.
        losses: expected loss at each rate, falling.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    losses: tuple[float, ...]


def allocate(units: list[Unit], budget: int) -> list[int]:
    """Index of the rate of each unit, with the least total loss a greedy choice finds.

    All start at the lowest rate; the step up that saves most loss per bit comes first, as long as
    the budget (in bits, for all units) lasts. Optimal up to the last step where losses are convex
    in bits, as they are for the codecs offered.

    Raises:
        PCDVQError: the lowest rate is already over the budget.
    """
    choice = [0] * len(units)
    left = budget - sum(unit.bits[0] for unit in units)
    if left < 0:
        least = sum(unit.bits[0] for unit in units)
        raise PCDVQError(
            f"the lowest rate takes {least} bits, over the budget of {budget}; raise --bits"
        )
    heap = [(-_gain(unit, 0), index) for index, unit in enumerate(units)]
    heapq.heapify(heap)
    while heap:
        _, index = heapq.heappop(heap)
        unit, rate = units[index], choice[index]
        if rate + 1 == len(unit.bits):
            continue
        cost = unit.bits[rate + 1] - unit.bits[rate]
        if cost > left:
            continue
        left -= cost
        choice[index] = rate + 1
        heapq.heappush(heap, (-_gain(unit, rate + 1), index))
    return choice


def _gain(unit: Unit, rate: int) -> float:
    """Loss saved per bit by the step up from `rate`."""
    if rate + 1 == len(unit.bits):
        return 0.0
    return (unit.losses[rate] - unit.losses[rate + 1]) / (unit.bits[rate + 1] - unit.bits[rate])


def choose_rates(
    plan: PCDVQPlan, model: LayeredModel, tokens: Tensor, directory: Path, progress: Progress
) -> PCDVQPlan:
    """`plan` with a rate for each layer, within `options.bits` for all that is stored of them.

    Args:
        tokens: int64 [S, T], the calibration text.
        directory: where the choice is kept, or found if an earlier run made it.
    """
    path = directory / RATES_FILE
    if not path.exists():
        progress.start("Measuring the sensitivity of layers", len(model.layers))
        windows = tokens[: max(1, TOKENS // tokens.shape[1])]
        names, seed = plan.selection.linears, plan.options.seed
        measured = measure_sensitivity(model, windows, names, seed, progress)
        write_json_whole(path, _rates(plan, measured))
    rates = read_json(path)
    chosen = {name: plan.codebook(name, rate) for name, rate in rates.items()}
    return replace(plan, codebooks=plan.codebooks | chosen)


def _rates(plan: PCDVQPlan, sensitivity: dict[tuple[str, ...], float]) -> dict[str, float]:
    """Rate of each layer of `plan`, in its order."""
    rates = offered_rates(plan.options.codec)
    measured = {name for group in sensitivity for name in group}
    # A layer that the text never reached stays at the lowest rate, as far as it is for itself.
    losses = sensitivity | {(n,): 0.0 for n in plan.selection.linears if n not in measured}
    losses = _with_whole_experts(losses)
    units = [
        Unit(
            group,
            tuple(
                8 * sum(plan.packed_bytes(name, plan.codebook(name, rate)) for name in group)
                for rate in rates
            ),
            tuple(loss * plan.codebook(group[0], rate).distortion for rate in rates),
        )
        for group, loss in losses.items()
    ]
    books = {plan.codebook(name, rate) for name in plan.selection.linears for rate in rates}
    tables = 8 * sum(book.bytes for book in books)
    choice = allocate(units, plan.linear_budget - tables)
    by_name = {
        name: rates[rate] for unit, rate in zip(units, choice, strict=True) for name in unit.layers
    }
    return {name: by_name[name] for name in plan.selection.linears}


def _with_whole_experts(losses: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """`losses` of groups of layers, with the experts of a decoder layer as one group."""
    merged: dict[tuple[str, ...], float] = {}
    experts: dict[str, tuple[str, ...]] = {}
    for group, loss in losses.items():
        name = experts_of(group[0])
        before = experts.get(name, ()) if name else ()
        loss += merged.pop(before, 0.0)
        if name:
            experts[name] = before + group
        merged[before + group] = loss
    return merged
