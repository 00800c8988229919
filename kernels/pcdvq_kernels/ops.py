"""The operators on packed codes (FORMAT.md).

y = R (Q H S x) + b:

    torch.ops.pcdvq.linear(x, qweight, row_scale, signs_in, codewords, bias, layout) -> Tensor

    x          bf16, fp16 or fp32 [..., K]; any M = product of the leading sizes, also 0
    qweight    uint8 [N, row_bytes], the checkpoint's codes
    row_scale  fp32 [N]
    signs_in   uint8 [K / 8]
    codewords  int8 [2 ** magnitude_bits * spec.rows, vector_dim], `Codebook.codewords()`
    bias       any float dtype [N], or None
    layout     `Layout(...).to_ints()`
    returns    x.dtype [..., N]

Rows of the dense weight R Q H S, of which only those asked for are decoded:

    torch.ops.pcdvq.embedding(
        ids, qweight, row_scale, signs_in, codewords, layout, dtype) -> Tensor

    ids        int32 or int64 [...], each in [0, N)
    dtype      bf16, fp16 or fp32
    returns    dtype [..., K], a new tensor

Importing this module registers the operators. They raise PCDVQError (a ValueError) for arguments
that do not fit together; on the CPU also for ids that are no rows, elsewhere the device reports
those as it does for any index. On the CPU the result for a row of x or an id does not depend on
the others or on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcdvq_kernels import cpu, fallback
from pcdvq_kernels.arguments import ACTIVATIONS
from pcdvq_kernels.config import DEFAULT_ACTIVATIONS, Activations, CodebookSpec


@dataclass(frozen=True)
class Layout:
    """How a layer's codes and activations are laid out: the operator's `layout` argument.

    Attributes:
        hadamard_block: Hadamard block size for the layer's K.
        spec: layout of its codebook's codes.
        activations: what H S x is rounded to where the device has a kernel for that: "int8",
            "int16" or "float" for not at all.
    """

    hadamard_block: int
    spec: CodebookSpec
    activations: Activations = DEFAULT_ACTIVATIONS

    def to_ints(self) -> list[int]:
        spec = self.spec
        return [
            self.hadamard_block,
            spec.vector_dim,
            spec.sign_bits,
            int(spec.parity),
            spec.pattern_bits,
            spec.magnitude_bits,
            spec.rotation_bits,
            spec.state_bits,
            ACTIVATIONS.index(self.activations),
        ]


def _linear_cpu(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    run = cpu.linear if cpu.available() else fallback.linear
    return run(x, qweight, row_scale, signs_in, codewords, bias, layout)


def _linear_fake(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], qweight.shape[0])


def _embedding_cpu(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    run = cpu.embedding if cpu.available() else fallback.embedding
    return run(ids, qweight, row_scale, signs_in, codewords, layout, dtype)


def _embedding_fake(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    return ids.new_empty(*ids.shape, 8 * signs_in.shape[0], dtype=dtype)


# Registrations last as long as this object.
_LIBRARY = torch.library.Library("pcdvq", "DEF")
_LIBRARY.define(
    "linear(Tensor x, Tensor qweight, Tensor row_scale, Tensor signs_in, Tensor codewords, "
    "Tensor? bias, int[] layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.define(
    "embedding(Tensor ids, Tensor qweight, Tensor row_scale, Tensor signs_in, Tensor codewords, "
    "int[] layout, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear", fallback.linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear", _linear_cpu, "CPU")
_LIBRARY.impl("embedding", fallback.embedding, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding", _embedding_cpu, "CPU")
torch.library.register_fake("pcdvq::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("pcdvq::embedding", _embedding_fake, lib=_LIBRARY)
