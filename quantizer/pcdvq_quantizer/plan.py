"""Decisions of a quantization run, made before any weight is read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from pcdvq_kernels.config import FORMAT_VERSION, PCDVQCheckpointConfig
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import choose_block
from torch import Tensor

from pcdvq_quantizer.calibration.objectives import OBJECTIVES
from pcdvq_quantizer.codebooks import NamedCodebook, get_codebook, offered_rates
from pcdvq_quantizer.embeddings import UNQUANTIZED_BITS, get_embedding_codebook
from pcdvq_quantizer.layer import QuantizedLinear, check_finite, quantize_linear
from pcdvq_quantizer.selection import DEFAULT_SKIP, Selection, select_layers
from pcdvq_quantizer.sources import Source, open_source

SELF = "self"  # calibrate on text the model writes
NONE = "none"  # do not calibrate


@dataclass(frozen=True)
class QuantizeOptions:
    """What makes one checkpoint differ from another of the same model.

    Attributes:
        bits: a nominal rate of `codebooks.OFFERED[codec]` for every layer, or any average between
            them: then each layer gets a rate by its sensitivity, and all that is stored of the
            quantized layers stays within `bits` per weight.
        codec: one of `codebooks.OFFERED`.
        embedding_bits: of input embedding and output head, 4, 8, or 16 to leave them as they are.
        max_tp: largest tensor-parallel size to keep possible where K allows.
        seed: of the input signs and the calibration text.
        calibration: a text or JSONL file, a `datasets` name, SELF, or NONE.
        samples: windows of calibration text.
        sequence_length: tokens of a window.
        objective: what rounding keeps small, one of `calibration.objectives.OBJECTIVES`.
        skip: patterns (fnmatch) of names of linear layers to leave as they are.
    """

    bits: float = 4.0
    codec: str = "trellis"
    embedding_bits: int = UNQUANTIZED_BITS
    max_tp: int = 8
    seed: int = 0
    calibration: str = SELF
    samples: int = 24
    sequence_length: int = 1024
    objective: str = "hessian"
    skip: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises PCDVQError for options outside their range."""
        if self.max_tp < 1:
            raise PCDVQError(f"--max-tp is {self.max_tp}; give 1 or more")
        if self.samples < 1:
            raise PCDVQError(f"--samples is {self.samples}; give 1 or more")
        if self.sequence_length < 16:
            raise PCDVQError(f"--sequence-length is {self.sequence_length}; give 16 or more")
        if self.objective not in OBJECTIVES:
            raise PCDVQError(
                f"there is no objective {self.objective!r}; --objective is one of "
                f"{', '.join(OBJECTIVES)}"
            )
        if self.calibration == NONE and self.objective != QuantizeOptions.objective:
            raise PCDVQError(
                f"--objective {self.objective} is measured on calibration text; drop it or "
                "--calibration none"
            )
        rates = offered_rates(self.codec)
        if not rates[0] <= self.bits <= rates[-1]:
            raise PCDVQError(
                f"codec {self.codec} offers {rates[0]:g} to {rates[-1]:g} bits per weight, not "
                f"{self.bits:g}; change --bits or --codec"
            )
        if self.is_mixed and self.calibration == NONE:
            listed = ", ".join(f"{rate:g}" for rate in rates)
            raise PCDVQError(
                f"--bits {self.bits:g} chooses a rate for each layer by its sensitivity, which "
                f"needs calibration text; drop --calibration none or choose one of {listed}"
            )

    @property
    def is_mixed(self) -> bool:
        """Whether layers get rates of their own."""
        return self.bits not in offered_rates(self.codec)


