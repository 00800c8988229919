"""What a squared error at each token of the calibration text costs."""

from __future__ import annotations

import torch
from torch import Tensor

# A hidden state may be this many times as long as the median one before an error counts less there:
# the norm after it divides by the length, and such tokens are mostly sinks of attention.
LONG = 2.0


def lengths(before: Tensor, after: Tensor) -> Tensor:
    """The greater one of two hidden states' lengths, fp32 [S, T], of fp32 [S, T, H]."""
    return torch.maximum(before.norm(dim=-1), after.norm(dim=-1)).cpu()


def without_outliers(weights: Tensor, length: Tensor) -> Tensor:
    """`weights` fp32 [S, T], less where the original's hidden states are outliers.

    Args:
        length: fp32 [S, T], of the hidden states around a decoder layer.
    """
    limit = LONG * length.median()
    return torch.where(length > limit, weights * (limit / length).square(), weights)
