"""The compiled CPU kernels (kernels/csrc), bound with ctypes."""

from __future__ import annotations

import ctypes
import math
import mmap
import struct
from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

import torch  # loads the OpenMP runtime that the library must share
from torch import Tensor

from pcdvq_kernels.arguments import (
    ACTIVATION_DTYPES,
    LinearShape,
    check_embedding,
    check_expert_ids,
    check_ids,
    check_linear,
    check_moe,
    expect,
    linear_shape,
)
from pcdvq_kernels.errors import PCDVQError

LIBRARY = Path(__file__).with_name("_cpu.so")
ISAS = {"auto": 0, "scalar": 1, "avx2": 2, "avx512": 3}

HUGE_PAGE = 1 << 21
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_NO_MEMORY = 1
_NO_ISA = 2
BAD_ID = 3
_OTHER_ISA = "isa {!r} cannot read packed weights; pass the checkpoint's qweight"


# PcdvqLinear of kernels/csrc/pcdvq.h. Packing takes a third of what a ctypes.Structure takes.
_LINEAR = struct.Struct("7P12q4i")
# PcdvqPrepack, likewise.
_PREPACK = struct.Struct("2P10q2i")
# PcdvqEmbedding, likewise; padded as in C.
_EMBEDDING = struct.Struct("6P12q3i4x")
# PcdvqMoe, with its two PcdvqExperts.
_MOE = struct.Struct("5P3q" + 2 * "3P10q" + "3i4x")
# PcdvqVptqSegment and PcdvqVptq; `vptq.cpu` calls those.
VPTQ_SEGMENT = struct.Struct("2P5q")
VPTQ = struct.Struct("7P5q5i4x")
# PcdvqNearest, likewise, and PcdvqChains; `cpu_search` calls those.
NEAREST = struct.Struct("4P2q3i4x")
CHAINS = struct.Struct("3P2q6i")


@cache
def _library() -> ctypes.CDLL | str:
    """The library, or why it cannot be loaded."""
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return str(error)
    if _struct_bytes(library) != [
        _LINEAR.size,
        _EMBEDDING.size,
        _MOE.size,
        NEAREST.size,
        VPTQ_SEGMENT.size,
        VPTQ.size,
        _PREPACK.size,
        CHAINS.size,
    ]:
        return f"{LIBRARY.name} was built from other sources than this version's"
    library.pcdvq_linear.argtypes = (ctypes.c_char_p,)
    library.pcdvq_prepack.argtypes = (ctypes.c_char_p,)
    library.pcdvq_packed_bytes.argtypes = (ctypes.c_char_p,)
    library.pcdvq_packed_bytes.restype = ctypes.c_int64
    library.pcdvq_embedding.argtypes = (ctypes.c_char_p,)
    library.pcdvq_moe.argtypes = (ctypes.c_char_p,)
    library.pcdvq_nearest.argtypes = (ctypes.c_char_p,)
    library.pcdvq_chains.argtypes = (ctypes.c_char_p,)
    library.pcdvq_vptq.argtypes = (ctypes.c_char_p,)
    return library


def _struct_bytes(library: ctypes.CDLL) -> list[int] | None:
    """Sizes of the library's structs; None if it is older than the function that tells them."""
    if not hasattr(library, "pcdvq_struct_bytes"):
        return None
    sizes = (ctypes.c_int64 * 8)()
    library.pcdvq_struct_bytes(sizes)
    return list(sizes)


def available() -> bool:
    """Whether the compiled kernels are installed and can be loaded."""
    return not isinstance(_library(), str)


def unavailable_message() -> str:
    """Why the compiled kernels cannot be used, and what to do about it."""
    return (
        f"the compiled CPU kernels cannot be used ({_library()}). Install g++ (apt-get install "
        "g++, or dnf install gcc-c++) and reinstall vllm-pcdvq"
    )


def isas() -> list[str]:
    """Instruction sets this CPU can run, best last; empty without the compiled kernels."""
    library = _library()
    best = 0 if isinstance(library, str) else library.pcdvq_best_isa()
    return [name for name, number in ISAS.items() if 0 < number <= best]


def isa_number(isa: str) -> int:
    if isa not in ISAS or (isa != "auto" and isa not in isas()):
        raise PCDVQError(f"isa {isa!r} is not available here; choose from {['auto', *isas()]}")
    return ISAS[isa]


