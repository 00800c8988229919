"""The claim PCDVQ rests on (arXiv 2506.05432, section 3.1): direction matters more than magnitude.

At equal bits per group, quantizing directions alone must hurt far more than magnitudes alone.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_quantizer.layer import ErrorSum
from pcdvq_quantizer.plan import input_signs
from torch import Tensor
from transformers import AutoModelForCausalLM

DIM = 8


def spherical_codebook(directions: Tensor, bits: int) -> Tensor:
    """2^bits unit vectors fitted to unit `directions` [G, 8] (spherical k-means)."""
    centres = directions[: 1 << bits].clone()
    for _ in range(15):
        nearest = (directions @ centres.T).argmax(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, directions)
        centres /= centres.norm(dim=1, keepdim=True)
    return centres


def lloyd_max(lengths: Tensor, bits: int) -> Tensor:
    """2^bits levels fitted to `lengths` [G]."""
    levels = lengths.quantile((torch.arange(1 << bits) + 0.5) / (1 << bits))
    for _ in range(30):
        nearest = (lengths[:, None] - levels).abs().argmin(1)
        counts = torch.bincount(nearest, minlength=len(levels))
        sums = torch.zeros_like(levels).index_add_(0, nearest, lengths)
        levels = torch.where(counts > 0, sums / counts.clamp_min(1), levels)
    return levels


def quantize(groups: Tensor, bits: int, part: str) -> Tensor:
    """`groups` [G, 8] with only their direction or only their magnitude quantized."""
    lengths = groups.norm(dim=1)
    directions = groups / lengths[:, None]
    if part == "direction":
        centres = spherical_codebook(directions, bits)
        return centres[(directions @ centres.T).argmax(1)] * lengths[:, None]
    levels = lloyd_max(lengths, bits)
    return directions * levels[(lengths[:, None] - levels).abs().argmin(1)][:, None]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_suffer_more_from_directions(bits: int) -> None:
    groups = torch.randn(1 << 14, DIM, generator=torch.Generator().manual_seed(0))
    errors = {
        part: (quantize(groups, bits, part) - groups).square().sum() / groups.square().sum()
        for part in ("direction", "magnitude")
    }
    assert errors["direction"] > 10 * errors["magnitude"]


@pytest.mark.parametrize("bits", [2, 6])
def test_a_model_suffers_more_from_directions(bits: int, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_config())
    tokens = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))

    def divergence(part: str) -> float:
        original, changed = (
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32) for _ in range(2)
        )
        for name, parameter in changed.named_parameters():
            if "proj" in name:
                signs = input_signs(parameter.shape[1], 0)
                rotated = block_hadamard(parameter.data * signs, 64)
                q = quantize(rotated.reshape(-1, DIM), bits, part).view_as(rotated)
                parameter.data = block_hadamard(q, 64) * signs
        with torch.no_grad():
            p, q = (m(tokens).logits.log_softmax(-1) for m in (original, changed))
        return (p.exp() * (p - q)).sum().item()

    assert divergence("direction") > 5 * divergence("magnitude")


@pytest.mark.parametrize("length", [DIM, 0], ids=["groups", "rows"])
def test_error_is_split_exactly(length: int) -> None:
    """|w - q|^2 = 2 |w| |q| (1 - cos) + (|w| - |q|)^2, and the pure cases."""
    w = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))

    def shares(q: Tensor) -> tuple[float, float]:
        errors = ErrorSum(length)
        errors.add(w, q)
        total = errors.total()
        assert total.weight == pytest.approx(
            ((w - q).square().sum() / w.square().sum()).item(), rel=1e-4
        )
        return total.direction, 1 - total.direction

    assert shares(w * 1.5)[0] == pytest.approx(0, abs=1e-4)
    flipped = w.view(-1, DIM).flip(1).view_as(w)
    assert shares(flipped)[1] == pytest.approx(0, abs=1e-4)
