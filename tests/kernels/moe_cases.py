"""Random experts for the kernel tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from linear_cases import Case, random_case
from pcdvq_kernels import reference
from torch import Tensor


@dataclass(frozen=True)
class MoeCase:
    """Random experts, tokens and their routing.

    Attributes:
        x: [T, H].
        topk_weights, topk_ids: [T, top_k].
        gate_up: all experts' gate and up as one layer of E * 2 I rows.
        down: likewise, E * H rows.
        experts: E.
    """

    x: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    gate_up: Case
    down: Case
    experts: int

    def args(self) -> tuple:
        gate_up, down = self._stacked(self.gate_up), self._stacked(self.down)
        layouts = self.gate_up.args()[-1], self.down.args()[-1]
        routing = self.topk_weights, self.topk_ids
        return self.x, *routing, gate_up, down, self.gate_up.codewords, *layouts

    def _stacked(self, case: Case) -> list[Tensor]:
        shape = self.experts, -1
        qweight = case.qweight.view(*shape, case.qweight.shape[1])
        return [qweight, case.row_scale.view(shape), case.signs_in]

    def _dense(self, case: Case) -> Tensor:
        """fp32 [E, N, K]."""
        stacked, signs_in = self._stacked(case), case.signs_in
        return torch.stack(
            [
                reference.dequantize(qweight, row_scale, signs_in, case.codebook, case.block)
                for qweight, row_scale in zip(*stacked[:2], strict=True)
            ]
        )

    def reference(self) -> Tensor:
        """fp32 [T, H]."""
        gate_up, down = self._dense(self.gate_up), self._dense(self.down)
        sums = torch.zeros(self.x.shape)
        for token, (weights, ids) in enumerate(zip(self.topk_weights, self.topk_ids, strict=True)):
            for weight, expert in zip(weights.float(), ids.tolist(), strict=True):
                if expert >= 0:
                    gate, up = (gate_up[expert] @ self.x[token].float()).chunk(2)
                    active = torch.nn.functional.silu(gate) * up
                    sums[token] += weight * (down[expert] @ active)
        return sums

    def tokens(self, which: slice | Tensor) -> MoeCase:
        """The case with these of its tokens."""
        routing = self.topk_weights[which], self.topk_ids[which]
        return replace(self, x=self.x[which], topk_weights=routing[0], topk_ids=routing[1])


def moe_case(
    codec: str, tokens: int, *, hidden: int = 128, inner: int = 64, experts: int = 7, top_k: int = 3
) -> MoeCase:
    """Expert 1 gets no token; some choices are of experts elsewhere (-1)."""
    generator = torch.Generator().manual_seed(tokens)
    gate_up = random_case(codec, tokens, experts * 2 * inner, hidden, block=8)
    down = random_case(codec, 1, experts * hidden, inner, block=4)
    scores = torch.rand(tokens, experts, generator=generator)
    scores[:, 1] = -1
    ids = scores.topk(top_k, 1).indices
    ids[::5, -1] = -1
    weights = torch.rand(tokens, top_k, generator=generator)
    # Around the middle of silu.
    gate_up = replace(gate_up, row_scale=gate_up.row_scale / 16)
    return MoeCase(gate_up.x, weights, ids, gate_up, down, experts)
