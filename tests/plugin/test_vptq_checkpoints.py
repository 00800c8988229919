"""Published VPTQ checkpoints: vLLM's layers on any rank, and its engine."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from bare_layers import PACKED_MODULES, finish, load, tensor_parallel
from engine_worker import Generation, failure, generate
from models import change_config
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.vptq.layout import VPTQLayout
from pcdvq_kernels.vptq.reference import dequantize
from random_checkpoint import tiny_llama
from torch import Tensor
from transformers import PreTrainedModel
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vptq_layers import CASES, entry, random_layer, write_checkpoint

from vllm_pcdvq.config import ACTIVATIONS_OPTION
from vllm_pcdvq.linear import CheckedUnquantizedLinearMethod
from vllm_pcdvq.vptq import VPTQConfig

K, HEAD = 98, 12  # 12 rows are no multiple of the row blocks
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
PROMPTS = [[7], list(range(20, 31)), list(range(300, 240, -1))]
EXACT = {ACTIVATIONS_OPTION: "float"}  # no rounding of large tables


@pytest.fixture
def vllm_config(vllm_config: VllmConfig) -> VllmConfig:
    vllm_config.additional_config = EXACT
    return vllm_config


def make_config(parts: dict[str, tuple[VPTQLayout, Any]], **options: Any) -> VPTQConfig:
    layers = {
        name: layout.model_dump(exclude_none=True, exclude={"dtype", "device"})
        for name, (layout, _) in parts.items()
    }
    config = VPTQConfig(layers, **options)
    config.packed_modules_mapping = PACKED_MODULES
    return config


def load_part(layer: LinearBase, part: Any, bias: Tensor, shard_id: Any = None) -> None:
    for key, tensor in part[1].items():
        load(layer, key, tensor, shard_id)
    load(layer, "bias", bias, shard_id)


@dataclass(frozen=True)
class Case:
    """A layer class, its parts on disk with what is special in each, how they are loaded, and its
    output partitions, with the number of shards that each can be cut into."""

    build: Callable[..., LinearBase]
    disk: dict[str, tuple[int, dict[str, Any]]]
    shard_ids: tuple[Any, ...]
    outputs: tuple[int, ...]
    distinct: tuple[int, ...]


def _qkv(**options: Any) -> LinearBase:
    return QKVParallelLinear(K, HEAD, 8, 2, bias=True, prefix="m.qkv_proj", **options)


def _merged(**options: Any) -> LinearBase:
    return MergedColumnParallelLinear(K, [96, 64], bias=True, prefix="m.gate_up_proj", **options)


QKV_ROWS = 8 * HEAD, 2 * HEAD, 2 * HEAD
LAYERS = {
    "qkv": Case(
        _qkv,
        {
            "m.q_proj": (QKV_ROWS[0], CASES["groups"]),
            "m.k_proj": (QKV_ROWS[1], CASES["v12"]),
            "m.v_proj": (QKV_ROWS[2], CASES["plain"]),
        },
        ("q", "k", "v"),
        QKV_ROWS,
        (8, 2, 2),
    ),
    "qkv on disk": Case(
        _qkv, {"m.qkv_proj": (sum(QKV_ROWS), CASES["residual"])}, (None,), QKV_ROWS, (8, 2, 2)
    ),
    "merged": Case(
        _merged,
        {"m.gate_proj": (96, CASES["v16"]), "m.up_proj": (64, CASES["outliers"])},
        (0, 1),
        (96, 64),
        (8, 8),
    ),
    "column": Case(
        lambda **options: ColumnParallelLinear(K, 96, bias=True, prefix="m.up", **options),
        {"m.up": (96, CASES["v6"])},
        (None,),
        (96,),
        (8,),
    ),
    "replicated": Case(
        lambda **options: ReplicatedLinear(K, 96, bias=True, prefix="m.same", **options),
        {"m.same": (96, CASES["residual"])},
        (None,),
        (96,),
        (1,),
    ),
}


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", LAYERS)
def test_output_shards(name: str, size: int, vllm_config) -> None:
    case = LAYERS[name]
    parts = {
        part: random_layer(rows, K, seed, **changes)
        for seed, (part, (rows, changes)) in enumerate(case.disk.items())
    }
    biases = {part: torch.randn(rows) for part, (rows, _) in case.disk.items()}
    x, outputs = torch.randn(3, K), []
    for rank in range(size):
        with tensor_parallel(rank, size):
            layer = case.build(quant_config=pickle.loads(pickle.dumps(make_config(parts))))
            for part, shard_id in zip(parts, case.shard_ids, strict=True):
                load_part(layer, parts[part], biases[part], shard_id)
            outputs.append(finish(layer)(x)[0])
    dense = [x @ dequantize(*parts[part]).T + biases[part] for part in parts]
    copies = [max(1, size // limit) for limit in case.distinct]
    widths = [rows * count // size for rows, count in zip(case.outputs, copies, strict=True)]
    whole = []
    for index, count in enumerate(copies):
        pieces = [output.split(widths, dim=-1)[index] for output in outputs]
        whole.append(torch.cat(pieces[::count], dim=-1))
        for rank in range(size):
            assert torch.equal(pieces[rank], pieces[rank // count * count])
    torch.testing.assert_close(torch.cat(whole, -1), torch.cat(dense, -1), **TOLERANCE)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("name", CASES)
def test_input_shards(name: str, size: int, vllm_config) -> None:
    """A permutation scatters the columns of a rank; so it may have none of a group."""
    columns = 128
    changes = dict(CASES[name])
    if "groups" in changes:
        changes["outliers"] = (2, 4, 100)
    part, bias, x = random_layer(60, columns, **changes), torch.randn(60), torch.randn(3, columns)
    total = torch.zeros(3, 60)
    for rank, share in enumerate(x.chunk(size, dim=-1)):
        with tensor_parallel(rank, size):
            config = make_config({"m.down": part})
            layer = RowParallelLinear(columns, 60, quant_config=config, prefix="m.down")
            load_part(layer, part, bias)
            total += finish(layer)(share)[0]
    torch.testing.assert_close(total, x @ dequantize(*part).T + bias, **TOLERANCE)


def _down(config: VPTQConfig) -> LinearBase:
    return RowParallelLinear(96, 48, bias=False, quant_config=config, prefix="m.down")


def test_entries_by_last_name(vllm_config) -> None:
    """`shared_layer_config` has no sizes, and layers may be left out of it."""
    layout, tensors = random_layer(48, 96)
    shared = entry(48, 96)
    del shared["in_features"], shared["out_features"]
    config = VPTQConfig.from_config(
        {"quant_method": "vptq", "shared_layer_config": {"down": shared}}
    )
    layer = _down(config)
    for key, tensor in tensors.items():
        load(layer, key, tensor)
    x = torch.randn(2, 96)
    torch.testing.assert_close(finish(layer)(x)[0], x @ dequantize(layout, tensors).T, **TOLERANCE)
    config = VPTQConfig.from_config(
        {"shared_layer_config": {"down": shared}, "modules_to_not_convert": ["m.down"]}
    )
    assert isinstance(_down(config).quant_method, CheckedUnquantizedLinearMethod)


def test_large_tables_are_rounded(vllm_config) -> None:
    part, x = random_layer(48, 96, **CASES["v12"]), torch.randn(8, 96)
    outputs = {}
    for activations in ("int8", "int16"):
        vllm_config.additional_config = {ACTIVATIONS_OPTION: activations}
        layer = _down(make_config({"m.down": part}))
        for key, tensor in part[1].items():
            load(layer, key, tensor)
        outputs[activations] = finish(layer)(x)[0]
    error = (outputs["int8"] - outputs["int16"]).norm() / outputs["int16"].norm()
    assert 1e-4 < error < 0.02


def test_dummy_weights(vllm_config) -> None:
    layer = finish(_down(make_config({"m.down": random_layer(48, 96, **CASES["outliers"])})))
    assert layer(torch.randn(2, 96))[0].isfinite().all()


def test_missing_and_repeated(vllm_config) -> None:
    part = random_layer(48, 96)
    layer = _down(make_config({"m.down": part}))
    for key in ("centroids", "indices", "weight_scale", "weight_bias"):
        load(layer, key, part[1][key])
    with pytest.raises(CheckpointError, match=r"m\.down\.perm is missing"):
        finish(layer)
    layer = _down(make_config({"m.down": part}))
    for key, tensor in part[1].items():
        load(layer, key, tensor)
    with pytest.raises(PCDVQError, match="not reloaded in place"):
        load(layer, "indices", part[1]["indices"])


def test_missing_bias(vllm_config) -> None:
    part = random_layer(96, K)
    layer = LAYERS["column"].build(quant_config=make_config({"m.up": part}))
    for key, tensor in part[1].items():
        load(layer, key, tensor)
    with pytest.raises(CheckpointError, match=r"m\.up\.bias is missing"):
        finish(layer)


def test_layers_that_do_not_fit(vllm_config) -> None:
    config = make_config({"m.q_proj": random_layer(96, K), "m.k_proj": random_layer(24, K)})
    with pytest.raises(CheckpointError, match=r"all be quantized or none, and m\.v_proj is not"):
        _qkv(quant_config=config)
    config = make_config({"m.down": random_layer(48, 64)})
    with pytest.raises(CheckpointError, match=r"in_features is 64 .* the model has 96"):
        _down(config)

    class Odd(ColumnParallelLinear):
        pass

    with tensor_parallel(0, 2), pytest.raises(PCDVQError, match="with --tensor-parallel-size 1"):
        Odd(K, 96, quant_config=make_config({"m.up": random_layer(96, K)}), prefix="m.up")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no quantization_config with config_for_layers"),
        ({"config_for_layers": {"a": {}}, "new": 1}, r"unknown keys \['new'\]"),
        ({"config_for_layers": {"a": 1}}, "objects of objects"),
        ({"config_for_layers": {"a": {}}, "modules_to_not_convert": "a"}, "list of names"),
    ],
)
def test_bad_configs(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VPTQConfig.from_config(config)


ATTENTION = {"q_proj": CASES["groups"], "k_proj": CASES["v6"], "v_proj": CASES["residual"]}
MLP = {"gate_proj": CASES["v16"], "up_proj": CASES["v12"], "down_proj": CASES["outliers"]}
TIED = tiny_llama(hidden_size=128, intermediate_size=320, tie_word_embeddings=True)


def _expect(model: PreTrainedModel, generations: list[Generation]) -> None:
    """Logprobs as the dense model has them."""
    for found in generations:
        logits = model(torch.tensor([found.tokens])).logits[0].log_softmax(-1)
        first = len(found.tokens) - len(found.logprobs)
        for place, logprobs in enumerate(found.logprobs):
            for token, value in logprobs.items():
                assert abs(logits[first + place - 1, token].item() - value) < 1e-3


@torch.no_grad()
def test_engine(tmp_path: Path, engine: ProcessPoolExecutor) -> None:
    """Found by its config alone; o_proj is not quantized, and two ranks give the same."""
    cases = {**ATTENTION, **MLP}
    cases["q_proj"] = {**cases["q_proj"], "outliers": (32, 4, 100)}
    model = write_checkpoint(tmp_path / "model", TIED, cases)
    options = {"dtype": "float32", "additional_config": EXACT}
    one = engine.submit(generate, tmp_path / "model", PROMPTS, **options)
    _expect(model, one.result())
    two = engine.submit(generate, tmp_path / "model", PROMPTS, **options, tensor_parallel_size=2)
    _expect(model, two.result())


def test_quantized_head_is_refused(tmp_path: Path, engine: ProcessPoolExecutor) -> None:
    write_checkpoint(tmp_path / "model", TIED, MLP)
    config = json.loads((tmp_path / "model/config.json").read_text())
    layers = config["quantization_config"]["config_for_layers"]
    change_config(tmp_path / "model", config_for_layers={**layers, "lm_head": entry(320, 128)})
    message = engine.submit(failure, generate, tmp_path / "model", PROMPTS).result()
    assert "quantizes lm_head" in message
