"""Triton's interpreter with checks: every access inside a tensor, no two programs at odds.

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


@pytest.fixture(autouse=True)
def _nan_in_empty_tensors():
    """What no kernel writes shows: `torch.empty` is full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
