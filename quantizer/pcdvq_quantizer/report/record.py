"""What the page tells: a checkpoint, the errors recorded with it, and its evaluations."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from pcdvq_kernels.checkpoint import REPORT_FILE, Checkpoint, LayerInfo, open_checkpoint, read_json
from pcdvq_kernels.errors import CheckpointError

from pcdvq_quantizer.layer import LayerError
from pcdvq_quantizer.record import WholeRecord, parse_record

MOST_DIGITS = 6  # of a layer number that a plot can show
# As they follow each other in a decoder layer; others come after them.
KINDS = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj")


@dataclass(frozen=True)
class LayerRecord:
    """One quantized layer.

    Attributes:
        name: in the checkpoint.
        number: of the decoder layer it belongs to, None for an embedding or a head.
        kind: what it is there, such as `q_proj`.
        info: its sizes.
        error: how far it is from the original.
    """

    name: str
    number: int | None
    kind: str
    info: LayerInfo
    error: LayerError


@dataclass(frozen=True)
class CheckpointRecord:
    """A checkpoint and the errors recorded with it; `layers` are all of its quantized layers."""

    checkpoint: Checkpoint
    run: WholeRecord
    layers: list[LayerRecord]

    @property
    def linears(self) -> list[LayerRecord]:
        """The layers without embedding and output head."""
        return [layer for layer in self.layers if layer.name in self.checkpoint.linears]

    @property
    def numbered(self) -> list[LayerRecord]:
        """The layers that the plots over layer numbers show."""
        return [layer for layer in self.linears if layer.number is not None]

    @property
    def kinds(self) -> list[str]:
        """Kinds of the numbered layers."""
        found = dict.fromkeys(layer.kind for layer in self.numbered)
        return sorted(found, key=lambda kind: KINDS.index(kind) if kind in KINDS else len(KINDS))

    @property
    def weight_error(self) -> float:
        """Mean weight error of the linear layers, each weight counted alike."""
        return mean(self.linears, lambda error: error.weight)

    @property
    def direction_share(self) -> float:
        """Share of `weight_error` that is due to directions; 0 where there is no error."""
        directions = mean(self.linears, lambda error: error.weight * error.direction)
        return directions / self.weight_error if self.weight_error else 0.0

    @property
    def stored_bytes(self) -> int:
        """Of all tensors and codebooks."""
        tensors = sum(tensor.bytes for tensor in self.checkpoint.tensors.values())
        return tensors + self.checkpoint.codebook_bytes

    @property
    def original_bytes(self) -> int:
        """Of all tensors, had the quantized layers 16 bits per weight."""
        infos = self.checkpoint.layers.values()
        saved = sum(2 * info.weights - info.bytes for info in infos)
        return self.stored_bytes - self.checkpoint.codebook_bytes + saved


def mean(layers: Iterable[LayerRecord], figure: Callable[[LayerError], float]) -> float:
    """Mean of a figure over `layers`, each weight counted alike."""
    layers = list(layers)
    total = sum(layer.info.weights * figure(layer.error) for layer in layers)
    return total / sum(layer.info.weights for layer in layers)


def read_record(directory: Path) -> CheckpointRecord:
    """Read the checkpoint in `directory` and what was recorded when it was made.

    Raises:
        CheckpointError: it is not a whole PCDVQ checkpoint, or comes without such a record.
    """
    checkpoint = open_checkpoint(directory)
    path = directory / REPORT_FILE
    if not path.exists():
        raise CheckpointError(
            f"{path} is missing, which holds the errors of all layers. Copy it from where the "
            "checkpoint was made, or quantize again."
        )
    run = parse_record(WholeRecord, read_json(path), path)
    if missing := checkpoint.layers.keys() - run.errors.keys():
        raise CheckpointError(
            f"{path} has no error of layer {min(missing)} ({len(missing)} in all). Quantize again."
        )
    layers = [
        LayerRecord(name, *_place(name), info, run.errors[name])
        for name, info in checkpoint.layers.items()
    ]
    layers.sort(key=lambda layer: -1 if layer.number is None else layer.number)
    return CheckpointRecord(checkpoint, run, layers)


def _place(name: str) -> tuple[int | None, str]:
    """Number and kind of layer `name`: (3, q_proj) of `model.layers.3.self_attn.q_proj`."""
    number = re.search(rf"\.([0-9]{{1,{MOST_DIGITS}}})\.", name)
    return int(number[1]) if number else None, name.rpartition(".")[2]
