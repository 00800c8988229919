"""What the metadata of a GGUF file say of the model: taken over, or refused by the key's name.

transformers takes some keys (its `GGUF_CONFIG_MAPPING`) and passes over all others in silence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from gguf import GGUFReader
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.integrations import GGUF_CONFIG_MAPPING
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

ROPE_FACTORS = "rope_freqs.weight"
# Parameters of "llama3" scaling but for the factor: those of every model that has it.
LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Of keys `ARCHITECTURE.KEY`: what transformers leaves out, and the fields of its configurations of
# which the first that a model has is to hold the value.
FIELDS = {
    "attention.head_count": ("num_attention_heads", "n_head"),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads", "n_head"),
    "attention.key_length": ("head_dim",),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_eps"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
}
# Values that change nothing in a model that does not know the key.
NEUTRAL: dict[str, Collection[object]] = {
    "attention.head_count": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0.0,),
    "attention.max_alibi_bias": (0.0,),
    "attn_logit_softcapping": (0.0,),
    "embedding_scale": (0.0, 1.0),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0.0,),
    "leading_dense_block_count": (0,),
    "logit_scale": (0.0, 1.0),
    "nextn_predict_layers": (0,),
    "residual_scale": (0.0, 1.0),
    "rope.scaling.attn_factor": (0.0, 1.0),
    "rope.scaling.yarn_attn_factor": (1.0,),
    "rope.scaling.yarn_ext_factor": (1.0,),
    "rope.scaling.yarn_log_multiplier": (0.0,),
    "ssm.dt_b_c_rms": (False,),
}
# That files have in which transformers looks for them; it would take values of its own instead.
REQUIRED = ("attention.head_count", "attention.layer_norm_rms_epsilon")
# Architectures with tokenizers that put no space before a text, or take care of it themselves.
NO_SPACE_PREFIX = ("gemma2", "gemma3", "gemma4", "phi3")
# Ways of splitting text, `tokenizer.ggml.pre`, of models that read a BOS token first.
PRE_WITH_BOS = ("falcon3", "llama-bpe", "llama-v3", "llama3", "tekken")
# What llama.cpp takes where a file says nothing.
ROPE_BASE = 10000.0
# Sizes, which the shapes of tensors tell again, and notes.
HARMLESS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("pooling_type", "rope.scaling.finetuned", "tensor_data_layout"),
}
SCALING = "rope.scaling."
SCALING_KEYS = {
    f"{SCALING}{name}"
    for name in ("type", "factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow")
}
# Older files have it instead of `rope.scaling.factor`.
SCALE_LINEAR = "rope.scale_linear"


def check_file(reader: GGUFReader, name: str) -> str:
    """The architecture of `reader`, the GGUF file `name`, if it may be a whole model.

    Raises:
        PCDVQError: it is part of a model, something else than a language model, of an architecture
            that transformers does not read, or has more blocks than tensors.
    """
    parts = _value(reader, "split.count")
    if isinstance(parts, int) and parts > 1:
        raise PCDVQError(
            f"{name} is part {int(_value(reader, 'split.no') or 0) + 1} of the {parts} of a split "
            "GGUF file; put them together with llama.cpp's llama-gguf-split --merge"
        )
    kind = _value(reader, "general.type")
    if kind not in (None, "model"):
        raise PCDVQError(
            f"{name} is no model: its general.type is {kind!r}; give a file of a model"
        )
    architecture = _value(reader, "general.architecture")
    if architecture not in GGUF_CONFIG_MAPPING or architecture in ("general", "tokenizer"):
        raise PCDVQError(
            f"{name} has general.architecture {architecture!r}, which this release does not read; "
            "give the original model in Hugging Face's layout"
        )
    blocks = _value(reader, f"{architecture}.block_count")
    if not isinstance(blocks, int) or blocks > len(reader.tensors):
        raise PCDVQError(
            f"{name} has {architecture}.block_count {blocks} and {len(reader.tensors)} tensors; "
            "get the file again"
        )
    return architecture


def take_metadata(reader: GGUFReader, architecture: str, config: PreTrainedConfig) -> None:
    """Put into `config`, which transformers has made of `reader`, all that it left out.

    Raises:
        PCDVQError: a key says something of the model that `config` cannot say, or is missing.
    """
    _imply_attention_scale(architecture, config)
    prefix = f"{architecture}."
    keys = [key.removeprefix(prefix) for key in reader.fields if key.startswith(prefix)]
    for key in REQUIRED:
        if key in GGUF_CONFIG_MAPPING[architecture] and not _has(keys, key):
            raise PCDVQError(f"the GGUF file has no {prefix}{key}; get the file again")
    if "rope.freq_base" not in keys:
        _take_base(ROPE_BASE, config)
    for key in keys:
        value = _value(reader, prefix + key)
        if not _is_held(key, value, architecture, config):
            raise _refused(prefix + key, value)
    scaling = {key: _value(reader, prefix + key) for key in keys if key in SCALING_KEYS}
    if SCALE_LINEAR in keys:
        scaling.setdefault(f"{SCALING}factor", _value(reader, prefix + SCALE_LINEAR))
    _take_scaling(scaling, prefix, config)


def take_rope_factors(factors: Tensor, config: PreTrainedConfig) -> None:
    """Put into `config` the scaling that made `factors`, fp32, of each rotary frequency.

    Raises:
        PCDVQError: they are not those of "llama3" scaling.
    """
    factor = factors.max().item()
    if bool((factors == 1).all()):
        return
    rope = config.rope_parameters
    plain = 1 / rope["rope_theta"] ** (torch.arange(len(factors)) / len(factors))
    scaled = {**rope, "rope_type": "llama3", "factor": factor, **LLAMA3}
    config.rope_parameters = scaled
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    known = rope.get("rope_type") == "default" and found.shape == plain.shape
    if not known or not torch.allclose(plain / found, factors, rtol=1e-3):
        raise PCDVQError(
            f"tensor {ROPE_FACTORS} scales rotary frequencies in a way that is not known here; "
            "give the original model in Hugging Face's layout"
        )


def special_token_options(reader: GGUFReader) -> dict[str, bool]:
    """Special tokens that every prompt gets, which transformers does not ask the file for.

    Raises:
        PCDVQError: texts are to begin in a way that transformers' tokenizer would not have it.
    """
    model = _value(reader, "tokenizer.ggml.model")
    prefix = _value(reader, "tokenizer.ggml.add_space_prefix")
    architecture = _value(reader, "general.architecture")
    if model == "llama" and prefix is False and architecture not in NO_SPACE_PREFIX:
        raise _refused("tokenizer.ggml.add_space_prefix", prefix)
    # What llama.cpp does for files that do not say.
    begins = model == "llama" or _value(reader, "tokenizer.ggml.pre") in PRE_WITH_BOS
    options = {"add_bos_token": begins, "add_eos_token": False}
    for option in options:
        if (said := _value(reader, f"tokenizer.ggml.{option}")) is not None:
            options[option] = bool(said)
    return {option: True for option, wanted in options.items() if wanted}


def _value(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _has(keys: list[str], wanted: str) -> bool:
    """Whether `wanted` is in `keys`; either norm's epsilon stands for both."""
    return wanted in keys or wanted.replace("_rms", "") in keys


