"""What a GGUF file says of its model is taken over or refused by name."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from gguf_files import BLOCKS, HEAD_DIM, HIDDEN, INNER, KV_HEADS, VOCAB, write_gguf
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import gguf_source
from pcdvq_quantizer.evaluation.files import ModelFiles
from pcdvq_quantizer.gguf_source import GGUFSource
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.selection import hf_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

OPTIONS = QuantizeOptions(bits=3.0, max_tp=1, calibration="none")
SCALING = "rope.scaling."
GEMMA: dict[str, Any] = {
    "attention.key_length": HEAD_DIM,
    "attention.value_length": HEAD_DIM,
    "attention.sliding_window": 32,
    "rope.dimension_count": None,
}


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


def per_block(shape: tuple[int, ...], *names: str) -> dict[str, np.ndarray]:
    return {f"blk.{block}.{name}": ones(*shape) for block in range(BLOCKS) for name in names}


GEMMA2_NORMS = per_block((HIDDEN,), "post_attention_norm.weight", "post_ffw_norm.weight")
GEMMA3_NORMS = GEMMA2_NORMS | per_block((HEAD_DIM,), "attn_q_norm.weight", "attn_k_norm.weight")


def rope_factors(factor: float) -> np.ndarray:
    """As llama.cpp's converter makes them of "llama3" scaling."""
    wavelengths = 2 * np.pi * 10000.0 ** (np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    smooth = np.clip((8192 / wavelengths - 1) / (4 - 1), 0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)


def test_whole_file(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {"other.note": "x", "attention.causal": True})
    checkpoint = quantize_model(make_plan(str(path), OPTIONS), tmp_path / "out")
    assert len(checkpoint.layers) == 7 * BLOCKS
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("AB").input_ids == [VOCAB - 1]
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file=path.name, dtype=torch.bfloat16
    )
    source = GGUFSource(path)
    for name in source.shapes:
        assert torch.equal(source.load(name), model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("metadata", "rope"),
    [
        ({}, {"rope_type": "default"}),
        ({f"{SCALING}type": "none", f"{SCALING}factor": 4.0}, {"rope_type": "default"}),
        (
            {f"{SCALING}type": "linear", f"{SCALING}factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({f"{SCALING}factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.freq_base": None}, {"rope_theta": 10000.0}),
        (
            {
                f"{SCALING}type": "yarn",
                f"{SCALING}factor": 4.0,
                f"{SCALING}original_context_length": 64,
                f"{SCALING}yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_scaled_rotary_frequencies(
    metadata: dict[str, Any], rope: dict[str, Any], tmp_path: Path
) -> None:
    source = GGUFSource(write_gguf(tmp_path / "tiny.gguf", metadata))
    assert (
        source.config["rope_parameters"] == {"rope_theta": 10000.0, "rope_type": "default"} | rope
    )


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_rotary_factors_of_llama3(factor: float, tmp_path: Path) -> None:
    factors = rope_factors(factor)
    source = GGUFSource(write_gguf(tmp_path / "a.gguf", None, {"rope_freqs.weight": factors}))
    assert source.config["rope_parameters"]["rope_type"] == "llama3"
    config = hf_config(source.config)
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    np.testing.assert_allclose(frequencies.numpy(), plain / factors, rtol=1e-4)


def test_gemma(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "2.gguf",
        GEMMA | {"attn_logit_softcapping": 40.0, "final_logit_softcapping": 20.0},
        GEMMA2_NORMS,
        "gemma2",
    )
    config = hf_config(GGUFSource(path).config)
    assert (config.attn_logit_softcapping, config.final_logit_softcapping) == (40.0, 20.0)
    assert (config.sliding_window, config.query_pre_attn_scalar) == (32, HEAD_DIM)
    scaling = {f"{SCALING}type": "linear", f"{SCALING}factor": 8.0, "rope.freq_base_swa": 5000.0}
    path = write_gguf(tmp_path / "3.gguf", GEMMA | scaling, GEMMA3_NORMS, "gemma3")
    rope = GGUFSource(path).config["rope_parameters"]
    assert rope["full_attention"]["rope_type"] == "linear"
    assert rope["full_attention"]["factor"] == 8.0
    assert rope["sliding_attention"] == {"rope_type": "default", "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{SCALING}type", "longrope"),
        (f"{SCALING}attn_factor", 2.0),
        (f"{SCALING}yarn_log_multiplier", 0.5),
        ("attention.scale", 0.5),
        ("attention.sliding_window", 128),
        ("attention.clamp_kqv", 8.0),
        ("attention.causal", False),
        ("attention.value_length", 32),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.25),
        ("logit_scale", 0.125),
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("use_parallel_residual", True),
        ("not.known.yet", 3),
    ],
)
def test_keys_that_cannot_be_taken(key: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(PCDVQError, match=rf"has llama\.{key} {value}, which changes"):
        GGUFSource(write_gguf(tmp_path / "tiny.gguf", {key: value}))


def test_window_that_the_model_does_not_use(tmp_path: Path) -> None:
    biases = per_block((HIDDEN,), "attn_q.bias") | per_block(
        (KV_HEADS * HEAD_DIM,), "attn_k.bias", "attn_v.bias"
    )
    assert GGUFSource(write_gguf(tmp_path / "a.gguf", None, biases, "qwen2")).shapes
    metadata = {"attention.sliding_window": 32}
    with pytest.raises(PCDVQError, match=r"qwen2\.attention\.sliding_window 32"):
        GGUFSource(write_gguf(tmp_path / "b.gguf", metadata, biases, "qwen2"))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("rope_freqs.weight", np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32), "not known here"),
        ("rope_freqs.weight", ones(HEAD_DIM // 2) * np.nan, "not known here"),
        ("rope_freqs.weight", 2 * ones(3), "not known here"),
        ("rope_factors_long.weight", ones(8), r"rope_factors_long\.weight, which .* no place"),
        ("blk.0.attn_q.bias", ones(HIDDEN), r"blk\.0\.attn_q\.bias, which .* no place"),
        ("blk.2.ffn_up.weight", ones(INNER, HIDDEN), r"blk\.2\.ffn_up.* no place"),
        ("blk.0.ffn_up.weight", ones(INNER, 32), r"blk\.0\.ffn_up.* is \[96, 32\], the file's"),
        ("blk.0.ffn_up.weight", np.ones((INNER, HIDDEN), np.int8), "is I8, which cannot be"),
    ],
)
def test_tensors_that_cannot_be_taken(
    name: str, tensor: np.ndarray, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PCDVQError, match=message):
        GGUFSource(write_gguf(tmp_path / "tiny.gguf", None, {name: tensor}))


@pytest.mark.parametrize(
    ("metadata", "architecture", "message"),
    [
        ({"split.count": 3, "split.no": 1}, "llama", "is part 2 of the 3 of a split GGUF"),
        ({"general.type": "adapter"}, "llama", "is no model: its general.type is 'adapter'"),
        ({}, "granite", "general.architecture 'granite', which this release does not read"),
        ({}, "qwen3moe", "'qwen3moe', which this release does not read"),
        ({"block_count": 2**31}, "llama", "block_count 2147483648 and 20 tensors"),
        ({"embedding_length": 2**31}, "llama", r"metadata make it \[64, 2147483648\]"),
        ({"vocab_size": 2**31}, "llama", r"metadata make it \[2147483648, 64\]"),
        ({"attention.head_count": 2**31}, "llama", "cannot be read as a GGUF model"),
        ({"attention.layer_norm_rms_epsilon": None}, "llama", "no llama.attention.layer_norm_rms"),
        ({"attention.head_count": None}, "llama", r"no llama\.attention\.head_count;"),
    ],
)
def test_files_that_are_no_model(
    metadata: dict[str, Any], architecture: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(PCDVQError, match=message):
        GGUFSource(write_gguf(tmp_path / "tiny.gguf", metadata, architecture=architecture))


def test_counts_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of 2^40 numbers, in a file that has a hole for them."""
    monkeypatch.setattr(gguf_source, "MOST_READS", 10_000)
    key = b"llama.numbers"
    head = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q", len(key)) + key
    path = tmp_path / "tiny.gguf"
    path.write_bytes(head + struct.pack("<IIQ", 9, 0, 1 << 40))
    os.truncate(path, 1 << 40)
    with pytest.raises(PCDVQError, match="more keys, tensors or items"):
        GGUFSource(path)


@pytest.mark.parametrize(
    ("metadata", "options"),
    [
        ({}, {}),
        ({"tokenizer.ggml.add_eos_token": True}, {"add_eos_token": True}),
        ({"tokenizer.ggml.pre": "llama-bpe"}, {"add_bos_token": True}),
        ({"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": False}, {}),
        ({"tokenizer.ggml.model": "llama"}, {"add_bos_token": True}),
    ],
)
def test_tokens_around_a_prompt(
    metadata: dict[str, Any], options: dict[str, bool], tmp_path: Path
) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", metadata)
    assert gguf_source.special_token_options(GGUFReader(path)) == options


def test_bos_reaches_the_tokenizer(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "tiny.gguf", {"tokenizer.ggml.pre": "llama-bpe"})
    GGUFSource(path).copy_files(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("AB").input_ids == [1, VOCAB - 1]


def test_tokenizers_that_cannot_be_made(tmp_path: Path) -> None:
    metadata = {"tokenizer.ggml.model": "llama", "tokenizer.ggml.add_space_prefix": False}
    with pytest.raises(PCDVQError, match=r"has tokenizer\.ggml\.add_space_prefix False"):
        GGUFSource(write_gguf(tmp_path / "a.gguf", metadata))
    path = write_gguf(tmp_path / "b.gguf", {"tokenizer.ggml.merges": ["no such"]})
    with pytest.raises(PCDVQError, match=r"b\.gguf has no tokenizer that transformers can make"):
        GGUFSource(path).copy_files(tmp_path)
    assert ModelFiles.find(str(path)).gguf == "b.gguf"
