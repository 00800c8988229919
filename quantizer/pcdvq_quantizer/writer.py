"""Writing a checkpoint directory so that it appears whole or not at all, and can be resumed."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pcdvq_kernels.checkpoint import CODEBOOK_FILE, INDEX_FILE, read_json
from pcdvq_kernels.errors import PCDVQError
from safetensors import safe_open
from torch import Tensor

from pcdvq_quantizer.checkpoints import AnyCheckpoint, open_any_checkpoint
from pcdvq_quantizer.codebooks import NamedCodebook
from pcdvq_quantizer.files import save_whole, write_json_whole
from pcdvq_quantizer.layer import LayerError, QuantizedLayer, StoredLayer
from pcdvq_quantizer.output import RUN_FILE, Output

SHARD_BYTES = 1 << 30
LONGEST_NAME = 150


@dataclass
class Shard:
    """One output file: quantized layers, and tensors copied as they are."""

    file: str = ""
    layers: list[str] = field(default_factory=list)
    copied: list[str] = field(default_factory=list)
    bytes: int = 0


def plan_shards(tensors: Iterable[tuple[str, int]], layer_bytes: dict[str, int]) -> list[Shard]:
    """Divide tensors into files of about `SHARD_BYTES`.

    Args:
        tensors: (name, bytes) of the source's tensors, in stored order.
        layer_bytes: packed size of each layer to quantize.
    """
    shards = [Shard()]
    for tensor, size in tensors:
        layer = tensor.removesuffix(".weight")
        size = layer_bytes.get(layer, size)
        if shards[-1].bytes and shards[-1].bytes + size > SHARD_BYTES:
            shards.append(Shard())
        shard = shards[-1]
        (shard.layers if layer in layer_bytes else shard.copied).append(
            layer if layer in layer_bytes else tensor
        )
        shard.bytes += size
    for number, shard in enumerate(shards, 1):
        shard.file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
    return shards


class CheckpointWriter:
    """Collects a checkpoint in `output`.partial and moves it to `output` when whole.

    The partial directory (`Output`) holds finished shards, the finished layers of the shard under
    way, and the description of the run; a run with the same description continues there.
    """

    def __init__(self, output: Output, run: dict[str, Any]) -> None:
        self._output = output
        self._run = _as_json(run)

    @contextmanager
    def open(self, needed_bytes: int) -> Iterator[CheckpointWriter]:
        """Lock and prepare the partial directory.

        Raises:
            PCDVQError: something would be lost at `output`, another run holds the directory or was
                started with other options, or the disk is or gets full.
        """
        with self._output.locked():
            try:
                self._check_run()
                self._check_space(needed_bytes)
                yield self
            finally:
                self._remove_if_useless()

    def _remove_if_useless(self) -> None:
        """Nothing made yet is nothing to resume: the next run may have other options."""
        if self._output.partial.exists() and not self._finished_files():
            self._output.discard()

    def _finished_files(self) -> list[Path]:
        return list(self._output.partial.rglob("*.safetensors"))

    def _check_run(self) -> None:
        path = self._output.partial / RUN_FILE
        if path.exists() and self._finished_files():
            earlier = read_json(path)
            for key in sorted(_differences(self._run, earlier)):
                raise PCDVQError(
                    f"{self._output.partial} was begun with {key} = {earlier.get(key)!r}, this "
                    f"run has {self._run.get(key)!r}; use the same model and options or delete "
                    "that directory"
                )
        else:
            write_json_whole(path, self._run)
        for directory in (self.work_directory, self.directory):
            directory.mkdir(exist_ok=True)

    def _check_space(self, needed_bytes: int) -> None:
        done = sum(path.stat().st_size for path in self._finished_files())
        # The layers of one shard exist twice while the shard is written.
        needed = needed_bytes - done + min(needed_bytes, SHARD_BYTES)
        partial = self._output.partial
        free = shutil.disk_usage(partial).free
        if free < needed:
            raise PCDVQError(
                f"{partial} needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free; "
                "free some space or choose another OUT"
            )

    def is_written(self, shard: Shard) -> bool:
        return (self.directory / shard.file).exists()

    def read_layer(self, name: str) -> StoredLayer | None:
        """A layer that an interrupted run finished, else None."""
        path = self._layer_path(name)
        if not path.exists():
            return None
        with safe_open(path, framework="pt") as file:
            error = LayerError(**json.loads(file.metadata()["error"]))
            packed = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return StoredLayer(packed, error)

    def write_layer(self, name: str, layer: QuantizedLayer) -> None:
        metadata = {"error": json.dumps(asdict(layer.error))}
        save_whole(layer.tensors(), self._layer_path(name), metadata)

    def write_shard(
        self, shard: Shard, tensors: dict[str, Tensor], errors: dict[str, LayerError]
    ) -> None:
        """Write a whole shard; its layers are then no longer kept one by one."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        recorded = {name: asdict(error) for name, error in errors.items()}
        write_json_whole(self._summary_path(shard), {"bytes": size, "errors": recorded})
        # One metadata entry only: safetensors writes several in random order.
        save_whole(tensors, self.directory / shard.file, {"format": "pt"})
        for name in shard.layers:
            self._layer_path(name).unlink(missing_ok=True)

    def finish(self, shards: list[Shard], codebooks: list[NamedCodebook]) -> dict[str, Any]:
        """Write index and codebooks; returns the `LayerError` fields of every layer."""
        weight_map: dict[str, str] = {}
        errors: dict[str, Any] = {}
        total = 0
        for shard in shards:
            with safe_open(self.directory / shard.file, framework="pt") as file:
                weight_map |= dict.fromkeys(file.keys(), shard.file)
            summary = json.loads(self._summary_path(shard).read_text(encoding="utf-8"))
            errors |= summary["errors"]
            total += summary["bytes"]
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json_whole(self.directory / INDEX_FILE, index)
        if codebooks:
            save_codebooks(codebooks, self.directory)
        return errors

    def write_json(self, file: str, value: Any) -> None:
        write_json_whole(self.directory / file, value)

    @property
    def work_directory(self) -> Path:
        """Where a run keeps what it needs to resume; gone once the checkpoint is published."""
        return self._output.work

    @property
    def directory(self) -> Path:
        """Where files are collected."""
        return self._output.new

    def publish(self, models: dict[str, Any]) -> AnyCheckpoint:
        """Check the collected checkpoint as a reader would and move it to `output`.

        Args:
            models: what the run's description says of models, made anew.

        Raises:
            PCDVQError: one has changed meanwhile, or something would be lost.
        """
        if changed := sorted(_differences(self._run, self._run | _as_json(models))):
            raise PCDVQError(
                f"a model has changed since the run began ({changed[0]}); delete "
                f"{self._output.partial} and start again"
            )
        open_any_checkpoint(self.directory)
        self._output.publish()
        return open_any_checkpoint(self._output.path)

    def _summary_path(self, shard: Shard) -> Path:
        return self.work_directory / f"{shard.file}.json"

    def _layer_path(self, name: str) -> Path:
        # Names are a model's: not all would be those of a file in that directory.
        file = quote(name, safe="")
        if len(file) > LONGEST_NAME:
            file = file[:LONGEST_NAME] + hashlib.sha256(name.encode()).hexdigest()
        return self.work_directory / f"{file}.safetensors"


def _as_json(run: dict[str, Any]) -> dict[str, Any]:
    """`run` as it will be read back: without tuples."""
    return json.loads(json.dumps(run))


def _differences(run: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {key for key in run.keys() | other.keys() if run.get(key) != other.get(key)}


def save_codebooks(codebooks: list[NamedCodebook], directory: Path) -> None:
    """Write the codebook file of a checkpoint."""
    tables = {}
    for named in codebooks:
        tables[f"{named.id}.directions"] = named.codebook.directions.contiguous()
        tables[f"{named.id}.magnitudes"] = named.codebook.magnitudes.contiguous()
    save_whole(tables, directory / CODEBOOK_FILE)
