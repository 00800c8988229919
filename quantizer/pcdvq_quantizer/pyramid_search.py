"""Nearest codes of integer pyramids (codec pvq)."""

from __future__ import annotations

import torch
from pcdvq_kernels import pyramid
from pcdvq_kernels.codebook import Codebook
from torch import Tensor

# Magnitudes tried for a group, those nearest to its own: more find nothing better.
CANDIDATES = 3
CHUNK_GROUPS = 1 << 14  # that stay in the cache


class PyramidSearch:
    """Finds the direction and magnitude nearest to a group in Euclidean distance."""

    def __init__(self, codebook: Codebook) -> None:
        self._spec = codebook.spec
        self._pulses = torch.tensor(codebook.spec.pulses)  # [M]
        self._scales = pyramid.scales(codebook.magnitudes, codebook.spec.shift)  # [M]
        self._steps = self._scales / pyramid.scales(torch.ones(1), 0)  # [M], levels of one pulse

    def encode(self, x: Tensor) -> Tensor:
        """Codes int64 [G] of `x`, fp32 [G, 8] in levels, finite."""
        return torch.cat([self._encode(chunk) for chunk in x.split(CHUNK_GROUPS)])

    def _encode(self, x: Tensor) -> Tensor:
        magnitudes = x.abs().sum(1, keepdim=True)  # [G, 1]
        far = (magnitudes - self._steps * self._pulses).abs()  # [G, M]
        tried = far.topk(min(CANDIDATES, far.shape[1]), largest=False).indices  # [G, C]
        points = nearest_points(
            x.unsqueeze(1) / self._steps[tried].unsqueeze(-1), self._pulses[tried]
        )
        levels = pyramid.scale_points(points, self._scales[tried])  # [G, C, 8]
        best = (levels - x.unsqueeze(1)).square().sum(-1).argmin(1, keepdim=True)  # [G, 1]
        point = points[torch.arange(len(x)), best[:, 0]]
        magnitude = tried.gather(1, best)[:, 0]
        return pyramid.encode(point, magnitude, self._spec.pulses, self._spec.code_bits)


def nearest_points(x: Tensor, pulses: Tensor) -> Tensor:
    """The integer points nearest to `x` whose magnitudes sum to `pulses`.

    Args:
        x: fp32 [..., 8], finite.
        pulses: int64 [...], at least 1.

    Returns:
        int32 [..., 8].
    """
    total = pulses.float()  # [...]
    # Where a coordinate has all pulses, how far it is beyond does not matter.
    target = x.abs().minimum(2 * total.unsqueeze(-1))
    point = _project(target, total).round()
    missing = total - point.sum(-1)  # [...]
    while missing.any():
        # The one that comes nearest, or leaves farthest off least, by one pulse more or less.
        behind = target - point
        most = behind.argmax(-1, keepdim=True)
        least = torch.where(point > 0, behind, torch.inf).argmin(-1, keepdim=True)
        where = torch.where(missing.unsqueeze(-1) > 0, most, least)
        point.scatter_add_(-1, where, missing.sign().unsqueeze(-1))
        missing -= missing.sign()
    return torch.where(x < 0, -point, point).int()


def _project(target: Tensor, total: Tensor) -> Tensor:
    """`target` [..., 8] >= 0, shifted alike and cut at 0 so that sums come near to `total` [...].

    Exact, the projection onto a simplex, but for groups with coordinates near the cut (Michelot,
    1986, "A finite algorithm for finding the projection of a point onto the canonical simplex").
    """
    shift = ((target.sum(-1) - total) / target.shape[-1]).unsqueeze(-1)
    for _ in range(2):
        inside = target > shift
        count = inside.sum(-1, keepdim=True).clamp_min(1)
        shift = ((target * inside).sum(-1, keepdim=True) - total.unsqueeze(-1)) / count
    return (target - shift).clamp_min(0)
