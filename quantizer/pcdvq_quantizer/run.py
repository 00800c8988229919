"""The quantization run: a model in, a whole checkpoint directory out."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from pcdvq_kernels.checkpoint import REPORT_FILE, Checkpoint
from pcdvq_kernels.config import FORMAT_VERSION, PCDVQCheckpointConfig
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import choose_block
from torch import Tensor

from pcdvq_quantizer.card import write_model_card
from pcdvq_quantizer.codebooks import NamedCodebook, get_codebook
from pcdvq_quantizer.embeddings import UNQUANTIZED_BITS, get_embedding_codebook
from pcdvq_quantizer.layer import QuantizedLinear, quantize_linear
from pcdvq_quantizer.selection import Selection, select_layers
from pcdvq_quantizer.sources import Source, open_source
from pcdvq_quantizer.writer import CheckpointWriter, Shard, plan_shards

Progress = Callable[[int], None]
"""Called after each layer with its number of weights."""


@dataclass(frozen=True)
class QuantizeOptions:
    """What makes one checkpoint differ from another of the same model.

    Attributes:
        bits: nominal bits per weight, one of `codebooks.OFFERED[codec]`.
        codec: one of `codebooks.OFFERED`.
        max_tp: largest tensor-parallel size to keep possible where K allows.
        seed: of the input signs.
        embedding_bits: of input embedding and output head, 4, 8, or 16 to leave them as they are.
    """

    bits: float = 2.0
    codec: str = "signed"
    max_tp: int = 8
    seed: int = 0
    embedding_bits: int = UNQUANTIZED_BITS


@dataclass(frozen=True)
class Plan:
    """All decisions of a run, made before any weight is read; `codebooks` are by layer."""

    source: Source
    options: QuantizeOptions
    codebooks: dict[str, NamedCodebook]
    selection: Selection
    config: PCDVQCheckpointConfig

    def shape(self, layer: str) -> tuple[int, int]:
        rows, columns = self.source.shapes[f"{layer}.weight"]
        return rows, columns

    @property
    def weights(self) -> int:
        """Number of weights to quantize."""
        return sum(rows * columns for rows, columns in map(self.shape, self.selection.layers))

    def packed_bytes(self, layer: str) -> int:
        rows, columns = self.shape(layer)
        row_bytes = self.codebooks[layer].codebook.spec.row_bytes(columns)
        return rows * (row_bytes + 2) + columns // 8

    def fingerprint(self) -> dict[str, object]:
        """Equal for runs that make the same checkpoint."""
        model = json.dumps([self.source.config, self.source.shapes], sort_keys=True, default=str)
        digest = hashlib.sha256(model.encode()).hexdigest()
        return {"model": self.source.name, "model_sha256": digest, **asdict(self.options)}


def make_plan(model: str, options: QuantizeOptions) -> Plan:
    """Open `model` and decide what becomes of each tensor.

    Raises:
        PCDVQError: the model, the rate or the codec cannot be served.
    """
    if options.max_tp < 1:
        raise PCDVQError(f"--max-tp is {options.max_tp}; give 1 or more")
    codebook = get_codebook(options.codec, options.bits)
    embedding_codebook = get_embedding_codebook(options.embedding_bits)
    source = open_source(model)
    if method := source.config.get("quantization_config", {}).get("quant_method"):
        raise PCDVQError(
            f"{model} is already quantized ({method}); quantize the original model instead"
        )
    selection = select_layers(source, embeddings=embedding_codebook is not None)
    in_features = {source.shapes[f"{name}.weight"][1] for name in selection.layers}
    codebooks = dict.fromkeys(selection.layers, codebook)
    if embedding_codebook is not None:
        codebooks |= dict.fromkeys(selection.embeddings, embedding_codebook)
    config = PCDVQCheckpointConfig(
        quant_method="pcdvq",
        format_version=FORMAT_VERSION,
        codebooks={used.id: used.codebook.spec for used in codebooks.values()},
        layers={layer: used.id for layer, used in codebooks.items()},
        hadamard_blocks={str(k): choose_block(k, options.max_tp) for k in sorted(in_features)},
        max_tp=options.max_tp,
        modules_to_not_convert=list(selection.skipped),
        embedding=selection.embedding,
        head=selection.head,
    )
    return Plan(source, options, codebooks, selection, config)


def quantize_model(
    plan: Plan, output: Path, overwrite: bool = False, progress: Progress | None = None
) -> Checkpoint:
    """Quantize and write the checkpoint `output`, which appears whole or not at all.

    Work goes to `output`.partial, layer by layer; a run that was interrupted and is started again
    with the same model and options continues there.

    Raises:
        PCDVQError: `output` exists, the disk is full, weights are not finite, or the partial
            directory belongs to another run.
    """
    started = time.monotonic()
    source = plan.source
    layer_bytes = {name: plan.packed_bytes(name) for name in plan.selection.layers}
    shards = plan_shards(((name, source.bytes(name)) for name in source.shapes), layer_bytes)
    writer = CheckpointWriter(output, plan.fingerprint(), overwrite)
    with writer.open(needed_bytes=sum(shard.bytes for shard in shards)):
        for shard in shards:
            if not writer.is_written(shard):
                _make_shard(plan, shard, writer, progress)
        errors = writer.finish(shards, plan.codebooks.values())
        quantization_config = plan.config.model_dump(exclude_none=True)
        writer.write_json(
            "config.json", source.config | {"quantization_config": quantization_config}
        )
        report = {
            "model": source.name,
            "options": asdict(plan.options),
            "seconds": round(time.monotonic() - started, 1),
            "relative_error": errors,
            "skipped": plan.selection.skipped,
        }
        writer.write_json(REPORT_FILE, report)
        source.copy_files(writer.directory)
        write_model_card(writer.directory, source)
        return writer.publish()


def _make_shard(
    plan: Plan, shard: Shard, writer: CheckpointWriter, progress: Progress | None
) -> None:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, float] = {}
    for name in shard.layers:
        layer = writer.read_layer(name)
        if layer is None:
            layer = _quantize_layer(plan, name)
            writer.write_layer(name, layer)
        tensors |= layer.tensors(prefix=f"{name}.")
        errors[name] = layer.relative_error
        if progress:
            rows, columns = plan.shape(name)
            progress(rows * columns)
    tensors |= {name: plan.source.load(name).contiguous() for name in shard.copied}
    writer.write_shard(shard, tensors, errors)


def _quantize_layer(plan: Plan, name: str) -> QuantizedLinear:
    weight = plan.source.load(f"{name}.weight")
    if not weight.isfinite().all():
        raise PCDVQError(f"{name}.weight of {plan.source.name} holds NaN or infinity")
    in_features = weight.shape[1]
    signs = input_signs(in_features, plan.options.seed)
    return quantize_linear(weight, plan.codebooks[name], signs, plan.config.block(in_features))


def input_signs(in_features: int, seed: int) -> Tensor:
    """Diagonal of S for layers of `in_features` columns: fp32 [K] of +1 / -1.

    One vector per K, so that all layers that could read the same activation share it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + in_features)
    return 1.0 - 2.0 * torch.randint(0, 2, (in_features,), generator=generator).float()
