"""Decisions of a quantization run, made before any weight is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import torch
from pcdvq_kernels.config import FORMAT_VERSION, PCDVQCheckpointConfig
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import choose_block
from pcdvq_kernels.reference import dequantize
from pcdvq_kernels.trellis import CHAIN_ROWS
from torch import Tensor

from pcdvq_quantizer import identity
from pcdvq_quantizer.calibration.objectives import HESSIAN, OBJECTIVES
from pcdvq_quantizer.calibration.objectives.base import StageObjective
from pcdvq_quantizer.calibration.parallel import Processes
from pcdvq_quantizer.calibration.stage import quantize_stage
from pcdvq_quantizer.calibration.statistics import InputStatistics
from pcdvq_quantizer.codebooks import NamedCodebook, get_codebook, offered_rates
from pcdvq_quantizer.embeddings import UNQUANTIZED_BITS, get_embedding_codebooks
from pcdvq_quantizer.layer import (
    QuantizedLayer,
    QuantizedLinear,
    check_finite,
    quantize_linear,
)
from pcdvq_quantizer.selection import Selection, select_layers
from pcdvq_quantizer.served import Heads, choose_chain_rows, describe_splits
from pcdvq_quantizer.source_check import check_source
from pcdvq_quantizer.sources import Source, open_source
from pcdvq_quantizer.texts import text_identity

SELF = "self"  # calibrate on text the model writes
NONE = "none"  # do not calibrate
EFFORTS = "auto", "exhaustive", "quick"


@dataclass(frozen=True)
class RunOptions:
    """Options of a run by any method; they make one checkpoint differ from another of a model.

    Attributes:
        seed: of all that is random, and of the calibration text.
        calibration: a text or JSONL file, a `datasets` name, SELF, or NONE.
        samples: windows of calibration text.
        sequence_length: tokens of a window, fewer where the model reads fewer.
        skip: patterns of names of layers to leave as they are, as in `select_layers`.
    """

    seed: int = 0
    calibration: str = SELF
    samples: int = 24
    sequence_length: int = 1024
    skip: tuple[str, ...] = ()

    def check(self) -> None:
        """Raises PCDVQError for options outside their range."""
        if self.samples < 1:
            raise PCDVQError(f"--samples is {self.samples}; give 1 or more")
        if self.sequence_length < 16:
            raise PCDVQError(f"--sequence-length is {self.sequence_length}; give 16 or more")

    def plan(self, source: Source) -> Plan:
        """What becomes of each tensor of `source`."""
        raise NotImplementedError


@dataclass(frozen=True)
class QuantizeOptions(RunOptions):
    """Options of PCDVQ.

    Attributes:
        bits: a nominal rate of `codebooks.OFFERED[codec]` for every layer, or any average between
            them: then each layer gets a rate by its sensitivity, and all that is stored of the
            quantized layers stays within `bits` per weight.
        codec: one of `codebooks.OFFERED`.
        embedding_bits: of input embedding and output head, 4, 8, or 16 to leave them as they are.
        max_tp: largest tensor-parallel size to keep possible where K allows.
        objective: what rounding keeps small, one of `calibration.objectives.OBJECTIVES`.
        effort: of the search for codes of codec `trellis`: "exhaustive", "quick" (sooner, a larger
            error), or "auto", which is quick without calibration.
    """

    bits: float = 4.0
    codec: str = "trellis"
    embedding_bits: int = UNQUANTIZED_BITS
    max_tp: int = 8
    objective: str = HESSIAN
    effort: str = "auto"

    def check(self) -> None:
        """Raises PCDVQError for options outside their range."""
        super().check()
        if self.max_tp < 1:
            raise PCDVQError(f"--max-tp is {self.max_tp}; give 1 or more")
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
        if self.effort not in EFFORTS:
            raise PCDVQError(f"--effort is {self.effort!r}; give one of {', '.join(EFFORTS)}")
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

    @property
    def search(self) -> str:
        """The effort of the search, decided."""
        if self.effort != "auto":
            return self.effort
        return "quick" if self.calibration == NONE else "exhaustive"

    def plan(self, source: Source) -> PCDVQPlan:
        return plan_source(source, self)


@dataclass(frozen=True)
class Plan(ABC):
    """All decisions of a run, and the method that carries them out layer by layer.

    Reading the model, calibrating and writing know nothing else of a method.

    Attributes:
        source: the model.
        options: what was asked for.
        selection: which layers are quantized.
    """

    source: Source
    options: RunOptions
    selection: Selection

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

    @property
    def output_bytes(self) -> int:
        """Size of all tensors of the checkpoint; an upper bound while rates are not chosen."""
        return self.copied_bytes + sum(map(self.packed_bytes, self.selection.layers))

    @property
    def copied_bytes(self) -> int:
        """Size of `copied`."""
        return sum(map(self.source.bytes, self.copied))

    @property
    def copied(self) -> list[str]:
        """Names of the tensors that stay as they are."""
        layers = {f"{name}.weight" for name in self.selection.layers}
        return [name for name in self.source.shapes if name not in layers]

    @property
    def distinct_codebooks(self) -> list[NamedCodebook]:
        """Codebooks that layers share, in the order of their ids."""
        return []

    def split_limit(self) -> str | None:
        """Why not every tensor-parallel size that was asked for will do; None if it will."""
        return None

    @abstractmethod
    def packed_bytes(self, layer: str) -> int:
        """Stored size of `layer`."""

    @abstractmethod
    def quantization_config(self) -> dict[str, Any]:
        """What config.json says of the method."""

    @abstractmethod
    def quantize(self, name: str) -> QuantizedLayer:
        """Layer `name` without calibration.

        Raises:
            PCDVQError: its weight is not finite.
        """

    @abstractmethod
    def quantize_stage(
        self,
        names: list[str],
        weights: list[Tensor],
        statistics: InputStatistics,
        processes: Processes,
        goal: StageObjective | None = None,
    ) -> tuple[Sequence[QuantizedLayer], list[Tensor]]:
        """Quantize linears that read the same activation.

        Args:
            names: of the layers.
            weights: fp32 [N_i, K].
            statistics: moments of what they read.
            processes: all of which call this.
            goal: what their errors cost; None: the same in all outputs.

        Returns:
            (the layers, for process 0 to write; what they decode to, fp32 [N_i, K]).
        """

    def load(self, name: str) -> Tensor:
        """The weight of layer `name`.

        Raises:
            PCDVQError: it is not finite.
        """
        weight = self.source.load(f"{name}.weight")
        check_finite(weight, f"{name}.weight", self.source.name)
        return weight

    def fingerprint(self) -> dict[str, object]:
        """Equal for runs that make the same checkpoint."""
        return {
            **identity.fingerprint(self.source),
            **asdict(self.options),
            **text_identity(self.options.calibration),
        }


@dataclass(frozen=True)
class PCDVQPlan(Plan):
    """A run of PCDVQ.

    Attributes:
        codebooks: codebook of each layer.
        chain_rows: of the linear layers, rows of their chains; 0 where the codec has none.
    """

    options: QuantizeOptions
    codebooks: dict[str, NamedCodebook]
    chain_rows: dict[str, int]

    def codebook(self, layer: str, bits: float) -> NamedCodebook:
        """The codebook for `layer` at `bits` per weight."""
        options = self.options
        return get_codebook(options.codec, bits, self.chain_rows[layer], options.search)

    def packed_bytes(self, layer: str, codebook: NamedCodebook | None = None) -> int:
        """Stored size of `layer` with `codebook` (default: its own)."""
        rows, columns = self.shape(layer)
        spec = (codebook or self.codebooks[layer]).codebook.spec
        return spec.stored_rows(rows) * spec.row_bytes(columns) + 2 * rows + columns // 8

    @property
    def output_bytes(self) -> int:
        if not self.options.is_mixed:
            return super().output_bytes
        packed = sum(map(self.packed_bytes, self.selection.stored_embeddings))
        return self.copied_bytes + packed + self.linear_budget // 8

    @property
    def linear_budget(self) -> int:
        """Bits that `options.bits` allow for all linear layers."""
        return int(self.options.bits * sum(map(self.size, self.selection.linears)))

    @property
    def distinct_codebooks(self) -> list[NamedCodebook]:
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

    def quantization_config(self) -> dict[str, Any]:
        return self.config.model_dump(exclude_none=True)

    def split_limit(self) -> str | None:
        shapes = {name: self.shape(name) for name in self.selection.linears}
        return describe_splits(shapes, self.config, Heads.of(self.source.config))

    def quantize(self, name: str) -> QuantizedLinear:
        """Layer `name`, each group rounded to its nearest code."""
        weight = self.load(name)
        return quantize_linear(weight, self.codebooks[name], *self._rotation(weight.shape[1]))

    def quantize_stage(
        self,
        names: list[str],
        weights: list[Tensor],
        statistics: InputStatistics,
        processes: Processes,
        goal: StageObjective | None = None,
    ) -> tuple[Sequence[QuantizedLinear], list[Tensor]]:
        rotation = self._rotation(weights[0].shape[1])
        made: dict[str, tuple[QuantizedLinear, Tensor]] = {}
        # Layers that are not served as one may have chains of other lengths.
        for codebook in dict.fromkeys(self.codebooks[name] for name in names):
            mine = [i for i, name in enumerate(names) if self.codebooks[name] == codebook]
            outputs = [goal.outputs[i] for i in mine] if goal and goal.outputs else None
            parts = [weights[i] for i in mine]
            results = quantize_stage(parts, statistics, codebook, *rotation, processes, outputs)
            made |= zip([names[i] for i in mine], zip(*results, strict=True), strict=True)
        return [made[name][0] for name in names], [made[name][1] for name in names]

    def dequantize(self, name: str, layer: QuantizedLinear) -> Tensor:
        """What `layer`, which `quantize` made of `name`, decodes to: fp32 [N, K]."""
        block, book = self.config.block(self.shape(name)[1]), self.codebooks[name].codebook
        return dequantize(layer.qweight, layer.row_scale, layer.signs_in, book, block)

    def _rotation(self, in_features: int) -> tuple[Tensor, int]:
        """Signs and block."""
        return input_signs(in_features, self.options.seed), self.config.block(in_features)


def make_plan(model: str, options: RunOptions) -> Plan:
    """Open `model` and decide what becomes of each tensor.

    With `options.is_mixed` every layer has the lowest rate until the run has measured
    sensitivities.

    Raises:
        PCDVQError: the model, the rate or the codec cannot be served.
    """
    options.check()
    return options.plan(open_source(model))


def plan_source(source: Source, options: QuantizeOptions) -> PCDVQPlan:
    """`make_plan` for an open model and options that were checked."""
    source = check_source(source)
    embeddings = options.embedding_bits != UNQUANTIZED_BITS
    least = get_codebook(options.codec, offered_rates(options.codec)[0], min(CHAIN_ROWS))
    selection = select_layers(
        source,
        options.skip,
        embeddings=embeddings,
        spec=least.codebook.spec,
        max_tp=options.max_tp,
    )
    heads = Heads.of(source.config)
    linears, vectors = (
        {name: source.shapes[f"{name}.weight"][0] for name in names}
        for names in (selection.linears, selection.stored_embeddings)
    )
    chain_rows = choose_chain_rows(linears, least.codebook.spec, heads, options.max_tp)
    plan = PCDVQPlan(source, options, selection, {}, chain_rows)
    rate = offered_rates(options.codec)[0] if options.is_mixed else options.bits
    codebooks = {name: plan.codebook(name, rate) for name in linears} | get_embedding_codebooks(
        vectors, options.embedding_bits, options.search, heads, options.max_tp
    )
    return replace(plan, codebooks={name: codebooks[name] for name in selection.layers})


def input_signs(in_features: int, seed: int) -> Tensor:
    """Diagonal of S for layers of `in_features` columns: fp32 [K] of +1 / -1.

    One vector per K, so that all layers that could read the same activation share it.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + in_features)
    return 1.0 - 2.0 * torch.randint(0, 2, (in_features,), generator=generator).float()
