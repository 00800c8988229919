"""The search for codes of the computed trellis against the format and a Viterbi search in fp64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pcdvq_kernels import cpu, cpu_search, search, trellis
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

pytestmark = pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")

WINDOW_BITS = 16
FACTOR = 0x96459645
LEVELS_PER_STD = {False: 52.25, True: 36.95}  # by `singles`
# Costs are integers: what that may cost, of the cost itself.
ROUNDING = 2e-3
KINDS = [(bits, bits >= 6) for bits in range(3, 9)]
# Of normal weights, by code bits and `singles`, with the row scale of SHRINKAGE: mean squared error
# of an exhaustive search and how many times that a quick one may have.
SHRINKAGE = {3: 1.02, 4: 1.06, 5: 1.1, 6: 1.08, 7: 1.1, 8: 1.12}
ERRORS = {
    (3, False): (0.142, 1.2),
    (4, False): (0.0730, 1.15),
    (5, False): (0.0378, 1.15),
    (6, True): (0.0180, 1.25),
    (7, True): (0.0093, 1.3),
    (8, True): (0.0047, 1.3),
}


def chain_codes(
    x: Tensor, weight: Tensor, code_bits: int, singles: bool, chain_rows: int, effort: str
) -> Tensor:
    assert singles == (code_bits >= 6)  # what the format has
    return search.chain_codes(x, weight, code_bits, chain_rows, effort)


@cache
def window_levels(singles: bool) -> NDArray[np.int64]:
    """Levels of every window: int64 [2^16, 1 or 2], by the text of the format."""
    product = np.arange(1 << WINDOW_BITS) * FACTOR % (1 << 32)
    b0, b1, b2, b3 = (product >> shift & 255 for shift in (0, 8, 16, 24))
    u, v = (b0 + b2 + 1) >> 1, (b1 + b3 + 1) >> 1
    return np.stack([(u + v + 1 >> 1) - 128] if singles else [u - 128, v - 128], -1)


def chains_of(matrix: NDArray, chain_rows: int, per_pair: int) -> list[NDArray]:
    """A matrix [N, pairs * per_pair] as chains [steps, per_pair], strip by strip."""
    width = 64 // chain_rows * per_pair
    return [
        strip.reshape(chain_rows, -1, per_pair).swapaxes(0, 1).reshape(-1, per_pair)
        for column in range(0, matrix.shape[1], width)
        for strip in np.split(matrix[:, column : column + width], len(matrix) // chain_rows)
    ]


def ring_windows(codes: NDArray, code_bits: int, singles: bool) -> NDArray[np.int64]:
    """The windows of one chain's codes [steps], in the order of its weights."""
    bits = (codes[:, None] >> np.arange(code_bits)[::-1] & 1).reshape(-1)
    ends = (np.arange(len(codes)) + 1) * code_bits
    if singles:
        ends = np.stack([ends - code_bits // 2, ends], -1).reshape(-1)
    window = bits[(ends[:, None] - WINDOW_BITS + np.arange(WINDOW_BITS)) % len(bits)]
    return window @ (1 << np.arange(WINDOW_BITS)[::-1])


def chain_costs(
    x: Tensor, weight: Tensor, codes: Tensor, code_bits: int, singles: bool, chain_rows: int
) -> list[float]:
    """Of each chain the weighted squared error of its codes."""
    costs = []
    targets = chains_of(x.double().numpy(), chain_rows, 2)
    weights = chains_of(weight.double().numpy()[:, None].repeat(x.shape[1], 1), chain_rows, 2)
    for target, w, code in zip(
        targets, weights, chains_of(codes.long().numpy(), chain_rows, 1), strict=True
    ):
        windows = ring_windows(code[:, 0], code_bits, singles)
        levels = window_levels(singles)[windows].reshape(target.shape)
        costs.append(float((w * (target - levels) ** 2).sum()))
    return costs


class Reference:
    """Viterbi search over all windows of one chain in fp64."""

    def __init__(self, target: NDArray, weight: NDArray, code_bits: int, singles: bool) -> None:
        self.levels = window_levels(singles).astype(np.float64)
        outputs = self.levels.shape[1]
        self.target = target.reshape(-1, outputs)
        self.weight = weight.reshape(-1, outputs)[:, 0]
        halves = [code_bits - code_bits // 2, code_bits // 2] if singles else [code_bits] * 2
        self.bits = halves * (len(self.target) // 2)

    def search(self, first: int, seam: int | None) -> tuple[float, list[int]]:
        """The least cost of a round from step `first` on, and its windows.

        Args:
            seam: the bits before the round and at its end; None for any, not the same at both.
        """
        steps = [(first + i) % len(self.bits) for i in range(len(self.bits))]
        kept = 1 << (WINDOW_BITS - self.bits[first])
        cost = np.zeros(kept) if seam is None else np.where(np.arange(kept) == seam, 0, np.inf)
        choices = []
        for step in steps:
            error = self.weight[step] * ((self.levels - self.target[step]) ** 2).sum(-1)
            following = self.bits[(step + 1) % len(self.bits)]
            total = (cost.repeat(1 << self.bits[step]) + error).reshape(1 << following, -1)
            choices.append(total.argmin(0))
            cost = total.min(0)
        path = int(cost.argmin()) if seam is None else seam
        least, windows = float(cost[path]), []
        for step, choice in zip(steps[::-1], choices[::-1], strict=True):
            windows.append(int(choice[path]) * len(choice) + path)
            path = windows[-1] >> self.bits[step]
        return least, windows[::-1]

    def best(self) -> float:
        """The cost of a round through the seam that the best round from the middle has."""
        middle = len(self.bits) // 2
        windows = self.search(middle, None)[1]
        seam = windows[middle - 1] & ((1 << (WINDOW_BITS - self.bits[0])) - 1)
        return self.search(0, seam)[0]


def problem(rows: int, columns: int, singles: bool, spread: float = 1) -> tuple[Tensor, Tensor]:
    """Targets in units of levels and row weights between 1 and `spread`."""
    generator = torch.Generator().manual_seed(rows * columns)
    x = torch.randn(rows, columns, generator=generator) * LEVELS_PER_STD[singles]
    return x, spread ** torch.rand(rows, generator=generator)


def compare(
    x: Tensor, weight: Tensor, code_bits: int, singles: bool, chain_rows: int
) -> list[tuple[float, float, float]]:
    """Of each chain the cost of the codes found, the least through the same seam, and `best`."""
    codes = chain_codes(x, weight, code_bits, singles, chain_rows, "exhaustive")
    assert codes.dtype == torch.uint8
    assert codes.shape == (len(x), x.shape[1] // 2)
    assert int(codes.max()) < 1 << code_bits
    costs = chain_costs(x, weight, codes, code_bits, singles, chain_rows)
    weights = weight.double().numpy()[:, None].repeat(x.shape[1], 1)
    compared = []
    for cost, target, w, code in zip(
        costs,
        chains_of(x.double().numpy(), chain_rows, 2),
        chains_of(weights, chain_rows, 2),
        chains_of(codes.long().numpy(), chain_rows, 1),
        strict=True,
    ):
        reference = Reference(target, w, code_bits, singles)
        last = int(ring_windows(code[:, 0], code_bits, singles)[-1])
        seam = last & ((1 << (WINDOW_BITS - reference.bits[0])) - 1)
        compared.append((cost, reference.search(0, seam)[0], reference.best()))
    return compared


@pytest.mark.parametrize(("code_bits", "singles"), KINDS)
@pytest.mark.parametrize(("chain_rows", "columns"), [(16, 2), (16, 10), (32, 4), (64, 2)])
def test_exhaustive_is_viterbi(code_bits, singles, chain_rows, columns):
    """No codes with the same seam have less error. Narrow strips are short chains."""
    x, weight = problem(chain_rows, columns, singles)
    for cost, least, _ in compare(x, weight, code_bits, singles, chain_rows):
        assert least * (1 - 1e-9) <= cost <= least * (1 + ROUNDING)


@pytest.mark.parametrize(("code_bits", "singles"), [(4, False), (5, False), (6, True), (8, True)])
def test_exhaustive_with_uneven_weights(code_bits, singles):
    """The same where rows weigh up to 100 times as much as others; and the seam is a good one."""
    x, weight = problem(128, 4, singles, spread=100)
    costs = np.array(compare(x, weight, code_bits, singles, 64)).sum(0)
    assert costs[0] <= costs[1] * (1 + ROUNDING)
    assert costs[0] == pytest.approx(costs[2], rel=1e-2)


@pytest.mark.parametrize(("code_bits", "singles"), ERRORS)
@pytest.mark.parametrize("chain_rows", trellis.CHAIN_ROWS)
def test_error_of_normal_weights(code_bits, singles, chain_rows):
    x, weight = problem(64, 128, singles)
    scaled = x / SHRINKAGE[code_bits]
    errors = {}
    for effort in cpu_search.EFFORTS:
        codes = chain_codes(scaled, weight, code_bits, singles, chain_rows, effort)
        costs = chain_costs(scaled, weight, codes, code_bits, singles, chain_rows)
        errors[effort] = sum(costs) / scaled.square().sum().item()
    most, quick = ERRORS[code_bits, singles]
    assert errors["exhaustive"] < most * 1.03  # 8192 weights are a sample
    assert errors["exhaustive"] < errors["quick"] < errors["exhaustive"] * quick


@pytest.mark.parametrize("effort", cpu_search.EFFORTS)
@pytest.mark.parametrize(("code_bits", "singles"), KINDS)
def test_instruction_sets_agree(code_bits, singles, effort):
    x, weight = problem(32, 10, singles, spread=100)
    x[3, 1], x[5, 2], weight[7] = 1000, -1000, 0
    args = x, weight, code_bits, 16, effort
    expected = cpu_search.chain_codes(*args, isa="scalar")
    for isa in cpu.isas():
        assert torch.equal(cpu_search.chain_codes(*args, isa=isa), expected), isa


def test_threads_agree():
    x, weight = problem(9 * 16, 18, False)
    before = torch.get_num_threads()
    codes = []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            codes.append(chain_codes(x, weight, 4, False, 16, "exhaustive"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*codes)
    alone = chain_codes(x[16:32, :8].clone(), weight[16:32], 4, False, 16, "exhaustive")
    assert torch.equal(codes[0][16:32, :4], alone)


@pytest.mark.parametrize("effort", cpu_search.EFFORTS)
def test_rows_without_weight_mean_nothing(effort):
    """Their bits serve the other rows."""
    x, weight = problem(64, 16, True)
    whole = chain_codes(x, weight, 8, True, 64, effort)
    weight[24:] = 0
    padded = chain_codes(x, weight, 8, True, 64, effort)
    x[24:] = torch.randn(40, 16)
    assert torch.equal(chain_codes(x, weight, 8, True, 64, effort), padded)
    cost, cost_of_whole = (
        sum(chain_costs(x, weight, codes, 8, True, 64)) for codes in (padded, whole)
    )
    assert cost < cost_of_whole
    nothing = chain_codes(x, torch.zeros(64), 8, True, 64, effort)
    assert nothing.shape == (64, 8)


def test_weights_count():
    """A row that weighs more has less error, whatever the unit of weights."""
    x, _ = problem(64, 2, False)
    errors = []
    for heavy in (1, 100):
        weight = torch.ones(64)
        weight[:16] = heavy
        codes = chain_codes(x, weight * 1e-20, 4, False, 64, "exhaustive")
        assert torch.equal(codes, chain_codes(x, weight, 4, False, 64, "exhaustive"))
        only = (torch.arange(64) < 16).float()
        errors += chain_costs(x, only, codes, 4, False, 64)
    assert errors[1] < errors[0] * 0.8


def test_targets_beyond_the_levels():
    x = torch.full((16, 2), 1e30)
    x[8:] = -torch.inf
    codes = chain_codes(x, torch.ones(16), 8, True, 16, "exhaustive")
    windows = ring_windows(codes[:, 0].long().numpy(), 8, True)
    levels = window_levels(True)[windows].reshape(16, 2)
    assert levels[:8].mean() > 80
    assert levels[8:].mean() < -80
    empty = chain_codes(torch.empty(0, 4), torch.empty(0), 4, False, 16, "quick")
    assert empty.shape == (0, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"code_bits": 2}, "code_bits is 2 and chain_rows 64; expected 3 to 8"),
        ({"chain_rows": 48}, r"chain_rows 48; expected 3 to 8 and one of \(64, 32, 16\)"),
        ({"effort": "fast"}, r"effort is 'fast'; expected one of \('exhaustive', 'quick'\)"),
        ({"x": torch.zeros(64, 3)}, r"\[64, 3\].*N a multiple of 64, K of 2"),
        ({"x": torch.zeros(64, 2).double()}, r"torch.float64 \[64, 2\].*expected fp32"),
        ({"x": torch.zeros(64)}, r"x is torch.float32 \[64\].*expected fp32"),
        ({"x": torch.zeros(65, 2)}, r"\[65, 2\].*N a multiple of 64"),
        ({"row_weight": torch.zeros(63)}, r"row_weight is torch.float32 \[63\] on cpu; expected"),
    ],
)
def test_bad_arguments(changes, message):
    good = {"x": torch.zeros(64, 2), "row_weight": torch.ones(64), "code_bits": 4}
    good |= {"chain_rows": 64, "effort": "quick"}
    with pytest.raises(PCDVQError, match=message):
        search.chain_codes(**{**good, **changes})
