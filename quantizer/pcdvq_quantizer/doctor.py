"""Checks of an installation: what would keep `vllm serve` from working or from being fast."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec

import torch
from packaging.requirements import Requirement
from pcdvq_kernels import cpu
from pcdvq_kernels.ops import kernels_for
from rich.table import Table

from pcdvq_quantizer.threads import THREADS_BIND, all_cores

DISTRIBUTION = "vllm-pcdvq"
PLUGIN_GROUP = "vllm.general_plugins"


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        check: what was looked at.
        found: what it is like.
        remedy: what to do about it; empty if it is as it should be.
        fatal: whether serving will not work as it is.
    """

    check: str
    found: str
    remedy: str = ""
    fatal: bool = False


def examine() -> list[Finding]:
    """All findings, in the order in which remedies are best applied."""
    return [finding for check in CHECKS for finding in check()]


def findings_table(findings: list[Finding]) -> Table:
    """`findings` as a table."""
    table = Table("", "found", "remedy")
    for finding in findings:
        table.add_row(finding.check, finding.found, finding.remedy or "-")
    return table


def _vllm() -> Iterator[Finding]:
    required = next(
        requirement
        for requirement in map(Requirement, metadata.requires(DISTRIBUTION) or [])
        if requirement.name == "vllm"
    )
    if find_spec("vllm") is None:
        yield Finding("vLLM", "not installed", f"pip install '{required}'", fatal=True)
        return
    try:
        version = metadata.version("vllm")
    except metadata.PackageNotFoundError:
        # The command `vllm` of the CPU build looks for this metadata and dies without it.
        remedy = "install packaging/vllm of the vllm-pcdvq repository (its Makefile does)"
        yield Finding("vLLM", "no distribution named vllm", remedy, fatal=True)
        return
    fits = required.specifier.contains(version, prereleases=True)
    remedy = "" if fits else f"pip install '{required}', or another release of {DISTRIBUTION}"
    yield Finding("vLLM", version, remedy, fatal=not fits)


def _plugin() -> Iterator[Finding]:
    found = any(point.name == "pcdvq" for point in metadata.entry_points(group=PLUGIN_GROUP))
    remedy = "" if found else f"install {DISTRIBUTION} in the environment that vLLM runs in"
    yield Finding("plugin", "registered" if found else "not registered", remedy, fatal=not found)


def _torchvision() -> Iterator[Finding]:
    """A build that does not match torch keeps transformers from being imported."""
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except (ImportError, OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        remedy = "pip uninstall torchvision torchaudio torchcodec; text models need none of them"
        yield Finding("torchvision", f"does not match torch ({reason})", remedy, fatal=True)


def _kernels() -> Iterator[Finding]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    lacks_cpu_kernels = device.type == "cpu" and not cpu.available()
    remedy = cpu.unavailable_message() if lacks_cpu_kernels else ""
    yield Finding("kernels", kernels_for(device), remedy)


def _threads() -> Iterator[Finding]:
    if torch.cuda.is_available():
        return
    cores, bound = len(os.sched_getaffinity(0)), os.environ.get(THREADS_BIND)
    if bound:
        yield Finding("threads", f"{THREADS_BIND}={bound}, {cores} cores")
    else:
        remedy = f"export {THREADS_BIND}={all_cores()}; by default vLLM leaves a core out"
        yield Finding("threads", f"not bound, {cores} cores", remedy)


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _vllm,
    _plugin,
    _torchvision,
    _kernels,
    _threads,
)
