"""Reading and checking checkpoint directories (FORMAT.md) without loading their weights."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import PCDVQCheckpointConfig
from pcdvq_kernels.errors import CheckpointError

INDEX_FILE = "model.safetensors.index.json"
CODEBOOK_FILE = "pcdvq_codebooks.safetensors"
REPORT_FILE = "pcdvq_report.json"

QWEIGHT, ROW_SCALE, SIGNS_IN = "qweight", "row_scale", "signs_in"
PACKED_TENSORS = (QWEIGHT, ROW_SCALE, SIGNS_IN)
# Of a tensor's elements; every other dtype takes one byte.
DTYPE_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("BF16", "F16", "I16", "U16"), 2),
}
REMEDY = "The checkpoint is damaged or incomplete: copy it again or quantize again."
# The largest files, indices of models with 100,000 tensors, have a tenth of it.
MOST_JSON_BYTES = 1 << 26


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as a safetensors header describes it."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        size = DTYPE_BYTES.get(self.dtype, 1)
        for length in self.shape:
            size *= length
        return size


@dataclass(frozen=True)
class LayerInfo:
    """Sizes of one quantized layer."""

    out_features: int
    in_features: int
    codebook: str
    bytes: int

    @property
    def weights(self) -> int:
        return self.out_features * self.in_features

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint directory.

    Attributes:
        directory: where it is.
        config: its `quantization_config`.
        codebooks: codebook id to tables.
        tensors: every tensor of the model by name.
        layers: every quantized layer by name.
    """

    directory: Path
    config: PCDVQCheckpointConfig
    codebooks: dict[str, Codebook]
    tensors: dict[str, TensorInfo]
    layers: dict[str, LayerInfo]

    @property
    def codebook_bytes(self) -> int:
        return self._codebook_bytes(self.codebooks)

    @property
    def linears(self) -> dict[str, LayerInfo]:
        """The quantized layers without embedding and output head."""
        embeddings = self.config.embeddings
        return {name: layer for name, layer in self.layers.items() if name not in embeddings}

    @property
    def embeddings(self) -> tuple[str, ...]:
        """Names of the input embedding and the output head, those quantized."""
        return tuple(self.config.embeddings)

    @property
    def modules_to_not_convert(self) -> list[str]:
        return self.config.modules_to_not_convert

    @property
    def counted(self) -> str:
        """What bits per weight count."""
        return f"codes, row scales, signs and {self.codebook_bytes} bytes of codebooks"

    @property
    def bits_per_weight(self) -> float:
        """All stored bits of the quantized linear layers and their codebooks over their weights."""
        return self._bits_per_weight(self.linears)

    @property
    def bits_per_weight_with_embeddings(self) -> float:
        """`bits_per_weight` of linear layers, embedding and output head, those quantized."""
        return self._bits_per_weight(self.layers)

    def _bits_per_weight(self, layers: dict[str, LayerInfo]) -> float:
        used = {layer.codebook for layer in layers.values()}
        packed = sum(layer.bytes for layer in layers.values()) + self._codebook_bytes(used)
        return 8 * packed / max(1, sum(layer.weights for layer in layers.values()))

    def _codebook_bytes(self, ids: Iterable[str]) -> int:
        tables = [self.codebooks[id] for id in ids]
        return sum(book.directions.numel() + book.magnitudes.numel() for book in tables)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open `directory` and check every header of it against its configuration.

    Raises:
        CheckpointError: anything that would not serve, naming the tensor or file.
    """
    config = PCDVQCheckpointConfig.parse(read_quantization_config(directory))
    if not config.layers:
        raise CheckpointError(f"{directory}: quantization_config.layers is empty. {REMEDY}")
    tensors = read_headers(directory)
    layers = {
        name: _check_layer(name, codebook, config, tensors)
        for name, codebook in config.layers.items()
    }
    _check_no_strays(config, tensors)
    return Checkpoint(
        directory, config, load_codebooks(directory / CODEBOOK_FILE, config), tensors, layers
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        CheckpointError: the file is missing, too large or not a JSON object, or an object in it has
            a key twice.
    """
    _check_file(path)
    try:
        value = json.loads(read_json_bytes(path).decode(), object_pairs_hook=_unique)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {REMEDY}") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}). {REMEDY}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} does not hold a JSON object. {REMEDY}")
    return value


def read_json_bytes(path: Path) -> bytes:
    """Read a JSON file without parsing it.

    Raises:
        CheckpointError: it is too large, or no regular file.
        OSError: it is missing or cannot be read.
    """
    size = path.stat().st_size
    _check_file(path)
    if size > MOST_JSON_BYTES:
        raise CheckpointError(
            f"{path} has {size} bytes, over the limit of {MOST_JSON_BYTES}. {REMEDY}"
        )
    return path.read_bytes()


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON file: readers differ in which of two equal keys they take."""
    value: dict[str, Any] = {}
    for key, item in pairs:
        if key in value:
            raise ValueError(f"the key {key!r} is there twice")
        value[key] = item
    return value


@contextmanager
def open_tensors(path: Path) -> Iterator[Any]:
    """Open a safetensors file, as safetensors' `safe_open` for torch does.

    Raises:
        CheckpointError: the file is missing, not a safetensors file, larger than memory, or a
            tensor that is asked for has a dtype that torch does not know.
    """
    _check_file(path)
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {REMEDY}") from None
    except (MemoryError, RuntimeError) as error:
        # The size of a file that has holes says nothing of what was written to it.
        raise CheckpointError(
            f"{path} has {path.stat().st_size} bytes, which this machine cannot read ({error}). If "
            f"it should be smaller: {REMEDY[0].lower()}{REMEDY[1:]}"
        ) from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor of any shape and dtype has neither NaN nor infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # Ten times as fast as `isfinite`, with no copy: both ends are NaN where any value is.
    ends = (tensor if tensor.element_size() > 1 else tensor.float()).aminmax()
    return all(math.isfinite(end.item()) for end in ends)


def check_finite(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError unless tensor `name` is finite."""
    if not is_finite(tensor):
        raise CheckpointError(f"tensor {name} is not finite. {REMEDY}")


