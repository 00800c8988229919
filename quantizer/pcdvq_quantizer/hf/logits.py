"""Logits of a causal language model, a chunk of positions at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

# Of logits that exist at a time: 256 x 262144 (Gemma) in fp32 are 256 MiB.
CHUNK_POSITIONS = 256
PROBE_TOKENS = 8


class ChunkedLogits:
    """A causal language model in two parts: its body, and its head over some positions.

    Gradients pass through both.

    Attributes:
        chunked: whether the model can be parted; else its body is the whole model, and all logits
            of a window exist at once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.chunked = True
        self.chunked = self._head_works_in_chunks()

    def body(self, ids: Tensor) -> Tensor:
        """What `head` reads, [1, T, features], for int64 `ids` [T] on the model's device."""
        if not self.chunked:
            return self.model(input_ids=ids[None], use_cache=False).logits
        return self.model.base_model(input_ids=ids[None], use_cache=False).last_hidden_state

    def head(self, ids: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        """Logits at `positions`, [C, vocabulary], from what `body` gave for `ids`.

        The model's own `forward` makes them, over a body that only returns `hidden`: so whatever
        the architecture does to logits (scaling, capping) is done.
        """
        if not self.chunked:
            return hidden[0, positions]
        with _body(self.model, _Replay(hidden)):
            output = self.model(input_ids=ids[None], logits_to_keep=positions, use_cache=False)
        return output.logits[0]

    # Not inference_mode: models may keep what they make in their first forward, and a tensor made
    # in inference mode is of no use to gradients.
    @torch.no_grad()
    def _head_works_in_chunks(self) -> bool:
        """Whether `head` gives the model's logits, tried on a few tokens."""
        ids = torch.arange(PROBE_TOKENS, device=self.model.device)
        expected = self.model(input_ids=ids[None], use_cache=False).logits[0]
        try:
            found = torch.cat([self.head(ids, self.body(ids), part) for part in ids.split(3)])
        except (TypeError, AttributeError, KeyError, RuntimeError, ValueError):
            return False
        if found.shape != expected.shape:
            return False
        # Only rounding may differ; a step of the head that was left out is far outside of this.
        return bool((found - expected).abs().max() <= 0.05 * expected.float().std())


class _Replay(nn.Module):
    """A model body that returns given hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=self._hidden)


@contextmanager
def _body(model: PreTrainedModel, body: nn.Module) -> Iterator[None]:
    """Put `body` in the place of the model's own for a while."""
    name = model.base_model_prefix
    original = model._modules[name]
    model._modules[name] = body
    try:
        yield
    finally:
        model._modules[name] = original
