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
CODEC, BITS = "trellis-2", 2
MMA = 16 * 8 * 32  # multiplications of an int8 tensor-core instruction


@dataclass(frozen=True)
class GPU:
    """Data-sheet figures.

    Attributes:
        target: what its kernels are compiled for.
        issue: instructions per second that all its schedulers start.
        tensor: int8 multiplications per second of its tensor cores.
        bandwidth: bytes per second from memory.
    """

    target: str
    issue: float
    tensor: float
    bandwidth: float

    @property
    def break_even(self) -> float:
        """Instructions it starts in the time it reads 1024 weights at `BITS`."""
        return self.issue * 1024 * BITS / 8 / self.bandwidth

    def seconds(self, count: dict) -> float:
        """Time for 1024 weights and the tokens of a program, without memory's."""
        if not count["pipes"]:
            return count["per_1024_weights"] / self.issue
        issued = max(count["per_1024_weights"], *(2 * n for n in count["pipes"].values()))
        products = sum(count["mma"].values()) * MMA
        return max(issued / self.issue, products / self.tensor)


GPUS = {
    "H100 SXM": GPU("sm_90", 132 * 4 * 1.71e9, 0.99e15, 3.35e12),
    "A100 SXM 80 GB": GPU("sm_80", 108 * 4 * 1.41e9, 0.312e15, 2.04e12),
    "RTX 4090": GPU("sm_89", 128 * 4 * 2.52e9, 0.33e15, 1.01e12),
    # A compute unit starts one vector instruction of 64 lanes a cycle.
    "MI300X": GPU("gfx942", 304 * 2.1e9, 1.3e15, 5.3e12),
}


def find(counts: list[dict], target: str, m_tile: int) -> dict:
    """What the product of `m_tile` tokens compiled to."""
    wanted = target, f"linear {m_tile} tokens", CODEC
    for count in counts:
        if (count["target"], count["kernel"], count["codec"]) == wanted:
            return count
    raise SystemExit(f"error: no count of {wanted}; run gpu_static.py without filters")


def rows(counts: list[dict]) -> list[str]:
    lines = []
    for name, gpu in GPUS.items():
        for model, weights in MODELS.items():
            for tokens in TOKENS:
                m_tile = m_tile_for(tokens, Device(name, gpu.target, 1))
                programs = -(-tokens // m_tile)
                count = find(counts, gpu.target, m_tile)
                memory = weights * BITS / 8 / gpu.bandwidth
                compute = weights / 1024 * programs * gpu.seconds(count)
                lines.append(
                    f"| {name} | {model} | {tokens} "
                    f"| {count['per_1024_weights'] * programs:.0f} of {gpu.break_even:.0f} "
                    f"| {1e3 * memory:.2f} | {1e3 * compute:.2f} "
                    f"| {tokens / max(memory, compute):.0f} |"
                )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("counts", type=Path, help="what gpu_static.py --json wrote")
    args = parser.parse_args()
    print(
        "| GPU | model | M | instructions, of break-even | memory-bound ms | compute-bound ms "
        "| at most tokens/s |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(rows(json.loads(args.counts.read_text()))))


if __name__ == "__main__":
    main()
