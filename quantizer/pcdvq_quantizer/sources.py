"""Models to quantize: a local Hugging Face directory, a hub id, or a GGUF file."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pcdvq_kernels.checkpoint import INDEX_FILE, TensorInfo, open_tensors, read_index, read_json
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

SINGLE_FILE = "model.safetensors"
MISTRAL_FILES = "consolidated*.safetensors"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
NOT_COPIED = ("config.json", INDEX_FILE, "README.md", ".gitattributes")


class Source(Protocol):
    """A model whose tensors are read one at a time."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by Hugging Face name, in the order to be stored."""

    def load(self, name: str) -> Tensor:
        """Tensor `name`, in the dtype it is to be stored in when left unquantized."""

    def bytes(self, name: str) -> int:
        """Stored size of tensor `name` when left unquantized."""

    def copy_files(self, output: Path) -> None:
        """Write tokenizer, generation config and the like to `output`."""


def open_source(model: str) -> Source:
    """Open `model`: a directory, a .gguf file, or a hub id (downloaded, cached).

    Raises:
        PCDVQError: it does not exist or holds no safetensors weights.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return SafetensorsSource.open(model, path)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise PCDVQError(f"{model} does not exist; give a GGUF file, a directory or a hub id")
        from pcdvq_quantizer.gguf_source import GGUFSource

        return GGUFSource(path)
    return SafetensorsSource.open(model, _download(model))


def _download(repo_id: str) -> Path:
    try:
        return Path(
            snapshot_download(
                repo_id,
                allow_patterns=["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"],
                ignore_patterns=["original/*", "onnx/*"],
            )
        )
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PCDVQError(
            f"{repo_id} is neither a local directory, a .gguf file, nor a model the hub gives out "
            f"({reason}). Check the spelling, the connection, or log in with `hf auth login`."
        ) from error


@dataclass(frozen=True)
class SafetensorsSource:
    """A Hugging Face directory with safetensors weights."""

    name: str
    directory: Path
    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    files: dict[str, str]
    sizes: dict[str, int]

    @classmethod
    def open(cls, name: str, directory: Path) -> SafetensorsSource:
        _check_format(directory)
        config = read_json(directory / "config.json")
        files, shapes, sizes = {}, {}, {}
        for tensor, file, shape, size in _list_tensors(directory):
            files[tensor], shapes[tensor], sizes[tensor] = file, shape, size
        return cls(name, directory, config, shapes, files, sizes)

    def load(self, name: str) -> Tensor:
        with open_tensors(self.directory / self.files[name]) as file:
            return file.get_tensor(name)

    def bytes(self, name: str) -> int:
        return self.sizes[name]

    def copy_files(self, output: Path) -> None:
        for path in sorted(self.directory.iterdir()):
            if not path.is_file() or path.suffix in WEIGHT_SUFFIXES or path.name in NOT_COPIED:
                continue
            if not path.name.endswith(".index.json"):
                shutil.copyfile(path, output / path.name)


def _check_format(directory: Path) -> None:
    """Raise PCDVQError if the model is there in Mistral's own format only."""
    ours = any((directory / name).is_file() for name in (INDEX_FILE, SINGLE_FILE))
    if not ours and (theirs := next(directory.glob(MISTRAL_FILES), None)):
        raise PCDVQError(
            f"{theirs} is in Mistral's own format, which has the rows of q and k in another order; "
            f"take the model in Hugging Face's format (config.json and {SINGLE_FILE} or several)"
        )


def _list_tensors(directory: Path) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, file, shape, bytes) of every tensor, file by file."""
    for file in _weight_files(directory):
        with open_tensors(directory / file) as weights:
            for name in weights.keys():  # noqa: SIM118
                view = weights.get_slice(name)
                shape = tuple(view.get_shape())
                info = TensorInfo(directory / file, view.get_dtype(), shape)
                yield name, file, shape, info.bytes


def _weight_files(directory: Path) -> list[str]:
    if (directory / INDEX_FILE).is_file():
        return sorted(read_index(directory)[0])
    if (directory / SINGLE_FILE).is_file():
        return [SINGLE_FILE]
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise PCDVQError(
            f"{directory} holds only pickled weights, which can run code when read; convert them "
            "with transformers' save_pretrained (it writes safetensors) and try again"
        )
    raise PCDVQError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}")
