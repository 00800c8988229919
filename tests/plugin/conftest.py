import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import network_guard
import pytest
from bare_layers import tensor_parallel
from engine_worker import inspect_models_here
from hub import Hub, running_hub
from vllm.config import VllmConfig, set_current_vllm_config


@pytest.fixture
def vllm_config() -> Iterator[VllmConfig]:
    """What vLLM's layers look up while they are built: a config, and a rank (0 of 1)."""
    config = VllmConfig()
    with set_current_vllm_config(config), tensor_parallel(0, 1):
        yield config


@contextmanager
def engine_process(cache: Path, **changes: str) -> Iterator[ProcessPoolExecutor]:
    """A process that runs vLLM engines in itself, one after another, and needs no network."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_CI_ENV": "1",
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_DISABLE_COMPILE_CACHE": "1",
        "HF_HUB_OFFLINE": "1",
        **changes,
    }
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, network_guard.install) as executor:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            # The first task starts the process, which inherits the environment.
            executor.submit(inspect_models_here).result()
        yield executor
        assert executor.submit(network_guard.attempts_of_ours).result() == []


@pytest.fixture(scope="session")
def engine(pytestconfig: pytest.Config) -> Iterator[ProcessPoolExecutor]:
    # vLLM compiles a few helpers even in eager mode, which takes longer than all the rest.
    with engine_process(pytestconfig.cache.mkdir("vllm"), TORCH_COMPILE_DISABLE="1") as executor:
        yield executor


@pytest.fixture
def own_engine(pytestconfig: pytest.Config) -> Iterator[ProcessPoolExecutor]:
    # Speculation imports numba, after which vLLM 0.32 starts no other engine in the process.
    with engine_process(pytestconfig.cache.mkdir("vllm"), TORCH_COMPILE_DISABLE="1") as executor:
        yield executor


@pytest.fixture
def hub_engine(
    pytestconfig: pytest.Config, tmp_path: Path
) -> Iterator[tuple[Hub, ProcessPoolExecutor]]:
    """A Hub on this machine, and engines that load models from it."""
    with running_hub() as hub:
        environment = {**hub.environment(tmp_path / "home"), "TORCH_COMPILE_DISABLE": "1"}
        with engine_process(pytestconfig.cache.mkdir("vllm"), **environment) as executor:
            yield hub, executor


@pytest.fixture
def compiling_engine(pytestconfig: pytest.Config) -> Iterator[ProcessPoolExecutor]:
    # In its CI mode vLLM traces models but does not compile them.
    with engine_process(pytestconfig.cache.mkdir("vllm"), VLLM_CPU_CI_ENV="0") as executor:
        yield executor
