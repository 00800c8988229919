"""Quantizing the linears of one stage by VPTQ's method, and storing them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from pcdvq_kernels.packing import pack_codes
from pcdvq_kernels.vptq.layout import TABLES, VPTQLayout
from torch import Tensor

from pcdvq_quantizer.calibration.stage import (
    asymmetric_target,
    energy,
    prepare_moments,
)
from pcdvq_quantizer.calibration.statistics import InputStatistics
from pcdvq_quantizer.layer import ErrorSum, StoredLayer, relative
from pcdvq_quantizer.vptq.rounding import (
    ROUNDS,
    Problem,
    add_residuals,
    column_costs,
    make_tables,
    refit_tables,
    round_columns,
)
from pcdvq_quantizer.vptq.tables import Tables, to_vectors


@dataclass(frozen=True)
class Storage:
    """How tables are stored: `dtype` of floats; `seed` of the draws of k-means."""

    dtype: torch.dtype
    seed: int


def quantize_stage(
    weights: Sequence[Tensor],
    layouts: Sequence[VPTQLayout],
    statistics: InputStatistics,
    storage: Storage,
) -> tuple[list[StoredLayer], list[Tensor]]:
    """Quantize linears that read the same activation.

    Columns are rounded in the order of falling Hessian diagonal; outliers are the first of them.
    What is rounded are the weights W* of `calibration.stage.quantize_stage`.

    Args:
        weights: fp32 [N_i, K].
        layouts: of each.
        statistics: moments of their input.
        storage: of the tables.

    Returns:
        (layers; what they decode to, fp32 [N_i, K]).
    """
    order = statistics.hessian.diagonal().argsort(descending=True, stable=True)
    moments = prepare_moments(statistics.permuted(order), 1)
    columns = _Columns.of(order, moments.hessian, moments.feedback)
    original = torch.cat([weight[:, order] for weight in weights])
    lack = None if statistics.lack is None else moments.wanted
    aim = asymmetric_target(original, moments, lack)
    counts = [len(weight) for weight in weights]
    layers, dense = [], []
    parts = zip(original.split(counts), aim.split(counts), layouts, strict=True)
    for part, wanted, layout in parts:
        packed, decoded = _quantize(wanted, layout, columns, storage)
        lost = energy(decoded - wanted, moments.hessian).item()
        output = relative(lost, energy(part, moments.hessian).item())
        error = _weight_error(part, decoded, layout).total(output)
        layers.append(StoredLayer(packed, error))
        dense.append(torch.empty_like(decoded).index_copy_(1, order, decoded))
    return layers, dense


def quantize_alone(weight: Tensor, layout: VPTQLayout, storage: Storage) -> StoredLayer:
    """Quantize one weight fp32 [N, K] without calibration: all inputs are as important."""
    unit = torch.eye(weight.shape[1])
    columns = _Columns.of(torch.arange(len(unit)), unit, unit)
    packed, decoded = _quantize(weight, layout, columns, storage)
    return StoredLayer(packed, _weight_error(weight, decoded, layout).total())


class _Columns(NamedTuple):
    """Columns in the order they are rounded in: their places in the weight, int64 [K], and what
    `Problem` has of them."""

    order: Tensor
    hessian: Tensor
    feedback: Tensor
    cost: Tensor

    @classmethod
    def of(cls, order: Tensor, hessian: Tensor, feedback: Tensor) -> _Columns:
        return cls(order, hessian, feedback, column_costs(hessian, feedback))


def _quantize(
    aim: Tensor, layout: VPTQLayout, columns: _Columns, storage: Storage
) -> tuple[dict[str, Tensor], Tensor]:
    """Quantize `aim`, whose columns are in the order of `columns`.

    Returns:
        (tensors on disk; what they decode to, columns in that order).
    """
    order = columns.order
    problem = _problem(aim, layout, columns, storage.dtype)
    tables, codes = solve(problem, layout, storage)
    packed = _pack(layout, tables, codes, order, storage.dtype)
    if layout.enable_norm:
        for key, values in (("weight_scale", problem.scale), ("weight_bias", problem.shift)):
            packed[key] = torch.empty_like(values).index_copy_(0, order, values).to(storage.dtype)
    return packed, problem.decode(tables, codes)


def _weight_error(original: Tensor, decoded: Tensor, layout: VPTQLayout) -> ErrorSum:
    length = layout.vector_lens[1]
    errors = ErrorSum(length)
    errors.add(*(to_vectors(each, length).flatten(0, 1) for each in (original, decoded)))
    return errors


def _problem(aim: Tensor, layout: VPTQLayout, columns: _Columns, dtype: torch.dtype) -> Problem:
    scale, shift = torch.ones(aim.shape[1]), torch.zeros(aim.shape[1])
    if layout.enable_norm:
        scale = aim.std(0, correction=0).to(dtype).float()
        scale = torch.where(scale > 0, scale, 1.0)
        shift = aim.mean(0).to(dtype).float()
    return Problem(aim, *columns[1:], scale, shift)


def solve(
    problem: Problem, layout: VPTQLayout, storage: Storage
) -> tuple[list[Tables], list[Tensor]]:
    """Tables and codes of `problem`: k-means, then rounding and refitting in turns.

    Returns:
        (tables, their values representable in `storage.dtype`; codes of each).
    """
    tables: list[Tables] = []
    start, seed = 0, storage.seed
    for segment in layout.segments():
        columns = slice(start, start := start + segment.columns)
        count = layout.num_centroids[0 if layout.outliers and not tables else 1]
        tables.append(make_tables(problem, columns, segment.vector_len, count, seed))
    if layout.residuals:
        _, lacks = round_columns(problem, tables)
        first = 1 if layout.outliers else 0
        tables[first:] = [
            add_residuals(problem, each, lacks[:, each.columns], layout.residuals, seed)
            for each in tables[first:]
        ]
    codes: list[Tensor] = []
    for _ in range(ROUNDS):
        codes, _ = round_columns(problem, tables)
        tables = refit_tables(problem, tables, codes)
    rounded = [
        each.replaced([part.to(storage.dtype).float() for part in each.parts()]) for each in tables
    ]
    return rounded, codes


def _pack(
    layout: VPTQLayout,
    tables: list[Tables],
    codes: list[Tensor],
    order: Tensor,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """Tensors on disk but for the column scales, by their names there."""
    packed: dict[str, Tensor] = {}
    tables, codes = list(tables), list(codes)
    if layout.outliers:
        packed["outlier_centroids"] = tables.pop(0).centroids.view(1, -1)
        packed["outlier_indices"] = _sixteen_bits(codes.pop(0))
    if layout.enable_perm:
        packed["perm"] = _sixteen_bits(order)
    else:
        codes = [torch.empty_like(code).index_copy_(2, order, code) for code in codes]
    packed["indices"] = torch.stack([_words(layout, code) for code in codes])
    packed["centroids"] = torch.stack([table.centroids.flatten() for table in tables])
    if layout.residuals:
        residuals = [table.residuals for table in tables if table.residuals is not None]
        packed["res_centroids"] = torch.stack([each.flatten() for each in residuals])
    for key in TABLES:
        if key in packed:
            packed[f"{key}.weight"] = packed.pop(key).to(dtype)
    return packed


def _words(layout: VPTQLayout, codes: Tensor) -> Tensor:
    """Codes [1 or 2, blocks, n] of a group as int32 [blocks, words]."""
    group = layout.segments()[-1]
    whole = codes[0] if len(codes) == 1 else codes[0] | codes[1] << group.index_bits
    stream = pack_codes(whole, group.bits)
    return torch.nn.functional.pad(stream, (0, -stream.shape[1] % 4)).view(torch.int32)


def _sixteen_bits(values: Tensor) -> Tensor:
    """Values below 2^16 as int16 of the same bits."""
    return values.to(torch.int32).to(torch.uint16).view(torch.int16)
