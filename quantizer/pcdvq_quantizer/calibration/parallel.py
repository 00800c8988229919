"""Calibration by several processes, which exchange tensors on the CPU.

Each holds the hidden states of its share of the calibration text, and rounds its share of the rows
of a weight. With GPUs each has its own.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process among those of the default process group, which has the backend gloo.

    All call the same methods in the same order; with a count of 1 nothing is exchanged.

    Attributes:
        rank: of this process. Process 0 writes the checkpoint.
        count: how many.
    """

    rank: int = 0
    count: int = 1

    @property
    def device(self) -> torch.device:
        """What this process computes forward passes on."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", self.rank % torch.cuda.device_count())

    def share(self, total: int, unit: int = 1, rank: int | None = None) -> slice:
        """The part of `total` rows, in units of `unit`, of process `rank` (default: this one)."""
        rank = self.rank if rank is None else rank
        units = -(-total // unit)
        first, end = (units * each // self.count * unit for each in (rank, rank + 1))
        return slice(first, min(end, total))

    def sum(self, *tensors: Tensor) -> None:
        """Make each tensor, in place, the sum over processes."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def gather(self, part: Tensor, total: int, unit: int = 1) -> Tensor:
        """The tensor [total, ...] of which each process has the rows `share(total, unit)`."""
        if self.count == 1:
            return part
        whole = part.new_empty(total, *part.shape[1:])
        whole[self.share(total, unit)] = part
        for rank in range(self.count):
            dist.broadcast(whole[self.share(total, unit, rank)], rank)
        return whole

    def agree(self, value: object) -> bool:
        """Whether `value` is the same in all processes."""
        if self.count == 1:
            return True
        values: list[object] = [None] * self.count
        dist.all_gather_object(values, value)
        return all(each == value for each in values)

    def all_of(self, numbers: set[int]) -> set[int]:
        """The `numbers` of all processes."""
        if self.count == 1:
            return numbers
        sets: list[set[int]] = [set()] * self.count
        dist.all_gather_object(sets, numbers)
        return set().union(*sets)

    def once(self, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """What `make` gives, which process 0 alone calls, on all cores."""
        if self.count == 1:
            return make()
        made: tuple[Tensor, ...] = ()
        if self.rank == 0:
            with self._all_cores():
                # As the others will receive it: factors are stored by columns.
                made = tuple(tensor.contiguous() for tensor in make())
        kinds = [[(tensor.shape, tensor.dtype) for tensor in made]]
        dist.broadcast_object_list(kinds)
        if self.rank > 0:
            made = tuple(torch.empty(shape, dtype=dtype) for shape, dtype in kinds[0])
        for tensor in made:
            dist.broadcast(tensor, 0)
        return made

    @contextmanager
    def first_alone(self) -> Iterator[None]:
        """Process 0 runs the body on all cores, then the others do."""
        if self.rank > 0:
            dist.barrier()
            yield
            return
        with self._all_cores():
            yield
        if self.count > 1:
            dist.barrier()

    @contextmanager
    def _all_cores(self) -> Iterator[None]:
        threads = torch.get_num_threads()
        torch.set_num_threads(min(threads * self.count, max(threads, cores())))
        try:
            yield
        finally:
            torch.set_num_threads(threads)


ALONE = Processes()


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0))
