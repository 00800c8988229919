"""The quantization config that vLLM asks which layer is quantized how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pcdvq_kernels.arguments import ACTIVATIONS
from pcdvq_kernels.config import (
    DEFAULT_ACTIVATIONS,
    QUANT_METHOD,
    Activations,
    CodebookSpec,
    PCDVQCheckpointConfig,
)
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_pcdvq.codebooks import CodebookStore, read_codebooks
from vllm_pcdvq.startup import Startup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.models.utils import WeightsMapper

# Keys of vLLM's --additional-config that are ours, each with its values.
ACTIVATIONS_OPTION = "pcdvq_activations"
OPTIONS = {ACTIVATIONS_OPTION: ACTIVATIONS}

LEAVES = "Quantize again: `pcdvq quantize` leaves such layers as they are."

# vLLM's Qwen3-MoE says this of its dense layers only after it has asked for our config.
PACKED_ANYWAY = {"gate_up_proj": ["gate_proj", "up_proj"]}


def activations_option(vllm_config: VllmConfig | None) -> Activations | None:
    """What the server's option says that activations are rounded to; None without it.

    Raises:
        PCDVQError: it has another value, or another option seems meant for this plugin.
    """
    given = vllm_config.additional_config if vllm_config else {}
    # Other plugins have keys, or a whole class, of their own.
    options = given if isinstance(given, dict) else {}
    for key, value in options.items():
        if key in OPTIONS and value not in OPTIONS[key]:
            raise PCDVQError(
                f"{key} in --additional-config is {value!r}; choose from {', '.join(OPTIONS[key])}"
            )
        if key not in OPTIONS and str(key).lower().startswith("pcdvq"):
            raise PCDVQError(
                f"--additional-config has the unknown key {key!r}; vllm-pcdvq knows "
                f"{', '.join(OPTIONS)}"
            )
    return options.get(ACTIVATIONS_OPTION)


class PCDVQConfig(QuantizationConfig):
    """`quantization_config` of a PCDVQ checkpoint, as vLLM sees it.

    vLLM makes it in the API server and pickles it into the workers, codebooks included.

    Attributes:
        checkpoint: the parsed `quantization_config`.
        layers: quantized layer to codebook id, under vLLM's names for the layers.
        left: modules that are not quantized, likewise.
        embedding: the quantized input embedding, likewise; None if it is not quantized.
        codebooks: the codebooks, once `maybe_update_config` has read them.
        startup: what this worker has built and loaded so far.
    """

    def __init__(self, checkpoint: PCDVQCheckpointConfig | None = None) -> None:
        """Make the config of `checkpoint`.

        Raises:
            CheckpointError: no checkpoint, which is how vLLM says that config.json has no
                `quantization_config`.
        """
        super().__init__()
        if checkpoint is None:
            raise CheckpointError(
                "not a PCDVQ checkpoint: config.json has no quantization_config. Make one with "
                "`pcdvq quantize MODEL OUT`, or serve this model without --quantization pcdvq."
            )
        self.checkpoint = checkpoint
        self.layers = dict(checkpoint.layers)
        self.left = set(checkpoint.modules_to_not_convert)
        self.embedding = checkpoint.embedding
        self.codebooks: CodebookStore | None = None
        self.startup = Startup()
        self._mappers: list[WeightsMapper] = []
        self._model_config: ModelConfig | None = None
        self._loaded_from: str | None = None

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability 8.0: the oldest that Triton supports."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PCDVQConfig:
        """Parse `config`, the `quantization_config` of config.json.

        Raises:
            CheckpointError: not PCDVQ, another format version, or malformed.
        """
        return cls(PCDVQCheckpointConfig.parse(config))

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PreTrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Read the codebooks; vLLM calls this in the API server, before any weight is loaded.

        Raises:
            CheckpointError: the checkpoint cannot be served.
        """
        # Imported here because `register` must stay light.
        from vllm_pcdvq.row_order import check_classifier, check_row_orders

        parts = {
            layer: self.checkpoint.codebooks[codebook].row_multiple
            for layer, codebook in self.checkpoint.layers.items()
        }
        check_row_orders(QUANT_METHOD, hf_config, parts, LEAVES)
        check_classifier(hf_config, self.checkpoint.head or self.checkpoint.embedding)
        self.codebooks = CodebookStore(read_codebooks(model_name, revision, self.checkpoint))

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """vLLM's own, which looks at each tensor on the way."""
        from vllm_pcdvq.weights import FiniteWeights

        return FiniteWeights.of(super().get_checkpoint_weight_mapper())

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename all modules as the model does.

        A model and its parts may bring the same mapper: each distinct one is applied once.
        """
        if hf_to_vllm_mapper not in self._mappers:
            self._mappers.append(hf_to_vllm_mapper)
            self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
            if self.embedding is not None:
                self.embedding = next(iter(hf_to_vllm_mapper.apply_list([self.embedding])), None)
            self.left = set(hf_to_vllm_mapper.apply_list(list(self.left)))

    def activations(self, vllm_config: VllmConfig | None) -> Activations:
        """What activations are rounded to: the server's option, or what the checkpoint says.

        Raises:
            PCDVQError: the option has another value.
        """
        return activations_option(vllm_config) or self.checkpoint.activations or DEFAULT_ACTIVATIONS

    def spec(self, codebook: str) -> CodebookSpec:
        """Code layout of the codebook with this id."""
        return self.checkpoint.codebooks[codebook]

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of the linear layer, experts, embedding or output head `prefix`, else None.

        Raises:
            CheckpointError: the checkpoint treats the parts of a fused layer differently, or
                quantizes a layer of another kind.
        """
        # Imported here because these modules bring the op library: `register` must stay light.
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase
        from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

        from vllm_pcdvq.embedding import embedding_method
        from vllm_pcdvq.linear import CheckedUnquantizedLinearMethod, PCDVQLinearMethod
        from vllm_pcdvq.moe import moe_method

        if isinstance(layer, VocabParallelEmbedding):
            return embedding_method(self, layer, prefix)
        if isinstance(layer, RoutedExperts):
            return moe_method(self, layer, prefix)
        if not isinstance(layer, LinearBase):
            self.refuse_quantized(layer, prefix)
            return None
        codebook = self._codebook_of(prefix)
        if codebook is None:
            return CheckedUnquantizedLinearMethod()
        return PCDVQLinearMethod(self, prefix, codebook)

    def _codebook_of(self, prefix: str) -> str | None:
        """Codebook id of the linear layer `prefix`, None if it is not quantized."""
        # vLLM's Granite hybrids build as `mixer` what they load as `mamba`.
        mamba = prefix.replace(".mixer.", ".mamba.")
        stored = mamba if mamba in self.layers or mamba in self.left else prefix
        if stored in self.layers:
            return self.layers[stored]
        parent, dot, name = stored.rpartition(".")
        packed = {**PACKED_ANYWAY, **self.packed_modules_mapping}
        parts = [parent + dot + part for part in packed.get(name, [name])]
        codebooks = {part: self.layers.get(part) for part in parts}
        if len(set(codebooks.values())) > 1:
            listed = ", ".join(f"{part}: {id or 'none'}" for part, id in codebooks.items())
            raise CheckpointError(
                f"layer {prefix} serves {len(parts)} layers as one, which must all have the same "
                f"codebook or none ({listed}). Quantize again with one rate for them."
            )
        codebook = next(iter(codebooks.values()))
        if codebook is None and not self.left.intersection(parts):
            self._check_unnamed(prefix, {part.rpartition(".")[2] for part in parts})
        return codebook

    def _check_unnamed(self, prefix: str, names: set[str]) -> None:
        """Raise CheckpointError if `prefix` may be a quantized layer under a name of vLLM's own."""
        alike = (layer for layer in self.layers if layer.rpartition(".")[2] in names)
        if example := next(alike, None):
            skip = " ".join(f"--skip '*.{name}'" for name in sorted(names))
            raise CheckpointError(
                f"vLLM builds a layer {prefix}, and the checkpoint has none of that name but "
                f"{example}: which is which cannot be told for this architecture. Quantize again "
                f"with {skip}."
            )

    def refuse_quantized(self, layer: torch.nn.Module, prefix: str) -> None:
        """Raise CheckpointError if `prefix` is quantized: it would silently get no weights."""
        inside = [name for name in self.layers if name == prefix or name.startswith(f"{prefix}.")]
        if inside:
            raise CheckpointError(
                f"layer {inside[0]} is quantized, but vllm-pcdvq does not serve quantized "
                f"{type(layer).__name__} layers. Quantize again and leave it out."
            )

    def add_layer(self, kind: str, codebook: str, weights: int, model: ModelConfig | None) -> None:
        """Take note of a layer that this worker builds, and of the model it is part of."""
        self.startup.add_layer(kind, self.spec(codebook), weights)
        if model is not None:
            self._model_config, self._loaded_from = model, model.model

    def loaded_codebooks(self) -> CodebookStore:
        """The codebooks that belong to the weights just loaded.

        A reload in place may have named another checkpoint, whose codebooks are read here.

        Raises:
            CheckpointError: that checkpoint does not fit the running model.
        """
        if self.codebooks is None:
            raise PCDVQError("vLLM did not call maybe_update_config: no codebooks were read")
        model = self._model_config
        if model is not None and model.model != self._loaded_from:
            self.codebooks.replace(read_codebooks(model.model, model.revision, self.checkpoint))
            self._loaded_from = model.model
        return self.codebooks
