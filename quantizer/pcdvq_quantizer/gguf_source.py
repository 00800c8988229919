"""GGUF files as a source: tensors are dequantized one at a time."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, ReaderTensor, dequantize
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.modeling_gguf_pytorch_utils import (
    TENSOR_PROCESSORS,
    TensorProcessor,
    get_gguf_hf_weights_map,
)


class GGUFSource:
    """A GGUF file of an architecture transformers can read.

    transformers maps names and undoes llama.cpp's layout changes (its `TENSOR_PROCESSORS`); the
    blocks are dequantized by the `gguf` package. Tensors are stored as bf16.
    """

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._path = path
        try:
            reader = GGUFReader(path)
            self._hf_config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
        except (ValueError, KeyError, IndexError, OSError) as error:
            raise PCDVQError(f"{path} cannot be read as a GGUF model: {error}") from error
        self._hf_config.dtype = torch.bfloat16
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._hf_config)
        self._hf_config.architectures = [type(model).__name__]
        self._special_tokens = special_token_options(reader)
        architecture = reader.get_field("general.architecture").contents()
        processor_class = TENSOR_PROCESSORS.get(architecture, TensorProcessor)
        self._processor = processor_class(config=self._hf_config.to_dict())
        names = get_gguf_hf_weights_map(model, self._processor)
        self._tensors: dict[str, ReaderTensor] = {
            names[tensor.name]: tensor for tensor in reader.tensors if tensor.name in names
        }
        state = model.state_dict()
        self.shapes = {name: tuple(state[name].shape) for name in self._tensors}
        tied = {"lm_head.weight"} if self._hf_config.tie_word_embeddings else set()
        if missing := sorted(set(state) - set(self._tensors) - tied):
            raise PCDVQError(f"{path} lacks tensor {missing[0]} ({len(missing)} in all)")

    @property
    def location(self) -> Path:
        return self._path

    @property
    def weight_files(self) -> list[Path]:
        return [self._path]

    @cached_property
    def config(self) -> dict[str, Any]:
        return json.loads(self._hf_config.to_json_string(use_diff=True))

    def load(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        values = self._processor.process(weights=values, name=tensor.name).weights
        return torch.from_numpy(values.copy()).view(self.shapes[name]).to(torch.bfloat16)

    def bytes(self, name: str) -> int:
        return 2 * torch.Size(self.shapes[name]).numel()

    def copy_files(self, output: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(
            self._path.parent, gguf_file=self._path.name, **self._special_tokens
        )
        tokenizer.save_pretrained(output)
        GenerationConfig.from_model_config(self._hf_config).save_pretrained(output)


def special_token_options(reader: GGUFReader) -> dict[str, bool]:
    """Special tokens that the file says every prompt gets; transformers does not read them."""
    options = {}
    for option in ("add_bos_token", "add_eos_token"):
        field = reader.get_field(f"tokenizer.ggml.{option}")
        if field is not None and field.contents():
            options[option] = True
    return options
