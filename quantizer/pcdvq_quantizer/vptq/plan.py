"""A run by VPTQ's method: its options, and what becomes of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq.layout import FLOAT_DTYPES, QUANT_METHOD, VPTQLayout
from torch import Tensor

from pcdvq_quantizer.calibration.objectives.base import StageObjective
from pcdvq_quantizer.calibration.parallel import Processes
from pcdvq_quantizer.calibration.statistics import InputStatistics
from pcdvq_quantizer.experts import experts_of
from pcdvq_quantizer.layer import StoredLayer
from pcdvq_quantizer.plan import Plan, RunOptions
from pcdvq_quantizer.selection import select_layers
from pcdvq_quantizer.source_check import check_source
from pcdvq_quantizer.sources import Source
from pcdvq_quantizer.vptq.choice import LayoutOptions, check_options, choose, config_entry
from pcdvq_quantizer.vptq.stage import Storage, quantize_alone, quantize_stage


@dataclass(frozen=True)
class VPTQOptions(LayoutOptions, RunOptions):
    """Options of VPTQ: of the run and of the layout."""

    method: str = QUANT_METHOD

    def check(self) -> None:
        """Raises PCDVQError for options outside their range."""
        super().check()
        check_options(self)

    def plan(self, source: Source) -> VPTQPlan:
        """What becomes of each tensor of `source`.

        Raises:
            PCDVQError: as `check_source`; it has experts, or a layer cannot have such a layout.
        """
        source = check_source(source)
        selection = select_layers(source, self.skip, method=self.method)
        if experts := next(filter(experts_of, selection.layers), None):
            raise PCDVQError(
                f"{experts} is part of a mixture of experts, which VPTQ checkpoints are not served "
                "with; leave them with --skip '*.experts.*', or take --method pcdvq"
            )
        layouts = {}
        for name in selection.layers:
            rows, columns = source.shapes[f"{name}.weight"]
            bias = f"{name}.bias" in source.shapes
            layouts[name] = choose(self, name, (rows, columns), bias)
        return VPTQPlan(source, self, selection, layouts)


@dataclass(frozen=True)
class VPTQPlan(Plan):
    """A run of VPTQ.

    Attributes:
        layouts: of each layer.
    """

    options: VPTQOptions
    layouts: dict[str, VPTQLayout]

    def packed_bytes(self, layer: str) -> int:
        return sum(
            prod(spec.shape) * (2 if spec.dtypes == FLOAT_DTYPES else spec.dtypes[0].itemsize)
            for spec in self.layouts[layer].tensors().values()
        )

    def quantization_config(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "config_for_layers": {
                name: config_entry(layout) for name, layout in self.layouts.items()
            },
            "shared_layer_config": {},
            "modules_to_not_convert": list(self.selection.left),
        }

    @cached_property
    def _storage(self) -> Storage:
        config = self.source.config
        half = "float16" in (config.get("dtype"), config.get("torch_dtype"))
        return Storage(torch.float16 if half else torch.bfloat16, self.options.seed)

    def quantize(self, name: str) -> StoredLayer:
        return quantize_alone(self.load(name).float(), self.layouts[name], self._storage)

    def quantize_stage(
        self,
        names: list[str],
        weights: list[Tensor],
        statistics: InputStatistics,
        processes: Processes,
        goal: StageObjective | None = None,
    ) -> tuple[Sequence[StoredLayer], list[Tensor]]:
        """As the base's; process 0 does it, since the tables are for all rows of a layer."""
        layers: list[StoredLayer] = []

        def make() -> tuple[Tensor, ...]:
            layouts = [self.layouts[name] for name in names]
            made, dense = quantize_stage(weights, layouts, statistics, self._storage)
            layers.extend(made)
            return tuple(dense)

        return layers, list(processes.once(make))
