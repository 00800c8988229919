"""What the Triton kernels compile to: no spills, few registers and instructions, tensor cores.

Compiled in a process of its own, because other tests may have made triton interpret.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_static.py"
# Of a program; what an architecture has for one is at least this much.
MOST_SHARED_BYTES = {"gfx942": 64 << 10}
# Warp instructions of the main loop per 1024 weights on sm_90, M <= 8: all, and of the busier pipe.
MOST_INSTRUCTIONS = {
    "trellis-1.5": (124, 66),
    "trellis-2": (108, 58),
    "trellis-2.5": (122, 66),
    "trellis-3": (252, 130),
    "trellis-3.5": (256, 132),
    "trellis-4": (230, 114),
    "trellis-2, chains of 16 rows": (110, 58),
    "stored": (22, 14),
}
MOST_REGISTERS = 168  # of programs of one warp: 12 of them on a processor


def counts(tmp_path: Path, *options: str) -> list[dict]:
    file = tmp_path / "counts.json"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, "--json", file, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found
    return found


def check(count: dict) -> None:
    name = count["target"], count["kernel"], count["codec"]
    assert count["stack_bytes"] == 0, name
    assert count["registers"] <= MOST_REGISTERS, name
    assert count["shared_bytes"] <= MOST_SHARED_BYTES.get(count["target"], 48 << 10), name
    assert "spill" not in count["classes"], name
    if count["per_1024_weights"] is None:
        return
    assert count["mma"], name
    if count["target"] != "gfx942":
        assert all(kind.startswith("IMMA.16832.S8") for kind in count["mma"]), name
        # Codes become operands inside a lane: nothing crosses lanes or waits for others.
        assert not {"shuffle", "barrier", "store"} & count["classes"].keys(), name


@pytest.mark.parametrize("target", ["sm_80", "sm_86", "sm_89", "sm_100", "sm_120"])
def test_decoding_on_every_nvidia_target(target: str, tmp_path: Path) -> None:
    for count in counts(tmp_path, "--target", target, "--codec", "trellis-2", "--kernel", "linear"):
        check(count)
        if count["kernel"] == "linear 8 tokens":
            assert count["per_1024_weights"] <= MOST_INSTRUCTIONS["trellis-2"][0]


def test_instructions_of_every_codec(tmp_path: Path) -> None:
    for count in counts(tmp_path, "--target", "sm_90", "--kernel", "linear 8 tokens"):
        check(count)
        most, of_pipe = MOST_INSTRUCTIONS[count["codec"]]
        assert count["per_1024_weights"] <= most, count["codec"]
        assert max(count["pipes"].values()) <= of_pipe, count["codec"]


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_every_kernel(target: str, tmp_path: Path) -> None:
    for count in counts(tmp_path, "--target", target, "--codec", "trellis-2", ""):
        check(count)


def test_sixteen_tokens(tmp_path: Path) -> None:
    options = "--codec", "trellis-3", "stored", "--kernel", "linear 16 tokens"
    for count in counts(tmp_path, "--target", "sm_90", *options):
        check(count)
