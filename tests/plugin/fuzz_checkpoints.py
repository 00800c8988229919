"""Opens and serves thousands of damaged checkpoints in this process, which must survive it.

Run by test_untrusted.py: python fuzz_checkpoints.py DIRECTORY CASES. A case that takes too long
ends the process, and so does one that asks for much memory; its files are then in DIRECTORY/case.
"""

from __future__ import annotations

import faulthandler
import json
import resource
import sys
from collections import Counter
from io import StringIO
from pathlib import Path

import torch
from bare_layers import PACKED_MODULES, load, tensor_parallel
from damage import SHARD, Damaged, Files, damaged, read_files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pcdvq_kernels import reference
from pcdvq_kernels.checkpoint import REPORT_FILE, Checkpoint, open_checkpoint
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.trellis import CHAIN_ROWS, CODE_BITS
from pcdvq_quantizer.inspection import inspect_checkpoint
from pydantic import ValidationError
from random_checkpoint import (
    E8,
    INT8,
    SHORT_CHAINS,
    TRELLIS,
    tiny_llama,
    trellis,
    write_random_checkpoint,
)
from rich.console import Console
from safetensors import safe_open
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from vllm_pcdvq.codebooks import CodebookStore
from vllm_pcdvq.config import PCDVQConfig

CASE_SECONDS = 60
MORE_BYTES = 2 << 30
HIDDEN, INNER, HEAD, VOCAB = 64, 128, 32, 40
MODEL = tiny_llama(
    hidden_size=HIDDEN,
    intermediate_size=INNER,
    num_hidden_layers=1,
    head_dim=HEAD,
    vocab_size=VOCAB,
    attention_bias=True,
)
ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
# A product may differ from the dense one by this, of the largest it can be.
TOLERANCE = {"int8": 0.02, "int16": 1e-3, "float": 1e-5}
# Names on disk of a layer's parts, and what vLLM's models call them.
PARTS = {
    "qkv": [(f"{ATTENTION}.{part}_proj", part) for part in ("q", "k", "v")],
    "gate_up": [(f"{MLP}.gate_proj", 0), (f"{MLP}.up_proj", 1)],
    "down": [(f"{MLP}.down_proj", None)],
    "embedding": [("model.embed_tokens", None)],
}


def make_layers(config: PCDVQConfig) -> dict[str, torch.nn.Module]:
    attention = f"{ATTENTION}.qkv_proj"
    return {
        "qkv": QKVParallelLinear(HIDDEN, HEAD, 4, 2, quant_config=config, prefix=attention),
        "gate_up": MergedColumnParallelLinear(
            HIDDEN, [INNER] * 2, bias=False, quant_config=config, prefix=f"{MLP}.gate_up_proj"
        ),
        "down": RowParallelLinear(
            INNER, HIDDEN, bias=False, quant_config=config, prefix=f"{MLP}.down_proj"
        ),
        "embedding": VocabParallelEmbedding(
            VOCAB, HIDDEN, quant_config=config, prefix="model.embed_tokens"
        ),
    }


def serve(checkpoint: Checkpoint) -> dict[str, bool]:
    """Load the layers as vLLM does and check what they compute; layer to whether it is quantized.

    Raises:
        PCDVQError: the checkpoint cannot be served.
    """
    with safe_open(checkpoint.directory / SHARD, framework="pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    config = PCDVQConfig(checkpoint.config)
    config.codebooks = CodebookStore(checkpoint.codebooks)
    config.packed_modules_mapping = PACKED_MODULES
    served = {}
    for name, layer in make_layers(config).items():
        for disk_name, shard_id in PARTS[name]:
            for tensor_name, tensor in stored.items():
                owner, _, suffix = tensor_name.rpartition(".")
                if owner == disk_name and hasattr(layer, suffix):
                    load(layer, suffix, tensor, shard_id)
        layer.quant_method.process_weights_after_loading(layer)
        served[name] = hasattr(layer, "codewords")
        if served[name]:
            check(name, layer, checkpoint, stored)
    return served


def check(
    name: str, layer: torch.nn.Module, checkpoint: Checkpoint, stored: dict[str, Tensor]
) -> None:
    """Compare a layer's outputs with those of the dense weight that its tensors stand for."""
    dense, biases = [], []
    for part, _ in PARTS[name]:
        packed = [stored[f"{part}.{tensor}"] for tensor in ("qweight", "row_scale", "signs_in")]
        info = checkpoint.layers[part]
        book, block = checkpoint.codebooks[info.codebook], checkpoint.config.block(info.in_features)
        dense.append(reference.dequantize(*packed, book, block))
        biases.append(stored.get(f"{part}.bias", torch.zeros(info.out_features)).float())
    weight, bias = torch.cat(dense), torch.cat(biases)
    if name == "embedding":
        x = torch.eye(len(weight))
        y = layer(torch.arange(len(weight)))
    else:
        x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(0))
        y = layer(x)[0]
    limit = weight.norm(dim=1) * x.norm(dim=1).max() + bias.abs()
    if name == "embedding":
        limit = weight.norm(dim=1, keepdim=True)
    if not limit.isfinite().all() or limit.max() > 1e36:
        return  # scales so large that sums overflow
    expected = x @ weight.T + bias if name != "embedding" else weight
    tolerance = TOLERANCE[checkpoint.config.activations or "int8"]
    assert ((y - expected).abs() <= tolerance * limit + 1e-30).all(), name


