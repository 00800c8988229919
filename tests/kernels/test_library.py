"""The compiled library itself."""

from __future__ import annotations

import ctypes.util
import shutil
from pathlib import Path

import pytest
from pcdvq_kernels import cpu


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build it with")
def test_is_built():
    assert cpu.available(), cpu.unavailable_message()


def test_from_other_sources(monkeypatch):
    """Calling it would write past its structs; any other library stands for it."""
    monkeypatch.setattr(cpu, "LIBRARY", Path(ctypes.util.find_library("m")))
    cpu._library.cache_clear()
    try:
        assert not cpu.available()
        assert "built from other sources" in cpu.unavailable_message()
        assert "reinstall" in cpu.unavailable_message()
    finally:
        cpu._library.cache_clear()
