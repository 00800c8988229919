"""Whether a source holds the model that its configuration describes."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from pcdvq_kernels.errors import PCDVQError
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging
from transformers.utils.loading_report import LoadStateDictInfo

from pcdvq_quantizer.embeddings import find_embeddings
from pcdvq_quantizer.experts import separate_experts, without_fusing
from pcdvq_quantizer.layer import check_finite
from pcdvq_quantizer.selection import build_empty, hf_config
from pcdvq_quantizer.sources import Source

# Names in safetensors headers (FORMAT.md).
FLOATING = ("BF16", "F16", "F32")
REMEDY = "Get the whole model again, or the config.json that belongs to it."


def check_source(source: Source) -> Source:
    """`source` without its second copies of tied tensors, if it holds the model of its config.json.

    Only headers are read, and both of a pair of tied tensors where both are stored. What is said of
    missing and superfluous tensors is for models of text alone: transformers builds only the part
    of others that reads text.

    Raises:
        PCDVQError: it is quantized already, lacks a tensor of the model, has one of another shape
            or of no floating dtype, has more layers or biases than the model, or two tensors that
            are to be tied differ.
    """
    check_unquantized(source)
    model = build_empty(source)
    conversions = get_model_conversion_mapping(model)
    if separate_experts(model, source.shapes):
        conversions = without_fusing(conversions)
    stored = _stored_names(source, model, conversions)
    _check_dtypes(source, model, stored)
    info = _load_empty(source, model, conversions)
    for name, found, expected in sorted(info.mismatched_keys):
        names = stored.get(name, [])
        raise PCDVQError(
            f"tensor {names[0] if len(names) == 1 else name} of {source.name} is {list(found)}, "
            f"its config.json makes it {list(expected)}. {REMEDY}"
        )
    if not hf_config(source.config).sub_configs:
        _check_complete(source, model, info)
    return _without_copies(source, model, stored)


def check_unquantized(source: Source) -> None:
    """Raises PCDVQError if `source` is a quantized checkpoint."""
    config = source.config.get("quantization_config")
    if not config:
        return
    method = config.get("quant_method") if isinstance(config, dict) else config
    raise PCDVQError(
        f"{source.name} is already quantized ({method}); quantize the original model instead"
    )


def check_values(source: Source, names: Iterable[str]) -> None:
    """Raises PCDVQError if one of the tensors `names` is not finite; reads them all."""
    for name in names:
        check_finite(source.load(name), name, source.name)


def _stored_names(
    source: Source, model: PreTrainedModel, conversions: list[WeightConverter | WeightRenaming]
) -> dict[str, list[str]]:
    """Name in `model` to those in `source` of which transformers makes it."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    names: dict[str, list[str]] = {}
    for stored in source.shapes:
        name, _ = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        names.setdefault(name if name in state else stored, []).append(stored)
    return names


def _check_dtypes(source: Source, model: PreTrainedModel, stored: dict[str, list[str]]) -> None:
    floating = [name for name, each in model.state_dict().items() if each.is_floating_point()]
    for name in (part for each in floating for part in stored.get(each, ())):
        if source.dtypes[name] not in FLOATING:
            raise PCDVQError(
                f"tensor {name} of {source.name} is {source.dtypes[name]}, it must be "
                f"{', '.join(FLOATING[:-1])} or {FLOATING[-1]}; convert it from F64, and in place "
                "of quantized weights give the model that they were made of"
            )


def _load_empty(
    source: Source, model: PreTrainedModel, conversions: list[WeightConverter | WeightRenaming]
) -> LoadStateDictInfo:
    """What transformers says when it loads tensors of the shapes of `source` into `model`.

    Raises:
        PCDVQError: tensors that it puts together do not fit.
    """
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        state = {
            name: torch.empty(shape, dtype=torch.bfloat16, device="meta")
            for name, shape in source.shapes.items()
        }
        options = LoadStateDictConfig(device_map={"": "meta"}, weight_mapping=conversions)
        info, _ = convert_and_load_state_dict_in_model(model, state, options)
    finally:
        if bars:
            logging.enable_progress_bar()
    for name in sorted(info.conversion_errors):
        raise PCDVQError(
            f"the tensors of {source.name} that make {name} are not all there or not of one shape. "
            f"{REMEDY}"
        )
    model.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
    model._adjust_missing_and_unexpected_keys(info)
    return info


def _head_without_use(source: Source, model: PreTrainedModel) -> set[str]:
    """The output head where the model is said to be a body, such as one that makes embeddings."""
    architectures = source.config.get("architectures") or ["ForCausalLM"]
    _, head = find_embeddings(model)
    is_body = all(name.endswith("Model") for name in architectures)
    return {f"{head}.weight", f"{head}.bias"} if is_body else set()


def _check_complete(source: Source, model: PreTrainedModel, info: LoadStateDictInfo) -> None:
    """Raises PCDVQError for a tensor that is missing, or that the model would have no use for."""
    tied = model.all_tied_weights_keys
    # Of a pair of tied tensors the second need not be stored, nor a head that no class asks for.
    head = _head_without_use(source, model)
    if missing := sorted(info.missing_keys - head, key=lambda name: (name in tied, name)):
        raise PCDVQError(
            f"{source.name} lacks tensor {missing[0]} ({len(missing)} in all). {REMEDY}"
        )
    modules = dict(model.named_modules())
    kinds = {_kind(name) for name in model.state_dict()}
    # Layers past the last that predict further tokens are for speculation.
    speculates = bool(source.config.get("num_nextn_predict_layers"))
    for name in sorted(info.unexpected_keys):
        module = modules.get(name.rpartition(".")[0])
        extends = module is not None and any(True for _ in module.parameters(recurse=False))
        if extends or (_kind(name) in kinds and not speculates):
            raise PCDVQError(
                f"{source.name} has a tensor {name}, for which the model that its config.json "
                f"describes has no place. {REMEDY}"
            )


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def _without_copies(source: Source, model: PreTrainedModel, stored: dict[str, list[str]]) -> Source:
    copies = []
    for name, origin in model.all_tied_weights_keys.items():
        if name not in stored:
            continue
        if origin not in stored:
            raise PCDVQError(
                f"{source.name} has {stored[name][0]} in the place of {origin}, which its "
                "config.json ties it to; vLLM looks for the latter: rename it"
            )
        pair = stored[name][0], stored[origin][0]
        if not torch.equal(*(source.load(each) for each in pair)):
            raise PCDVQError(
                f"{pair[0]} and {pair[1]} of {source.name} differ, though its config.json ties "
                "them; set tie_word_embeddings to false there to keep both, or take one out"
            )
        copies.append(pair[0])
    return source.without(copies) if copies else source
