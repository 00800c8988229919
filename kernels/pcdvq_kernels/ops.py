"""The operators on packed codes (FORMAT.md).

y = R (Q H S x) + b:

    torch.ops.pcdvq.linear(x, qweight, row_scale, signs_in, codewords, bias, layout) -> Tensor

    x          bf16, fp16 or fp32 [..., K]; any M = product of the leading sizes, also 0
    qweight    uint8 [N, row_bytes], the checkpoint's codes (of codec trellis with its padding
               rows), or what `prepack_weight` made of them
    row_scale  fp32 [N]
    signs_in   uint8 [K / 8]
    codewords  int8 [rows, vector_dim], `Codebook.codewords()`: tables of pyramid codes are not
               checked; with words what `prepack_codewords` made of it
    bias       any float dtype [N], or None
    layout     `Layout(...).to_ints()`
    returns    x.dtype [..., N]

Rows of the dense weight R Q H S, of which only those asked for are decoded:

    torch.ops.pcdvq.embedding(
        ids, qweight, row_scale, signs_in, codewords, layout, dtype) -> Tensor

    ids        int32 or int64 [...], each in [0, N)
    dtype      bf16, fp16 or fp32
    returns    dtype [..., K], a new tensor

The routed experts of a token, y = sum over choices of weight * down(silu(gate(x)) * up(x)):

    torch.ops.pcdvq.moe(x, topk_weights, topk_ids, gate_up, down, codewords,
                        gate_up_layout, down_layout) -> Tensor

    x             bf16, fp16 or fp32 [T, H]
    topk_weights  any float dtype [T, top_k]
    topk_ids      int32 or int64 [T, top_k], each below E; those below 0 are experts that are not
                  here
    gate_up       [qweight uint8 [E, 2 I, row_bytes], row_scale fp32 [E, 2 I],
                  signs_in uint8 [H / 8]]: gate before up, signs shared by all experts
    down          [qweight uint8 [E, H, row_bytes], row_scale fp32 [E, H], signs_in uint8 [I / 8]]
    codewords     of all of them; qweights may be words as above, [E, ...]
    *_layout      layouts that differ in their Hadamard blocks at most
    returns       x.dtype [T, H]

Codes are served by the C++ kernels on a CPU and by slow torch code elsewhere; words, the form of a
device that `prepacks`, by the Triton kernels.

Importing this module registers the operators. For arguments that do not fit together they raise
PCDVQError (a ValueError), or where torch calls C++ without Python (`torch_op`) a RuntimeError with
the same text; on the CPU also for ids that are no rows or experts. On a GPU an id that is no row
gives NaN, or is reported by the device as any index is, and an id that is no expert counts for
nothing or is reported so. On the CPU the result for a row of x or an id does not depend on
the others or on the number of threads; with words its rounding depends on how many there are.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from pcdvq_kernels import cpu, fallback, torch_op
from pcdvq_kernels.arguments import ACTIVATIONS, check_routing, check_same_device
from pcdvq_kernels.config import (
    DEFAULT_ACTIVATIONS,
    MAX_PATTERN_BITS,
    Activations,
    CodebookSpec,
)
from pcdvq_kernels.errors import PCDVQError


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
        # Codes whose levels are looked up are rows of a table, however many fields divide them.
        looked_up = spec.pulses and not spec.pyramid_rows
        upper_bits = max(0, spec.pattern_bits - MAX_PATTERN_BITS) if looked_up else 0
        return [
            self.hadamard_block,
            spec.vector_dim,
            spec.pattern_bits - upper_bits,
            spec.magnitude_bits + upper_bits,
            spec.chain_rows,
            ACTIVATIONS.index(self.activations),
            spec.pyramid_rows,
        ]


def prepacks(device: torch.device) -> bool:
    """Whether weights on `device` are prepacked for the Triton kernels.

    So they are on GPUs, unless the environment says PCDVQ_BACKEND=torch. On a CPU only if it says
    PCDVQ_BACKEND=triton and TRITON_INTERPRET=1, for tests.

    Raises:
        PCDVQError: the environment names another backend.
    """
    backend = os.environ.get("PCDVQ_BACKEND") or None
    if backend not in (None, "torch", "triton"):
        raise PCDVQError(
            f"PCDVQ_BACKEND in the environment is {backend!r}; choose from torch and triton, or "
            "unset it"
        )
    if find_spec("triton") is None:
        return False
    if device.type == "cpu":
        return backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return device.type == "cuda" and backend != "torch"


def kernels_for(device: torch.device) -> str:
    """What computes with weights on `device`, for people to read."""
    if prepacks(device):
        return f"triton on {device.type}"
    if device.type == "cpu" and cpu.available():
        return f"cpu {cpu.isas()[-1]}"
    return f"torch on {device.type} (slow)"


def prepack_weight(qweight: Tensor, codewords: Tensor, layout: Layout, in_features: int) -> Tensor:
    """`qweight` uint8 [N, row_bytes] in the form that `pcdvq::linear` reads fastest on its device.

    That is int32 words where the device `prepacks`, and uint8 blocks on CPUs that read such
    (`cpu.prepack`), which `pcdvq::embedding` does not take.
    """
    if not prepacks(qweight.device):
        if qweight.dim() == 3 or qweight.device.type != "cpu" or not cpu.available():
            return qweight
        return cpu.prepack(qweight, layout.to_ints(), in_features)
    from pcdvq_kernels.triton import prepack

    return prepack.prepack_weight(qweight, codewords, layout.to_ints(), in_features)


def prepack_experts(qweight: Tensor, codewords: Tensor, layout: Layout, in_features: int) -> Tensor:
    """`prepack_weight` of stacked experts, uint8 [E, N, row_bytes]."""
    if not prepacks(qweight.device):
        return qweight
    return torch.stack([prepack_weight(q, codewords, layout, in_features) for q in qweight])


def prepack_codewords(codewords: Tensor, spec: CodebookSpec) -> Tensor:
    """`Codebook.codewords()` in the form its device computes with; see `prepacks`."""
    if not prepacks(codewords.device):
        return codewords
    from pcdvq_kernels.triton import prepack

    return prepack.prepack_codewords(codewords)


def _kernels(qweight: Tensor, on_cpu: bool) -> ModuleType:
    """The module whose functions compute with `qweight`.

    Raises:
        PCDVQError: words, which nothing reads on this CPU.
    """
    if qweight.dtype == torch.int32:
        if on_cpu:
            check_words_on_cpu("qweight")
        from pcdvq_kernels.triton import backend

        return backend
    return cpu if on_cpu and cpu.available() else fallback


def check_words_on_cpu(name: str) -> None:
    """Raise PCDVQError unless the Triton kernels run on the CPU, for tests."""
    if not prepacks(torch.device("cpu")):
        raise PCDVQError(
            f"{name} is int32 words for the Triton kernels, which run on GPUs only; give the "
            "checkpoint's uint8 codes, or move all arguments to a GPU"
        )


def linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
) -> Tensor:
    """`pcdvq::linear` without torch's dispatcher."""
    run = _kernels(qweight, x.is_cpu).linear
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
    check_same_device(x, qweight, row_scale, signs_in, codewords, bias)
    return x.new_empty(*x.shape[:-1], row_scale.shape[0])


