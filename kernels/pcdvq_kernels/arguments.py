"""Checks of the operators' arguments, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from pcdvq_kernels import pyramid, trellis
from pcdvq_kernels.config import (
    DEFAULT_ACTIVATIONS,
    MAX_CODE_BITS,
    MAX_PATTERN_BITS,
    Activations,
)
from pcdvq_kernels.errors import PCDVQError

INT8_FIELDS = (1, 8, 0, 0)  # of a layout whose codes are the levels
# By their number in a layout.
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
# Of a block of a weight that `cpu.prepack` has packed.
BLOCK_ROWS, BLOCK_COLUMNS = 16, 64
TILE_BLOCKS = 4  # that chains run through
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayoutFields(NamedTuple):
    """The integers of the op's `layout` argument; `CodebookSpec` has the field meanings."""

    hadamard_block: int
    vector_dim: int
    pattern_bits: int
    magnitude_bits: int
    chain_rows: int
    activations: int = ACTIVATIONS.index(DEFAULT_ACTIVATIONS)
    pyramid_rows: int = 0  # of the codewords, where they are `pyramid.make_tables`

    @property
    def code_bits(self) -> int:
        return self.pattern_bits + self.magnitude_bits

    @property
    def codeword_count(self) -> int:
        return 0 if self.chain_rows else self.pyramid_rows or 1 << self.code_bits