def _check_file(path: Path) -> None:
    """Raise CheckpointError unless `path` is a regular file; to read a pipe would take for ever."""
    if not path.is_file():
        state = "is not a regular file" if os.path.lexists(path) else "is missing"
        raise CheckpointError(f"{path} {state}. {REMEDY}")


def read_quantization_config(directory: Path) -> dict[str, Any]:
    """The `quantization_config` object of `directory`/config.json, {} if it has none or null."""
    value = read_json(directory / "config.json").get("quantization_config")
    if not isinstance(value, dict | None):
        raise CheckpointError(f"{directory}/config.json: quantization_config is not an object")
    return value or {}


def load_codebooks(path: Path, config: PCDVQCheckpointConfig) -> dict[str, Codebook]:
    """Load the codebooks that `config` names from `path`, a safetensors file.

    Raises:
        CheckpointError: a table is missing, of another shape or dtype, or out of the limits.
    """
    with open_tensors(path) as file:
        wanted = {f"{id}.{table}" for id in config.codebooks for table in _TABLES}
        _compare(f"{path}", wanted, set(file.keys()))
        return {
            id: Codebook(spec, *(file.get_tensor(f"{id}.{table}") for table in _TABLES))
            for id, spec in config.codebooks.items()
        }


_TABLES = ("directions", "magnitudes")


def read_index(directory: Path) -> tuple[dict[str, set[str]], dict[str, Any]]:
    """The index of a model directory.

    Returns:
        File name to names of its tensors, and the whole index.

    Raises:
        CheckpointError: there is none, or it names something that is no file of the directory.
    """
    index = read_json(directory / INDEX_FILE)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{directory / INDEX_FILE} has no weight_map. {REMEDY}")
    shards: dict[str, set[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise CheckpointError(
                f"{INDEX_FILE}: {shard!r} is not the name of a safetensors file. {REMEDY}"
            )
        shards.setdefault(shard, set()).add(name)
    return shards, index


def read_headers(directory: Path) -> dict[str, TensorInfo]:
    """Headers of every shard of the index; each must hold what the index says, no more."""
    shards, index = read_index(directory)
    tensors: dict[str, TensorInfo] = {}
    for shard, expected in shards.items():
        path = directory / shard
        with open_tensors(path) as file:
            _compare(f"{path}", expected, set(file.keys()))
            for name in expected:
                view = file.get_slice(name)
                tensors[name] = TensorInfo(path, view.get_dtype(), tuple(view.get_shape()))
    _check_total(index.get("metadata"), sum(tensor.bytes for tensor in tensors.values()))
    return tensors


def _check_total(metadata: object, found: int) -> None:
    """The index's total size tells of tensors that are missing from shard and index alike."""
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if total is not None and total != found:
        raise CheckpointError(
            f"{INDEX_FILE} says that all tensors take {total} bytes, they take {found}. {REMEDY}"
        )


def _check_layer(
    name: str, codebook: str, config: PCDVQCheckpointConfig, tensors: dict[str, TensorInfo]
) -> LayerInfo:
    packed = [f"{name}.{suffix}" for suffix in PACKED_TENSORS]
    for tensor in packed:
        if tensor not in tensors:
            raise CheckpointError(f"tensor {tensor} is missing. {REMEDY}")
    qweight, row_scale, signs_in = (tensors[tensor] for tensor in packed)
    _check_tensor(packed[1], row_scale, "BF16", (max(row_scale.shape, default=0),))
    _check_tensor(packed[2], signs_in, "U8", (max(signs_in.shape, default=0),))
    out_features, in_features = row_scale.shape[0], 8 * signs_in.shape[0]
    if not out_features or not in_features:
        raise CheckpointError(f"layer {name} is empty: [{out_features}, {in_features}]. {REMEDY}")
    config.block(in_features)
    spec = config.codebooks[codebook]
    stored = spec.stored_rows(out_features), spec.row_bytes(in_features)
    _check_tensor(packed[0], qweight, "U8", stored)
    size = qweight.bytes + row_scale.bytes + signs_in.bytes
    return LayerInfo(out_features, in_features, codebook, size)


def _check_tensor(name: str, info: TensorInfo, dtype: str, shape: tuple[int, ...]) -> None:
    if info.dtype != dtype:
        raise CheckpointError(f"tensor {name} is {info.dtype}, the format asks for {dtype}")
    if info.shape != shape:
        raise CheckpointError(
            f"tensor {name} is {list(info.shape)}, expected {list(shape)}. {REMEDY}"
        )


def _check_no_strays(config: PCDVQCheckpointConfig, tensors: Iterable[str]) -> None:
    for tensor in tensors:
        layer, _, suffix = tensor.rpartition(".")
        if (suffix in PACKED_TENSORS) != (layer in config.layers) and suffix not in ("bias",):
            raise CheckpointError(
                f"tensor {tensor} does not belong: quantization_config.layers "
                f"{'lists' if layer in config.layers else 'does not list'} {layer}. {REMEDY}"
            )


def _compare(where: str, expected: set[str], found: set[str]) -> None:
    if missing := sorted(expected - found):
        raise CheckpointError(
            f"{where} lacks tensor {missing[0]} ({len(missing)} in all). {REMEDY}"
        )
    if extra := sorted(found - expected):
        raise CheckpointError(
            f"{where} holds unexpected tensor {extra[0]} ({len(extra)} in all). {REMEDY}"
        )
