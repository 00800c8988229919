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
from torch.utils._pytree import tree_flatten
from transformers import AutoModelForCausalLM, PreTrainedModel

from pcdvq_quantizer.experts import separate_experts
from pcdvq_quantizer.selection import hf_config, names_in_model
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
                hf_config(source.config), dtype=torch.float32, trust_remote_code=False
            )
        separate_experts(self.model, source.shapes)
        names = names_in_model(self.model, source.shapes)
        self._stored = {loaded: stored for stored, loaded in names.items()}
        self._stored |= {stored: stored for stored in names}  # as `separate_experts` has them
        self.model.eval()
        self.prefix, self._stack = _decoder_layers(self.model, set(linears), source.name)
        self._base = self.model.get_submodule(self.prefix.rpartition(".")[0])
        self.layers = [f"{self.prefix}.{index}" for index in range(len(self._stack))]

    def check(self) -> None:
        """Raises PCDVQError if decoder layers hand on more than one stream of hidden states."""
        _ = self._tuples

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

    @property
    def predicts(self) -> bool:
        """Whether its output head is stored, without which it cannot write or predict text."""
        self._materialize_except_layers()
        head = self.model.get_output_embeddings()
        return head is None or self._missing(head) is None

    def embed(self, tokens: Tensor, embedding: Tensor | None = None) -> tuple[Tensor, list[Call]]:
        """The input of the first decoder layer, and how each layer is called.

        Args:
            tokens: int64 [S, T].
            embedding: fp32 [V, H] to use in place of the model's own.

        Returns:
            (hidden fp32 [S, T, H], a `Call` for each layer; calls fit any row of `tokens`).

        Raises:
            PCDVQError: as `check`; or a parameter is not stored.
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
        """Logits [T, V] of hidden states [T, H] that come out of the last decoder layer.

        Raises:
            PCDVQError: a parameter, such as the output head, is not stored.
        """
        recorders = [_Recorder(self._tuples) for _ in self._stack]
        # Not as inputs_embeds: models may norm them, or add positions.
        recorders[-1].output = hidden[None]
        with self._instead_of_layers(recorders):
            self._require_head()
            tokens = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.device)
            return self.model(input_ids=tokens, use_cache=False).logits[0]

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
        """The whole model in memory, for a while.

        Raises:
            PCDVQError: a parameter, such as the output head, is not stored.
        """
        self._materialize_except_layers()
        self._require_head()
        for index in range(len(self.layers)):
            self.load(index)
        yield self.model.to(self.device)
        for index in range(len(self.layers)):
            self.unload(index)

    @cached_property
    def _tuples(self) -> bool:
        """Whether decoder layers return tuples, of which the hidden states are the first.

        Raises:
            PCDVQError: it is another thing that they return, or they read something else, too,
                that depends on the text.
        """
        if self._misfit(tuples=False) is None:
            return False
        if reason := self._misfit(tuples=True):
            raise self._unknown(reason)
        return True

    def _misfit(self, tuples: bool) -> str | None:
        """Why layers that return tuples, or do not, are not those of this model, tried on tokens.

        Raises:
            PCDVQError: as `_tuples`.
        """
        calls = []
        for token in range(2):
            recorders = [_Recorder(tuples) for _ in self._stack]
            misfit = self._try(torch.full((1, 1), token, device=self.device), recorders)
            if recorders[0].hidden.dim() not in (0, 3):
                raise self._unknown("they hand on several streams of hidden states")
            if misfit is not None:
                return misfit
            calls.append([recorder.call for recorder in recorders])
        if not all(map(_same, *calls)):
            raise self._unknown("they read more of the text than hidden states")
        return None

    def _try(self, tokens: Tensor, recorders: list[_Recorder]) -> str | None:
        """Why the model does not run with `recorders` for its layers, None if it does."""
        with self._instead_of_layers(recorders):
            try:
                self._base(input_ids=tokens, use_cache=False)
            except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
                # Such as for a tensor [1, 1, H], which has not as many parts as the tuple.
                return f"{type(error).__name__}: {error}"
        if any(recorder.hidden.dim() != 3 for recorder in recorders):
            return "what they return is not what the next one reads"
        return None

    def _unknown(self, reason: str) -> PCDVQError:
        return PCDVQError(
            f"calibration does not handle the decoder layers of {self._source.name} ({reason}); "
            "use --calibration none"
        )

    @contextmanager
    def _instead_of_layers(self, recorders: list[_Recorder]) -> Iterator[None]:
        self._materialize_except_layers()
        self._require(self._base, "as calibration needs it; use --calibration none")
        try:
            # Not in the place of the modules, of which the model may read attributes.
            for layer, recorder in zip(self._stack, recorders, strict=True):
                layer.forward = recorder
            yield
        finally:
            for layer in self._stack:
                layer.__dict__.pop("forward", None)

    def _require_head(self) -> None:
        """Raise PCDVQError if the output head is not stored."""
        if (head := self.model.get_output_embeddings()) is not None:
            self._require(
                head,
                "without which it cannot write or predict text; name a text with --calibration, "
                "and leave out --objective and rates between those offered",
            )

    def _require(self, module: nn.Module, why: str) -> None:
        """Raise PCDVQError if a parameter of `module`, decoder layers apart, is not stored."""
        if (name := self._missing(module)) is not None:
            raise PCDVQError(f"{self._source.name} stores nothing as {name}, {why}")

    def _missing(self, module: nn.Module) -> str | None:
        """A parameter of `module`, decoder layers apart, that is not stored; None if all are."""
        wanted = {id(parameter) for parameter in module.parameters() if parameter.is_meta}
        for name, parameter in self.model.named_parameters():
            if id(parameter) in wanted and not name.startswith(f"{self.prefix}."):
                return name
        return None

    def _materialize_except_layers(self) -> None:
        for name, module in self.model.named_modules():
            if not name.startswith(f"{self.prefix}."):
                self._materialize(module, name)
        self.model.tie_weights()

    def _materialize(self, module: nn.Module, name: str) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            full = f"{name}.{key}" if name else key
            # A tied output head is not stored; `tie_weights` makes it the embedding.
            stored = self._stored.get(full)
            if parameter.device.type == "meta" and stored is not None:
                value = self._source.load(stored).to(self.device, torch.float32)
                setattr(module, key, nn.Parameter(value, requires_grad=False))


class _Recorder:
    """Stands for a decoder layer's `forward`: keeps what it is given, passes hidden states on.

    Attributes:
        output: what to pass on instead.
    """

    def __init__(self, tuples: bool) -> None:
        self._tuples = tuples
        self.hidden = torch.empty(())  # until it is called
        self.call = Call((), {})
        self.output: Tensor | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.pop("hidden_states")
        if not isinstance(given, Tensor):
            raise TypeError(f"{type(given).__name__} in the place of hidden states")
        self.hidden = given
        self.call = Call(args[1:], kwargs)
        output = self.hidden if self.output is None else self.output
        # What is beside the hidden states is nothing that another layer may need.
        return (output, _Beside()) if self._tuples else output


class _Beside:
    """Equal to nothing else."""


def _same(a: Call, b: Call) -> bool:
    """Whether layers are called alike."""
    (mine, shape), (theirs, other) = (tree_flatten((each.args, each.kwargs)) for each in (a, b))
    return shape == other and all(
        x.shape == y.shape and torch.equal(x, y)
        if isinstance(x, Tensor) and isinstance(y, Tensor)
        else x is y or (type(x) is type(y) and x == y)
        for x, y in zip(mine, theirs, strict=True)
    )


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
