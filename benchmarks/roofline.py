"""The bounds that kernels are compared with: reading the weights, and a tuned bf16 GEMV."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_name("roofline.cpp")


@cache
def _library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "roofline.so"
        options = ["-O3", "-march=native", "-std=c++17", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(path)], check=True)
        library = ctypes.CDLL(str(path))
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.bf16_gemv.argtypes = (pointer, pointer, pointer, integer, integer, ctypes.c_int)
    library.bf16_gemv.restype = None
    library.read_all.argtypes = (pointer, integer, ctypes.c_int)
    library.read_all.restype = ctypes.c_uint32
    return library


def read_all(data: Tensor) -> int:
    """Read all bytes of `data` once; returns something that depends on them."""
    size = data.numel() * data.element_size() // 128 * 128
    return _library().read_all(data.data_ptr(), size, torch.get_num_threads())


def bf16_gemv(weight: Tensor, x: Tensor) -> Tensor:
    """`weight` (bf16 [N, K]) times x (bf16 [K], K a multiple of 32), fp32 [N]."""
    n, k = weight.shape
    pairs = x.float().view(-1, 8, 2).transpose(1, 2).contiguous()  # even columns, then odd ones
    y = torch.empty(n)
    _library().bf16_gemv(
        weight.data_ptr(), pairs.data_ptr(), y.data_ptr(), n, k, torch.get_num_threads()
    )
    return y


def check() -> None:
    """Raise RuntimeError if the GEMV is wrong."""
    weight, x = torch.randn(70, 96).bfloat16(), torch.randn(96).bfloat16()
    expected = weight.float() @ x.float()
    if not torch.allclose(bf16_gemv(weight, x), expected, rtol=1e-4, atol=1e-4):
        raise RuntimeError("the bf16 GEMV is wrong")
