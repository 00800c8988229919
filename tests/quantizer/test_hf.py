"""PCDVQ checkpoints in transformers against the same model with dense weights."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pcdvq_quantizer.hf
import pytest
import torch
from models import change_config, save_model, tiny_config
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, open_checkpoint
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_quantizer.hf import PCDVQLinear
from pcdvq_quantizer.plan import NONE, QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

TOKENS = torch.arange(3, 60).view(1, -1)
# Of the largest logit. The operator rounds its sums in another order than a dense product.
RTOL = 1e-5
OPTIONS = QuantizeOptions(bits=3.0, calibration=NONE)
MLP = "model.layers.0.mlp.up_proj"


def quantize(
    tmp_path: Path, config: dict[str, object], options: QuantizeOptions = OPTIONS
) -> tuple[Path, Path]:
    """A random model of `config` with biases that are not zero, and its checkpoint."""
    source = save_model(tmp_path / "original", config)
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.save_pretrained(source)
    quantize_model(make_plan(str(source), options), tmp_path / "out")
    change_config(tmp_path / "out", activations="float")  # as dense weights compute
    return source, tmp_path / "out"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tmp_path_factory.mktemp("hf"), tiny_config())[1]


@pytest.fixture(scope="module")
def biased(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tmp_path_factory.mktemp("biased"), tiny_config("qwen2"))[1]


def dense_model(source: Path, checkpoint: Path) -> PreTrainedModel:
    """The original in fp32 with the weights that the checkpoint's codes stand for."""
    weights = load_file(source / "model.safetensors")
    opened = open_checkpoint(checkpoint)
    for name, layer in opened.layers.items():
        packed = []
        for part in ("qweight", "row_scale", "signs_in"):
            tensor = f"{name}.{part}"
            with safe_open(opened.tensors[tensor].file, framework="pt") as file:
                packed.append(file.get_tensor(tensor))
        codebook = opened.codebooks[layer.codebook]
        block = opened.config.block(layer.in_features)
        weights[f"{name}.weight"] = reference.dequantize(*packed, codebook, block)
    dense = checkpoint.with_name("dense")
    shutil.copytree(source, dense)
    save_file(weights, dense / "model.safetensors", {"format": "pt"})
    return AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits


# Of the largest logit, after two decoder layers whose activations are rounded.
INT8_RTOL = 0.03


def assert_same(found: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * scale, check_dtype=False)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config(tie_word_embeddings=True),
        tiny_config("qwen2"),
        tiny_config("phi3", pad_token_id=0),
        tiny_config("gemma3_text", head_dim=16, tie_word_embeddings=True),
        tiny_config(
            "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
        ),
        tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16),
    ],
    ids=["untied", "tied", "biases", "fused", "gemma3", "experts", "mixtral"],
)
def test_logits_are_those_of_the_dense_weights(config: dict[str, object], tmp_path: Path) -> None:
    source, checkpoint = quantize(tmp_path, config)
    expected = logits(dense_model(source, checkpoint))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    packed = {name for name, each in model.named_modules() if isinstance(each, PCDVQLinear)}
    assert packed == open_checkpoint(checkpoint).layers.keys()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert_same(logits(model), expected)
    model.dequantize()
    assert not any(isinstance(each, PCDVQLinear) for each in model.modules())
    assert_same(logits(model), expected)
    model.save_pretrained(tmp_path / "saved")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    assert_same(logits(saved), expected)


