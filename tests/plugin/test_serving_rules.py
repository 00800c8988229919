"""The rules that the quantizer asks are those of vLLM and the plugin."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import vllm.model_executor
from bare_layers import make_codebook, make_config, tensor_parallel
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import choose_block
from pcdvq_kernels.serving import MERGED, UNSPLIT
from pcdvq_kernels.trellis import CHAIN_ROWS
from pcdvq_quantizer.served import Heads, choose_chain_rows, describe_splits, find_unserved
from random_checkpoint import E8, SHORT_CHAINS
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.mamba.mamba_mixer import MambaMixer

from vllm_pcdvq.config import PCDVQConfig

SOURCES = Path(vllm.model_executor.__file__).parent
# Parts of Olmo's hybrids and Bailing 3 that other models have, and do not merge.
OF_ONE_MODEL = {
    ("q_proj", "k_proj", "v_proj", "b_proj"),
    ("q_proj", "k_proj", "v_proj", "g_proj"),
}


@pytest.fixture(scope="module")
def modules() -> list[ast.Module]:
    """vLLM's models and the layers that they share."""
    paths = [path for part in ("models", "layers") for path in (SOURCES / part).rglob("*.py")]
    return [ast.parse(path.read_text()) for path in paths]


def _merged(module: ast.Module) -> Iterator[tuple[str, ...]]:
    for node in ast.walk(module):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if not any(getattr(each, "id", None) == "packed_modules_mapping" for each in targets):
            continue
        for found in ast.walk(node):
            for value in found.values if isinstance(found, ast.Dict) else []:
                if isinstance(value, ast.List) and len(value.elts) > 1:
                    names = ast.literal_eval(value)
                    yield tuple(name.rpartition(".")[2] for name in names)


def test_layers_that_vllm_merges(modules: list[ast.Module]) -> None:
    found = {parts for module in modules for parts in _merged(module)}
    assert found == set(MERGED) | OF_ONE_MODEL


def test_layers_whose_rows_vllm_does_not_split(modules: list[ast.Module]) -> None:
    split: Counter[str] = Counter()
    for node in (each for module in modules for each in ast.walk(module)):
        if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Call):
            continue
        kind, target = getattr(node.value.func, "id", None), getattr(node.targets[0], "attr", "")
        split[target] += kind in ("ColumnParallelLinear", "MergedColumnParallelLinear")
        split[target] -= kind in ("RowParallelLinear", "ReplicatedLinear")
    assert {name: split[name] for name in UNSPLIT if split[name] >= 0} == {}


def test_mamba1_gives_its_layers_no_quantization() -> None:
    assert "quant_config" not in inspect.signature(MambaMixer).parameters


HIDDEN, HEAD_DIM = 128, 8
NAMES = [f"m.{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
SHAPES = list(product([2, 4, 8], [1, 2, 4, 8], [96, 128, 200, 256, 320]))


def _plugin_refuses(config: PCDVQConfig, heads: Heads, inner: int, size: int) -> bool:
    """Whether the plugin does not build one of the layers on `size` ranks."""
    here, hidden = {"quant_config": config}, heads.heads * HEAD_DIM
    with tensor_parallel(0, size):
        try:
            qkv = HIDDEN, HEAD_DIM, heads.heads, heads.kv_heads
            QKVParallelLinear(*qkv, prefix="m.qkv_proj", **here)
            RowParallelLinear(hidden, HIDDEN, prefix="m.o_proj", **here)
            MergedColumnParallelLinear(HIDDEN, [inner] * 2, prefix="m.gate_up_proj", **here)
            RowParallelLinear(inner, HIDDEN, prefix="m.down_proj", **here)
        except PCDVQError:
            return True
    return False


@pytest.mark.parametrize("spec", [E8, SHORT_CHAINS], ids=lambda spec: spec.codec)
@pytest.mark.parametrize("max_tp", [1, 2, 8])
def test_what_is_quantized_is_served(spec: CodebookSpec, max_tp: int, vllm_config) -> None:
    """At every size that vLLM could serve the model at, unless the run said that it will not be."""
    outcomes: Counter[str] = Counter()
    lengths: set[int] = set()
    for count, kv_heads, inner in SHAPES:
        if count % kv_heads:
            continue
        heads = Heads(count, kv_heads, HEAD_DIM)
        rows = dict(zip(("q", "k", "v"), (count, kv_heads, kv_heads), strict=True))
        sizes = {f"m.{part}_proj": (n * HEAD_DIM, HIDDEN) for part, n in rows.items()}
        sizes |= {f"m.{part}_proj": (inner, HIDDEN) for part in ("gate", "up")}
        sizes |= {"m.o_proj": (HIDDEN, count * HEAD_DIM), "m.down_proj": (HIDDEN, inner)}
        layers = {name: shape[0] for name, shape in sizes.items()}
        left = find_unserved(layers, layers, spec, heads, max_tp)
        kept = {name: shape for name, shape in sizes.items() if name not in left}
        blocks = {columns: choose_block(columns, max_tp) for _, columns in sizes.values()}
        rows = {name: shape[0] for name, shape in kept.items()}
        chains = choose_chain_rows(rows, spec, heads, max_tp)
        lengths.update(chains.values())
        books = {
            str(length): make_codebook(spec.model_copy(update={"chain_rows": length}))
            for length in {*chains.values()}
        }
        config = make_config({name: str(chains[name]) for name in kept}, blocks, books)
        config.left = set(left)
        config.checkpoint = config.checkpoint.model_copy(update={"max_tp": max_tp})
        said = describe_splits(kept, config.checkpoint, heads) is not None
        for size in heads.tensor_parallel_sizes(max_tp):
            if (inner % size and size > 1) or (kv_heads % size and size % kv_heads):
                continue
            refused = _plugin_refuses(config, heads, inner, size)
            outcomes["refused" if refused else "served"] += 1
            assert not refused or (said and size > 1), (count, kv_heads, inner, size)
        outcomes["left"] += bool(left)
    assert outcomes["served"] > 30
    assert (outcomes["left"] > 0) == (spec is not E8)
    assert lengths == ({0} if spec is E8 else set(CHAIN_ROWS))


@pytest.mark.parametrize(("hidden", "chain_rows"), [(256, 64), (224, 32), (208, 16), (200, None)])
def test_stacked_experts_have_whole_chains(hidden: int, chain_rows: int | None) -> None:
    """Those of an expert's last layer, too, whose rows no rank splits."""
    sizes = {"gate_proj": 128, "up_proj": 128, "down_proj": hidden}
    layers = {f"m.experts.{e}.{part}": rows for e in range(2) for part, rows in sizes.items()}
    heads = Heads(4, 2, HEAD_DIM)
    left = find_unserved(layers, layers, SHORT_CHAINS, heads, 1)
    down = {f"m.experts.{e}.down_proj" for e in range(2)}
    assert set(left) == (set() if chain_rows else down)
    if chain_rows:
        chains = choose_chain_rows(layers, SHORT_CHAINS, heads, 1)
        assert {chains[name] for name in down} == {chain_rows}


def test_without_the_rules_the_plugin_refuses(vllm_config) -> None:
    heads = Heads(4, 4, HEAD_DIM)
    config = make_config(NAMES, {HIDDEN: 64, 32: 32, 200: 8}, make_codebook(SHORT_CHAINS))
    assert _plugin_refuses(config, heads, 200, 1)
    config = make_config([NAMES[0], *NAMES[3:]], {HIDDEN: 64, 32: 32, 256: 64}, make_codebook())
    assert _plugin_refuses(config, heads, 256, 1)
