"""What is added to the diagonal of a Hessian, chosen by the error on text of another kind.

Error feedback and the target of a layer are learnt from the calibration text, and a small damping
follows that text closely. How closely is well depends on how much of it other texts share: each
kind of text is held out in turn, what is learnt from the other is applied to it, and the damping
with the least error there is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import torch
from pcdvq_kernels.hadamard import block_hadamard, choose_block
from torch import Tensor

from pcdvq_quantizer.calibration.ldlq import cholesky_feedback
from pcdvq_quantizer.calibration.statistics import Damping, InputStatistics

STEP = 4.0  # between the values that are tried
# Of feedback, of the target: as whole models show, with less it follows the text too closely.
LEAST, LEAST_TARGET = 0.001, 0.1
MOST = 32.0
ROWS = 256  # of the weights, whose targets are tried


def damped(hessian: Tensor, share: float) -> Tensor:
    """`hessian` with `share` of its mean diagonal added to the diagonal."""
    mean = hessian.diagonal().mean().item() or 1.0
    return hessian + share * mean * torch.eye(len(hessian), dtype=hessian.dtype)


def choose_damping(kinds: Sequence[InputStatistics], weight: Tensor, start: Damping) -> Damping:
    """The damping of feedback and target that is best for kinds of text held out.

    Args:
        kinds: moments of the same inputs in texts of two kinds or more.
        weight: fp32 [N, K], of the linears that read them.
        start: what is tried first.
    """
    # As they are rounded: in the basis of some random rotation, which one makes no difference.
    size = weight.shape[1]
    signs = 1.0 - 2.0 * torch.randint(0, 2, (size,), generator=torch.Generator().manual_seed(0))
    block = choose_block(size, 1)
    kinds = [each.rotated(signs, block) for each in kinds]
    rows = torch.linspace(0, len(weight) - 1, min(ROWS, len(weight))).round().long()
    part = block_hadamard(weight[rows].cpu() * signs, block).double()
    folds = [(fit, held) for fit in kinds for held in kinds if held is not fit]

    def feedback_error(share: float) -> float:
        return sum(_feedback_error(fit, held, share) for fit, held in folds)

    def target_error(share: float) -> float:
        return sum(_target_error(fit, held, part, rows, share) for fit, held in folds)

    target = max(LEAST_TARGET, _least(target_error, start.target))
    return Damping(_least(feedback_error, start.feedback), target)


def _least(error: Callable[[float], float], start: float) -> float:
    """Where `error` is least, from `start` downhill in steps of a factor.

    Between the steps by a parabola in the logarithm, so that a small change of the errors changes
    little.
    """
    found = {0: error(start)}

    def at(step: int) -> float:
        if step not in found:
            share = start * STEP**step
            found[step] = error(share) if LEAST <= share <= MOST else inf
        return found[step]

    best = 0
    for direction in (1, -1):
        while at(best + direction) < at(best):
            best += direction
    left, here, right = at(best - 1), at(best), at(best + 1)
    bend = left - 2 * here + right
    shift = (left - right) / (2 * bend) if 0 < bend < inf else 0.0
    return start * STEP ** (best + shift)


def _feedback_error(fit: InputStatistics, held: InputStatistics, share: float) -> float:
    """What feedback learnt from `fit` leaves of the errors of rounding on `held`."""
    try:
        feedback = cholesky_feedback(damped(fit.hessian, share), 1)
    except torch.linalg.LinAlgError:
        return inf
    hessian = held.hessian.float()
    left = ((feedback @ hessian) * feedback).sum()
    return (left / hessian.trace().clamp_min(1e-30)).item()


def _target_error(
    fit: InputStatistics, held: InputStatistics, weight: Tensor, rows: Tensor, share: float
) -> float:
    """What the target learnt from `fit` leaves of the output error on `held`, of the output.

    What does not depend on the target is left out.
    """
    try:
        factor = torch.linalg.cholesky(damped(fit.hessian, share))
    except torch.linalg.LinAlgError:
        return inf
    learnt, wanted = (
        weight @ each.cross if each.lack is None else each.lack[rows] for each in (fit, held)
    )
    change = torch.cholesky_solve(learnt.T, factor).T
    error = ((change @ held.hessian - 2 * wanted) * change).sum()
    return (error / ((weight @ held.hessian) * weight).sum().clamp_min(1e-30)).item()
