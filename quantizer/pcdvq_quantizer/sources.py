"""Models to quantize: a local Hugging Face directory, a hub id, or a GGUF file."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pcdvq_kernels.checkpoint import INDEX_FILE, TensorInfo, open_tensors, read_index, read_json
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.contents import companions, copy_files

SINGLE_FILE = "model.safetensors"
# What a directory without a model in Hugging Face's layout may hold, and what to do then.
OTHER_CONTENTS = {
    "adapter_config.json": "holds an adapter (LoRA), not a model; merge it into its base model "
    "with peft's merge_and_unload, save that and quantize the result",
    "consolidated*.safetensors": "holds a model in Mistral's own layout "
    "(consolidated.safetensors); take the files that Hugging Face's layout has (model*.safetensors "
    "and config.json), or convert it with transformers' script for its architecture",
    **dict.fromkeys(
        ("*.bin", "*.pt", "*.pth"),
        "holds only pickled weights, which can run code when read; convert them with transformers' "
        "save_pretrained (it writes safetensors) and try again",
    ),
    "*.gguf": "holds GGUF files; name one of them",
}
CODE = "code that a model brings along (auto_map) is never run"


class Source(Protocol):
    """A model whose tensors are read one at a time."""

    @property
    def name(self) -> str:
        """What the user called it."""

    @property
    def location(self) -> Path:
        """The directory or file it is read from."""

    @property
    def weight_files(self) -> list[Path]:
        """The files of its weights, in a fixed order."""

    @property
    def config(self) -> dict[str, Any]:
        """Its config.json."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor by Hugging Face name, in the order to be stored."""

    @property
    def dtypes(self) -> dict[str, str]:
        """Dtype of every tensor, as safetensors headers name it."""

    def load(self, name: str) -> Tensor:
        """Tensor `name`, in the dtype it is to be stored in when left unquantized."""

    def bytes(self, name: str) -> int:
        """Stored size of tensor `name` when left unquantized."""

    def without(self, names: Collection[str]) -> Source:
        """The same model with all tensors but `names`."""

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


def reason(error: BaseException) -> str:
    """What `error` of transformers says, in short, without its advice to run code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if "trust_remote_code" in str(error):
        return CODE
    return " ".join(lines[:2] if lines[0].endswith(":") else lines[:1])


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
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, name: str, directory: Path) -> SafetensorsSource:
        """Open `directory`, which the user called `name`.

        Raises:
            PCDVQError: it holds no such model, or a shard lacks a tensor of the index.
        """
        weight_files = _weight_files(directory)
        config = read_json(directory / "config.json")
        tensors: dict[str, TensorInfo] = {}
        for file, expected in weight_files.items():
            found = _read_header(directory / file)
            if missing := sorted(expected - found.keys()):
                raise PCDVQError(
                    f"{directory / file} lacks tensor {missing[0]} ({len(missing)} in all), which "
                    f"{INDEX_FILE} says it has; get the file again"
                )
            if twice := sorted(found.keys() & tensors.keys()):
                raise PCDVQError(
                    f"tensor {twice[0]} is in {tensors[twice[0]].file.name} and in {file} of "
                    f"{directory}; take it out of one of them"
                )
            tensors |= found
        return cls(name, directory, config, tensors)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @cached_property
    def dtypes(self) -> dict[str, str]:
        return {name: info.dtype for name, info in self.tensors.items()}

    @property
    def location(self) -> Path:
        return self.directory

    @property
    def weight_files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def load(self, name: str) -> Tensor:
        with open_tensors(self.tensors[name].file) as file:
            return file.get_tensor(name)

    def bytes(self, name: str) -> int:
        return self.tensors[name].bytes

    def without(self, names: Collection[str]) -> SafetensorsSource:
        kept = {name: info for name, info in self.tensors.items() if name not in names}
        return replace(self, tensors=kept)

    def copy_files(self, output: Path) -> None:
        copy_files(companions(self.directory), self.directory, output)


def _read_header(path: Path) -> dict[str, TensorInfo]:
    with open_tensors(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        return {
            name: TensorInfo(path, view.get_dtype(), tuple(view.get_shape()))
            for name, view in views.items()
        }


def _weight_files(directory: Path) -> dict[str, set[str]]:
    """Files with weights, each with the tensors that the index says it has.

    Raises:
        PCDVQError: there are none that this package reads.
    """
    if (directory / INDEX_FILE).is_file():
        shards, _ = read_index(directory)
        return {file: shards[file] for file in sorted(shards)}
    if (directory / SINGLE_FILE).is_file():
        return {SINGLE_FILE: set()}
    for pattern, advice in OTHER_CONTENTS.items():
        if any(directory.glob(pattern)):
            raise PCDVQError(f"{directory} {advice}")
    held = "holds" if any(directory.iterdir()) else "is empty: it holds"
    raise PCDVQError(
        f"{directory} {held} neither {SINGLE_FILE} nor {INDEX_FILE}; give the directory of a model "
        "in Hugging Face's layout"
    )
