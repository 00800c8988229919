"""Checks of the operators' arguments, the same for every backend."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from pcdvq_kernels import pyramid, windows
from pcdvq_kernels.config import (
    DEFAULT_ACTIVATIONS,
    MAX_CODE_BITS,
    MAX_PATTERN_BITS,
    Activations,
)
from pcdvq_kernels.errors import PCDVQError

MAX_STATE_BITS = 4
INT8_FIELDS = (1, 0, 0, 8, 0, 0, 0)  # of a layout whose codes are the levels
# By their number in a layout.
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
# Of a block of a weight that `cpu.prepack` has packed.
BLOCK_ROWS, BLOCK_COLUMNS = 16, 64
ACTIVATION_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class LayoutFields(NamedTuple):
    """The integers of the op's `layout` argument; `CodebookSpec` has the field meanings."""

    hadamard_block: int
    vector_dim: int
    sign_bits: int
    parity: int
    pattern_bits: int
    magnitude_bits: int
    rotation_bits: int
    state_bits: int
    activations: int = ACTIVATIONS.index(DEFAULT_ACTIVATIONS)
    pyramid_rows: int = 0  # of the codewords, where they are `pyramid.make_tables`

    @property
    def code_bits(self) -> int:
        return self.sign_bits + self.pattern_bits + self.magnitude_bits

    @property
    def windows(self) -> bool:
        """Whether coordinates select codewords one by one: codec `compact`."""
        return self.state_bits > 0 and not self.sign_bits

    @property
    def codeword_count(self) -> int:
        if self.windows:
            return 1 << windows.INDEX_BITS
        if self.pyramid_rows:
            return self.pyramid_rows
        fields = self.state_bits + self.pattern_bits - self.rotation_bits + self.magnitude_bits
        return 1 << (fields + self.parity)


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

    def packed_shape(self, rows: int) -> tuple[int, int, int]:
        """Shape of a weight of `rows` rows that `cpu.prepack` has packed."""
        blocks = -(-self.in_features // BLOCK_COLUMNS)
        return -(-rows // BLOCK_ROWS), blocks, self.block_bytes


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
        "vector_dim must be 2, 4 or 8, or 1 with 8 pattern bits alone": fields.vector_dim
        not in (2, 4, 8)
        and layout[1:8] != INT8_FIELDS,
        "sign_bits must be 0 or vector_dim": fields.sign_bits not in (0, fields.vector_dim),
        "parity must be 0, or 1 with sign bits": fields.parity not in (0, 1)
        or fields.parity > fields.sign_bits,
        f"pattern_bits must be in [1, {MAX_PATTERN_BITS}]": not fields.pyramid_rows
        and not 1 <= fields.pattern_bits <= MAX_PATTERN_BITS,
        "magnitude_bits must be in [0, 4]": not 0 <= fields.magnitude_bits <= 4,
        f"code bits must be at most {MAX_CODE_BITS}": not fields.pyramid_rows
        and fields.code_bits > MAX_CODE_BITS,
        "pyramid_rows must be 0, or positive beside 12 to 32 pattern bits": fields.pyramid_rows != 0
        and not _fits_pyramid(fields),
        "rotation_bits must be 0 or those of vector_dim": fields.rotation_bits != 0
        and 1 << fields.rotation_bits != fields.vector_dim,
        "state_bits must be in [0, 4]": not fields.windows
        and not 0 <= fields.state_bits <= MAX_STATE_BITS,
        "states without signs are those of codec compact": fields.windows
        and not _fits_windows(fields),
        "rotation and state bits must be pattern bits beside signs, without magnitude bits": not (
            fields.windows
        )
        and max(fields.rotation_bits, fields.state_bits)
        > (0 if fields.magnitude_bits or not fields.sign_bits else fields.pattern_bits),
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


def _fits_windows(fields: LayoutFields) -> bool:
    others = fields.parity, fields.magnitude_bits, fields.rotation_bits, fields.pyramid_rows
    return (
        fields.vector_dim == windows.DIM
        and not any(others)
        and fields.pattern_bits in windows.CODE_BITS
        and fields.state_bits == windows.state_bits(fields.pattern_bits)
    )


def _fits_pyramid(fields: LayoutFields) -> bool:
    others = fields[2:4] + fields[5:8]
    return (
        fields.pyramid_rows > 0
        and fields.vector_dim == pyramid.DIM
        and not any(others)
        and pyramid.MIN_CODE_BITS <= fields.pattern_bits <= pyramid.MAX_CODE_BITS
    )


def _check_codes(
    shape: LinearShape, qweight: Tensor, row_scale: Tensor, device: torch.device
) -> tuple[int, ...]:
    """The number of rows of packed or plain codes, alone in a tuple."""
    if qweight.dim() == 3:
        rows = row_scale.shape[:1]
        expect("packed qweight", qweight, torch.uint8, shape.packed_shape(sum(rows)), device)
        return rows
    rows = qweight.shape[:1]
    expect("qweight", qweight, torch.uint8, (*rows, shape.row_bytes), device)
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
    if x.dtype not in ACTIVATION_DTYPES or x.dim() < 1:
        raise PCDVQError(f"x is {_describe(x)}; expected bf16, fp16 or fp32 [..., K]")
    in_features = x.shape[-1]
    shape = linear_shape(tuple(layout), in_features)
    rows = _check_codes(shape, qweight, row_scale, x.device)
    _check_scales(shape, rows, (row_scale, signs_in, codewords), x.device)
    if bias is not None:
        if not bias.is_floating_point():
            raise PCDVQError(f"bias is {_describe(bias)}; expected a float dtype")
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
    if ids.dtype not in (torch.int32, torch.int64):
        raise PCDVQError(f"ids is {_describe(ids)}; expected int32 or int64")
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
    check_routing(x, topk_weights, topk_ids)
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
        expect(f"{name} qweight", qweight, torch.uint8, stacked, x.device)
        expect(f"{name} row_scale", row_scale, torch.float32, stacked[:2], x.device)
        expect(f"{name} signs_in", signs_in, torch.uint8, (columns // 8,), x.device)
        expect("codewords", codewords, torch.int8, shape.codewords_shape, x.device)
        shapes.append(shape)
    return shapes[0], shapes[1]


def check_routing(x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> None:
    """Raise PCDVQError unless `x` has tokens and the others experts for each."""
    if x.dtype not in ACTIVATION_DTYPES or x.dim() != 2:
        raise PCDVQError(f"x is {_describe(x)}; expected bf16, fp16 or fp32 [T, H]")
    if topk_ids.dtype not in (torch.int32, torch.int64) or topk_ids.shape[:1] != x.shape[:1]:
        raise PCDVQError(f"topk_ids is {_describe(topk_ids)}; expected int32 or int64 [T, top_k]")
    if not topk_weights.is_floating_point() or topk_weights.shape != topk_ids.shape:
        raise PCDVQError(
            f"topk_weights is {_describe(topk_weights)}; expected a float dtype "
            f"{list(topk_ids.shape)}"
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
    if ids.numel():
        lowest, highest = (int(bound) for bound in ids.aminmax())
        if lowest < 0 or highest >= rows:
            raise PCDVQError(
                f"ids lie in [{lowest}, {highest}]; the embedding has rows 0 to {rows - 1}"
            )


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
    if tensor.dtype != dtype or tensor.shape != shape or tensor.device != device:
        raise PCDVQError(
            f"{name} is {_describe(tensor)}; expected {dtype} {list(shape)} on {device}. "
            "The layer's tensors, its layout and x must come from the same checkpoint entry."
        )
    if not tensor.is_contiguous():
        raise PCDVQError(f"{name} has strides {tensor.stride()}; call .contiguous() on it once")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"


def check_nearest(x: Tensor, codewords: Tensor, bias: Tensor) -> None:
    """Raise PCDVQError unless the arguments of `nearest_codeword` fit together."""
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] not in (2, 4, 8):
        raise PCDVQError(f"x is {_describe(x)}; expected fp32 [G, dim] with dim 2, 4 or 8")
    count = codewords.shape[0] if codewords.dim() else 0
    if not 1 <= count < 1 << 31:
        raise PCDVQError(f"codewords is {_describe(codewords)}; expected at least one codeword")
    for name, tensor, shape in (
        ("codewords", codewords, (count, x.shape[1])),
        ("bias", bias, (count,)),
    ):
        if tensor.dtype != x.dtype or tensor.shape != shape or tensor.device != x.device:
            raise PCDVQError(
                f"{name} is {_describe(tensor)}; expected {x.dtype} {list(shape)} on {x.device}"
            )


def check_trellis(
    x: Tensor, row_weight: Tensor, codewords: Tensor, parity: bool, state_bits: int
) -> int:
    """Raise PCDVQError unless the arguments of `trellis_codes` fit together.

    Returns:
        Bits of the fields beside the signs.
    """
    if x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] not in (2, 4, 8):
        raise PCDVQError(f"x is {_describe(x)}; expected fp32 [N, G, dim] with dim 2, 4 or 8")
    if not 1 <= state_bits <= MAX_STATE_BITS:
        raise PCDVQError(f"state_bits is {state_bits}; expected 1 to {MAX_STATE_BITS}")
    count = codewords.shape[0] if codewords.dim() else 0
    field_bits = count.bit_length() - 1 - state_bits - parity
    if count != 1 << max(0, field_bits + state_bits + parity) or field_bits < state_bits:
        raise PCDVQError(
            f"codewords is {_describe(codewords)}; expected a power of two of them, at least "
            f"{1 << (2 * state_bits + parity)}"
        )
    for name, tensor, shape in (
        ("row_weight", row_weight, x.shape[:1]),
        ("codewords", codewords, (count, x.shape[2])),
    ):
        if tensor.dtype != x.dtype or tensor.shape != shape or tensor.device != x.device:
            raise PCDVQError(
                f"{name} is {_describe(tensor)}; expected {x.dtype} {list(shape)} on {x.device}"
            )
    return field_bits


def check_windows(x: Tensor, row_weight: Tensor, table: Tensor, code_bits: int) -> None:
    """Raise PCDVQError unless the arguments of `window_codes` fit together."""
    if x.dtype != torch.float32 or x.dim() != 3 or x.shape[2] != windows.DIM:
        raise PCDVQError(f"x is {_describe(x)}; expected fp32 [N, G, {windows.DIM}]")
    if code_bits not in windows.CODE_BITS:
        raise PCDVQError(f"code_bits is {code_bits}; expected one of {windows.CODE_BITS}")
    for name, tensor, shape in (
        ("row_weight", row_weight, x.shape[:1]),
        ("table", table, (1 << windows.INDEX_BITS, windows.DIM)),
    ):
        if tensor.dtype != x.dtype or tensor.shape != shape or tensor.device != x.device:
            raise PCDVQError(
                f"{name} is {_describe(tensor)}; expected {x.dtype} {list(shape)} on {x.device}"
            )
