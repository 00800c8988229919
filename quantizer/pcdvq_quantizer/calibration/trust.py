"""How far a quantized model is from its original on calibration text that was held out."""

from __future__ import annotations

from dataclasses import dataclass
from math import exp

import torch
from torch import Tensor, nn

from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.mixture import CHAT, TEXT, Windows
from pcdvq_quantizer.calibration.parallel import Processes
from pcdvq_quantizer.hf.logits import CHUNK_POSITIONS

MOST_KL = 0.25  # nats; with more a user would notice


@dataclass(frozen=True)
class HeldOut:
    """The quantized model beside its original on windows of one kind.

    Attributes:
        kind: `answers` to requests or `text`.
        kl: KL(original || quantized) of the next-token distributions, mean, nats.
        agreement: share of tokens whose likeliest next one is the same.
        perplexity: of the quantized model.
        reference_perplexity: of the original.
        tokens: number of tokens predicted.
    """

    kind: str
    kl: float
    agreement: float
    perplexity: float
    reference_perplexity: float
    tokens: int

    @property
    def is_bad(self) -> bool:
        return not self.kl <= MOST_KL  # NaN is bad too

    def sentence(self, remedy: str) -> str:
        """What to tell the user; `remedy` is advice for a bad one."""
        what = {"answers": "held-out answers", "text": "held-out calibration text"}[self.kind]
        figures = (
            f"on {what} ({self.tokens} tokens): KL {self.kl:.3f} nats from the original, the same "
            f"likeliest token in {100 * self.agreement:.0f} %, perplexity {self.perplexity:.2f} "
            f"(original {self.reference_perplexity:.2f})"
        )
        if not self.is_bad:
            return figures
        changed = "answers" if self.kind == "answers" else "predictions"
        return f"{figures}. This model's {changed} changed: {remedy}"


def measure_held_out(
    model: LayeredModel,
    windows: Windows,
    original: Tensor,
    quantized: Tensor,
    processes: Processes,
) -> HeldOut | None:
    """Compare what comes out of the last decoder layer of both models; None without such windows.

    Answers are measured where there are any, else text. An output head that is quantized is taken
    as it was.

    Args:
        original, quantized: fp32 [S, T, H], this process's share.
    """
    kind = CHAT if (windows.held & (windows.kinds == CHAT)).any() else TEXT
    rows = windows.held & (windows.kinds == kind)
    if not rows.any():
        return None
    share = processes.share(len(rows))
    sums = torch.zeros(5, dtype=torch.float64)  # KL, same, two negative log-likelihoods, tokens
    for row in range(*share.indices(len(rows))):
        if rows[row]:
            hidden = original[row - share.start], quantized[row - share.start]
            sums += _compare(model, windows.tokens[row], windows.said[row], *hidden)
    processes.sum(sums)
    kl, same, nll, reference_nll = (sums[:4] / sums[4].clamp_min(1)).tolist()
    name = "answers" if kind == CHAT else "text"
    count = int(sums[4].item())
    return HeldOut(name, kl, same, exp(min(nll, 99.0)), exp(min(reference_nll, 99.0)), count)


def _compare(
    model: LayeredModel, tokens: Tensor, said: Tensor, original: Tensor, quantized: Tensor
) -> Tensor:
    """Sums of `measure_held_out` over one window, where its next token was `said`."""
    sums = torch.zeros(5, dtype=torch.float64)
    for places in said[:-1].nonzero()[:, 0].split(CHUNK_POSITIONS):
        theirs, mine = (
            model.logits(hidden[places]).float().log_softmax(1) for hidden in (original, quantized)
        )
        kl = nn.functional.kl_div(mine, theirs, reduction="sum", log_target=True)
        same = (mine.argmax(1) == theirs.argmax(1)).sum()
        targets = tokens[places + 1, None].to(mine.device)
        nlls = [-each.gather(1, targets).sum() for each in (mine, theirs)]
        count = torch.tensor(len(places), device=mine.device)
        sums += torch.stack([kl, same, *nlls, count]).double().cpu()
    return sums