def loaded() -> ctypes.CDLL:
    """The compiled library.

    Raises:
        PCDVQError: it is not installed or cannot be loaded.
    """
    library = _library()
    if isinstance(library, str):
        raise PCDVQError(unavailable_message())
    return library


def check_device(x: Tensor) -> None:
    if not x.is_cpu:
        raise PCDVQError(f"x is on {x.device}; the CPU kernels need CPU tensors")


def stream_memory(shape: Sequence[int]) -> Tensor:
    """uint8 [shape] of any values, for a weight that is read from one end to the other.

    It is on huge pages as far as it fills them: else every 32 KiB wait for a line of page tables,
    which the weights before have driven out of the caches.
    """
    size = math.prod(shape)
    if size < HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(tuple(shape), dtype=torch.uint8)
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=private)  # what is not touched takes none
    everything = torch.frombuffer(memory, dtype=torch.uint8)
    first = -everything.data_ptr() % HUGE_PAGE
    with suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE, first, size // HUGE_PAGE * HUGE_PAGE)
    return everything[first : first + size].view(tuple(shape))


def raise_status(status: int, what: str) -> NoReturn:
    if status == _NO_MEMORY:
        raise MemoryError(f"no memory for the scratch of {what}")
    raise RuntimeError(f"{what} failed with status {status}")


def linear(
    x: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    bias: Tensor | None,
    layout: Sequence[int],
    *,
    isa: str = "auto",
    out: Tensor | None = None,
) -> Tensor:
    """`pcdvq::linear` on the CPU; the arguments are the op's (see `ops`).

    The result for a row of x does not depend on the other rows or on the number of threads.

    Args:
        isa: "auto" or one of `isas()`.
        out: buffer to write, contiguous, x.dtype [..., N]; by default a new one.

    Raises:
        PCDVQError: arguments that do not fit together, or an unavailable `isa`.
    """
    library = loaded()
    shape = check_linear(x, qweight, row_scale, signs_in, codewords, bias, layout)
    check_device(x)
    leading, k, n = x.shape[:-1], x.shape[-1], row_scale.shape[0]
    x = x.contiguous()
    if out is None:
        out = x.new_empty((*leading, n))
    elif out.dtype != x.dtype or out.shape != (*leading, n) or not out.is_contiguous():
        raise PCDVQError(
            f"out is {out.dtype} {list(out.shape)}; expected contiguous {x.dtype} {[*leading, n]}"
        )
    if bias is not None and bias.dtype not in ACTIVATION_DTYPES:
        bias = bias.float()
    m = x.numel() // k
    status = library.pcdvq_linear(
        _LINEAR.pack(
            x.data_ptr(),
            qweight.data_ptr(),
            row_scale.data_ptr(),
            signs_in.data_ptr(),
            codewords.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            *(m, n, k, shape.row_bytes, qweight.dim() == 3),
            *shape.layout,
            DTYPES[x.dtype],
            0 if bias is None else DTYPES[bias.dtype],
            torch.get_num_threads(),
            0 if isa == "auto" else isa_number(isa),
        )
    )
    if status == _NO_ISA:
        raise PCDVQError(_OTHER_ISA.format(isa))
    if status:
        raise_status(status, f"pcdvq::linear [{m}, {k}] x [{n}, {k}]")
    return out


def prepack(
    qweight: Tensor, layout: Sequence[int], in_features: int, *, isa: str = "auto"
) -> Tensor:
    """Codes in the order in which `linear` reads them, of the same size but for padding.

    Args:
        qweight: uint8 [N or more, row_bytes], the checkpoint's codes: whole chains.
        layout: `Layout(...).to_ints()`, that of the calls to come.
        in_features: K.
        isa: "auto" or one of `isas()`, that of the calls to come.

    Returns:
        uint8 [ceil(N / 16), ceil(K / 64), bytes of a block], of codec trellis whole tiles of 64
        rows, or `qweight` itself where `linear` reads it as it is.

    Raises:
        PCDVQError: qweight or layout do not fit together, or an unavailable `isa`.
    """
    library = loaded()
    shape = linear_shape(tuple(layout), in_features)
    rows = qweight.shape[0]
    expect("qweight", qweight, torch.uint8, (rows, shape.row_bytes), torch.device("cpu"))

    def problem(out: int) -> bytes:
        sizes = (rows, in_features, shape.row_bytes)
        threads, number = torch.get_num_threads(), 0 if isa == "auto" else isa_number(isa)
        return _PREPACK.pack(qweight.data_ptr(), out, *sizes, *shape.layout, threads, number)

    if not library.pcdvq_packed_bytes(problem(0)):
        return qweight
    packed = stream_memory(shape.packed_shape(rows))
    status = library.pcdvq_prepack(problem(packed.data_ptr()))
    if status:
        raise_status(status, f"packing a weight [{rows}, {in_features}]")
    return packed


