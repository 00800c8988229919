"""A causal LM of which one decoder layer at a time is in memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from pcdvq_quantizer.experts import separate_experts
from pcdvq_quantizer.selection import hf_config
from pcdvq_quantizer.sources import Source


@dataclass(frozen=True)
class Call:
    """How the model calls a decoder layer, besides the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class LayeredModel:
    """The model of a source: decoder layers are loaded one by one, in fp32.

    Attributes:
        prefix: name of the list of decoder layers, such as `model.layers`.
        layers: names of the decoder layers, in order.
    """

    def __init__(self, source: Source, linears: Iterable[str], device: torch.device) -> None:
        self._source = source
        self.device = device
        # Parameters are on the meta device; buffers such as rotary frequencies are real.
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(
                hf_config(source.config), dtype=torch.float32
            )
        separate_experts(self.model, source.shapes)
        self.model.eval()
        self.prefix, self._stack = _decoder_layers(self.model, set(linears), source.name)
        self._base = self.model.get_submodule(self.prefix.rpartition(".")[0])
        self.layers = [f"{self.prefix}.{index}" for index in range(len(self._stack))]

    @property
    def bytes(self) -> int:
        """Of all weights, in fp32."""
        return 4 * sum(parameter.numel() for parameter in self.model.parameters())

    @property
    def fits(self) -> bool:
        """Whether the whole model fits into the memory that is left on its device."""
        if self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
        else:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            with suppress(OSError, IndexError, ValueError):  # Linux counts caches too
                text = Path("/proc/meminfo").read_text(encoding="ascii")
                free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
        return self.bytes < free

    def embed(self, tokens: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """The input of the first decoder layer, and how each layer is called.

        Args:
            tokens: int64 [S, T].
            embedding: fp32 [V, H] to use in place of the model's own.

        Returns:
            (hidden fp32 [S, T, H], a `Call` for each layer; calls fit any row of `tokens`).
        """
        recorders = [_Recorder(self._tuples) for _ in self._stack]
        hidden = []
        with self._instead_of_layers(recorders):
            weight = self.model.get_input_embeddings().weight
            original = weight.data
            weight.data = original if embedding is None else embedding.to(self.device)
            for row in tokens:
                self._base(input_ids=row[None].to(self.device), use_cache=False)
                hidden.append(recorders[0].hidden)
            weight.data = original
        return torch.cat(hidden), [recorder.call for recorder in recorders]

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [T, V] of hidden states [T, H] that come out of the last decoder layer."""
        self._materialize_except_layers()
        with self._instead_of_layers([_Recorder(self._tuples) for _ in self._stack]):
            return self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]

    def load(self, index: int) -> nn.Module:
        """Decoder layer `index` with its weights, fp32.

        Raises:
            PCDVQError: some are not stored under the names that transformers gives them.
        """
        layer = self._stack[index]
        for name, module in layer.named_modules():
            self._materialize(module, f"{self.layers[index]}.{name}".rstrip("."))
        for name, parameter in layer.named_parameters():
            if parameter.is_meta:
                raise PCDVQError(
                    f"{self._source.name} stores {self.layers[index]}.{name} under another name or "
                    "in parts (experts of a kind that is not known?), which calibration does not "
                    "handle; use --calibration none"
                )
        return layer.to(self.device)

    def unload(self, index: int) -> None:
        """Free the weights of decoder layer `index`."""
        for module in self._stack[index].modules():
            for key, parameter in module.named_parameters(recurse=False):
                empty = torch.empty_like(parameter, device="meta")
                setattr(module, key, nn.Parameter(empty, requires_grad=False))

    @contextmanager
    def whole(self) -> Iterator[PreTrainedModel]:
        """The whole model in memory, for a while."""
        self._materialize_except_layers()
        for index in range(len(self.layers)):
            self.load(index)
        yield self.model.to(self.device)
        for index in range(len(self.layers)):
            self.unload(index)

    @cached_property
    def _tuples(self) -> bool:
        """Whether decoder layers return tuples, of which the hidden states are the first."""
        recorders = [_Recorder(tuples=False) for _ in self._stack]
        token = torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        with self._instead_of_layers(recorders):
            try:
                self._base(input_ids=token, use_cache=False)
            except ValueError:  # a tensor [1, 1, H] has not as many parts as the tuple
                return True
        return recorders[-1].hidden.dim() != 3

    @contextmanager
    def _instead_of_layers(self, modules: list[_Recorder]) -> Iterator[None]:
        self._materialize_except_layers()
        layers = list(self._stack)
        try:
            for index, module in enumerate(modules):
                self._stack[index] = module
            yield
        finally:
            for index, layer in enumerate(layers):
                self._stack[index] = layer

    def _materialize_except_layers(self) -> None:
        for name, module in self.model.named_modules():
            if not name.startswith(f"{self.prefix}."):
                self._materialize(module, name)
        self.model.tie_weights()

    def _materialize(self, module: nn.Module, name: str) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            # A tied output head is not stored; `tie_weights` makes it the embedding.
            if parameter.device.type == "meta" and full in self._source.shapes:
                value = self._source.load(full).to(self.device, torch.float32)
                setattr(module, key, nn.Parameter(value, requires_grad=False))


class _Recorder(nn.Module):
    """Stands for a decoder layer: keeps what it is given and passes the hidden states on."""

    def __init__(self, tuples: bool) -> None:
        super().__init__()
        self._tuples = tuples
        self.hidden = torch.empty(0)
        self.call = Call((), {})

    def forward(
        self, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | tuple[Tensor, None]:
        self.hidden, self.call = hidden_states, Call(args, kwargs)
        return (hidden_states, None) if self._tuples else hidden_states


def _decoder_layers(
    model: PreTrainedModel, linears: set[str], source: str
) -> tuple[str, nn.ModuleList]:
    """The module list that holds most of `linears`."""
    best, most = None, 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            held = sum(linear.startswith(name + ".") for linear in linears)
            if held > most:
                best, most = (name, module), held
    if best is None:
        raise PCDVQError(
            f"{source} has no list of decoder layers to calibrate one by one; use "
            "--calibration none"
        )
    return best
