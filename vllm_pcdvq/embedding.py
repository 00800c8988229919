"""Input embeddings and output heads whose vectors are PCDVQ codes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from pcdvq_kernels.errors import CheckpointError
from torch import Tensor
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)

from vllm_pcdvq.linear import PCDVQLinearMethod

if TYPE_CHECKING:
    from vllm_pcdvq.config import PCDVQConfig


def embedding_method(
    config: PCDVQConfig, layer: VocabParallelEmbedding, prefix: str
) -> QuantizeMethodBase | None:
    """The method of an input embedding or output head, None to leave it to vLLM.

    Many models build their input embedding without saying its name: then `prefix` is "".

    Raises:
        CheckpointError: the checkpoint quantizes something inside of the layer.
    """
    is_head = isinstance(layer, ParallelLMHead)
    name = prefix or (None if is_head else config.embedding)
    if name in config.layers:
        return PCDVQEmbeddingMethod(config, name, config.layers[name])
    config.refuse_quantized(layer, prefix)
    return TiedHeadMethod() if is_head and config.embedding else None


def _tie(head: ParallelLMHead, embed_tokens: VocabParallelEmbedding) -> VocabParallelEmbedding:
    """The layer to serve as a head tied to a quantized embedding: the embedding itself."""
    if head.bias is not None:
        raise CheckpointError(
            f"{head.prefix} has a bias and is tied to a quantized embedding, which vllm-pcdvq does "
            "not serve. Quantize again with --embedding-bits 16."
        )
    return embed_tokens


class PCDVQEmbeddingMethod(PCDVQLinearMethod):
    """A vector per token, as the rows of a quantized layer.

    vLLM splits a vocabulary, padded to 64, at any row. So a rank has the vectors that are its own,
    padding included, and before them `lead` others, with which the chain of the first one starts.
    N counts all of these; K is the length of a vector, which is never split. Padding has row scale
    0. The parameters are those of `PCDVQLinearMethod`, and there is an empty buffer `weight`, from
    which LoRA takes dtype and device.
    """

    kind = "embeddings"

    def create_weights(
        self,
        layer: VocabParallelEmbedding,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Add the parameters to `layer`; see `PCDVQLinearMethod.create_weights`."""
        self.lead = layer.shard_indices.padded_org_vocab_start_index % self.spec.row_multiple
        rows = self.lead + sum(output_partition_sizes)  # a whole layer, as far as chains go
        sizes = input_size_per_partition, [rows], input_size, rows
        super().create_weights(layer, *sizes, params_dtype, **extra_weight_attrs)

    def process_weights_after_loading(self, layer: VocabParallelEmbedding) -> None:
        super().process_weights_after_loading(layer)
        empty = torch.empty(0, dtype=self.params_dtype, device=layer.qweight.device)
        layer.register_buffer("weight", empty, persistent=False)

    def embedding(self, layer: VocabParallelEmbedding, input_: Tensor) -> Tensor:
        """Vectors [..., K] of the ids `input_` [...] in the model's dtype, a new tensor."""
        return torch.ops.pcdvq.embedding(
            input_ + self.lead if self.lead else input_,
            layer.qweight,
            layer.row_scale,
            layer.signs_in,
            layer.codewords,
            self.layout_ints,
            self.params_dtype,
        )

    def apply(self, layer: VocabParallelEmbedding, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Logits [..., N - lead] in x's dtype, from x [..., K]."""
        if not self.lead:
            return super().apply(layer, x, bias)
        bias = None if bias is None else F.pad(bias, (self.lead, 0))
        return super().apply(layer, x, bias)[..., self.lead :].contiguous()

    def dequantize_weight(self, layer: VocabParallelEmbedding) -> Tensor:
        """The dense vectors [N - lead, K] in the model's dtype."""
        return super().dequantize_weight(layer)[self.lead :]

    def tie_weights(
        self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding
    ) -> VocabParallelEmbedding:
        return _tie(layer, embed_tokens)


class TiedHeadMethod(UnquantizedEmbeddingMethod):
    """vLLM's method for a head that may yet be tied to a quantized embedding."""

    def tie_weights(
        self, layer: ParallelLMHead, embed_tokens: VocabParallelEmbedding
    ) -> VocabParallelEmbedding:
        if isinstance(embed_tokens.quant_method, PCDVQEmbeddingMethod):
            return _tie(layer, embed_tokens)
        return super().tie_weights(layer, embed_tokens)