@dataclass(frozen=True)
class Plan:
    """All decisions of a run.

    Attributes:
        source: the model.
        options: what was asked for.
        selection: which layers are quantized.
        codebooks: codebook of each layer.
    """

    source: Source
    options: QuantizeOptions
    selection: Selection
    codebooks: dict[str, NamedCodebook]

    def shape(self, layer: str) -> tuple[int, int]:
        rows, columns = self.source.shapes[f"{layer}.weight"]
        return rows, columns

    def size(self, layer: str) -> int:
        """Number of weights of `layer`."""
        rows, columns = self.shape(layer)
        return rows * columns

    @property
    def weights(self) -> int:
        """Number of weights to quantize."""
        return sum(map(self.size, self.selection.layers))

    def packed_bytes(self, layer: str, codebook: NamedCodebook | None = None) -> int:
        """Stored size of `layer` with `codebook` (default: its own)."""
        rows, columns = self.shape(layer)
        spec = (codebook or self.codebooks[layer]).codebook.spec
        return rows * (spec.row_bytes(columns) + 2) + columns // 8

    @property
    def output_bytes(self) -> int:
        """Size of all tensors of the checkpoint; an upper bound while rates are not chosen."""
        layers = {f"{name}.weight" for name in self.selection.layers}
        copied = sum(self.source.bytes(name) for name in self.source.shapes if name not in layers)
        if self.options.is_mixed:
            packed = sum(map(self.packed_bytes, self.selection.stored_embeddings))
            return copied + packed + self.linear_budget // 8
        return copied + sum(map(self.packed_bytes, self.selection.layers))

    @property
    def linear_budget(self) -> int:
        """Bits that `options.bits` allow for all linear layers."""
        return int(self.options.bits * sum(map(self.size, self.selection.linears)))

    @property
    def distinct_codebooks(self) -> list[NamedCodebook]:
        """Codebooks in use, in the order of their ids."""
        return [book for _, book in sorted({b.id: b for b in self.codebooks.values()}.items())]

    @cached_property
    def config(self) -> PCDVQCheckpointConfig:
        """The checkpoint's `quantization_config`."""
        in_features = {self.shape(name)[1] for name in self.selection.layers}
        max_tp = self.options.max_tp
        return PCDVQCheckpointConfig(
            quant_method="pcdvq",
            format_version=FORMAT_VERSION,
            codebooks={book.id: book.codebook.spec for book in self.distinct_codebooks},
            layers={name: book.id for name, book in self.codebooks.items()},
            hadamard_blocks={str(k): choose_block(k, max_tp) for k in sorted(in_features)},
            max_tp=max_tp,
            modules_to_not_convert=list(self.selection.skipped),
            embedding=self.selection.embedding,
            head=self.selection.head,
        )

    def fingerprint(self) -> dict[str, object]:
        """Equal for runs that make the same checkpoint."""
        model = json.dumps([self.source.config, self.source.shapes], sort_keys=True, default=str)
        return {
            "model": self.source.name,
            "model_sha256": _sha256(model.encode()),
            "calibration_sha256": text_sha256(self.options.calibration),
            **asdict(self.options),
        }


def make_plan(model: str, options: QuantizeOptions) -> Plan:
    """Open `model` and decide what becomes of each tensor.

    With `options.is_mixed` every layer has the lowest rate until the run has measured
    sensitivities.

    Raises:
        PCDVQError: the model, the rate or the codec cannot be served.
    """
    options.check()
    return plan_source(open_source(model), options)


def plan_source(source: Source, options: QuantizeOptions) -> Plan:
    """`make_plan` for an open model and options that were checked."""
    rate = offered_rates(options.codec)[0] if options.is_mixed else options.bits
    codebook = get_codebook(options.codec, rate)
    embedding_codebook = get_embedding_codebook(options.embedding_bits)
    if method := source.config.get("quantization_config", {}).get("quant_method"):
        raise PCDVQError(
            f"{source.name} is already quantized ({method}); quantize the original model instead"
        )
    selection = select_layers(
        source, DEFAULT_SKIP + options.skip, embeddings=embedding_codebook is not None
    )
    codebooks = dict.fromkeys(selection.layers, codebook)
    if embedding_codebook is not None:
        codebooks |= dict.fromkeys(selection.stored_embeddings, embedding_codebook)
    return Plan(source, options, selection, codebooks)


def text_sha256(calibration: str) -> str | None:
    """Digest of the file that `calibration` names, None where it names none."""
    path = Path(calibration).expanduser()
    return _sha256(path.read_bytes()) if path.is_file() else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def input_signs(in_features: int, seed: int) -> Tensor:
    """Diagonal of S for layers of `in_features` columns: fp32 [K] of +1 / -1.

    One vector per K, so that all layers that could read the same activation share it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + in_features)
    return 1.0 - 2.0 * torch.randint(0, 2, (in_features,), generator=generator).float()


def quantize_uncalibrated(plan: Plan, name: str) -> QuantizedLinear:
    """Layer `name` of the plan, each group rounded to its nearest code.

    Raises:
        PCDVQError: its weight is not finite.
    """
    weight = plan.source.load(f"{name}.weight")
    check_finite(weight, name, plan.source.name)
    in_features = weight.shape[1]
    signs = input_signs(in_features, plan.options.seed)
    return quantize_linear(weight, plan.codebooks[name], signs, plan.config.block(in_features))
