"""Tensors that vLLM loads by itself: NaN or infinity in one of them is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from bare_layers import BLOCK_256, make_codebook, make_config
from pcdvq_kernels.errors import CheckpointError
from torch import Tensor, nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper

from vllm_pcdvq.vptq import VPTQConfig
from vllm_pcdvq.weights import FiniteWeights


class Body(nn.Module):
    """The part of a model that loads itself, as vLLM's do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 8)
        self.norm = nn.LayerNorm(8)
        self.register_buffer("tokens", torch.zeros(40, dtype=torch.int64))

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


class Model(nn.Module):
    def __init__(self, quant_config: QuantizationConfig) -> None:
        super().__init__()
        self.quant_config = quant_config
        self.model = Body()
        self.model.quant_config = quant_config
        self.lm_head = nn.Linear(8, 40)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> set[str]:
        mapper = WeightsMapper(orig_to_new_prefix={"language.": "model."})
        return AutoWeightsLoader(self).load_weights(weights, mapper=mapper)


CONFIGS = {
    "pcdvq": lambda: make_config(["q_proj"], BLOCK_256, make_codebook()),
    "vptq": lambda: VPTQConfig(shared={"q_proj": {}}),
}
NAMES = ["language.embed.weight", "language.norm.weight", "language.norm.bias", "lm_head.weight"]


def stored(dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """What a checkpoint holds."""
    tensors = {
        name.replace("model.", "language."): t for name, t in Model(None).state_dict().items()
    }
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", NAMES)
def test_refused_by_the_name_on_disk(config: str, value: float, name: str) -> None:
    model, tensors = Model(CONFIGS[config]()), stored()
    tensors[name].flatten()[-1] = value
    with pytest.raises(CheckpointError, match=rf"tensor {name} is not finite\. .*quantize again"):
        model.load_weights(iter(tensors.items()))
    # Another load of the same process, such as a reload, is looked at as well.
    with pytest.raises(CheckpointError, match=name):
        model.load_weights(iter(tensors.items()))


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float8_e4m3fn])
def test_finite_ones_load_and_are_looked_at_once(
    config: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []
    monkeypatch.setattr(
        "vllm_pcdvq.weights.check_finite", lambda name, tensor: looked_at.append(name)
    )
    model, tensors = Model(CONFIGS[config]()), stored(dtype)
    loaded = model.load_weights(iter(tensors.items()))
    assert loaded == set(dict(model.named_parameters())) | {"model.tokens"}
    assert looked_at == list(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(model.state_dict()[name.replace("language.", "model.")], tensor.float())


def test_other_mappers_keep_their_names() -> None:
    ours = CONFIGS["vptq"]().get_checkpoint_weight_mapper()
    plain = WeightsMapper(orig_to_new_prefix={"a.": "b."})
    for mapper in (plain | ours, ours | plain, plain | ours | plain):
        assert isinstance(mapper, FiniteWeights)
        assert mapper.map_name("a.centroids.weight") == "b.centroids"
    assert CONFIGS["pcdvq"]().get_checkpoint_weight_mapper().map_name("a.g_idx") is None
