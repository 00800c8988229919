"""Makes the tests' own helpers importable and keeps caches out of the home directory."""

import os
import sys
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that wait must not take the cores of tests that run beside them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# These need TRITON_INTERPRET=1 from the start; other tests run them in processes of their own.
collect_ignore_glob = [] if os.environ.get("TRITON_INTERPRET") == "1" else ["*/interpreted/*"]

TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "benchmarks")]


@pytest.fixture(autouse=True, scope="session")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> object:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
