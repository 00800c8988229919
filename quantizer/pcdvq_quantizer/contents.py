"""What belongs to a checkpoint directory, and what of a model's directory goes along."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from huggingface_hub import constants
from pcdvq_kernels.checkpoint import (
    CODEBOOK_FILE,
    INDEX_FILE,
    REPORT_FILE,
    read_index,
    read_quantization_config,
)
from pcdvq_kernels.config import QUANT_METHOD
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.vptq import layout as vptq

from pcdvq_quantizer.files import whole_file

README = "README.md"
OWN_FILES = ("config.json", INDEX_FILE, CODEBOOK_FILE, REPORT_FILE, README)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
TEMPLATES = "additional_chat_templates"
# The kinds of files that transformers and vLLM read beside weights, and licenses. Nothing else of
# a model's directory is anybody's business: keys, code, pickled weights.
COMPANION = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json"
    r"|tokenizer\.model(\.v\d+(m\d+)?)?|(spiece|sentencepiece|sentencepiece\.bpe|tiktoken)\.model"
    r"|vocab\.(json|txt)|merges\.txt|normalizer\.json|tekken\.json|[\w-]+\.tiktoken"
    rf"|chat_template\.json|({TEMPLATES}/)?[\w.-]+\.jinja"
    r"|generation_config\.json|((video_|image_)?pre)?processor_config\.json"
    r"|(?i:(LICEN[CS]E|COPYING|NOTICE|USE_POLICY)([_-][\w-]+)?(\.(md|txt|rst))?)"
)


def companions(directory: Path) -> list[str]:
    """Names of the files that go along with the weights in `directory`."""
    return [name for name in _names(directory) if COMPANION.fullmatch(name)]


def checkpoint_files(directory: Path) -> list[str]:
    """Names of all files that belong to the checkpoint in `directory`.

    Raises:
        CheckpointError: it has no index.
    """
    own = [name for name in OWN_FILES if (directory / name).exists()]
    return sorted({*own, *read_index(directory)[0], *companions(directory)})


def copy_file(name: str, source: Path, target: Path) -> None:
    """Copy file `name` of directory `source` to `target`.

    Raises:
        PCDVQError: as `check_inside`.
    """
    path = check_inside(source, name)
    (target / name).parent.mkdir(exist_ok=True)
    with whole_file(target / name) as scratch:
        shutil.copyfile(path, scratch)


def copy_files(names: Iterable[str], source: Path, target: Path) -> None:
    """`copy_file` for each of `names`."""
    for name in names:
        copy_file(name, source, target)


def check_inside(directory: Path, name: str) -> Path:
    """Where file `name` of `directory` is, links followed.

    Raises:
        PCDVQError: it is not a regular file, or is a link to outside of both `directory` and the
            Hub's cache.
    """
    try:
        path, home = (directory / name).resolve(), directory.resolve()
    except (OSError, RuntimeError) as error:
        raise PCDVQError(f"{directory / name} leads nowhere ({error}); delete it") from None
    places = [home, Path(constants.HF_HUB_CACHE).resolve()]
    if home.parent.name == "snapshots":  # in some other cache of the Hub
        places.append(home.parent.parent / "blobs")
    if not any(path.is_relative_to(place) for place in places):
        raise PCDVQError(
            f"{directory / name} is a link to {path}, which is no part of {directory}; put the "
            "file itself there, or delete the link"
        )
    if not path.is_file():
        raise PCDVQError(f"{directory / name} is not a regular file; delete it")
    return path


def check_replaceable(directory: Path) -> None:
    """Raise PCDVQError unless `directory` is empty or a checkpoint of ours and nothing else."""
    names = sorted(_names(directory))
    if not names:
        return
    if not _is_ours(directory):
        raise PCDVQError(
            f"{directory} is not a checkpoint that pcdvq has written, and --overwrite would delete "
            f"what it holds ({names[0]}, for instance); choose another OUT"
        )
    for name in names:
        if name not in OWN_FILES and not SHARD.fullmatch(name) and not COMPANION.fullmatch(name):
            raise PCDVQError(
                f"{directory} holds {name}, which is no part of a checkpoint, and --overwrite "
                "would delete it; move it away or choose another OUT"
            )


def _is_ours(directory: Path) -> bool:
    try:
        method = read_quantization_config(directory).get("quant_method")
    except CheckpointError:
        return False
    # Others publish checkpoints of VPTQ, too.
    return method == QUANT_METHOD or (
        method == vptq.QUANT_METHOD and (directory / REPORT_FILE).is_file()
    )


def _names(directory: Path) -> Iterator[str]:
    """Names of the files of `directory`; a directory in it ends with a slash, unless it is the one
    of further chat templates, whose files are named instead."""
    for path in sorted(directory.iterdir()):
        if path.name == TEMPLATES and path.is_dir() and not path.is_symlink():
            yield from (
                f"{TEMPLATES}/{each.name}" + "/" * each.is_dir() for each in sorted(path.iterdir())
            )
        else:
            yield path.name + "/" * (path.is_dir() and not path.is_symlink())
