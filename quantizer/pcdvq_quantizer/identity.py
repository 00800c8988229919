"""What makes two models the same: their contents, not where they lie or what they are called."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pcdvq_quantizer.contents import check_inside, companions
from pcdvq_quantizer.sources import Source

# Of a file of weights: its beginning, which has the header, and samples of the rest.
BEGINNING_BYTES = 1 << 24
SAMPLES, SAMPLE_BYTES = 1024, 1 << 14


def fingerprint(source: Source) -> dict[str, object]:
    """Equal for what is the same model on this machine and was not changed in between.

    The time of change is part of it: it also tells of changes between the samples.
    """
    return {
        "model_sha256": weights_sha256(source),
        "model_files_sha256": _files_sha256(source),
        "model_changed_ns": [path.stat().st_mtime_ns for path in source.weight_files],
    }


def weights_sha256(source: Source) -> str:
    """Digest of the weights of `source`: the same for copies of them, of all machines."""
    digest = hashlib.sha256()
    for path in source.weight_files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            for start, length in _parts(size):
                file.seek(start)
                digest.update(file.read(length))
    return digest.hexdigest()


def _parts(size: int) -> Iterable[tuple[int, int]]:
    """(start, bytes) of what is read of a file of `size` bytes: all of it, if that is not more."""
    rest = size - BEGINNING_BYTES
    if rest <= SAMPLES * SAMPLE_BYTES:
        return [(0, size)]
    last = rest - SAMPLE_BYTES
    starts = (BEGINNING_BYTES + last * number // (SAMPLES - 1) for number in range(SAMPLES))
    return [(0, BEGINNING_BYTES), *((start, SAMPLE_BYTES) for start in starts)]


def _files_sha256(source: Source) -> str:
    """Of the configuration, the tokenizer and all else that goes along with the weights."""
    config = json.dumps([source.config, source.shapes], sort_keys=True, default=str)
    digest = hashlib.sha256(config.encode())
    if source.location.is_dir():
        for name in companions(source.location):
            content = check_inside(source.location, name).read_bytes()
            digest.update(hashlib.sha256(name.encode()).digest())
            digest.update(hashlib.sha256(content).digest())
    return digest.hexdigest()


def paths_of(source: Source) -> list[Path]:
    """Every file and directory that reading `source` depends on."""
    return [source.location, *source.weight_files]
