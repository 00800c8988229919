"""Which GPUs the Triton kernels run on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.triton import tuning

GPU = torch.device("cuda", 1)


@pytest.fixture
def properties(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    found = SimpleNamespace(name="some GPU", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    tuning.describe.cache_clear()
    yield found
    tuning.describe.cache_clear()


def test_supported(properties: SimpleNamespace) -> None:
    assert tuning.describe(GPU) == tuning.Device("some GPU", "sm_90", 132)


def test_too_old(properties: SimpleNamespace) -> None:
    properties.major, properties.minor = 7, 5
    with pytest.raises(PCDVQError, match="some GPU is sm_75; the kernels need sm_80 or newer"):
        tuning.describe(GPU)


def test_of_amd(properties: SimpleNamespace) -> None:
    properties.major, properties.gcnArchName = 7, "gfx942:sramecc+:xnack-"
    assert tuning.describe(GPU).architecture == "gfx942"


def test_kernels_are_launched_where_the_tensors_are(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[object] = []

    @contextmanager
    def device(which: object) -> Iterator[None]:
        current.append(which)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    launch = tuning.on_its_device(lambda x, *args: (list(current), args))
    assert launch(SimpleNamespace(is_cuda=True, device=GPU), 1, 2) == ([GPU], (1, 2))
    assert launch(torch.zeros(1)) == ([], ())
    assert not current