class LinearShape(NamedTuple):
    """What the layout says about the tensors of a layer of K columns."""

    layout: LayoutFields
    row_bytes: int
    codewords_shape: tuple[int, int]
    in_features: int

    @property
    def block_bytes(self) -> int:
        """Codes of BLOCK_ROWS rows and BLOCK_COLUMNS columns."""
        codes = BLOCK_ROWS * BLOCK_COLUMNS // self.layout.vector_dim
        return codes * self.layout.code_bits // 8

    def stored_rows(self, rows: int) -> int:
        """Rows of `qweight` of a layer of `rows` outputs: whole chains."""
        multiple = self.layout.chain_rows or 1
        return -(-rows // multiple) * multiple

    def packed_shape(self, rows: int) -> tuple[int, int, int]:
        """Shape of a weight of `rows` rows that `cpu.prepack` has packed."""
        blocks = -(-self.in_features // BLOCK_COLUMNS)
        together = TILE_BLOCKS if self.layout.chain_rows else 1
        tiles = -(-rows // (together * BLOCK_ROWS))
        return tiles * together, blocks, self.block_bytes


@lru_cache(maxsize=256)
def linear_shape(layout: tuple[int, ...], in_features: int) -> LinearShape:
    """Raise PCDVQError unless `layout` is valid for `in_features` columns."""
    if len(layout) != len(LayoutFields._fields):
        raise PCDVQError(
            f"layout has {len(layout)} integers, expected {len(LayoutFields._fields)}: "
            f"{', '.join(LayoutFields._fields)}. Make it with pcdvq_kernels.ops.Layout."
        )
    fields = LayoutFields(*layout)
    block = fields.hadamard_block
    problems = {
        "vector_dim must be 8, 2 with chains, or 1 with 8 pattern bits alone": not (
            _fits_trellis(fields) if fields.chain_rows else fields.vector_dim == 8
        )
        and layout[1:5] != INT8_FIELDS,
        f"pattern_bits must be in [1, {MAX_PATTERN_BITS}]": not fields.pyramid_rows
        and not 1 <= fields.pattern_bits <= MAX_PATTERN_BITS,
        "magnitude_bits must be in [0, 4]": not 0 <= fields.magnitude_bits <= 4,
        f"code bits must be at most {MAX_CODE_BITS}": not fields.pyramid_rows
        and fields.code_bits > MAX_CODE_BITS,
        "pyramid_rows must be 0, or positive beside 12 to 32 pattern bits": fields.pyramid_rows != 0
        and not _fits_pyramid(fields),
        f"activations must be in [0, {len(ACTIVATIONS) - 1}]": not 0
        <= fields.activations
        < len(ACTIVATIONS),
        "hadamard_block must be a power of two": block < 1 or block & (block - 1),
        "K must be a positive multiple of 8": in_features < 8 or in_features % 8,
    }
    for problem, present in problems.items():
        if present:
            raise PCDVQError(f"{problem}; K is {in_features}, layout is {fields}")
    if in_features % block:
        raise PCDVQError(
            f"hadamard_block {block} does not divide K = {in_features}; use the checkpoint's "
            "hadamard_blocks entry, or a smaller tensor-parallel size"
        )
    row_bytes = -(-(in_features // fields.vector_dim) * fields.code_bits // 8)
    codewords_shape = (fields.codeword_count, fields.vector_dim)
    return LinearShape(fields, row_bytes, codewords_shape, in_features)


def _fits_trellis(fields: LayoutFields) -> bool:
    return (
        fields.vector_dim == trellis.PAIR
        and fields.chain_rows in trellis.CHAIN_ROWS
        and fields.pattern_bits in trellis.CODE_BITS
        and not (fields.magnitude_bits or fields.pyramid_rows)
    )


def _fits_pyramid(fields: LayoutFields) -> bool:
    return (
        fields.pyramid_rows > 0
        and fields.vector_dim == pyramid.DIM
        and not (fields.magnitude_bits or fields.chain_rows)
        and pyramid.MIN_CODE_BITS <= fields.pattern_bits <= pyramid.MAX_CODE_BITS
    )


def check_same_device(*tensors: Tensor | None) -> None:
    """Raise PCDVQError unless all of an operator's tensors are on one device.

    Elsewhere `expect` does that. This is for operators that only make an output of the right shape:
    torch asks them also where a single argument is on the device `meta`.
    """
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        raise PCDVQError(
            f"the arguments are on different devices ({', '.join(sorted(devices))}); move all of "
            "them to one"
        )


def check_activations(x: Tensor) -> None:
    """Raise PCDVQError unless `x` can be the activations of a linear layer."""
    if not _is_strided(x) or x.dtype not in ACTIVATION_DTYPES or x.dim() < 1:
        raise PCDVQError(f"x is {describe(x)}; expected bf16, fp16 or fp32 [..., K]")


def _check_codes(
    shape: LinearShape, qweight: Tensor, row_scale: Tensor, device: torch.device
) -> tuple[int, ...]:
    """The number of outputs of packed or plain codes, alone in a tuple."""
    rows = row_scale.shape[:1]
    if qweight.dim() == 3 and device.type == "cpu":  # which alone packs codes so
        expect("packed qweight", qweight, torch.uint8, shape.packed_shape(sum(rows)), device)
    else:
        stored = shape.stored_rows(sum(rows)), shape.row_bytes
        expect("qweight", qweight, torch.uint8, stored, device)
    return rows


def check_linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
) -> LinearShape:
    """Raise PCDVQError (a ValueError) unless the arguments of `pcdvq::linear` fit together."""
    check_activations(x)
    in_features = x.shape[-1]
    shape = linear_shape(tuple(layout), in_features)
    rows = _check_codes(shape, qweight, row_scale, x.device)
    _check_scales(shape, rows, (row_scale, signs_in, codewords), x.device)
    if bias is not None:
        if not bias.is_floating_point():
            raise PCDVQError(f"bias is {describe(bias)}; expected a float dtype")
        expect("bias", bias, bias.dtype, rows, x.device)
    return shape


def check_embedding(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
) -> LinearShape:
    """Raise PCDVQError unless the arguments of `pcdvq::embedding` fit together."""
    if not _is_strided(ids) or ids.dtype not in (torch.int32, torch.int64):
        raise PCDVQError(f"ids is {describe(ids)}; expected int32 or int64")
    if dtype not in ACTIVATION_DTYPES:
        raise PCDVQError(f"dtype is {dtype}; expected bf16, fp16 or fp32")
    in_features = 8 * signs_in.numel()
    shape = linear_shape(tuple(layout), in_features)
    rows = _check_codes(shape, qweight, row_scale, ids.device)
    _check_scales(shape, rows, (row_scale, signs_in, codewords), ids.device)
    return shape


def check_moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    codewords: Tensor,
    gate_up_layout: Sequence[int],
    down_layout: Sequence[int],
) -> tuple[LinearShape, LinearShape]:
    """Raise PCDVQError unless the arguments of `pcdvq::moe` fit together.

    Returns:
        What the layouts say of gate and up, and of down.
    """
    check_routing(x, topk_weights, topk_ids, gate_up, down)
    hidden = x.shape[1]
    experts, both = (*gate_up[0].shape[:2], 0, 0)[:2]
    shapes = []
    for name, tensors, layout, rows, columns in (
        ("gate_up", gate_up, gate_up_layout, both // 2 * 2, hidden),
        ("down", down, down_layout, hidden, both // 2),
    ):
        qweight, row_scale, signs_in = tensors
        shape = linear_shape(tuple(layout), columns)
        stacked = experts, rows, shape.row_bytes
        if rows % (shape.layout.chain_rows or 1):
            raise PCDVQError(
                f"{name} has {rows} rows, no multiple of chain_rows {shape.layout.chain_rows}"
            )
        expect(f"{name} qweight", qweight, torch.uint8, stacked, x.device)
        expect(f"{name} row_scale", row_scale, torch.float32, stacked[:2], x.device)
        expect(f"{name} signs_in", signs_in, torch.uint8, (columns // 8,), x.device)
        expect("codewords", codewords, torch.int8, shape.codewords_shape, x.device)
        shapes.append(shape)
    return shapes[0], shapes[1]


def check_routing(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
) -> None:
    """Raise PCDVQError unless `x` has tokens, with experts for each, and experts have 3 tensors."""
    if not _is_strided(x) or x.dtype not in ACTIVATION_DTYPES or x.dim() != 2:
        raise PCDVQError(f"x is {describe(x)}; expected bf16, fp16 or fp32 [T, H]")
    ids_fit = topk_ids.dim() == 2 and topk_ids.shape[0] == x.shape[0]
    if topk_ids.dtype not in (torch.int32, torch.int64) or not ids_fit:
        raise PCDVQError(f"topk_ids is {describe(topk_ids)}; expected int32 or int64 [T, top_k]")
    if not topk_weights.is_floating_point() or topk_weights.shape != topk_ids.shape:
        raise PCDVQError(
            f"topk_weights is {describe(topk_weights)}; expected a float dtype "
            f"{list(topk_ids.shape)}"
        )
    for name, tensor in (("topk_ids", topk_ids), ("topk_weights", topk_weights)):
        if not _is_strided(tensor) or tensor.device != x.device:
            raise PCDVQError(f"{name} is {describe(tensor)}; expected it on {x.device}")
    for name, tensors in (("gate_up", gate_up), ("down", down)):
        if len(tensors) != 3:
            raise PCDVQError(
                f"{name} has {len(tensors)} tensors; expected qweight, row_scale and signs_in"
            )


def check_prepacked(
    in_features: int, row_scale: Tensor, signs_in: Tensor, layout: Sequence[int], like: Tensor
) -> LayoutFields:
    """Raise PCDVQError unless the arguments beside a prepacked weight fit together.

    Args:
        in_features: K.
        like: a tensor on the operator's device.
    """
    expect("row_scale", row_scale, torch.float32, row_scale.shape[:1], like.device)
    expect("signs_in", signs_in, torch.uint8, (in_features // 8,), like.device)
    return linear_shape(tuple(layout), in_features).layout


def check_ids(ids: Tensor, rows: int) -> None:
    """Raise PCDVQError unless every id is a row of an embedding of `rows` rows."""
    _check_range("ids", ids, rows, "the embedding has rows", below=False)


def check_expert_ids(topk_ids: Tensor, experts: int) -> None:
    """Raise PCDVQError unless every id is one of `experts` experts, or below 0."""
    _check_range("topk_ids", topk_ids, experts, "below 0 there is no expert, and the others are")


def check_columns(columns: Tensor) -> None:
    """Raise PCDVQError unless every entry is a column of x."""
    _check_range("columns", columns, len(columns), "x has columns", below=False)


def _check_range(name: str, ids: Tensor, count: int, what: str, below: bool = True) -> None:
    """Raise PCDVQError unless `ids` lie in [0, count), or also `below` that."""
    if ids.numel():
        lowest, highest = (int(bound) for bound in ids.aminmax())
        if highest >= count or (lowest < 0 and not below):
            raise PCDVQError(f"{name} lie in [{lowest}, {highest}]; {what} 0 to {count - 1}")


def _check_scales(
    shape: LinearShape,
    rows: tuple[int, ...],
    tensors: tuple[Tensor, Tensor, Tensor],
    device: torch.device,
) -> None:
    row_scale, signs_in, codewords = tensors
    expect("row_scale", row_scale, torch.float32, rows, device)
    expect("signs_in", signs_in, torch.uint8, (shape.in_features // 8,), device)
    expect("codewords", codewords, torch.int8, shape.codewords_shape, device)


def expect(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    """Raise PCDVQError unless `tensor` is as described, and contiguous."""
    if (
        not _is_strided(tensor)
        or tensor.dtype != dtype
        or tensor.shape != shape
        or tensor.device != device
    ):
        raise PCDVQError(
            f"{name} is {describe(tensor)}; expected {dtype} {list(shape)} on {device}. "
            "The layer's tensors, its layout and x must come from the same checkpoint entry."
        )
    if not tensor.is_contiguous():
        raise PCDVQError(f"{name} has strides {tensor.stride()}; call .contiguous() on it once")


def _is_strided(tensor: Tensor) -> bool:
    """Whether `tensor` has memory that strides describe: sparse ones have not."""
    return tensor.layout == torch.strided and not tensor.is_nested


def describe(tensor: Tensor) -> str:
    """Dtype, shape and device, for an error."""
    shape = "nested" if tensor.is_nested else list(tensor.shape)
    kind = "" if tensor.layout == torch.strided else f" ({tensor.layout})"
    return f"{tensor.dtype} {shape}{kind} on {tensor.device}"