def _embedding(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    run = _kernels(qweight, ids.is_cpu).embedding
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
    check_same_device(ids, qweight, row_scale, signs_in, codewords)
    return ids.new_empty(*ids.shape, 8 * signs_in.shape[0], dtype=dtype)


def _moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    codewords: Tensor,
    gate_up_layout: Sequence[int],
    down_layout: Sequence[int],
) -> Tensor:
    check_routing(x, topk_weights, topk_ids, gate_up, down)
    run = _kernels(gate_up[0], x.is_cpu).moe
    return run(x, topk_weights, topk_ids, gate_up, down, codewords, gate_up_layout, down_layout)


def _moe_fake(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    codewords: Tensor,
    gate_up_layout: Sequence[int],
    down_layout: Sequence[int],
) -> Tensor:
    check_same_device(x, topk_weights, topk_ids, *gate_up, *down, codewords)
    return x.new_empty(x.shape)


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
_LIBRARY.define(
    "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor[] gate_up, Tensor[] down, "
    "Tensor codewords, int[] gate_up_layout, int[] down_layout) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
_LIBRARY.impl("embedding", _embedding, "CompositeExplicitAutograd")
_LIBRARY.impl("moe", _moe, "CompositeExplicitAutograd")
torch.library.register_fake("pcdvq::linear", _linear_fake, lib=_LIBRARY)
torch.library.register_fake("pcdvq::embedding", _embedding_fake, lib=_LIBRARY)
torch.library.register_fake("pcdvq::moe", _moe_fake, lib=_LIBRARY)
if cpu.available() and not prepacks(torch.device("cpu")):
    torch_op.register(cpu.loaded(), linear)
