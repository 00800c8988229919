"""Checkpoints are input from anybody: whatever is wrong with them is said, or they serve right."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

CASES = 2000


def test_damaged_checkpoints_are_refused_or_serve_right(tmp_path: Path) -> None:
    program = Path(__file__).with_name("fuzz_checkpoints.py")
    search = [str(program.parent), str(program.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "OMP_NUM_THREADS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    run = subprocess.run(
        [sys.executable, str(program), str(tmp_path), str(CASES)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, f"{run.stdout[-2000:]}\n{run.stderr[-6000:]}"
    outcomes = json.loads(run.stdout.splitlines()[-1])
    damaged, layouts = outcomes["damaged"], outcomes["layouts"]
    assert sum(damaged.values()) >= CASES
    # Damage that no check can see, such as other codes, serves; a check too many would refuse it.
    assert min(damaged["served"], damaged["refused"]) > CASES / 20
    assert layouts == {"served": CASES // 20}
