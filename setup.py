"""Builds the C++ kernels; everything else is in pyproject.toml."""

from __future__ import annotations

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

NOT_BUILT = """
vllm-pcdvq: the CPU kernels were NOT built: {error}
  They need g++ with OpenMP: `apt-get install g++` or `dnf install gcc-c++`, then install again.
  The installation goes on; on a CPU a slow torch path will serve.
"""


class BuildKernels(build_ext):
    """Builds a plain shared library, loaded with ctypes; an install survives its failure."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(NOT_BUILT.format(error=error), file=sys.stderr)
            raise  # `optional` makes setuptools continue


setup(
    cmdclass={"build_ext": BuildKernels},
    ext_modules=[
        Extension(
            "pcdvq_kernels._cpu",
            sources=sorted(glob("kernels/csrc/*.cpp")),
            depends=sorted(glob("kernels/csrc/*.h")),
            language="c++",
            # Without contraction only explicit FMAs fuse, the same ones in every code path.
            extra_compile_args=[
                "-O3",
                "-std=c++17",
                "-fopenmp",
                "-fvisibility=hidden",
                "-ffp-contract=off",
                "-g0",
                # gcc 12 warns about its own AVX-512 header, thousands of lines of it.
                "-Wno-uninitialized",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-fopenmp"],
            optional=True,
        )
    ],
)
