"""A checkpoint that cannot be served stops the server with a sentence that says why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import network_guard
import pytest
import torch
from engine_worker import configure, failure, generate, generate_and_reload, reload_without
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, INDEX_FILE
from random_checkpoint import tiny_llama, write_random_checkpoint
from safetensors.torch import load_file, save_file
from torch import Tensor

SHARD = "model-00001-of-00001.safetensors"
DOWN = "model.layers.0.mlp.down_proj"
K_PROJ = "model.layers.1.self_attn.k_proj"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good")
    write_random_checkpoint(path, tiny_llama())
    return path


@pytest.fixture
def checkpoint(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(good, tmp_path / "checkpoint")


def edit_config(path: Path, edit: Callable[[dict], object]) -> None:
    config = json.loads((path / "config.json").read_text())
    edit(config)
    (path / "config.json").write_text(json.dumps(config))


def edit_tensors(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the model and its index together."""
    tensors = load_file(path / SHARD)
    edit(tensors)
    save_file(tensors, path / SHARD)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}
    (path / INDEX_FILE).write_text(json.dumps(index))


def _quantization(key: str, value: object) -> Callable[[Path], None]:
    return lambda path: edit_config(path, lambda c: c["quantization_config"].update({key: value}))


def _tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Path], None]:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return lambda path: edit_tensors(path, edit)


def _truncate(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    (path / SHARD).write_bytes(data[: len(data) // 2])


def _unknown_codec(path: Path) -> None:
    def edit(config: dict) -> None:
        config["quantization_config"]["codebooks"]["trellis"]["codec"] = "qtip"

    edit_config(path, edit)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensor missing": (
        lambda path: edit_tensors(path, lambda t: t.pop(f"{DOWN}.row_scale")),
        f"tensor {DOWN}.row_scale is missing",
    ),
    "tensor too many": (
        lambda path: edit_tensors(path, lambda t: t.update({f"{DOWN}.weight": torch.ones(2, 2)})),
        f"tensor {DOWN}.weight does not belong",
    ),
    "wrong shape": (
        _tensor(f"{DOWN}.qweight", lambda t: t[:, :-1]),
        f"tensor {DOWN}.qweight is [256, 127], expected [256, 128]",
    ),
    "wrong dtype": (
        _tensor(f"{DOWN}.row_scale", Tensor.float),
        f"tensor {DOWN}.row_scale is F32, the format asks for BF16",
    ),
    "truncated": (_truncate, f"{SHARD} cannot be read"),
    "shard missing": (lambda path: (path / SHARD).unlink(), f"{SHARD} is missing"),
    "codebooks missing": (
        lambda path: (path / CODEBOOK_FILE).unlink(),
        f"{CODEBOOK_FILE} is missing",
    ),
    "format version": (
        _quantization("format_version", 1),
        "format_version is 1, this release reads version 2. Upgrade vllm-pcdvq or quantize the "
        "model again.",
    ),
    "codec": (
        _unknown_codec,
        "codebooks.trellis.codec: Input should be 'trellis', 'e8', 'pvq' or 'int8'",
    ),
    "unknown key": (_quantization("group_size", 8), "group_size: Extra inputs are not permitted"),
}


def test_engines_have_no_network(engine: ProcessPoolExecutor) -> None:
    assert engine.submit(network_guard.blocks_others).result()


def test_undamaged(engine: ProcessPoolExecutor, good: Path) -> None:
    assert engine.submit(failure, configure, good, quantization="pcdvq").result() == ""


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged(name: str, engine: ProcessPoolExecutor, checkpoint: Path) -> None:
    damage, expected = DAMAGES[name]
    damage(checkpoint)
    assert expected in engine.submit(failure, configure, checkpoint).result()


def test_plain_model(engine: ProcessPoolExecutor, checkpoint: Path) -> None:
    edit_config(checkpoint, lambda config: config.pop("quantization_config"))
    message = engine.submit(failure, configure, checkpoint, quantization="pcdvq").result()
    assert "not a PCDVQ checkpoint: config.json has no quantization_config" in message


def test_other_quantization(engine: ProcessPoolExecutor, checkpoint: Path) -> None:
    edit_config(
        checkpoint, lambda config: config.update(quantization_config={"quant_method": "fp8"})
    )
    message = engine.submit(failure, configure, checkpoint, quantization="pcdvq").result()
    assert "does not match the quantization method specified" in message


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (
            _tensor(f"{DOWN}.row_scale", lambda t: t.index_fill(0, torch.tensor(3), torch.nan)),
            f"tensor {DOWN}.row_scale is not finite",
        ),
        (
            _tensor(f"{K_PROJ}.signs_in", lambda t: t ^ 1),
            "model.layers.1.self_attn.qkv_proj.signs_in differs between the 3 layers",
        ),
        (
            _tensor("model.norm.weight", lambda t: t.index_fill(0, torch.tensor(3), -torch.inf)),
            "tensor model.norm.weight is not finite",
        ),
    ],
    ids=["scale is NaN", "unequal signs", "norm is infinite"],
)
def test_damaged_values(
    damage: Callable[[Path], object], expected: str, engine: ProcessPoolExecutor, checkpoint: Path
) -> None:
    damage(checkpoint)
    assert expected in engine.submit(failure, generate, checkpoint, [[1]]).result()


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (_tensor(f"{K_PROJ}.signs_in", lambda t: t ^ 1), "qkv_proj.signs_in differs"),
        (
            _tensor("lm_head.weight", lambda t: t.index_fill(0, torch.tensor(3), torch.nan)),
            "tensor lm_head.weight is not finite",
        ),
    ],
    ids=["unequal signs", "head is NaN"],
)
def test_reload_of_damaged_values(
    damage: Callable[[Path], object],
    expected: str,
    engine: ProcessPoolExecutor,
    good: Path,
    checkpoint: Path,
) -> None:
    damage(checkpoint)
    arguments = failure, generate_and_reload, good, [checkpoint], [[1]]
    reload = engine.submit(*arguments, dtype="float32")
    assert expected in reload.result()


def test_reload_without_a_tensor(engine: ProcessPoolExecutor, good: Path) -> None:
    message = engine.submit(failure, reload_without, good, SHARD, f"{K_PROJ}.qweight").result()
    assert "qkv_proj.qweight (part 1 of 3) is missing" in message
