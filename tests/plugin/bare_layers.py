"""vLLM's linear layers without an engine, on a pretended tensor-parallel rank."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import CodebookSpec, PCDVQCheckpointConfig
from random_checkpoint import TRELLIS, PackedLayer, random_codebook, random_layer
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase

from vllm_pcdvq.codebooks import CodebookStore
from vllm_pcdvq.config import PCDVQConfig
from vllm_pcdvq.loading import ShardId

BLOCK_256 = {256: 64}
PACKED_MODULES = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
}


@contextmanager
def tensor_parallel(rank: int, size: int) -> Iterator[None]:
    """Pretend to be `rank` of `size`; an all-reduce returns this rank's part."""
    modules = [
        "vllm.model_executor.layers.linear",
        "vllm.model_executor.parameter",
        "vllm.model_executor.layers.vocab_parallel_embedding",
    ]
    with ExitStack() as stack:
        for module in modules:
            for name, value in (("rank", rank), ("world_size", size)):
                target = f"{module}.get_tensor_model_parallel_{name}"
                stack.enter_context(patch(target, return_value=value))
        reduce = f"{modules[0]}.tensor_model_parallel_all_reduce"
        stack.enter_context(patch(reduce, side_effect=lambda x: x))
        yield


def make_codebook(spec: CodebookSpec = TRELLIS, seed: int = 1) -> Codebook:
    return random_codebook(spec, torch.Generator().manual_seed(seed))


def make_config(
    layers: Sequence[str] | dict[str, str],
    blocks: dict[int, int],
    codebook: Codebook | dict[str, Codebook],
    embedding: str | None = None,
) -> PCDVQConfig:
    """A config as a worker gets it; a plain list of layers all use the codebook "a".

    A single codebook is that of all ids.
    """
    by_name = layers if isinstance(layers, dict) else dict.fromkeys(layers, "a")
    ids = sorted({"a", *by_name.values()})
    codebooks = codebook if isinstance(codebook, dict) else dict.fromkeys(ids, codebook)
    config = PCDVQConfig(
        PCDVQCheckpointConfig(
            quant_method="pcdvq",
            format_version=2,
            codebooks={id: book.spec for id, book in codebooks.items()},
            layers=by_name,
            hadamard_blocks={str(columns): block for columns, block in blocks.items()},
            max_tp=1,
            modules_to_not_convert=[],
            embedding=embedding,
            activations="float",  # as dense weights compute
        )
    )
    config.codebooks = CodebookStore(codebooks)
    config.packed_modules_mapping = PACKED_MODULES
    return config


def make_parts(
    rows: Sequence[int], columns: int, seed: int = 2, spec: CodebookSpec = TRELLIS
) -> list[PackedLayer]:
    """Layers of `rows` outputs each that share their input signs."""
    generator = torch.Generator().manual_seed(seed)
    parts = [random_layer(spec, n, columns, generator) for n in rows]
    return [PackedLayer(part.qweight, part.row_scale, parts[0].signs_in) for part in parts]


def load(layer: LinearBase, name: str, tensor: Tensor, shard_id: ShardId = None) -> None:
    """Load one tensor as vLLM's models do."""
    param = getattr(layer, name)
    args = () if shard_id is None else (shard_id,)
    param.weight_loader(param, tensor, *args)


def load_part(
    layer: LinearBase, part: PackedLayer, shard_id: ShardId = None, bias: Tensor | None = None
) -> None:
    for name, tensor in part.tensors().items():
        load(layer, name, tensor, shard_id)
    if bias is not None:
        load(layer, "bias", bias, shard_id)


def finish(layer: LinearBase) -> LinearBase:
    layer.quant_method.process_weights_after_loading(layer)
    return layer
