"""VPTQ weights in the form that the operator takes: a part of the rows and columns of a layer."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

import torch
from torch import Tensor

from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.ops import prepacks
from pcdvq_kernels.packing import pack_codes, unpack_codes
from pcdvq_kernels.vptq.layout import REMEDY, Segment, VPTQLayout, permutation, sixteen_bits

TABLE_SLACK = 16  # elements that kernels may read past the last row of a table
SMALL_TABLE = 1 << 15  # elements; smaller ones stay in a CPU's cache as they are
ROUNDING_LIMIT = 0.02  # of a table's root mean square


@dataclass(frozen=True)
class VPTQWeight:
    """The arguments of `pcdvq::vptq_linear` (see `ops`) but for x and the bias."""

    columns: Tensor
    scale: Tensor
    shift: Tensor
    codes: list[Tensor]
    tables: list[Tensor]
    layout: list[int]

    def args(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor]]:
        return self.columns, self.scale, self.shift, self.codes, self.tables


@dataclass(frozen=True)
class Tables:
    """The tables of a layer's segments, in whole units.

    Attributes:
        tensors: of each segment [rows * vector_len + TABLE_SLACK], all of one dtype.
        units: what one unit of each of them stands for.
    """

    tensors: list[Tensor]
    units: list[float]

    def rounded(self) -> Tables:
        """The tables in int8, if that is of use and does little harm, else as they are.

        A centroid is a random access, and half the bytes are in a nearer cache. Rounding to 255
        values adds an error that is independent of that of the codes, about 1 % of a weight beside
        the 30 % of two bits; tables with values so large that it would be over `ROUNDING_LIMIT`
        stay as they are, and those of fewer than `SMALL_TABLE` elements.
        """
        if max(table.numel() for table in self.tensors) < SMALL_TABLE:
            return self
        rounded, units = [], []
        for table in self.tensors:
            values = table.float()
            unit = max(values.abs().max().item() / 127, torch.finfo(torch.float32).tiny)
            levels = (values / unit).round()
            error = (levels * unit - values).square().mean().sqrt()
            if error > ROUNDING_LIMIT * values.square().mean().sqrt():
                return self
            rounded.append(levels.to(torch.int8))
            units.append(unit)
        return Tables(rounded, units)


def check_values(layout: VPTQLayout, tensors: dict[str, Tensor], name: str) -> None:
    """Check what dtypes and shapes do not say.

    Raises:
        CheckpointError: a tensor is missing or not finite, an index has no centroid, or the
            permutation is none.
    """
    for key in layout.tensors():
        if key not in tensors:
            raise CheckpointError(f"tensor {name}.{key} is missing from the checkpoint. {REMEDY}")
        if key.endswith(("centroids", "scale", "bias")) and not tensors[key].isfinite().all():
            raise CheckpointError(f"tensor {name}.{key} is not finite. {REMEDY}")
    permutation(layout, tensors, name)
    if layout.outliers:
        highest = int(sixteen_bits(tensors["outlier_indices"]).max())
        if highest >= layout.num_centroids[0]:
            raise CheckpointError(
                f"tensor {name}.outlier_indices has index {highest}, there are "
                f"{layout.num_centroids[0]} outlier centroids. {REMEDY}"
            )


def pack_tables(layout: VPTQLayout, tensors: dict[str, Tensor], device: torch.device) -> Tables:
    """The tables of `layout.segments()` on `device`, in the dtype of `tensors`."""
    parts = []
    if layout.outliers:
        parts.append([tensors["outlier_centroids"][0]])
    for group in range(layout.group_num):
        names = ("centroids", "res_centroids") if layout.residuals else ("centroids",)
        parts.append([tensors[key][group] for key in names])
    dtype = tensors["centroids"].dtype
    tables = []
    for segment, rows in zip(layout.segments(), parts, strict=True):
        table = torch.zeros(segment.rows * segment.vector_len + TABLE_SLACK, dtype=dtype)
        values = torch.cat(rows)
        table[: len(values)] = values
        tables.append(table.to(device))
    return Tables(tables, [1.0] * len(tables))


def pack_weight(
    layout: VPTQLayout,
    tensors: dict[str, Tensor],
    tables: Tables,
    rows: range | None = None,
    columns: range | None = None,
) -> VPTQWeight:
    """The served form of `rows` and `columns` of a layer, by default of all of it.

    A permutation scatters the columns over the codes: those of `columns` are picked.

    Args:
        layout: the layer's.
        tensors: as on disk, on the CPU, and checked (`check_values`).
        tables: of `pack_tables`, or those rounded.
        rows: any run of [0, N).
        columns: any run of [0, K).
    """
    rows, columns = rows or range(layout.out_features), columns or range(layout.in_features)
    segments = layout.segments()
    # Row blocks of every segment start here.
    first = rows.start // (align := lcm(*(s.vector_len for s in segments))) * align
    perm = permutation(layout, tensors)
    device = tables.tensors[0].device
    fields: list[int] = []
    kept_columns, kept_codes, kept_tables, kept_units, start = [], [], [], [], 0
    for index, (segment, table) in enumerate(zip(segments, tables.tensors, strict=True)):
        order = perm[start : start + segment.columns]
        start += segment.columns
        inside = (order >= columns.start) & (order < columns.stop)
        if not inside.any():
            continue
        blocks = slice(first // segment.vector_len, -(-rows.stop // segment.vector_len))
        codes = _segment_codes(layout, tensors, index, blocks, inside)
        served = segment._replace(columns=int(inside.sum()))
        fields.extend(served)
        kept_columns.append(order[inside])
        kept_codes.append(codes.view(torch.int32 if prepacks(device) else torch.uint8).to(device))
        kept_tables.append(table)
        kept_units.append(torch.full((served.columns,), tables.units[index]))
    order = torch.cat(kept_columns)
    scale, shift = torch.ones(layout.in_features), torch.zeros(layout.in_features)
    if layout.enable_norm:
        scale, shift = tensors["weight_scale"].float(), tensors["weight_bias"].float()
    return VPTQWeight(
        (order - columns.start).int().to(device),
        (scale[order] * torch.cat(kept_units)).to(device),
        shift[columns.start : columns.stop].clone().to(device),
        kept_codes,
        kept_tables,
        [len(rows), rows.start - first, *fields],
    )


def _segment_codes(
    layout: VPTQLayout, tensors: dict[str, Tensor], index: int, blocks: slice, inside: Tensor
) -> Tensor:
    """Codes of segment `index`, those columns that are `inside`: uint8 [blocks, row_bytes]."""
    segment = layout.segments()[index]
    if layout.outliers and index == 0:
        codes = sixteen_bits(tensors["outlier_indices"][0, blocks])
        packed = pack_codes(codes[:, inside], segment.bits)
    else:
        words = tensors["indices"][index - bool(layout.outliers), blocks]
        packed = _pick(words.contiguous().view(torch.uint8), segment, inside)
    served = segment._replace(columns=int(inside.sum()))
    codes = torch.zeros(packed.shape[0], served.row_bytes(), dtype=torch.uint8)
    codes[:, : packed.shape[1]] = packed
    return codes


def _pick(packed: Tensor, segment: Segment, inside: Tensor) -> Tensor:
    """The codes of the columns that are `inside`: uint8 [blocks, bytes]."""
    packed = packed[:, : -(-segment.columns * segment.bits // 8)]
    if inside.all():
        return packed
    if segment.bits % 8 == 0:
        return packed.view(packed.shape[0], segment.columns, -1)[:, inside].flatten(1)
    return pack_codes(unpack_codes(packed, segment.bits, segment.columns)[:, inside], segment.bits)