def test_half_precision(checkpoint: Path) -> None:
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    assert_same(logits(model), expected, rtol=0.05)
    model.dequantize(torch.float16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert_same(logits(model), expected, rtol=0.05)


def test_casting_keeps_the_codes(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = logits(model)
    assert_same(logits(model.to(torch.bfloat16)), expected, rtol=0.05)


def test_generates_and_shares_codewords(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    packed = model.generate(TOKENS, **options)
    layers = [each for each in model.modules() if isinstance(each, PCDVQLinear)]
    assert len({layer.codewords.data_ptr() for layer in layers}) == 1
    assert torch.equal(model.dequantize().generate(TOKENS, **options), packed)


def test_only_a_dequantized_model_is_saved(checkpoint: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "packed")
    expected = logits(model.dequantize())
    model.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(logits(loaded), expected)


def test_one_import_is_enough_and_brings_no_vllm(checkpoint: Path) -> None:
    script = (
        "import sys, pcdvq_quantizer.hf; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__, 'vllm' in sys.modules)"
    )
    command = [sys.executable, "-c", script, str(checkpoint)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["PCDVQLinear", "False"]


def test_hub_id(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository in the hub's cache loads; one whose codebooks were never fetched says so."""
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(checkpoint, target_is_directory=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    options = {"cache_dir": tmp_path / "hub", "dtype": torch.float32}
    model = AutoModelForCausalLM.from_pretrained("org/tiny", **options)
    assert torch.equal(
        logits(model),
        logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)),
    )
    copied = tmp_path / "copied"
    copied.mkdir()
    for file in checkpoint.iterdir():
        if file.name != CODEBOOK_FILE:
            (copied / file.name).symlink_to(file)
    snapshot.unlink()
    snapshot.symlink_to(copied, target_is_directory=True)
    with pytest.raises(CheckpointError, match=r"cannot fetch pcdvq_codebooks.*of org/tiny"):
        AutoModelForCausalLM.from_pretrained("org/tiny", **options)


def changed_copy(checkpoint: Path, path: Path, **changes: object) -> Path:
    """A copy of `checkpoint` with other fields in its quantization_config."""
    path.mkdir()
    for file in checkpoint.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    change_config(path, **changes)
    return path


def test_activations(checkpoint: Path, tmp_path: Path) -> None:
    """Rounding to int8 is the default."""
    expected = logits(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32))
    rounded = changed_copy(checkpoint, tmp_path / "rounded", activations=None)
    found = logits(AutoModelForCausalLM.from_pretrained(rounded, dtype=torch.float32))
    assert not torch.equal(found, expected)
    assert_same(found, expected, rtol=INT8_RTOL)


def test_bad_checkpoints(checkpoint: Path, tmp_path: Path) -> None:
    bad = changed_copy(checkpoint, tmp_path / "version", format_version=99)
    with pytest.raises(CheckpointError, match="format_version is 99"):
        AutoModelForCausalLM.from_pretrained(bad)
    bad = changed_copy(checkpoint, tmp_path / "codebooks")
    (bad / CODEBOOK_FILE).unlink()
    with pytest.raises(CheckpointError, match=r"pcdvq_codebooks\.safetensors is missing"):
        AutoModelForCausalLM.from_pretrained(bad)
    bad = changed_copy(checkpoint, tmp_path / "layers", layers={})
    with pytest.raises(CheckpointError, match="layers is empty"):
        AutoModelForCausalLM.from_pretrained(bad)
    bad = changed_copy(checkpoint, tmp_path / "size")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"intermediate_size": 256}))
    with pytest.raises(CheckpointError, match=r"\[64, 192\], config.json makes it \[64, 256\]"):
        AutoModelForCausalLM.from_pretrained(bad)
    with pytest.raises(PCDVQError, match="offloaded to disk"):
        AutoModelForCausalLM.from_pretrained(checkpoint, device_map={"": "disk"})


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.norm.weight",
        "model.layers.1.self_attn.q_proj.bias",
        f"{MLP}.row_scale",
        "lm_head.weight",
    ],
)
def test_values_that_are_not_finite(value: float, name: str, biased: Path, tmp_path: Path) -> None:
    bad = changed_copy(biased, tmp_path / "bad")
    (shard,) = bad.glob("model-*.safetensors")
    tensors = load_file(shard)
    tensors[name].flatten()[-1] = value
    save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"tensor {name} is not finite\. .*quantize again"):
        AutoModelForCausalLM.from_pretrained(bad)


def test_values_beyond_the_dtype(biased: Path, tmp_path: Path) -> None:
    """A number that the checkpoint's bf16 holds may be infinite in fp16."""
    large = changed_copy(biased, tmp_path / "large")
    (shard,) = large.glob("model-*.safetensors")
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = 1e5
    save_file(tensors, shard, {"format": "pt"})
    AutoModelForCausalLM.from_pretrained(large, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is not finite"):
        AutoModelForCausalLM.from_pretrained(large, dtype=torch.float16)


def test_modules_that_cannot_be_loaded_are_named(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    quantizer = model.hf_quantizer
    quantizer.checkpoint.layers["model.norm"] = quantizer.checkpoint.layers[MLP]
    with pytest.raises(CheckpointError, match="no quantized LlamaRMSNorm in transformers"):
        quantizer._replacement(model, "model.norm")
    with pytest.raises(CheckpointError, match=r"model\.nothing of .* is not in LlamaForCausalLM"):
        quantizer._replacement(model, "model.nothing")
    assert pcdvq_quantizer.hf.PCDVQHfQuantizer is type(quantizer)