def _refused(key: str, value: object) -> PCDVQError:
    text = str(value)
    return PCDVQError(
        f"the GGUF file has {key} {text if len(text) < 80 else text[:80] + ' ...'}, which changes "
        "what the model computes and which this release cannot take over; give the original model "
        "in Hugging Face's layout"
    )


def _is_held(key: str, value: Any, architecture: str, config: PreTrainedConfig) -> bool:
    """Whether `config` says what `key` of the file does, after this call at the latest."""
    if key in HARMLESS or key in SCALING_KEYS or key == SCALE_LINEAR:
        return True
    if key in NEUTRAL and any(_same(value, neutral) for neutral in NEUTRAL[key]):
        return True
    if key in CHECKS:
        return CHECKS[key](value, config)
    if (field := GGUF_CONFIG_MAPPING[architecture].get(key)) is not None:
        return _same(value, getattr(config, field, None))
    for field in FIELDS.get(key, ()):
        if hasattr(config, field):
            if not _same(value, getattr(config, field)):
                setattr(config, field, value)
            return True
    return False


def _same(value: Any, held: Any) -> bool:
    # transformers keeps the largest of numbers that differ by layer, and elsewhere which they were.
    if isinstance(value, list) and not isinstance(held, list):
        value = max(value, default=None)
    if isinstance(value, float) and isinstance(held, int | float):
        return math.isclose(value, held, rel_tol=1e-6)
    return bool(value == held)