def embedding(
    ids: Tensor,
    qweight: Tensor,
    row_scale: Tensor,
    signs_in: Tensor,
    codewords: Tensor,
    layout: Sequence[int],
    dtype: torch.dtype,
    *,
    isa: str = "auto",
) -> Tensor:
    """`pcdvq::embedding` on the CPU; the arguments are the op's (see `ops`).

    Args:
        isa: "auto" or one of `isas()`.

    Raises:
        PCDVQError: an id that is no row, other arguments that do not fit together, or an
            unavailable `isa`.
    """
    library = loaded()
    shape = check_embedding(ids, qweight, row_scale, signs_in, codewords, layout, dtype)
    check_device(ids)
    n, k = row_scale.shape[0], 8 * signs_in.numel()
    ids = ids.long().contiguous()
    out = torch.empty((*ids.shape, k), dtype=dtype)
    status = library.pcdvq_embedding(
        _EMBEDDING.pack(
            ids.data_ptr(),
            qweight.data_ptr(),
            row_scale.data_ptr(),
            signs_in.data_ptr(),
            codewords.data_ptr(),
            out.data_ptr(),
            *(ids.numel(), n, k, shape.row_bytes, qweight.dim() == 3),
            *shape.layout,
            DTYPES[dtype],
            torch.get_num_threads(),
            0 if isa == "auto" else isa_number(isa),
        )
    )
    if status == BAD_ID:
        check_ids(ids, n)
    if status == _NO_ISA:
        raise PCDVQError(_OTHER_ISA.format(isa))
    if status:
        raise_status(status, f"pcdvq::embedding {list(ids.shape)} of [{n}, {k}]")
    return out


def moe(
    x: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    gate_up: Sequence[Tensor],
    down: Sequence[Tensor],
    codewords: Tensor,
    gate_up_layout: Sequence[int],
    down_layout: Sequence[int],
    *,
    isa: str = "auto",
) -> Tensor:
    """`pcdvq::moe` on the CPU; the arguments are the op's (see `ops`).

    The result for a token does not depend on the others or on the number of threads.

    Args:
        isa: "auto" or one of `isas()`.

    Raises:
        PCDVQError: arguments that do not fit together, or an unavailable `isa`.
    """
    library = loaded()
    shapes = check_moe(
        x, topk_weights, topk_ids, gate_up, down, codewords, gate_up_layout, down_layout
    )
    check_device(x)
    x, ids = x.contiguous(), topk_ids.long().contiguous()
    weights = topk_weights.float().contiguous()
    out = torch.empty_like(x)
    status = library.pcdvq_moe(
        _MOE.pack(
            x.data_ptr(),
            ids.data_ptr(),
            weights.data_ptr(),
            codewords.data_ptr(),
            out.data_ptr(),
            *(*ids.shape, len(gate_up[0])),
            *_experts(gate_up, shapes[0]),
            *_experts(down, shapes[1]),
            DTYPES[x.dtype],
            torch.get_num_threads(),
            0 if isa == "auto" else isa_number(isa),
        )
    )
    if status == BAD_ID:
        check_expert_ids(ids, len(gate_up[0]))
    if status:
        raise_status(status, f"pcdvq::moe of {list(ids.shape)} experts for {list(x.shape)}")
    return out


def _experts(tensors: Sequence[Tensor], shape: LinearShape) -> tuple[int, ...]:
    """Fields of a PcdvqExperts."""
    pointers = (tensor.data_ptr() for tensor in tensors)
    rows, columns = tensors[0].shape[1], 8 * tensors[2].shape[0]
    return (*pointers, rows, columns, shape.row_bytes, *shape.layout)
