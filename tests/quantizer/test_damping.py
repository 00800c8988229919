"""Damping that is chosen by the error on other kinds of text, and weights of tokens."""

from __future__ import annotations

import math

import pytest
import torch
from pcdvq_quantizer.calibration.damping import (
    LEAST_TARGET,
    _feedback_error,
    _least,
    _target_error,
    choose_damping,
)
from pcdvq_quantizer.calibration.ldlq import cholesky_feedback, ldlq
from pcdvq_quantizer.calibration.statistics import Damping, Inputs, InputStatistics
from pcdvq_quantizer.calibration.weights import LONG, lengths, without_outliers
from pcdvq_quantizer.codebooks import get_codebook
from torch import Tensor

COLUMNS = 64


def inputs(tokens: int, seed: int, basis: int = 0, noise: float = 0.1) -> Inputs:
    """Inputs with a spread of variances in the directions of `basis`, and noise in all."""
    turn = torch.linalg.qr(torch.randn(COLUMNS, COLUMNS, generator=_seeded(basis)))[0]
    generator = _seeded(seed)
    x = torch.randn(tokens, COLUMNS, generator=generator) * torch.logspace(-2, 0.5, COLUMNS) @ turn
    return Inputs(x, x + noise * torch.randn(tokens, COLUMNS, generator=generator))


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weight() -> Tensor:
    return torch.randn(40, COLUMNS, generator=_seeded(9))


def test_moments_by_kind() -> None:
    """All kinds together are what they would be at once, weights or none."""
    parts = [inputs(30, 1), inputs(50, 2)]
    weights = [torch.rand(30, generator=_seeded(3)), torch.rand(50, generator=_seeded(4))]
    for costs in ([None, None], weights):
        each = [
            Inputs(p.original, p.quantized, None, cost, kind)
            for kind, (p, cost) in enumerate(zip(parts, costs, strict=True))
        ]
        kinds = InputStatistics.gather_kinds(each)
        assert len(kinds) == 2
        merged, direct = InputStatistics.merge(kinds), InputStatistics.gather(each)
        alone = [Inputs(e.original, e.quantized, None, e.weight) for e in each]
        together = InputStatistics.gather(alone)
        for found in (merged, direct):
            torch.testing.assert_close(found.hessian, together.hessian, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found.cross, together.cross, rtol=1e-4, atol=1e-6)
            assert found.tokens == pytest.approx(together.tokens, abs=1)


def test_feedback_error_is_that_of_rounding() -> None:
    """On inputs that feedback was not learnt from, to the error of rounding without feedback."""
    fit, held = (InputStatistics.gather([inputs(400, seed)]) for seed in (1, 2))
    expected = _feedback_error(fit, held, 0.05)
    book = get_codebook("pvq", 4.0)
    rows = torch.randn(400, COLUMNS, generator=_seeded(5)) * book.unit
    ones = torch.ones(len(rows))

    def error(feedback: Tensor) -> float:
        _, levels = ldlq(rows, feedback, book.encoder, ones)
        wrong = (levels - rows).double()
        return ((wrong @ held.hessian) * wrong).sum().item()

    hessian = fit.hessian + 0.05 * fit.hessian.diagonal().mean() * torch.eye(COLUMNS)
    found = error(cholesky_feedback(hessian, book.codebook.spec.vector_dim))
    assert found / error(torch.eye(COLUMNS)) == pytest.approx(expected, rel=0.3)
    assert expected < 0.5


def test_target_error_is_that_of_outputs() -> None:
    """Up to what no target changes."""
    fit, other = inputs(400, 1), inputs(400, 2)
    statistics = [InputStatistics.gather([each]) for each in (fit, other)]
    rows = torch.arange(40)
    w = weight().double()
    errors, expected = [], []
    for share in (0.01, 1.0):
        errors.append(_target_error(*statistics, w, rows, share))
        hessian = statistics[0].hessian
        factor = hessian + share * hessian.diagonal().mean() * torch.eye(COLUMNS)
        target = w + w @ statistics[0].cross @ torch.linalg.inv(factor)
        x, wanted = other.quantized.double(), other.original.double() @ w.T
        power = (x @ w.T).square().sum()
        expected.append(((x @ target.T - wanted).square().sum() / power).item())
    assert errors[1] - errors[0] == pytest.approx(expected[1] - expected[0], rel=1e-3)


def test_text_that_says_nothing_of_another_is_damped_more() -> None:
    start = Damping(0.03, 0.5)
    alike = InputStatistics.gather_kinds(
        [inputs(4000, 1), Inputs(*vars_of(inputs(4000, 2)), kind=1)]
    )
    foreign = InputStatistics.gather_kinds(
        [inputs(4000, 1), Inputs(*vars_of(inputs(4000, 2, basis=7)), kind=1)]
    )
    few = InputStatistics.gather_kinds([inputs(40, 1), Inputs(*vars_of(inputs(40, 2)), kind=1)])
    same, other, less = (choose_damping(each, weight(), start) for each in (alike, foreign, few))
    assert same.feedback < other.feedback
    assert same.feedback < less.feedback
    assert same.target < less.target


def vars_of(each: Inputs) -> tuple[Tensor, Tensor, None, None]:
    return each.original, each.quantized, None, None


def test_search_between_steps() -> None:
    """The least of a smooth function is found between the steps, wherever it starts."""
    for least in (0.01, 0.3, 2.0):
        for start in (0.03, 0.5):
            found = _least(lambda share: math.log(share / least) ** 2, start)  # noqa: B023
            assert found == pytest.approx(least)
    assert _least(lambda share: share, 0.03) < 0.008
    assert _least(lambda share: 0.0, 0.03) == 0.03
    assert _least(lambda share: math.inf, 0.03) == 0.03


def test_singular_moments_are_damped() -> None:
    """Fewer tokens than columns, dead inputs, and no inputs at all of a kind."""
    dead = torch.zeros(8, COLUMNS)
    for first, second in ((inputs(9, 1), inputs(7, 2)), (inputs(9, 1), Inputs(dead, dead))):
        kinds = [InputStatistics.gather([each]) for each in (first, second)]
        found = choose_damping(kinds, weight(), Damping(0.03, 0.5))
        assert 0.001 <= found.feedback <= 32
        assert LEAST_TARGET <= found.target <= 32


def test_outliers_count_less() -> None:
    hidden = torch.ones(2, 5, 4)
    after = hidden.clone()
    hidden[0, 0] = 100.0
    after[1, 2] = 50.0
    weights = without_outliers(torch.full((2, 5), 3.0), lengths(hidden, after))
    expected = torch.full((2, 5), 3.0)
    # A state of ones has length 2, and is the median.
    expected[0, 0] *= (LONG / 100) ** 2
    expected[1, 2] *= (LONG / 50) ** 2
    torch.testing.assert_close(weights, expected)
    assert torch.equal(without_outliers(weights, 0 * lengths(hidden, after)), weights)