def _head_dim(config: PreTrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _ropes(config: PreTrainedConfig) -> dict[str, dict[str, Any]]:
    """Rotary parameters by type of layer; of models that have but one, under ""."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope and all(isinstance(each, dict) for each in rope.values()):
        return rope
    return {"": rope} if rope else {}


def _global_rope(config: PreTrainedConfig) -> dict[str, Any]:
    ropes = _ropes(config)
    return ropes.get("full_attention") or ropes.get("", {})


def _check_rotated(value: int, config: PreTrainedConfig) -> bool:
    part = _global_rope(config).get("partial_rotary_factor")
    if part is None:
        part = getattr(config, "partial_rotary_factor", None) or 1.0
    return bool(value == int(_head_dim(config) * part))


def _check_scale(value: float, config: PreTrainedConfig) -> bool:
    scalar = getattr(config, "query_pre_attn_scalar", None) or _head_dim(config)
    return _same(value, scalar**-0.5)


def _take_base(value: float, config: PreTrainedConfig) -> bool:
    rope = _global_rope(config)
    if rope:
        rope["rope_theta"] = value
    return bool(rope)


def _take_local_base(value: float, config: PreTrainedConfig) -> bool:
    rope = _ropes(config).get("sliding_attention")
    if rope:
        rope["rope_theta"] = value
    return bool(rope)


def _take_window(value: int, config: PreTrainedConfig) -> bool:
    if getattr(config, "use_sliding_window", True) and hasattr(config, "sliding_window"):
        config.sliding_window = value
    return getattr(config, "sliding_window", None) == value


CHECKS: dict[str, Callable[[Any, PreTrainedConfig], bool]] = {
    "attention.scale": _check_scale,
    "attention.sliding_window": _take_window,
    "attention.value_length": lambda value, config: value == _head_dim(config),
    "rope.dimension_count": _check_rotated,
    "rope.freq_base": _take_base,
    "rope.freq_base_swa": _take_local_base,
}


def _imply_attention_scale(architecture: str, config: PreTrainedConfig) -> None:
    """Set what llama.cpp derives: only the largest models differ, told by their blocks."""
    largest = {"gemma2": 46, "gemma3": 62}.get(architecture)
    if largest is not None:
        heads = config.hidden_size // config.num_attention_heads
        whole = config.num_hidden_layers == largest
        config.query_pre_attn_scalar = heads if whole else _head_dim(config)


def _take_scaling(found: dict[str, Any], prefix: str, config: PreTrainedConfig) -> None:
    """Put scaling of rotary frequencies, keys and values of `SCALING_KEYS`, into `config`."""
    factor = found.get(f"{SCALING}factor") or 1.0
    kind = found.get(f"{SCALING}type", "linear")  # as llama.cpp has it
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return
    rope = _global_rope(config)
    if kind not in ("linear", "yarn") or rope.get("rope_type", "default") != "default":
        raise _refused(f"{prefix}{SCALING}type", kind)
    if not rope:
        raise _refused(f"{prefix}{SCALING}factor", factor)
    rope |= {"rope_type": kind, "factor": float(factor)}
    if kind == "yarn":
        original = found.get(f"{SCALING}original_context_length")
        if original is None:
            original = config.max_position_embeddings
        rope["original_max_position_embeddings"] = original
        for name in ("beta_fast", "beta_slow"):
            if (value := found.get(f"{SCALING}yarn_{name}")) is not None:
                rope[name] = value
