"""Launch parameters."""
from __future__ import annotations
import os
from dataclasses import dataclass
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTRUCTIONS = not INTERPRETED

@dataclass(frozen=True)
class LinearConfig:
    row_tiles: int
    m_tile: int
    splits: int
