"""Registration, and which layer gets which method."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import vllm
from bare_layers import BLOCK_256, make_codebook, make_config
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, read_quantization_config
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from random_checkpoint import TRELLIS, tiny_llama, write_random_checkpoint
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.models.utils import WeightsMapper
from vptq_layers import entry

from vllm_pcdvq import check_vllm_version, register
from vllm_pcdvq.config import PCDVQConfig
from vllm_pcdvq.linear import CheckedUnquantizedLinearMethod, PCDVQLinearMethod
from vllm_pcdvq.vptq import VPTQConfig

QKV = [f"m.{part}_proj" for part in "qkv"]


def _method(config: PCDVQConfig, prefix: str):
    layer = ColumnParallelLinear.__new__(ColumnParallelLinear)
    return config.get_quant_method(layer, prefix)


def test_register_twice() -> None:
    register()
    register()
    assert get_quantization_config("pcdvq") is PCDVQConfig


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "1.32.0", "0.3", "dev"])
def test_register_refuses_other_versions(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm, "__version__", found)
    message = rf"supports vLLM 0\.32\.x, found {re.escape(found)}\. .*pip install"
    with pytest.raises(PCDVQError, match=message):
        register()


@pytest.mark.parametrize("found", ["0.32.0", "0.32.1+cpu", "0.32.0rc1"])
def test_supported_versions(found: str) -> None:
    check_vllm_version(found)


def test_config_without_checkpoint() -> None:
    with pytest.raises(CheckpointError, match=r"not a PCDVQ checkpoint.*without --quantization"):
        PCDVQConfig()


def test_fused_layer(vllm_config) -> None:
    method = _method(make_config(QKV, BLOCK_256, make_codebook()), "m.qkv_proj")
    assert isinstance(method, PCDVQLinearMethod)


def test_layer_left_as_it_was(vllm_config) -> None:
    method = _method(make_config(QKV, BLOCK_256, make_codebook()), "m.gate_up_proj")
    assert isinstance(method, CheckedUnquantizedLinearMethod)


@pytest.mark.parametrize(
    "layers", [{QKV[0]: "a", QKV[1]: "a"}, {QKV[0]: "a", QKV[1]: "a", QKV[2]: "b"}]
)
def test_fused_layer_of_unequal_parts(layers: dict[str, str], vllm_config) -> None:
    config = make_config(layers, BLOCK_256, make_codebook())
    listed = "m.q_proj: a, m.k_proj: a, m.v_proj: " + layers.get(QKV[2], "none")
    with pytest.raises(CheckpointError, match=rf"layer m\.qkv_proj serves 3 layers.*{listed}"):
        _method(config, "m.qkv_proj")


def test_output_layer_is_left_to_vllm() -> None:
    layer = ParallelLMHead.__new__(ParallelLMHead)
    assert make_config(QKV, BLOCK_256, make_codebook()).get_quant_method(layer, "lm_head") is None


@pytest.mark.parametrize("kind", [ParallelLMHead, torch.nn.Module])
def test_quantized_layer_of_another_kind(kind: type[torch.nn.Module]) -> None:
    layer, name = kind.__new__(kind), "experts.0.up_proj"
    config = make_config([name], BLOCK_256, make_codebook())
    with pytest.raises(CheckpointError, match=f"layer {name} is quantized, but .*{kind.__name__}"):
        config.get_quant_method(layer, "experts")


def test_renamed_modules() -> None:
    config = make_config(["model.layers.0.up"], BLOCK_256, make_codebook())
    mapper = {"model.": "model.model."}
    for _ in range(2):
        config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix=mapper))
    assert config.layers == {"model.model.layers.0.up": "a"}
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_substr={".up": ".up_proj"}))
    assert config.layers == {"model.model.layers.0.up_proj": "a"}


def test_layer_that_vllm_names_in_its_own_way() -> None:
    """Granite's hybrids are known; who builds a quantized layer as another would serve noise."""
    config = make_config(["layers.0.mamba.in_proj", "layers.0.o_proj"], BLOCK_256, make_codebook())
    assert isinstance(_method(config, "layers.0.mixer.in_proj"), PCDVQLinearMethod)
    with pytest.raises(CheckpointError, match=r"a layer model\.0\.mixer\.in_proj.*'\*\.in_proj'"):
        _method(config, "model.0.mixer.in_proj")
    config.left = {"layers.1.o_proj", "layers.1.mamba.in_proj"}
    for name in ("layers.1.o_proj", "layers.1.mixer.in_proj"):
        assert isinstance(_method(config, name), CheckedUnquantizedLinearMethod)


