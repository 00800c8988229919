"""Triton's interpreter with checks: every access inside a tensor, no two programs at odds.

Kernels are run as for NVIDIA GPUs, whose single instructions are emulated.

These checks run in a process of their own (`test_triton_interpreter.py`), because TRITON_INTERPRET
must be set before triton is imported and makes it unable to compile.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import triton.language as tl
from pcdvq_kernels.triton import dequantize, linear, moe
from triton.runtime import interpreter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

NOBODY, SEVERAL = -1, -2


class AccessError(Exception):
    """A kernel left its tensors, or its programs depend on their order."""


@dataclass
class Memory:
    """The bytes of one argument, and which program last touched each."""

    start: int
    reader: np.ndarray
    writer: np.ndarray

    def touch(self, first: np.ndarray, size: int, program: int, store: bool) -> None:
        places = (first[:, None] - self.start + np.arange(size)).ravel()
        if store:
            if len(np.unique(places)) != places.size:
                raise AccessError(f"program {program} stores twice to one place at once")
            if (self.reader[places] != NOBODY).any() and not np.isin(
                self.reader[places], (NOBODY, program)
            ).all():
                raise AccessError(f"program {program} stores what another reads")
        if not np.isin(self.writer[places], (NOBODY, program)).all():
            raise AccessError(f"program {program} touches what another stores")
        if store:
            self.writer[places] = program
        else:
            known = np.isin(self.reader[places], (NOBODY, program))
            self.reader[places] = np.where(known, program, SEVERAL)


def _check(memories: list[Memory], grid: tuple, pointers, mask, store: bool) -> None:
    shape = np.broadcast(pointers.data, mask.data).shape
    addresses = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape)]
    addresses = addresses.ravel().astype(np.int64)
    size = max(1, pointers.dtype.scalar.element_ty.primitive_bitwidth // 8)
    program = (grid[2] * 65536 + grid[1]) * 65536 + grid[0]
    left = np.ones(addresses.size, bool)
    for memory in memories:
        inside = (addresses >= memory.start) & (
            addresses + size <= memory.start + len(memory.writer)
        )
        if inside.any():
            memory.touch(addresses[inside], size, program, store)
            left &= ~inside
    if left.any():
        raise AccessError(f"{left.sum()} of {left.size} places are outside of all tensors")


@pytest.fixture(autouse=True)
def _checked_accesses(monkeypatch):
    """Watch the loads and stores of every launch of a test."""
    memories: list[Memory] = []
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    load, store = builder.create_masked_load, builder.create_masked_store
    begin = executor._init_args_hst

    def checked_load(self, pointers, mask, *rest, **options):
        _check(memories, self.grid_idx, pointers, mask, store=False)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, values, mask, *rest, **options):
        _check(memories, self.grid_idx, pointers, mask, store=True)
        return store(self, pointers, values, mask, *rest, **options)

    def checked_begin(self, args, options):
        host, rest = begin(self, args, options)
        memories.clear()
        seen = set()
        for tensor in [*host, *rest.values()]:
            if isinstance(tensor, torch.Tensor) and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                reader = np.full(tensor.nbytes, NOBODY, np.int64)
                memories.append(Memory(tensor.data_ptr(), reader, reader.copy()))
        return host, rest

    monkeypatch.setattr(builder, "create_masked_load", checked_load)
    monkeypatch.setattr(builder, "create_masked_store", checked_store)
    monkeypatch.setattr(executor, "_init_args_hst", checked_begin)


def _round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of fp32 values rounded to nearest even; the interpreter cuts them off."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


@pytest.fixture(autouse=True)
def _rounded_bfloat16(monkeypatch):
    builder = interpreter.InterpreterBuilder
    cast = builder.create_fp_trunc

    def rounded(self, source, to):
        if to.scalar != tl.bfloat16:
            return cast(self, source, to)
        return interpreter.TensorHandle(_round_to_bfloat16(source.data), tl.bfloat16)

    monkeypatch.setattr(builder, "create_fp_trunc", rounded)


def _prmt(low: np.ndarray, high: np.ndarray, selector: np.ndarray) -> np.ndarray:
    found = np.zeros_like(low)
    for place in range(4):
        digit = selector >> np.uint32(4 * place) & np.uint32(15)
        assert (digit < 8).all(), "signs of bytes are not emulated"
        byte = np.where(digit < 4, low, high) >> (digit % 4 * 8)
        found |= (byte & np.uint32(255)) << np.uint32(8 * place)
    return found


def _dp4a(left: np.ndarray, right: np.ndarray, addend: np.ndarray) -> np.ndarray:
    for shift in np.arange(0, 32, 8, dtype=np.uint32):
        addend = addend + (left >> shift & np.uint32(255)) * (right >> shift & np.uint32(255))
    return addend


INSTRUCTIONS = {"prmt.b32": _prmt, "dp4a.u32.u32": _dp4a}


class Results(list):
    """What an instruction returns, as the compiler's builder hands it out."""

    get_result = list.__getitem__


@pytest.fixture(autouse=True)
def _instructions(monkeypatch):
    def emulated(self, assembly, constraints, values, types, *options):
        run = INSTRUCTIONS[assembly.split()[0]]
        found = run(*(value.data for value in values))
        assert all(value.dtype.scalar == tl.uint32 for value in values)
        return Results([interpreter.TensorHandle(found, tl.uint32)])

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_inline_asm", emulated)
    for module in (dequantize, linear, moe):
        monkeypatch.setattr(module, "INSTRUCTIONS", True)


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors():
    """What no kernel writes shows: `torch.empty` is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
