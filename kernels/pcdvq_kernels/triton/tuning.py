"""Launch parameters of the linear kernels: defaults from arithmetic, and a file of measured ones.

Nothing is tuned while requests wait. The defaults need no measurement; `benchmarks/bench_gpu.py
--tune` measures the alternatives once and writes them to `cache_path()`, which is read at the first
launch.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from pcdvq_kernels.cache import cache_directory
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.triton.format import TILE_COLUMNS, TILE_ROWS, Format

P = ParamSpec("P")
T = TypeVar("T")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Whether kernels use single instructions of NVIDIA GPUs, which the interpreter does not know.
INSTRUCTIONS = not INTERPRETED and torch.version.hip is None

# Warps a processor needs to keep its share of the memory busy: bandwidth per processor times
# latency (600-800 ns), over the KiB of codes that a warp has in flight at 2 bits per weight.
WARPS_PER_PROCESSOR = {"sm_80": 12, "sm_86": 8, "sm_89": 8, "sm_90": 20, "sm_100": 28, "sm_120": 12}
DEFAULT_WARPS = 12
SHORTEST_SPLIT = 2  # tiles: fewer, and writing partial sums costs as much as reading the codes
OLDEST_MAJOR = 8  # compute capability: older tensor cores do not multiply 16 x 32 int8


@dataclass(frozen=True)
class LinearConfig:
    """Launch parameters of one product.

    Attributes:
        m_tile: tokens of a program, 8 or 16; more would not leave room for two sums in registers.
        splits: parts that the columns are cut into, summed by a second launch.
    """

    m_tile: int
    splits: int = 1


@dataclass(frozen=True)
class Device:
    """What launch parameters depend on.

    Attributes:
        name: as the driver says it.
        architecture: "sm_90", "gfx942", ...
        processors: multiprocessors or compute units.
    """

    name: str
    architecture: str
    processors: int


@cache
def describe(device: torch.device) -> Device:
    """The GPU `device`; a small one for tensors of the interpreter.

    Raises:
        PCDVQError: the kernels do not run on it.
    """
    if device.type == "cpu":
        return Device("interpreter", "cpu", 1)
    found = torch.cuda.get_device_properties(device)
    hip = getattr(found, "gcnArchName", "").split(":")[0]
    name = hip or f"sm_{found.major}{found.minor}"
    if not hip and found.major < OLDEST_MAJOR:
        raise PCDVQError(
            f"{found.name} is {name}; the kernels need sm_{OLDEST_MAJOR}0 or newer. Use such a "
            "GPU, or set PCDVQ_BACKEND=torch for slow torch code."
        )
    return Device(found.name, name, found.multi_processor_count)


def on_its_device(run: Callable[Concatenate[Tensor, P], T]) -> Callable[Concatenate[Tensor, P], T]:
    """`run`, which launches kernels, with its first argument's GPU as the current one."""

    @wraps(run)
    def launch(x: Tensor, /, *args: P.args, **options: P.kwargs) -> T:
        with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
            return run(x, *args, **options)

    return launch


def m_tile_for(tokens: int, device: Device) -> int:
    """Tokens of a program: NVIDIA's tensor cores take 8 or 16, AMD's 16."""
    return 8 if tokens <= 8 and not device.architecture.startswith("gfx") else 16


@cache
def linear_config(
    tokens: int, rows: int, columns: int, fmt: Format, device: Device
) -> LinearConfig:
    """Launch parameters for M tokens and a weight [rows, columns].

    Measured ones where `cache_path()` has them for this device, shape and format; otherwise as many
    splits as it takes to give every processor its warps.
    """
    m_tile = m_tile_for(tokens, device)
    measured = tuned().get(device.name, {}).get(tuning_key(m_tile, rows, columns, fmt))
    if measured is not None:
        return measured
    tiles = -(-columns // TILE_COLUMNS)
    programs = -(-rows // TILE_ROWS) * -(-tokens // m_tile)
    wanted = WARPS_PER_PROCESSOR.get(device.architecture, DEFAULT_WARPS) * device.processors
    return LinearConfig(m_tile, splits=max(1, min(-(-wanted // programs), tiles // SHORTEST_SPLIT)))


def tuning_key(m_tile: int, rows: int, columns: int, fmt: Format) -> str:
    codec = f"{fmt.code_bits}:{fmt.chain_rows}"
    return f"M{m_tile} N{rows} K{columns} {codec}"


def cache_path() -> Path:
    """Where measured parameters are kept: JSON, device name to `tuning_key` to parameters."""
    return cache_directory() / "triton.json"


@cache
def tuned() -> dict[str, dict[str, LinearConfig]]:
    """What `cache_path()` has; nothing if there is no such file, or not one of ours."""
    try:
        found = json.loads(cache_path().read_text())
        return {
            device: {key: LinearConfig(**config) for key, config in configs.items()}
            for device, configs in found.items()
        }
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        message = f"{cache_path()} is ignored ({error}): delete it, or tune again"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
        return {}


def save_tuned(device: str, configs: dict[str, LinearConfig]) -> None:
    """Add measured parameters of a device to `cache_path()`."""
    everything = {**tuned(), device: {**tuned().get(device, {}), **configs}}
    path = cache_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    as_json = {
        name: {key: asdict(config) for key, config in found.items()}
        for name, found in everything.items()
    }
    path.write_text(json.dumps(as_json, indent=1) + "\n")
    tuned.cache_clear()
    linear_config.cache_clear()
