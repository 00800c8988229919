"""The quantization method `pcdvq` of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, Checkpoint, open_checkpoint
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import QUANT_METHOD, PCDVQCheckpointConfig
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.ops import Layout
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from pcdvq_quantizer.hf.linear import PCDVQLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.get_logger(__name__)


@register_quantization_config(QUANT_METHOD)
class PCDVQConfig(QuantizationConfigMixin):
    """`quantization_config` of a PCDVQ checkpoint as transformers holds it: a checked dictionary.

    transformers makes it from config.json; it is no option of `from_pretrained`.
    """

    def __init__(self, **fields: Any) -> None:
        """Check `fields`, the `quantization_config` object of config.json.

        Raises:
            CheckpointError: another format version, or any malformed field.
        """
        PCDVQCheckpointConfig.parse(fields)
        self.__dict__.update(copy.deepcopy(fields))


@register_quantizer(QUANT_METHOD)
class PCDVQHfQuantizer(HfQuantizer):
    """Loads PCDVQ checkpoints: linear layers named in `layers` become `PCDVQLinear`."""

    requires_calibration = True  # transformers' word for: loads checkpoints, does not make them
    quantization_config: PCDVQConfig
    checkpoint: Checkpoint
    _dtypes: dict[str, torch.dtype]

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what cannot work.

        Raises:
            PCDVQError: layers are to be kept on disk.
        """
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise PCDVQError(
                'a PCDVQ model cannot be offloaded to disk; use device_map="cpu" or a device '
                "that holds it"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise PCDVQError("from_pretrained(state_dict=...) is not for PCDVQ; name a checkpoint")
        self.checkpoint = _open(Path(checkpoint_files[0]).parent)
        for name in self.checkpoint.layers:
            model.set_submodule(name, self._replacement(model, name))
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def _replacement(self, model: PreTrainedModel, name: str) -> nn.Module:
        """The module on the meta device that holds the packed tensors of layer `name`."""
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"layer {name} of quantization_config.layers is not in {type(model).__name__}; "
                "load the model class that config.json names in `architectures`"
            ) from None
        if isinstance(module, nn.Linear):
            return self._linear(name, module)
        raise CheckpointError(
            f"layer {name} is quantized, but this release loads no quantized "
            f"{type(module).__name__} in transformers. Serve it with vLLM, or quantize again and "
            "leave it out."
        )

    def _linear(self, name: str, module: nn.Linear) -> PCDVQLinear:
        layer, config = self.checkpoint.layers[name], self.checkpoint.config
        found = layer.out_features, layer.in_features
        if found != (module.out_features, module.in_features):
            raise CheckpointError(
                f"layer {name} is {list(found)}, config.json makes it "
                f"{[module.out_features, module.in_features]}; copy the checkpoint again"
            )
        layout = Layout(config.block(layer.in_features), config.codebooks[layer.codebook])
        with torch.device("meta"):
            return PCDVQLinear(
                layer.in_features, layer.out_features, module.bias is not None, layout
            )

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        # Only now: before, transformers would have replaced buffers that are not in the files.
        shared: dict[tuple[str, torch.device], torch.Tensor] = {}
        for name, module in self._packed_modules(model):
            key = self.checkpoint.layers[name].codebook, module.qweight.device
            if key not in shared:
                shared[key] = self._codebook(*key).codewords()
            module.set_codebook(shared[key])
        self._restore_dtypes(model)
        return model

    def _restore_dtypes(self, model: PreTrainedModel) -> None:
        """Cast what transformers renamed or merged while loading, such as experts.

        It leaves those tensors of a quantized checkpoint in the dtype they have on disk.
        """
        kept = {*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())}
        for name, parameter in model.named_parameters():
            if kept.isdisjoint(name.split(".")):
                parameter.data = parameter.data.to(self._dtypes.get(name, parameter.dtype))

    def _dequantize(
        self, model: PreTrainedModel, dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """Put dense layers in the place of the packed ones, one at a time."""
        dtype = dtype or model.dtype
        for name, module in self._packed_modules(model):
            codebook = self._codebook(self.checkpoint.layers[name].codebook, module.qweight.device)
            model.set_submodule(name, module.dequantize(codebook, dtype))
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model

    def _packed_modules(self, model: PreTrainedModel) -> list[tuple[str, PCDVQLinear]]:
        return [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, PCDVQLinear)
        ]

    def _codebook(self, id: str, device: torch.device) -> Codebook:
        book = self.checkpoint.codebooks[id]
        return Codebook(book.spec, book.directions.to(device), book.magnitudes.to(device))

    def is_serializable(self) -> bool:
        logger.warning(
            "A PCDVQ model is not saved by save_pretrained: copy the checkpoint directory, or call "
            "model.dequantize() first to save dense weights."
        )
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _open(directory: Path) -> Checkpoint:
    """Open `directory`: a checkpoint, or a snapshot of one in the hub's cache.

    A snapshot holds what transformers has fetched, which leaves out the codebooks: they are
    fetched from the same commit.

    Raises:
        CheckpointError: the checkpoint is damaged, or its codebooks cannot be fetched.
    """
    # CACHE/models--ORGANISATION--NAME/snapshots/COMMIT
    repository = directory.parent.parent.name
    if directory.parent.name == "snapshots" and repository.startswith("models--"):
        name = repository.removeprefix("models--").replace("--", "/")
        try:
            hf_hub_download(
                name, CODEBOOK_FILE, revision=directory.name, cache_dir=directory.parents[2]
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot fetch {CODEBOOK_FILE} of {name}: {error}. Check the network, or load a "
                "local copy of the whole checkpoint."
            ) from error
    return open_checkpoint(directory)