def test_activations(vllm_config) -> None:
    """The server's option comes before the checkpoint's, which comes before the default."""
    config = make_config(QKV, BLOCK_256, make_codebook())
    assert config.activations(None) == "float"
    assert config.activations(vllm_config) == "float"
    config.checkpoint = config.checkpoint.model_copy(update={"activations": None})
    assert config.activations(vllm_config) == "int8"
    vllm_config.additional_config = {"pcdvq_activations": "int16"}
    layer = ColumnParallelLinear(256, 64, quant_config=config, prefix="m.q_proj")
    assert layer.quant_method.layout.activations == "int16"


@pytest.mark.parametrize("value", ["int4", "INT8", "", None, 8, ["int8"]])
@pytest.mark.parametrize("method", ["pcdvq", "vptq"])
def test_options_of_other_values(value: object, method: str, vllm_config) -> None:
    vllm_config.additional_config = {"other_plugin": 1, "pcdvq_activations": value}
    message = (
        rf"pcdvq_activations in .* is {re.escape(repr(value))}; choose from int8, int16, float"
    )
    with pytest.raises(PCDVQError, match=message):
        build_layer(method)


@pytest.mark.parametrize("key", ["pcdvq_activation", "pcdvq-activations", "PCDVQ_Activations"])
@pytest.mark.parametrize("method", ["pcdvq", "vptq"])
def test_unknown_options(key: str, method: str, vllm_config) -> None:
    vllm_config.additional_config = {key: "int8"}
    message = rf"--additional-config has the unknown key '{key}'; .* knows pcdvq_activations$"
    with pytest.raises(PCDVQError, match=message):
        build_layer(method)
    vllm_config.additional_config = {"activations": "int4", "other": {"pcdvq_activation": 1}}
    build_layer(method)


def build_layer(method: str) -> ColumnParallelLinear:
    if method == "pcdvq":
        config = make_config(QKV, BLOCK_256, make_codebook())
    else:
        config = VPTQConfig({QKV[0]: entry(64, 256)})
    return ColumnParallelLinear(256, 64, quant_config=config, prefix=QKV[0])


def test_codebooks_survive_the_way_to_a_worker() -> None:
    config = make_config(QKV, BLOCK_256, make_codebook())
    cpu = torch.device("cpu")
    ours = config.codebooks.codewords("a", cpu)
    theirs = pickle.loads(pickle.dumps(config)).codebooks
    torch.testing.assert_close(theirs.codewords("a", cpu), ours, rtol=0, atol=0)
    assert theirs.codewords("a", cpu) is theirs.codewords("a", cpu)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An offline Hub cache that holds revision `r1` of `org/model`."""
    repository = tmp_path / "hub" / "models--org--model"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "r1").write_text(snapshot.name)
    write_random_checkpoint(snapshot, tiny_llama())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return snapshot


def _config_of(directory: Path) -> PCDVQConfig:
    return PCDVQConfig.from_config(read_quantization_config(directory))


def test_codebooks_from_the_hub(hub_cache: Path) -> None:
    config = _config_of(hub_cache)
    config.maybe_update_config("org/model", revision="r1")
    assert config.codebooks.codewords(TRELLIS.codec, torch.device("cpu")).shape == (0, 2)


def test_codebooks_not_on_the_hub(hub_cache: Path) -> None:
    (hub_cache / CODEBOOK_FILE).unlink()
    message = rf"cannot fetch {CODEBOOK_FILE} of org/model \(revision r1\)"
    with pytest.raises(CheckpointError, match=message):
        _config_of(hub_cache).maybe_update_config("org/model", revision="r1")


def test_reload_of_another_model(tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, layers in zip(paths, (1, 2), strict=True):
        write_random_checkpoint(path, tiny_llama(num_hidden_layers=layers))
    with pytest.raises(CheckpointError, match=r"b is not the one this server was started with"):
        _config_of(paths[0]).maybe_update_config(str(paths[1]))
