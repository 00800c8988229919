"""Quantized embeddings and output heads: which method, what is loaded, how it is sharded."""

from __future__ import annotations

import pytest
import torch
from bare_layers import (
    BLOCK_256,
    finish,
    load,
    load_part,
    make_codebook,
    make_config,
    make_parts,
    tensor_parallel,
)
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError
from random_checkpoint import E8, SHORT_CHAINS, TRELLIS_4
from torch import Tensor
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    UnquantizedEmbeddingMethod,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.utils import WeightsMapper

from vllm_pcdvq.config import PCDVQConfig
from vllm_pcdvq.embedding import PCDVQEmbeddingMethod, TiedHeadMethod

K, VOCAB = 256, 333  # padded to 384
NAME = "model.embed_tokens"
PART = make_parts([VOCAB], K)[0]
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def _config(*layers: str) -> PCDVQConfig:
    return make_config(list(layers or (NAME,)), BLOCK_256, make_codebook(), embedding=NAME)


def _embedding(config: PCDVQConfig, prefix: str = "", **changes: object) -> VocabParallelEmbedding:
    return VocabParallelEmbedding(VOCAB, K, quant_config=config, prefix=prefix, **changes)


def _head(config: PCDVQConfig, **changes: object) -> ParallelLMHead:
    return ParallelLMHead(VOCAB, K, quant_config=config, prefix="lm_head", **changes)


def _dense() -> Tensor:
    return PART.dense(make_codebook(), BLOCK_256[K])


def test_methods(vllm_config) -> None:
    config = _config(NAME, "lm_head")
    for layer in (_embedding(config), _embedding(config, NAME), _head(config)):
        assert isinstance(layer.quant_method, PCDVQEmbeddingMethod)
    assert type(_embedding(config, "other").quant_method) is UnquantizedEmbeddingMethod


def test_quantized_head_beside_an_embedding_that_is_not(vllm_config) -> None:
    config = make_config(["lm_head"], BLOCK_256, make_codebook())
    assert type(_embedding(config).quant_method) is UnquantizedEmbeddingMethod
    head = _head(config)
    load_part(head, PART)
    finish(head)
    x = torch.randn(3, K)
    expected = x @ _dense().T
    found = head.quant_method.apply(head, x)
    torch.testing.assert_close(found[:, :VOCAB], expected, **TOLERANCE)
    assert not found[:, VOCAB:].any()


@pytest.mark.parametrize("stored", [(NAME,), (NAME, "lm_head")], ids=["shared", "stored twice"])
def test_tied_head_is_the_embedding(stored: tuple[str, ...], vllm_config) -> None:
    config = _config(*stored)
    embedding, head = _embedding(config), _head(config)
    assert head.tie_weights(embedding) is embedding
    with pytest.raises(CheckpointError, match="lm_head has a bias and is tied"):
        _head(config, bias=True).tie_weights(embedding)


def test_head_tied_to_an_embedding_that_is_not_quantized(vllm_config) -> None:
    config = _config()
    embedding, head = _embedding(config, "other"), _head(config)
    assert isinstance(head.quant_method, TiedHeadMethod)
    assert head.tie_weights(embedding).weight is embedding.weight


@pytest.mark.parametrize("spec", [TRELLIS_4, SHORT_CHAINS, E8], ids=["64", "16", "no chains"])
@pytest.mark.parametrize("vocabulary", [333, 300, 10])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_shards(
    size: int, vocabulary: int, spec: CodebookSpec, vllm_config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every id is some rank's, and the logits of the ranks lie side by side.

    Ranks start anywhere in a chain, and some have nothing but padding.
    """
    module = "vllm.model_executor.layers.vocab_parallel_embedding"
    monkeypatch.setattr(f"{module}.tensor_model_parallel_all_reduce", lambda x: x)
    codebook = make_codebook(spec)
    config = make_config([NAME], BLOCK_256, codebook, embedding=NAME)
    (part,) = make_parts([vocabulary], K, spec=spec)
    dense = part.dense(codebook, BLOCK_256[K])
    ids = torch.arange(vocabulary - 1, -1, -1, dtype=torch.int32)
    x, bias = torch.randn(3, K), torch.randn(vocabulary)
    vectors, logits, weights = torch.zeros(vocabulary, K), [], []
    for rank in range(size):
        with tensor_parallel(rank, size):
            layer = ParallelLMHead(vocabulary, K, bias=True, quant_config=config, prefix=NAME)
            load_part(layer, part, bias=bias)
            finish(layer)
            vectors += VocabParallelEmbedding.forward(layer, ids)
            logits.append(layer.quant_method.apply(layer, x, layer.bias))
            weights.append(layer.quant_method.dequantize_weight(layer))
    torch.testing.assert_close(vectors, dense[ids.long()], **TOLERANCE)
    whole = torch.cat(logits, dim=-1)
    assert whole.shape == (3, -(-vocabulary // 64) * 64)
    torch.testing.assert_close(whole[:, :vocabulary], x @ dense.T + bias, **TOLERANCE)
    assert not whole[:, vocabulary:].any()
    torch.testing.assert_close(torch.cat(weights)[:vocabulary], dense, rtol=0, atol=0)


def test_added_vocabulary(vllm_config) -> None:
    """Rows that a model reserves past the checkpoint's vocabulary are zeros."""
    layer = VocabParallelEmbedding(
        VOCAB + 5, K, org_num_embeddings=VOCAB, quant_config=_config(), prefix=NAME
    )
    load_part(layer, PART)
    finish(layer)
    assert not layer(torch.tensor([layer.num_embeddings_padded - 1])).any()


def test_model_dtype(vllm_config) -> None:
    layer = _embedding(_config(), params_dtype=torch.bfloat16)
    load_part(layer, PART)
    finish(layer)
    found = layer(torch.tensor([3, 3]))
    assert found.dtype == layer.weight.dtype == torch.bfloat16
    torch.testing.assert_close(found[0].float(), _dense()[3], rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("missing", ["qweight", "row_scale", "signs_in"])
def test_missing_tensor(missing: str, vllm_config) -> None:
    layer = _embedding(_config())
    for name, tensor in PART.tensors().items():
        if name != missing:
            load(layer, name, tensor)
    with pytest.raises(CheckpointError, match=rf"tensor model\.embed_tokens\.{missing} is missing"):
        finish(layer)


def test_nothing_loaded(vllm_config) -> None:
    with pytest.raises(CheckpointError, match=r"model\.embed_tokens\.row_scale is missing"):
        finish(_embedding(_config()))


@pytest.mark.parametrize("name", ["qweight", "row_scale", "signs_in"])
def test_wrong_shape(name: str, vllm_config) -> None:
    layer = _embedding(_config())
    tensor = PART.tensors()[name]
    with pytest.raises(CheckpointError, match=rf"model\.embed_tokens\.{name} is \[.*expected \["):
        load(layer, name, tensor[:-1])


def test_renamed_embedding() -> None:
    config = _config()
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model."}))
    assert config.embedding == f"language_model.{NAME}"
    assert config.embedding in config.layers
