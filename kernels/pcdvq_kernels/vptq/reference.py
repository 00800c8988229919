"""Slow fp32 reference of VPTQ. Kernels are tested against it."""

from __future__ import annotations

import torch
from torch import Tensor

from pcdvq_kernels.packing import unpack_codes
from pcdvq_kernels.vptq.layout import VPTQLayout, permutation, sixteen_bits


def dequantize(layout: VPTQLayout, tensors: dict[str, Tensor]) -> Tensor:
    """The dense weight fp32 [N, K] of `tensors`, named and shaped as in `layout.tensors()`."""
    groups = [_group(layout, tensors, index) for index in range(layout.group_num)]
    if layout.outliers:
        codes = sixteen_bits(tensors["outlier_indices"])[0]
        table = tensors["outlier_centroids"].float().view(-1, layout.vector_lens[0])
        groups.insert(0, _rows(table[codes], layout.out_features))
    permuted = torch.cat(groups, dim=1)
    weight = torch.empty_like(permuted)
    weight[:, permutation(layout, tensors)] = permuted
    if layout.enable_norm:
        weight = weight * tensors["weight_scale"].float() + tensors["weight_bias"].float()
    return weight


def _group(layout: VPTQLayout, tensors: dict[str, Tensor], index: int) -> Tensor:
    """Columns of one group, fp32 [N, group_size]."""
    group, length = layout.segments()[-1], layout.vector_lens[1]
    packed = tensors["indices"][index].contiguous().view(torch.uint8)
    codes = unpack_codes(packed, group.bits, group.columns)
    table = tensors["centroids"][index].float().view(-1, length)
    vectors = table[codes & ((1 << group.index_bits) - 1)]
    if group.residual_bits:
        residuals = tensors["res_centroids"][index].float().view(-1, length)
        vectors = vectors + residuals[codes >> group.index_bits]
    return _rows(vectors, layout.out_features)


def _rows(vectors: Tensor, rows: int) -> Tensor:
    """Vectors [blocks, columns, length] as [rows, columns]."""
    return vectors.transpose(1, 2).flatten(0, 1)[:rows]
