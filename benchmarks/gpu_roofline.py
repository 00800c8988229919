"""What static counts predict for decoding: arithmetic, nothing here was measured on a GPU.

python benchmarks/gpu_static.py --json counts.json
python benchmarks/gpu_roofline.py counts.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

from pcdvq_kernels.triton.tuning import Device, m_tile_for

# Weights in linear layers of Llama 2: all that is streamed for a token but head and cache.
MODELS = {"7B": 6.48e9, "70B": 68.5e9}
TOKENS = (1, 16, 64)
CODEC, BITS = "signed-2", 2


@dataclass(frozen=True)
class GPU:
    """Data-sheet figures.

    Attributes:
        target: what its kernels are compiled for.
        issue: instructions per second that all its schedulers start.
        bandwidth: bytes per second from memory.
    """

    target: str
    issue: float
    bandwidth: float

    @property
    def break_even(self) -> float:
        """Instructions it starts in the time it reads 1024 weights at `BITS`."""
        return self.issue * 1024 * BITS / 8 / self.bandwidth


GPUS = {
    "H100 SXM": GPU("sm_90", 132 * 4 * 1.71e9, 3.35e12),
    "A100 SXM 80 GB": GPU("sm_80", 108 * 4 * 1.41e9, 2.04e12),
    "RTX 4090": GPU("sm_89", 128 * 4 * 2.52e9, 1.01e12),
    # A compute unit starts one vector instruction of 64 lanes a cycle.
    "MI300X": GPU("gfx942", 304 * 2.1e9, 5.3e12),
}


def instructions(counts: list[dict], target: str, m_tile: int) -> float:
    """Main-loop instructions per 1024 weights and `m_tile` tokens."""
    wanted = target, f"linear {m_tile} tokens", CODEC
    for count in counts:
        if (count["target"], count["kernel"], count["codec"]) == wanted:
            return count["per_1024_weights"]
    raise SystemExit(f"error: no count of {wanted}; run gpu_static.py without filters")


def rows(counts: list[dict]) -> list[str]:
    lines = []
    for name, gpu in GPUS.items():
        for model, weights in MODELS.items():
            for tokens in TOKENS:
                m_tile = m_tile_for(tokens, Device(name, gpu.target, 1))
                per_1024 = instructions(counts, gpu.target, m_tile) * -(-tokens // m_tile)
                memory = weights * BITS / 8 / gpu.bandwidth
                issue = weights / 1024 * per_1024 / gpu.issue
                lines.append(
                    f"| {name} | {model} | {tokens} | {per_1024:.0f} of {gpu.break_even:.0f} "
                    f"| {1e3 * memory:.2f} | {1e3 * issue:.2f} "
                    f"| {tokens / max(memory, issue):.0f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", type=Path, help="what gpu_static.py --json wrote")
    args = parser.parse_args()
    print(
        "| GPU | model | M | instructions, of break-even | memory-bound ms | issue-bound ms "
        "| at most tokens/s |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows(json.loads(args.counts.read_text()))))


if __name__ == "__main__":
    main()
