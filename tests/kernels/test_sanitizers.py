"""The C++ kernels under AddressSanitizer and UndefinedBehaviorSanitizer."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from distutils.core import run_setup
from pathlib import Path

import pytest
from pcdvq_kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
# AddressSanitizer sees what `null` and `object-size` would; calls instead of inlined checks halve
# the time of compilation.
FLAGS = (
    *("-O1", "-fPIC", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
    *("-fno-sanitize=null,object-size", "--param", "asan-instrumentation-with-call-threshold=0"),
)
AVX512 = "kernels_avx512.cpp"
NO_AVX512 = '#include "isa.h"\nconst pcdvq::Kernels* pcdvq::avx512_kernels() { return nullptr; }\n'


def sanitizer_runtime() -> str:
    """Path of libasan.so; skips where the compiler has none."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    command = ["g++", "-print-file-name=libasan.so"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    if not os.path.isabs(found):
        pytest.skip("this g++ has no AddressSanitizer (libasan.so)")
    return found


def build(directory: Path, scratch: Path) -> Path:
    """The library of setup.py with sanitizers, in `directory`, unless it is there already."""
    extension = run_setup(str(ROOT / "setup.py"), stop_after="init").ext_modules[0]
    sources = [ROOT / source for source in extension.sources]
    if "avx512" not in cpu.isas():  # half of the time of compilation, for kernels that cannot run
        sources = [source for source in sources if source.name != AVX512]
        (scratch / AVX512).write_text(NO_AVX512)
        sources.append(scratch / AVX512)
    flags = [*extension.extra_compile_args, *FLAGS, f"-I{ROOT / 'kernels/csrc'}"]
    digest = hashlib.sha256(" ".join((*flags, *cpu.isas())).encode())
    for path in sorted((ROOT / "kernels/csrc").iterdir()):
        digest.update(path.read_bytes())
    library = directory / f"{digest.hexdigest()[:16]}.so"
    if library.exists():
        return library
    for old in directory.glob("*.so"):
        old.unlink()

    def compile_source(source: Path) -> str:
        compiled = str(scratch / f"{source.name}.o")
        subprocess.run(["g++", *flags, "-c", str(source), "-o", compiled], check=True)
        return compiled

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_source, sources))
    partial = scratch / "partial"
    link = ["g++", "-shared", *extension.extra_link_args, *FLAGS, *objects, "-o", str(partial)]
    subprocess.run(link, check=True)
    return Path(shutil.move(partial, library))


@pytest.mark.skipif(not cpu.available(), reason="the CPU kernels are not built")
def test_every_kernel(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": sanitizer_runtime(),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python and torch keep what they have to the end
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "OMP_NUM_THREADS": "2",
        "OMP_WAIT_POLICY": "passive",
    }
    library = build(pytestconfig.cache.mkdir("sanitized"), tmp_path)
    program = Path(__file__).with_name("sanitized_calls.py")
    run = subprocess.run(
        [sys.executable, str(program), str(library)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-6000:]
    assert [line.partition(":")[0] for line in run.stdout.splitlines()] == cpu.isas()
