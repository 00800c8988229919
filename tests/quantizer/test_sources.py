"""Sources are checked against the model that they claim to be, before any work."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import read_quantization_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.serving import quantization_of
from pcdvq_quantizer.source_check import check_source
from pcdvq_quantizer.sources import open_source
from pcdvq_quantizer.vptq.plan import VPTQOptions
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

OPTIONS = QuantizeOptions(bits=3.0, calibration="none")
LINEAR = "model.layers.1.mlp.up_proj.weight"
HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
QWEN_EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
MIXTRAL_EXPERT = "model.layers.1.block_sparse_moe.experts.3.w1.weight"
CONFIGS = {
    "llama": tiny_config(),
    "tied": tiny_config(tie_word_embeddings=True),
    "biases": tiny_config("qwen2"),
    "fused": tiny_config("phi3", pad_token_id=0),
    "gemma2": tiny_config("gemma2", head_dim=16),
    "gemma3": tiny_config("gemma3_text", head_dim=16, tie_word_embeddings=True),
    "qwen_experts": tiny_config(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
    ),
    "mixtral": tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    # Of experts that this package leaves fused.
    "olmoe": tiny_config("olmoe", num_experts=4),
    "gpt_neox": tiny_config("gpt_neox"),
    "bloom": tiny_config("bloom"),
    "mamba": tiny_config("mamba"),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    directory = tmp_path_factory.mktemp("sources")

    def get(name: str) -> Path:
        path = directory / name
        return path if path.exists() else save_model(path, CONFIGS[name])

    return get


@pytest.fixture
def damaged(models: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Copies model `name`, with tensors put in its place or, where None, taken out."""

    def make(name: str = "llama", **changes: object) -> Path:
        target = tmp_path / "damaged"
        shutil.copytree(models(name), target)
        tensors = changes.pop("tensors", {})
        assert isinstance(tensors, dict)
        if tensors:
            state = load_file(target / "model.safetensors") | tensors
            state = {key: value for key, value in state.items() if value is not None}
            save_file(state, target / "model.safetensors", {"format": "pt"})
        config = json.loads((target / "config.json").read_text()) | changes
        config = {key: value for key, value in config.items() if value is not ...}
        (target / "config.json").write_text(json.dumps(config))
        return target

    return make


@pytest.mark.parametrize("name", CONFIGS)
def test_whole_models_pass(name: str, models: Callable[[str], Path]) -> None:
    source = check_source(open_source(str(models(name))))
    assert source.shapes.keys() == load_file(models(name) / "model.safetensors").keys()


def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("llama", {LINEAR: None}, f"lacks tensor {LINEAR} \\(1 in all\\)"),
        ("llama", {"model.norm.weight": None}, r"lacks tensor model\.norm\.weight"),
        ("llama", {HEAD: None}, f"lacks tensor {HEAD}"),
        ("tied", {EMBEDDING: None}, f"lacks tensor {EMBEDDING}"),
        ("llama", {LINEAR: zeros(100, 64)}, f"{LINEAR} of .* is \\[100, 64\\].* \\[192, 64\\]"),
        ("llama", {"model.norm.weight": zeros(63)}, r"model\.norm\.weight of .* is \[63\]"),
        ("llama", {LINEAR: zeros(192, 64, dtype=torch.int8)}, f"{LINEAR} of .* is I8"),
        ("llama", {LINEAR: zeros(192, 64, dtype=torch.float8_e4m3fn)}, f"{LINEAR} .* is F8_E4M3"),
        ("llama", {"model.norm.weight": zeros(64, dtype=torch.float64)}, "norm.* is F64"),
        ("llama", {"model.layers.1.mlp.up_proj.bias": zeros(192)}, "up_proj.bias, for which"),
        ("llama", {"model.layers.2.mlp.up_proj.weight": zeros(192, 64)}, "layers.2.*for which"),
        ("qwen_experts", {QWEN_EXPERT: None}, f"lacks tensor {QWEN_EXPERT}"),
        ("qwen_experts", {QWEN_EXPERT: zeros(32, 64)}, f"{QWEN_EXPERT} of .* is \\[32, 64\\]"),
        ("mixtral", {MIXTRAL_EXPERT: None}, f"lacks tensor {MIXTRAL_EXPERT}"),
        ("mixtral", {MIXTRAL_EXPERT: zeros(192, 64, dtype=torch.uint8)}, "experts.3.w1.* is U8"),
        ("olmoe", {QWEN_EXPERT: None}, r"make model\.layers\.1\.mlp\.experts\.gate_up_proj"),
        ("olmoe", {QWEN_EXPERT: zeros(192, 64, dtype=torch.int8)}, f"{QWEN_EXPERT} .* is I8"),
    ],
)
def test_tensors_are_those_of_the_model(
    name: str, tensors: dict[str, Tensor | None], message: str, damaged: Callable[..., Path]
) -> None:
    with pytest.raises(PCDVQError, match=message):
        make_plan(str(damaged(name, tensors=tensors)), OPTIONS)


def test_any_method_checks_its_source(damaged: Callable[..., Path]) -> None:
    with pytest.raises(PCDVQError, match="lacks tensor"):
        make_plan(str(damaged(tensors={LINEAR: None})), VPTQOptions(calibration="none"))


