"""The codebooks the quantizer offers, by codec and rate."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import resources
from pathlib import Path

import torch
from pcdvq_kernels.cache import cache_directory
from pcdvq_kernels.codebook import Codebook, int8_directions
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.trellis import CHAIN_ROWS, PAIR, UNITS
from safetensors import SafetensorError, safe_open

from pcdvq_quantizer.codebooks.e8 import make_e8_tables
from pcdvq_quantizer.encode import Encoder
from pcdvq_quantizer.files import save_whole

E8_DIRECTION_BITS = {2.0: 14, 2.25: 16}
WEIGHTS, ROWS = 1 << 15, 1 << 6  # that distortions are measured on
OFFERED = {
    "trellis": (1.5, 2.0, 2.5, 3.0, 3.5, 4.0),
    "e8": tuple(E8_DIRECTION_BITS),
    "pvq": (2.0, 2.25, 3.0, 3.25, 4.0),
    "int8": (8.0,),
}
# Least mean squared error of rounding N(0, 1) to 255 equidistant levels.
INT8_UNIT = 32.5


@dataclass(frozen=True)
class NamedCodebook:
    """A codebook as the quantizer uses it.

    Attributes:
        id: its name in checkpoints, such as `trellis-2`.
        codebook: the tables.
        unit: levels per standard deviation: N(0, 1) weights times `unit` are encoded best.
        effort: of the search for codes of codec `trellis`, "exhaustive" or "quick".
    """

    id: str
    codebook: Codebook
    unit: float
    effort: str = "exhaustive"

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.codebook, self.effort)

    @property
    def bytes(self) -> int:
        """Stored size of the tables."""
        return self.codebook.directions.nbytes + self.codebook.magnitudes.nbytes

    @cached_property
    def distortion(self) -> float:
        """Mean squared error of N(0, 1) weights."""
        x = torch.randn(ROWS, WEIGHTS // ROWS, generator=torch.Generator().manual_seed(0))
        x = x.unflatten(1, (-1, self.codebook.spec.vector_dim)) * self.unit
        levels = self.codebook.decode(self.encoder.encode(x)).float()
        return (levels - x).square().mean().item() / self.unit**2


def offered_rates(codec: str) -> tuple[float, ...]:
    """Bits per weight that `codec` offers, rising.

    Raises:
        PCDVQError: the codec is not offered.
    """
    if codec not in OFFERED:
        raise PCDVQError(f"codec {codec!r} is not offered; choose one of {', '.join(OFFERED)}")
    return OFFERED[codec]


@cache
def get_codebook(
    codec: str, bits: float, chain_rows: int = CHAIN_ROWS[0], effort: str = "exhaustive"
) -> NamedCodebook:
    """The codebook of `codec` at `bits` per weight.

    Args:
        chain_rows, effort: of codec `trellis`; others have none.

    Raises:
        PCDVQError: the codec or the rate is not offered.
    """
    if bits not in offered_rates(codec):
        rates = ", ".join(f"{rate:g}" for rate in offered_rates(codec))
        rates += "".join(f", or codec {other}" for other in OFFERED if bits in OFFERED[other])
        raise PCDVQError(f"codec {codec} does not offer {bits:g} bits per weight; choose {rates}")
    if codec == "int8":
        return _int8()
    id = f"{codec}-{bits:g}"
    if codec == "trellis":
        return _trellis(id, bits, chain_rows, effort)
    if codec != "e8":
        with resources.as_file(resources.files(__package__) / "tables") as tables:
            return load_codebook(id, tables / f"{id}.safetensors")
    return _cached_e8(id, E8_DIRECTION_BITS[bits])


def codebooks_at_hand() -> list[NamedCodebook]:
    """Every codebook on offer, except those of codec e8 that an earlier run has not cached."""
    return [
        get_codebook(codec, bits)
        for codec, rates in OFFERED.items()
        for bits in rates
        if codec != "e8" or _e8_path(f"{codec}-{bits:g}").is_file()
    ]


def save_codebook(codebook: NamedCodebook, path: Path) -> None:
    """Write the tables of `codebook` to `path`, its layout and unit as metadata."""
    spec, tables = codebook.codebook.spec, codebook.codebook
    save_whole(
        {"directions": tables.directions.contiguous(), "magnitudes": tables.magnitudes},
        path,
        {"spec": spec.model_dump_json(), "unit": repr(codebook.unit)},
    )


def load_codebook(id: str, path: Path) -> NamedCodebook:
    """Read what `save_codebook` wrote."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        spec = CodebookSpec.model_validate_json(metadata["spec"])
        tables = Codebook(spec, file.get_tensor("directions"), file.get_tensor("magnitudes"))
    return NamedCodebook(id, tables, float(metadata["unit"]))


def _int8() -> NamedCodebook:
    spec = CodebookSpec(
        codec="int8",
        vector_dim=1,
        pattern_bits=8,
    )
    tables = Codebook(spec, int8_directions(), torch.ones(1, dtype=torch.uint8))
    return NamedCodebook("int8", tables, INT8_UNIT)


def _trellis(id: str, bits: float, chain_rows: int, effort: str) -> NamedCodebook:
    code_bits = round(PAIR * bits)
    fields = {"vector_dim": PAIR, "pattern_bits": code_bits, "chain_rows": chain_rows}
    spec = CodebookSpec.model_validate({"codec": "trellis", **fields})
    none = torch.empty(0, PAIR, dtype=torch.int8), torch.ones(1, dtype=torch.uint8)
    name = id if chain_rows == CHAIN_ROWS[0] else f"{id}-rows{chain_rows}"
    return NamedCodebook(name, Codebook(spec, *none), UNITS[code_bits], effort)


def _e8_path(id: str) -> Path:
    return cache_directory() / f"{id}-v1.safetensors"


def _cached_e8(id: str, direction_bits: int) -> NamedCodebook:
    """Generate an E8 codebook, or read the copy an earlier run left in the cache."""
    path = _e8_path(id)
    with contextlib.suppress(OSError, SafetensorError, KeyError, ValueError):
        return load_codebook(id, path)
    spec = CodebookSpec(
        codec="e8",
        vector_dim=8,
        pattern_bits=direction_bits,
        magnitude_bits=2,
        shift=7,
    )
    directions, magnitudes, unit = make_e8_tables(direction_bits)
    codebook = NamedCodebook(id, Codebook(spec, directions, magnitudes), unit)
    # Not being able to cache costs only time.
    with contextlib.suppress(OSError, SafetensorError):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_codebook(codebook, path)
    return codebook
