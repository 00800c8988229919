"""The file of measured launch parameters: whatever is there, products are computed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from pcdvq_kernels.triton import tuning

CONFIGS = {"M8 N64 K64 4:64": tuning.LinearConfig(8, 2)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.tuned.cache_clear()
    yield tuning.cache_path()
    tuning.tuned.cache_clear()


def test_round_trip(cache: Path) -> None:
    tuning.save_tuned("GPU", CONFIGS)
    assert tuning.tuned() == {"GPU": CONFIGS}


@pytest.mark.parametrize("text", ["", "[1]", '{"GPU": 1}', '{"GPU": {"M8": {"warps": 1}}}', "\xff"])
def test_damaged(cache: Path, text: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(text.encode("latin-1"))
    with pytest.warns(RuntimeWarning, match=r"triton\.json is ignored"):
        assert tuning.tuned() == {}


def test_no_cache_directory(cache: Path) -> None:
    cache.parent.write_text("a file")
    assert tuning.tuned() == {}
