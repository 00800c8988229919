"""What is direction and what is magnitude in each codec, for people to read."""

from __future__ import annotations

from collections.abc import Iterable

from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.trellis import CHAIN_WEIGHTS

DIRECTION_AND_MAGNITUDE = {
    "trellis": f"the direction of {CHAIN_WEIGHTS} weights is the code of a chain, chosen as a "
    "whole; the magnitude is that of a row, its scale",
    "e8": "the code of 8 weights has a field for the pattern, which is their direction, and one "
    "for the magnitude; they are chosen apart, as in the paper",
    "pvq": "the code of 8 weights is one number for a point of an integer pyramid, which is their "
    "direction, and for the index of their magnitude",
    "int8": "the code of a weight is its level; it has no direction and no magnitude of its own",
}


def describe_codecs(specs: Iterable[CodebookSpec]) -> list[str]:
    """A line for each codec among `specs`."""
    used = {spec.codec for spec in specs}
    return [f"{codec}: {text}." for codec, text in DIRECTION_AND_MAGNITUDE.items() if codec in used]
