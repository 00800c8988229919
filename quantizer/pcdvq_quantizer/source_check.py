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
        raise PCDVQError(
            f"tensor {stored.get(name, name)} of {source.name} is {list(found)}, its config.json "
            f"makes it {list(expected)}. {REMEDY}"
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
) -> dict[str, str]:
    """Name in `model` to name in `source`, one of them where several make one tensor."""
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    state = model.state_dict()
    names = {}
    for stored in source.shapes:
        name, _ = rename_source_key(stored, renamings, converters, model.base_model_prefix, state)
        names[name if name in state else stored] = stored
    return names


def _check_dtypes(source: Source, model: PreTrainedModel, stored: dict[str, str]) -> None:
    for name, expected in model.state_dict().items():
        dtype = source.dtypes.get(stored.get(name, ""))
        if dtype is not None and expected.is_floating_point() and dtype not in FLOATING:
            raise PCDVQError(
                f"tensor {stored[name]} of {source.name} is {dtype}, expected "
                f"{', '.join(FLOATING[:-1])} or {FLOATING[-1]}. Quantized weights have lost what "
                "is needed here, and others can be converted: get the original model"
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


def _check_complete(source: Source, model: PreTrainedModel, info: LoadStateDictInfo) -> None:
    """Raises PCDVQError for a tensor that is missing, or that the model would have no use for."""
    if missing := sorted(info.missing_keys):
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


def _without_copies(source: Source, model: PreTrainedModel, stored: dict[str, str]) -> Source:
    copies = []
    for name, origin in model.all_tied_weights_keys.items():
        if name not in stored or origin not in stored:
            continue
        pair = stored[name], stored[origin]
        if not torch.equal(*(source.load(each) for each in pair)):
            raise PCDVQError(
                f"{pair[0]} and {pair[1]} of {source.name} differ, though its config.json ties "
                "them; set tie_word_embeddings to false there to keep both, or take one out"
            )
        copies.append(pair[0])
    return source.without(copies) if copies else source
