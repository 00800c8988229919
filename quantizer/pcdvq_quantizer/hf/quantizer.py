"""The quantization method `pcdvq` of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import hf_hub_download
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, Checkpoint, check_finite, open_checkpoint
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import DEFAULT_ACTIVATIONS, QUANT_METHOD, PCDVQCheckpointConfig
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.ops import Layout
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from pcdvq_quantizer.experts import experts_of, separate_experts, without_fusing
from pcdvq_quantizer.hf.embedding import PCDVQEmbedding
from pcdvq_quantizer.hf.linear import PCDVQLinear, PCDVQTiedHead, dense_linear

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
    """Loads PCDVQ checkpoints.

    Layers named in `layers` become `PCDVQLinear` or `PCDVQEmbedding`; an output head that is tied
    to such an embedding, `PCDVQTiedHead`.
    """

    requires_calibration = True  # transformers' word for: loads checkpoints, does not make them
    quantization_config: PCDVQConfig
    checkpoint: Checkpoint
    _dtypes: dict[str, torch.dtype]
    _tied: dict[str, str]
    _separated: bool = False

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
        if any(experts_of(name) for name in self.checkpoint.layers):
            separate_experts(model, self.checkpoint.tensors)
            self._separated = True
        for name in self.checkpoint.layers:
            model.set_submodule(name, self._replacement(model, name))
        self._tied = self._take_over_ties(model)
        self._dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}

    def update_weight_conversions(self, weight_conversions: list[Any]) -> list[Any]:
        """Without those that fuse experts, where experts are quantized: they stay as on disk."""
        if not self._separated:
            return super().update_weight_conversions(weight_conversions)
        return without_fusing(weight_conversions)

    def _replacement(self, model: PreTrainedModel, name: str) -> nn.Module:
        """The module on the meta device that holds the packed tensors of layer `name`."""
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise CheckpointError(
                f"layer {name} of quantization_config.layers is not in {type(model).__name__}; "
                "load the model class that config.json names in `architectures`"
            ) from None
        layer, config = self.checkpoint.layers[name], self.checkpoint.config
        spec = config.codebooks[layer.codebook]
        activations = config.activations or DEFAULT_ACTIVATIONS
        layout = Layout(config.block(layer.in_features), spec, activations)
        found = layer.out_features, layer.in_features
        if isinstance(module, nn.Linear):
            _check_shape(name, found, (module.out_features, module.in_features))
            with torch.device("meta"):
                return PCDVQLinear(
                    layer.in_features, layer.out_features, module.bias is not None, layout
                )
        if isinstance(module, nn.Embedding):
            _check_shape(name, found, (module.num_embeddings, module.embedding_dim))
            with torch.device("meta"):
                return PCDVQEmbedding(module, layout)
        raise CheckpointError(
            f"layer {name} is quantized, but this release loads no quantized "
            f"{type(module).__name__} in transformers. Serve it with vLLM, or quantize again and "
            "leave it out."
        )

    def _take_over_ties(self, model: PreTrainedModel) -> dict[str, str]:
        """Tie the heads of quantized embeddings here, as transformers ties only parameters.

        Returns:
            names of the heads that have no tensors of their own, each with its embedding's.
        """
        tied = {}
        for target, source in list(model.all_tied_weights_keys.items()):
            head, embedding = target.removesuffix(".weight"), source.removesuffix(".weight")
            if self.checkpoint.layers.keys().isdisjoint((head, embedding)):
                continue
            del model.all_tied_weights_keys[target]
            if head not in self.checkpoint.layers:
                bias = model.get_submodule(head).bias
                packed = model.get_submodule(embedding)
                model.set_submodule(head, PCDVQTiedHead(packed, bias))
                tied[head] = embedding
        return tied

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
        _check_values(model)
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
        for head, embedding in self._tied.items():
            weight, bias = model.get_submodule(embedding).weight, model.get_submodule(head).bias
            model.set_submodule(head, dense_linear(weight, bias))
            model.all_tied_weights_keys[f"{head}.weight"] = f"{embedding}.weight"
        for parameter in model.parameters():
            parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype
        return model

    def _packed_modules(
        self, model: PreTrainedModel
    ) -> list[tuple[str, PCDVQLinear | PCDVQEmbedding]]:
        return [
            (name, module)
            for name, module in model.named_modules()
            if isinstance(module, PCDVQLinear | PCDVQEmbedding)
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


def _check_values(model: PreTrainedModel) -> None:
    """Raise CheckpointError if a tensor that may come from the checkpoint is not finite."""
    seen: set[int] = set()  # a tied one has two names
    for name, tensor in model.state_dict().items():
        if not tensor.is_meta and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            check_finite(name, tensor)


def _check_shape(name: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    if found != expected:
        raise CheckpointError(
            f"layer {name} is {list(found)}, config.json makes it {list(expected)}; copy the "
            "checkpoint again"
        )


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
    with torch.device("cpu"):  # transformers builds models where the default is "meta"
        return open_checkpoint(directory)