def test_experts_where_the_configuration_has_none(damaged: Callable[..., Path]) -> None:
    with pytest.raises(PCDVQError, match=r"lacks tensor model\.layers\.1\.mlp\.down_proj"):
        make_plan(str(damaged("qwen_experts", mlp_only_layers=[1])), OPTIONS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"lacks tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, r"has a tensor model\.layers\.1.* no place"),
        (
            {"num_hidden_layers": 2**31},
            "num_hidden_layers 2147483648, but .* has 21 tensors",
        ),
        ({"text_config": {"num_hidden_layers": 2**31}}, "num_hidden_layers 2147483648"),
        ({"num_local_experts": 2**31}, "num_local_experts 2147483648"),
        ({"vocab_size": 2**31}, r"makes it \[2147483648, 64\]"),
        ({"hidden_size": 2**62}, "describes no llama model that can be built"),
        ({"num_attention_heads": 0}, "describes no llama model that can be built"),
        ({"num_hidden_layers": "2"}, "describes no llama model .*expected int, got str"),
        ({"model_type": ...}, "has no model_type"),
        ({"model_type": 5}, "has no model_type"),
        ({"model_type": "other", "auto_map": {"AutoConfig": "x.X"}}, r"\(auto_map\) is never run"),
        ({"quantization_config": "mine"}, r"already quantized \(mine\)"),
    ],
)
def test_configurations(
    changes: dict[str, object], message: str, damaged: Callable[..., Path]
) -> None:
    with pytest.raises(PCDVQError, match=message):
        make_plan(str(damaged(**changes)), OPTIONS)


def test_null_is_no_quantization(damaged: Callable[..., Path]) -> None:
    source = damaged(quantization_config=None, auto_map={"AutoConfig": "x.X"})
    assert read_quantization_config(source) == {}
    assert quantization_of(str(source)) is None
    assert len(make_plan(str(source), OPTIONS).selection.layers) == 14


def test_tied_tensors_are_stored_once(
    models: Callable[[str], Path], damaged: Callable[..., Path], tmp_path: Path
) -> None:
    embedding = load_file(models("tied") / "model.safetensors")[EMBEDDING]
    source = damaged("tied", tensors={HEAD: embedding.clone()})
    checkpoint = quantize_model(make_plan(str(source), OPTIONS), tmp_path / "out")
    assert HEAD not in checkpoint.tensors
    assert EMBEDDING in checkpoint.tensors


@pytest.mark.parametrize(
    ("embedding", "message"), [(True, "lm_head.weight and .* differ"), (False, "in the place of")]
)
def test_tied_tensors_that_are_not(
    embedding: bool, message: str, models: Callable[[str], Path], damaged: Callable[..., Path]
) -> None:
    weight = load_file(models("tied") / "model.safetensors")[EMBEDDING]
    tensors = {HEAD: weight + 1, EMBEDDING: weight if embedding else None}
    with pytest.raises(PCDVQError, match=message):
        make_plan(str(damaged("tied", tensors=tensors)), OPTIONS)


@pytest.mark.parametrize("name", ["model.norm.weight", HEAD, EMBEDDING])
def test_values_that_are_only_copied(
    name: str, damaged: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked at before anything is quantized."""
    tensor = load_file(damaged() / "model.safetensors")[name]
    shutil.rmtree(tmp_path / "damaged")
    tensor.view(-1)[3] = float("inf")
    plan = make_plan(str(damaged(tensors={name: tensor})), OPTIONS)
    monkeypatch.setattr(type(plan), "quantize", None)
    with pytest.raises(PCDVQError, match=f"{name} of .* holds NaN or infinity"):
        quantize_model(plan, tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "is empty"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter"),
        (["consolidated.safetensors", "params.json"], "Mistral's own layout"),
        (["config.json", "model-q4.gguf"], "holds GGUF files"),
        (["config.json", "pytorch_model.bin"], "pickled"),
        (["config.json"], "neither model.safetensors nor"),
    ],
)
def test_directories_without_a_model(files: list[str], message: str, tmp_path: Path) -> None:
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(PCDVQError, match=message):
        make_plan(str(tmp_path), OPTIONS)


def test_shards_hold_what_the_index_says(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", CONFIGS["llama"], shard_size="100KB")
    first, second = sorted(source.glob("*.safetensors"))[:2]
    tensors = load_file(first)
    save_file(load_file(second) | tensors, second, {"format": "pt"})
    with pytest.raises(PCDVQError, match=f"is in {first.name} and in {second.name}"):
        make_plan(str(source), OPTIONS)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, first, {"format": "pt"})
    with pytest.raises(PCDVQError, match=f"{first.name} lacks tensor {name}"):
        make_plan(str(source), OPTIONS)


def test_file_with_holes(damaged: Callable[..., Path]) -> None:
    """4 TiB of which next to nothing is on the disk."""
    source = damaged()
    side = 1 << 20
    entry = {"dtype": "F32", "shape": [side, side], "data_offsets": [0, 4 * side * side]}
    header = json.dumps({EMBEDDING: entry}).encode()
    path = source / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + 4 * side * side)
    with pytest.raises(PCDVQError, match=r"model\.safetensors has 4398\d+ bytes|lacks tensor"):
        make_plan(str(source), OPTIONS)


def test_what_passes_loads(models: Callable[[str], Path]) -> None:
    """The check's model is the one that transformers loads."""
    source = make_plan(str(models("mixtral")), OPTIONS).source
    model = AutoModelForCausalLM.from_pretrained(models("mixtral"))
    size = sum(parameter.numel() for parameter in model.parameters())
    assert size == sum(torch.Size(shape).numel() for shape in source.shapes.values())
