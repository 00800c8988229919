"""The one line that a worker logs when its weights are ready."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.vptq.layout import VPTQLayout
from vllm.logger import init_logger

# A child of vLLM's logger, so that its handlers and VLLM_LOGGING_LEVEL apply.
logger = init_logger("vllm.pcdvq")


@dataclass
class Startup:
    """What a worker serves, gathered while its layers are built and loaded.

    Attributes:
        built: by kind, such as `linear layers`: layout and number of weights of each layer.
        ready: layers whose weights are in their final form.
        bytes: of those layers' parameters, biases excepted.
        seconds: that bringing them into that form took.
    """

    built: dict[str, list[tuple[CodebookSpec | VPTQLayout, int]]] = field(default_factory=dict)
    ready: int = 0
    bytes: int = 0
    seconds: float = 0.0

    def add_layer(self, kind: str, spec: CodebookSpec | VPTQLayout, weights: int) -> None:
        """Take note of a layer of `weights` weights that is being built."""
        if not self.built:
            _ask_for_tiles()
        self.built.setdefault(kind, []).append((spec, weights))

    def add_ready(self, layer: torch.nn.Module, seconds: float, kernels: str) -> None:
        """Take note of a layer that is ready; after the last of the first load, log the line."""
        parameters = layer.named_parameters()
        self.bytes += sum(each.nbytes for name, each in parameters if name != "bias")
        self.seconds += seconds
        self.ready += 1
        if self.ready == sum(map(len, self.built.values())):
            logger.info(
                "PCDVQ: %s; %.3g GiB packed, made ready in %.1f s; kernels: %s",
                ", ".join(map(self._describe, self.built)),
                self.bytes / 2**30,
                self.seconds,
                kernels,
            )

    def _describe(self, kind: str) -> str:
        layers = self.built[kind]
        codecs = " and ".join(sorted({spec.codec for spec, _ in layers}))
        bits = sum(spec.bits * weights for spec, weights in layers)
        average = bits / sum(weights for _, weights in layers)
        return f"{len(layers)} {kind} ({codecs}, codes of {average:.3f} bits per weight)"


def _ask_for_tiles() -> None:
    """Ask Linux that this process may use the tile registers of a CPU with AMX.

    vLLM's attention in bf16 uses them without asking, which ends in an illegal instruction. In a
    dense model the products before it have asked. Where there are none this does nothing.
    """
    torch.cpu._init_amx()