def attempt(directory: Path) -> str:
    """What becomes of the checkpoint in `directory`: "served" or "refused"."""
    faulthandler.dump_traceback_later(CASE_SECONDS, exit=True)
    try:
        checkpoint = open_checkpoint(directory)
        serve(checkpoint)
        inspect_checkpoint(directory).print_table(Console(file=StringIO(), markup=False))
        return "served"
    except PCDVQError as error:
        message = str(error)
        assert message.isprintable()
        assert 10 < len(message) < 1100
        return "refused"
    finally:
        faulthandler.cancel_dump_traceback_later()


def fuzz_damage(bases: list[Files], directory: Path, cases: int) -> Counter[str]:
    outcomes: Counter[str] = Counter()

    @_settings(cases)
    @given(damaged(bases))
    def run(case: Damaged) -> None:
        case.write(directory)
        outcomes[attempt(directory)] += 1

    run()
    return outcomes


def fuzz_layouts(directory: Path, cases: int) -> Counter[str]:
    """Whole checkpoints with any layout of codes that the format allows."""
    outcomes: Counter[str] = Counter()

    @_settings(cases)
    @given(layouts(), st.integers(0, 2**32 - 1))
    def run(spec: CodebookSpec, seed: int) -> None:
        Damaged(Files()).write(directory)
        write_random_checkpoint(directory, MODEL, spec, embeddings=spec, seed=seed)
        (directory / REPORT_FILE).write_text("{}")
        outcomes[attempt(directory)] += 1

    run()
    return outcomes


def layouts() -> st.SearchStrategy[CodebookSpec]:
    chains = st.builds(trellis, st.sampled_from(CODE_BITS), st.sampled_from(CHAIN_ROWS))
    return st.one_of(chains, existing(lattices()), existing(pyramids()))


def existing(fields: st.SearchStrategy[dict[str, object]]) -> st.SearchStrategy[CodebookSpec]:
    """Layouts of these fields where they fit together."""
    return fields.map(_spec).filter(lambda spec: spec is not None)


def lattices() -> st.SearchStrategy[dict[str, object]]:
    """Fields of codec e8."""
    return st.fixed_dictionaries(
        {
            **{"codec": st.just("e8"), "vector_dim": st.just(8)},
            **{"pattern_bits": st.integers(1, 12), "magnitude_bits": st.integers(0, 4)},
            "shift": st.integers(0, 7),
        }
    )


def pyramids() -> st.SearchStrategy[dict[str, object]]:
    """Fields of codec pvq, many of which fit together."""
    few = st.lists(st.integers(1, 8), min_size=1, max_size=4)
    many = st.lists(st.integers(1, 16), min_size=1, max_size=12)
    return st.fixed_dictionaries(
        {
            **{"codec": st.just("pvq"), "vector_dim": st.just(8)},
            **{"pattern_bits": st.integers(11, 33), "shift": st.integers(0, 7)},
            "pulses": st.one_of(few, many).map(tuple),
        }
    )


def _spec(fields: dict[str, object]) -> CodebookSpec | None:
    try:
        return CodebookSpec(**fields)
    except ValidationError:
        return None


def _settings(cases: int) -> settings:
    return settings(
        max_examples=cases,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def make_bases(directory: Path) -> list[Files]:
    bases = []
    for number, (spec, embeddings) in enumerate(((TRELLIS, INT8), (E8, SHORT_CHAINS))):
        path = directory / str(number)
        write_random_checkpoint(path, MODEL, spec, embeddings=embeddings)
        errors = {f"{MLP}.down_proj": {"weight": 0.1, "direction": 0.5}}
        (path / REPORT_FILE).write_text(json.dumps({"model": "m", "errors": errors}))
        bases.append(read_files(path))
    return bases


def main() -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    directory, cases = Path(sys.argv[1]), int(sys.argv[2])
    bases = make_bases(directory)
    case = directory / "case"
    case.mkdir()
    with set_current_vllm_config(VllmConfig()), tensor_parallel(0, 1):
        for files in bases:
            Damaged(files).write(case)
            assert all(serve(open_checkpoint(case)).values())
        used = 1024 * int(Path("/proc/self/statm").read_text().split()[0]) * 4
        resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, resource.RLIM_INFINITY))
        outcomes = fuzz_damage(bases, case, cases)
        layouts = fuzz_layouts(case, cases // 20)
    print(json.dumps({"damaged": outcomes, "layouts": layouts}))


if __name__ == "__main__":
    main()
