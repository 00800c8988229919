"""GGUF files as a source: tensors are dequantized one at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)

from pcdvq_quantizer.gguf_metadata import (
    ROPE_FACTORS,
    check_file,
    special_token_options,
    take_metadata,
    take_rope_factors,
)
from pcdvq_quantizer.selection import UNKNOWN_MODEL
from pcdvq_quantizer.sources import reason

# What `GGUFReader` raises for files that are something else, or damaged.
NO_GGUF = (*UNKNOWN_MODEL, RecursionError)


# Several times as many as files with the largest vocabularies need.
MOST_READS = 1 << 23


class BoundedReader(GGUFReader):
    """Stops where a file has more keys, tensors and items of lists than any model has.

    The file says how many there are, and may have holes as large as they need.
    """

    _reads = 0

    def _get(self, *args: Any, **kwargs: Any) -> Any:
        self._reads += 1
        if self._reads > MOST_READS:
            raise ValueError("it has more keys, tensors or items of lists than any model")
        return super()._get(*args, **kwargs)


class GGUFSource:
    """A GGUF file of an architecture transformers can read.

    transformers maps names and undoes llama.cpp's layout changes (its `TENSOR_PROCESSORS`); the
    blocks are dequantized by the `gguf` package. Tensors are stored as bf16.
    """

    def __init__(self, path: Path) -> None:
        """Open the GGUF file `path`.

        Raises:
            PCDVQError: it is no such file, or it says something of the model, in a key of its
                metadata or in a tensor, that cannot be taken over.
        """
        self.name = path.name
        self._path = path
        try:
            reader = BoundedReader(path)
        except NO_GGUF as error:
            raise PCDVQError(
                f"{path} cannot be read as a GGUF file ({error}); get it again"
            ) from error
        architecture = check_file(reader, path.name)
        try:
            self._hf_config = AutoConfig.from_pretrained(
                path.parent, gguf_file=path.name, trust_remote_code=False
            )
            self._hf_config.dtype = torch.bfloat16
            take_metadata(reader, architecture, self._hf_config)
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(self._hf_config, trust_remote_code=False)
            processor_class = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
            self._processor = processor_class(config=self._hf_config.to_dict())
            names = get_gguf_hf_weights_map(model, self._processor)
        except PCDVQError:
            raise
        except UNKNOWN_MODEL as error:
            raise PCDVQError(
                f"{path} cannot be read as a GGUF model ({reason(error)}); get it again"
            ) from error
        self._hf_config.architectures = [type(model).__name__]
        self._special_tokens = special_token_options(reader)
        state = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self._tensors = self._take_tensors(reader, names, state)
        self.shapes = {name: state[name] for name in self._tensors}
        tied = {"lm_head.weight"} if self._hf_config.tie_word_embeddings else set()
        if missing := sorted(state.keys() - self._tensors.keys() - tied):
            raise PCDVQError(f"{path} lacks tensor {missing[0]} ({len(missing)} in all)")

    @property
    def location(self) -> Path:
        return self._path

    @property
    def weight_files(self) -> list[Path]:
        return [self._path]

    def _take_tensors(
        self, reader: GGUFReader, names: dict[str, str], shapes: dict[str, tuple[int, ...]]
    ) -> dict[str, ReaderTensor]:
        """The tensors of the file by Hugging Face name.

        Args:
            names: GGUF name to Hugging Face name.
            shapes: of the model's tensors.

        Raises:
            PCDVQError: there is no place for one, it has another shape, or its blocks cannot be
                decoded.
        """
        tensors: dict[str, ReaderTensor] = {}
        for tensor in reader.tensors:
            if tensor.name == ROPE_FACTORS:
                take_rope_factors(torch.tensor(_decode(tensor)).float(), self._hf_config)
                continue
            name = names.get(tensor.name)
            if name is None or name in tensors:
                raise PCDVQError(
                    f"{self.name} has a tensor {tensor.name}, which transformers has no place for "
                    "in a model of this architecture; give the original model in Hugging Face's "
                    "layout"
                )
            shape = [int(size) for size in reversed(tensor.shape)]
            if _whole(shape) != _whole(shapes[name]):
                raise PCDVQError(
                    f"tensor {tensor.name} of {self.name} is {shape}, the file's metadata make it "
                    f"{list(shapes[name])}; get the file again"
                )
            _decode(tensor, rows=1)
            tensors[name] = tensor
        return tensors

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(self._hf_config.to_json_string(use_diff=True))

    def load(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        values = _decode(tensor)
        values = self._processor.process(weights=values, name=tensor.name).weights
        return torch.from_numpy(values.copy()).view(self.shapes[name]).to(torch.bfloat16)

    def bytes(self, name: str) -> int:
        return 2 * torch.Size(self.shapes[name]).numel()

    @property
    def dtypes(self) -> dict[str, str]:
        return dict.fromkeys(self.shapes, "BF16")

    def without(self, names: Collection[str]) -> GGUFSource:
        other = copy.copy(self)
        other.shapes = {name: shape for name, shape in self.shapes.items() if name not in names}
        return other

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        try:
            return AutoTokenizer.from_pretrained(
                self._path.parent,
                gguf_file=self._path.name,
                trust_remote_code=False,
                **self._special_tokens,
            )
        # The package `tokenizers` raises nothing more special.
        except Exception as error:
            raise PCDVQError(
                f"{self.name} has no tokenizer that transformers can make ({reason(error)}); get "
                "the file again"
            ) from error

    def copy_files(self, output: Path) -> None:
        self._tokenizer.save_pretrained(output)
        GenerationConfig.from_model_config(self._hf_config).save_pretrained(output)


def _decode(tensor: ReaderTensor, rows: int | None = None) -> np.ndarray:
    """The first `rows` rows of `tensor`, default all, as it is in the file.

    Raises:
        PCDVQError: blocks of its type cannot be decoded.
    """
    try:
        return dequantize(tensor.data[:rows], tensor.tensor_type)
    except (NotImplementedError, ValueError) as error:
        raise PCDVQError(
            f"tensor {tensor.name} is {tensor.tensor_type.name}, which cannot be decoded "
            f"({error}); give the original model in Hugging Face's layout"
        ) from error


def _whole(shape: Iterable[int]) -> list[int]:
    """`shape` without the sizes of 1, which llama.cpp leaves out."""
    return [size for size in shape if size != 1]
