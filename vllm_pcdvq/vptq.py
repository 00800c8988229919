"""The quantization config of published VPTQ checkpoints: which layer is quantized how."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.vptq.layout import QUANT_METHOD, TABLES
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)

from vllm_pcdvq.config import PACKED_ANYWAY
from vllm_pcdvq.startup import Startup

if TYPE_CHECKING:
    from transformers import PreTrainedConfig
    from vllm.model_executor.models.utils import WeightsMapper

OTHER = "Choose another checkpoint of this model."
# Of a published `quantization_config`, besides `quant_method`.
KNOWN_KEYS = {
    "config_for_layers",
    "shared_layer_config",
    "modules_to_not_convert",
    "enable_proxy_error",
}


class VPTQConfig(QuantizationConfig):
    """`quantization_config` of a VPTQ checkpoint, as vLLM sees it.

    Attributes:
        layers: entry of each quantized layer, under vLLM's names for the layers.
        shared: entries of layers that `layers` does not have, by the last part of their name.
        left: modules that are not quantized, whatever the others say.
        startup: what this worker has built and loaded so far.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        shared: dict[str, dict[str, Any]] | None = None,
        left: list[str] | None = None,
    ) -> None:
        """Make the config of these entries.

        Raises:
            CheckpointError: no entries, which is also how vLLM says that config.json has no
                `quantization_config`.
        """
        super().__init__()
        if not layers and not shared:
            raise CheckpointError(
                "not a VPTQ checkpoint: config.json has no quantization_config with "
                f"config_for_layers or shared_layer_config. {OTHER}"
            )
        self.layers = dict(layers or {})
        self.shared = dict(shared or {})
        self.left = set(left or [])
        self.startup = Startup()
        self._mappers: list[WeightsMapper] = []

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

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Tables are embeddings on disk and parameters of the linear layer here."""
        from vllm_pcdvq.weights import FiniteWeights

        return FiniteWeights(orig_to_new_suffix={f".{key}.weight": f".{key}" for key in TABLES})

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> VPTQConfig:
        """Take `config`, the `quantization_config` of config.json; its entries are parsed later.

        Raises:
            CheckpointError: unknown keys, or others than the layout has.
        """
        if unknown := sorted(set(config) - KNOWN_KEYS - {"quant_method"}):
            raise CheckpointError(
                f"the quantization_config has unknown keys {unknown}; served are "
                f"{sorted(KNOWN_KEYS)}. Upgrade vllm-pcdvq, or choose another checkpoint."
            )
        layers = config.get("config_for_layers") or {}
        shared = config.get("shared_layer_config") or {}
        left = config.get("modules_to_not_convert") or []
        for entries in (layers, shared):
            if not isinstance(entries, dict) or not all(
                isinstance(entry, dict) for entry in entries.values()
            ):
                raise CheckpointError(
                    "config_for_layers and shared_layer_config must be objects of objects. " + OTHER
                )
        if not isinstance(left, list) or not all(isinstance(name, str) for name in left):
            raise CheckpointError(f"modules_to_not_convert must be a list of names. {OTHER}")
        return cls(layers, shared, left)

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: PreTrainedConfig | None = None,
        revision: str | None = None,
    ) -> None:
        """Look at the model's configuration, which vLLM has in the API server.

        Raises:
            CheckpointError: vLLM reorders the rows of a quantized layer.
        """
        # Imported here because `register` must stay light.
        from vllm_pcdvq.row_order import check_row_orders

        check_row_orders(
            QUANT_METHOD, hf_config, dict.fromkeys([*self.layers, *self.shared], 1), OTHER
        )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Rename all modules as the model does; each distinct mapper is applied once."""
        if hf_to_vllm_mapper not in self._mappers:
            self._mappers.append(hf_to_vllm_mapper)
            self.layers = hf_to_vllm_mapper.apply_dict(self.layers)
            self.left = set(hf_to_vllm_mapper.apply_list(list(self.left)))

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of the layer `prefix`; None leaves it to vLLM.

        Raises:
            CheckpointError: only some parts of a fused layer are quantized, or a layer of another
                kind is.
        """
        # Imported here because these modules bring the op library: `register` must stay light.
        from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
        from vllm.model_executor.layers.linear import LinearBase

        from vllm_pcdvq.linear import CheckedUnquantizedLinearMethod
        from vllm_pcdvq.vptq_linear import VPTQLinearMethod

        if not isinstance(layer, LinearBase):
            inside = [
                name for name in self.layers if name == prefix or name.startswith(f"{prefix}.")
            ]
            if inside or (isinstance(layer, RoutedExperts) and self.shared):
                raise CheckpointError(
                    f"the checkpoint quantizes {(inside or [prefix])[0]}; vllm-pcdvq serves VPTQ "
                    f"in linear layers, not in {type(layer).__name__}. {OTHER}"
                )
            return None
        entries = self._entries(prefix)
        if not entries:
            return CheckedUnquantizedLinearMethod()
        return VPTQLinearMethod(self, prefix, entries)

    def _entry(self, name: str) -> dict[str, Any] | None:
        if name in self.left:
            return None
        return self.layers.get(name, self.shared.get(name.rpartition(".")[2]))

    def _entries(self, prefix: str) -> dict[str, dict[str, Any]]:
        """Entries of the layers on disk that vLLM serves as `prefix`; none: it is not quantized."""
        if whole := self._entry(prefix):
            return {prefix: whole}
        parent, dot, name = prefix.rpartition(".")
        packed = {**PACKED_ANYWAY, **self.packed_modules_mapping}
        names = [parent + dot + part for part in packed.get(name, [])]
        entries = {name: entry for name in names if (entry := self._entry(name))}
        if entries and len(entries) < len(names):
            left = next(name for name in names if name not in entries)
            raise CheckpointError(
                f"layer {prefix} serves {len(names)} layers as one, which must all be quantized or "
                f"none, and {left} is not. {OTHER}"
            )
        return entries
