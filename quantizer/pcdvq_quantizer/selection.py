"""Which tensors of a model are quantized."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase, translate
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from pcdvq_kernels.config import QUANT_METHOD, CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.row_orders import reordered
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pcdvq_quantizer.embeddings import find_embeddings
from pcdvq_quantizer.experts import experts_of, separate_experts
from pcdvq_quantizer.served import Heads, find_unserved
from pcdvq_quantizer.sources import CODE, Source, reason

MIN_FEATURES = 8
SKIPPED = "skipped by name"
EMBEDDING, HEAD, ROUTER = "embedding", "output head", "router"
EXPERTS = "experts of this architecture"
# Keys of a config.json that say how many modules a model is made of.
LAYER_COUNTS = (
    *("num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_blocks"),
    *("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"),
)
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
# What transformers raises for configurations that it cannot build a model of.
UNKNOWN_MODEL = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, MemoryError),
    *(OSError, RuntimeError, StrictDataclassError, TypeError, ValueError),
)
# Output heads are left in their own precision, unless asked for with the embeddings; routers are
# tiny, and vLLM never quantizes them.
DEFAULT_SKIP = {
    "lm_head": HEAD,
    "*.lm_head": HEAD,
    "*.gate": ROUTER,
    "*.router": ROUTER,
    "*.shared_expert_gate": ROUTER,
}
REGEX = "re:"  # before a pattern, as other tools have it
EXAMPLES = 3  # of names, in a message
_EXPERTS = re.compile(r"(^|\.)experts(\.|$)")


@dataclass(frozen=True)
class Selection:
    """Result of `select_layers`.

    Attributes:
        layers: names of the layers to quantize, in stored order: linear layers and the two below.
        skipped: matrix-shaped parameters left as they are, with the reason.
        embedding: the input embedding, where it is quantized.
        head: the output head, where it is quantized; a tied one has no tensors of its own.
        left: linear modules of the model that are not quantized, with or without stored tensors.
    """

    layers: list[str]
    skipped: dict[str, str]
    embedding: str | None = None
    head: str | None = None
    left: tuple[str, ...] = ()

    @property
    def linears(self) -> list[str]:
        """The layers that are neither input embedding nor output head."""
        return [name for name in self.layers if name not in self.embeddings]

    @property
    def stored_embeddings(self) -> list[str]:
        return [name for name in self.layers if name in self.embeddings]

    @property
    def embeddings(self) -> list[str]:
        return [name for name in (self.embedding, self.head) if name is not None]

    def skipped_lines(self) -> list[str]:
        """`describe_skipped` of what this selection skips."""
        return describe_skipped(self.skipped)


def describe_skipped(skipped: dict[str, str]) -> list[str]:
    """One line for each kind of parameter in `Selection.skipped`; numbered ones count together."""
    kinds = Counter((_kind(name), reason) for name, reason in skipped.items())
    return [
        f"{name} ({reason})" if count == 1 else f"{name} ({count} of them: {reason})"
        for (name, reason), count in kinds.items()
    ]


def _kind(name: str) -> str:
    """`name` with stars for numbers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def select_layers(
    source: Source,
    skip: tuple[str, ...] = (),
    embeddings: bool = False,
    method: str = QUANT_METHOD,
    spec: CodebookSpec | None = None,
    max_tp: int = 1,
) -> Selection:
    """Find the linear layers of `source` that the format can hold and the plugin serves.

    Args:
        source: the model.
        skip: patterns of layer names to leave as they are, beside `DEFAULT_SKIP`: of fnmatch, or
            after `re:` regular expressions that match from the beginning of a name.
        embeddings: whether input embedding and output head are quantized too.
        method: `quant_method` of the checkpoint.
        spec: layout of the linear layers' codes; None for a method that splits any rows.
        max_tp: tensor-parallel size to keep possible.

    Raises:
        PCDVQError: the architecture is unknown, a pattern matches no layer, or nothing can be
            quantized.
    """
    architecture = _architecture(source.config)
    model = build_empty(source)
    separate_experts(model, source.shapes)
    modules = dict(model.named_modules())
    linears = {name for name, module in modules.items() if isinstance(module, nn.Linear)}
    roles = find_embeddings(model) if embeddings else (None, None)
    matrices = {
        tensor.removesuffix(".weight"): tensor
        for tensor, shape in source.shapes.items()
        if len(shape) >= 2
    }
    renamed = names_in_model(model, matrices.values())
    unwanted = _matching(skip, [*matrices, *sorted(linears.difference(matrices))], source.name)
    row_multiple = spec.row_multiple if spec else 1
    layers, skipped = [], {}
    for name, tensor in matrices.items():
        if name in unwanted:
            reason: str | None = SKIPPED
        else:
            loaded = renamed[tensor].removesuffix(".weight")
            reason = None if name in roles else _other_kind(name, loaded, modules)
            reason = reason or _unsuitable(source.shapes[tensor])
            reason = reason or reordered(source.config, name, method, row_multiple)
        if reason:
            skipped[name] = reason
        else:
            layers.append(name)
    unserved = _tied_with_bias(roles, layers, source)
    rows = {name: source.shapes[f"{name}.weight"][0] for name in layers if name not in roles}
    unserved |= find_unserved(linears, rows, spec, Heads.of(source.config), max_tp)
    layers = [name for name in layers if name not in unserved]
    skipped |= unserved
    # Experts are served as one layer.
    whole = {experts_of(name) for name in skipped} - {None}
    for name in [name for name in layers if experts_of(name) in whole]:
        layers.remove(name)
        skipped[name] = "another layer of the experts is skipped"
    if not set(layers).difference(roles):
        reasons = sorted({f"{name}: {reason}" for name, reason in skipped.items()})[:EXAMPLES]
        raise PCDVQError(
            f"nothing to quantize in {source.name} ({architecture}); for instance "
            f"{'; '.join(reasons)}. PCDVQ quantizes the torch.nn.Linear layers of causal LMs"
        )
    embedding, head = (name if name in layers else None for name in roles)
    left = tuple(sorted(linears.difference(layers)))
    return Selection(layers, skipped, embedding, head, left)


def names_in_model(model: PreTrainedModel, tensors: Iterable[str]) -> dict[str, str]:
    """What transformers calls each of `tensors`, names on disk, once it has loaded them."""
    changes = get_model_conversion_mapping(model)
    renamings = [change for change in changes if isinstance(change, WeightRenaming)]
    return {tensor: rename_source_key(tensor, renamings, [])[0] for tensor in tensors}


def _matching(patterns: tuple[str, ...], names: list[str], model: str) -> set[str]:
    """Those of `names` that one of `patterns` matches.

    Raises:
        PCDVQError: a pattern matches none, or is no regular expression.
    """
    found: set[str] = set()
    for pattern in patterns:
        is_regex = pattern.startswith(REGEX)
        try:
            regex = re.compile(pattern.removeprefix(REGEX) if is_regex else translate(pattern))
        except re.error as error:
            raise PCDVQError(
                f"--skip {pattern!r} is no regular expression ({error}); mend it, or leave out "
                f"{REGEX!r} for a pattern with stars"
            ) from None
        matches = set(filter(regex.match, names))
        if not matches:
            kinds = list({_kind(name): name for name in reversed(names)}.values())
            near = get_close_matches(pattern.removeprefix(REGEX), kinds, EXAMPLES, cutoff=0.0)
            raise PCDVQError(
                f"--skip {pattern!r} matches no layer of {model}, which has for instance "
                f"{', '.join(near)}; correct the pattern, which must fit a "
                f"{'name from its beginning' if is_regex else 'whole name'}"
            )
        found |= matches
    return found


def _other_kind(name: str, loaded: str, modules: dict[str, nn.Module]) -> str | None:
    """Why the matrix `name` is no linear layer to quantize, None if it is one.

    Args:
        name: of a layer on disk, or of a parameter that is not a weight.
        loaded: its name in transformers' model.
        modules: of that model.
    """
    linear = isinstance(modules.get(name), nn.Linear)
    holder, _, key = loaded.rpartition(".")
    module = modules.get(loaded)
    if module is None and holder in modules and key in modules[holder]._parameters:
        module = modules[holder]
    if not linear and (_EXPERTS.search(name) or "Experts" in type(module).__name__):
        return EXPERTS
    for pattern, kind in DEFAULT_SKIP.items():
        if fnmatchcase(loaded, pattern):
            return kind
    if linear:
        return None
    if isinstance(module, nn.Embedding):
        return EMBEDDING
    if isinstance(module, nn.Linear):
        return "stored under another name than transformers'"
    return "no layer that transformers knows" if module is None else "not a linear layer"


def _unsuitable(shape: tuple[int, ...]) -> str | None:
    """Why the format cannot hold a matrix of this shape, None if it can."""
    if shape[1] % 8 or min(shape) < MIN_FEATURES:
        return f"shape {list(shape)}: input size must be a multiple of 8, both sizes >= 8"
    return None


def _tied_with_bias(
    roles: tuple[str | None, str | None], layers: list[str], source: Source
) -> dict[str, str]:
    """The input embedding and why it stays, if the head that is tied to it keeps it so."""
    embedding, head = roles
    if embedding in layers and head not in layers and f"{head}.bias" in source.shapes:
        return {embedding: "the output head is tied to it and has a bias"}
    return {}


def hf_config(config: dict[str, Any]) -> PreTrainedConfig:
    """The transformers configuration that a config.json describes."""
    fields = {key: _infinities(value) for key, value in config.items() if key != "model_type"}
    return AutoConfig.for_model(config["model_type"], **fields)


def _infinities(value: Any) -> Any:
    """`value` with the floats that JSON lacks, which transformers writes as objects."""
    if isinstance(value, dict) and value.keys() == {"__float__"}:
        return float(value["__float__"])
    return [_infinities(each) for each in value] if isinstance(value, list) else value


def build_empty(source: Source) -> PreTrainedModel:
    """The model that `source.config` describes, on the meta device.

    Raises:
        PCDVQError: transformers does not know it, or it has more layers than `source` has tensors.
    """
    config = source.config
    architecture = _architecture(config)
    if not isinstance(config.get("model_type"), str):
        raise PCDVQError(
            f"config.json of {source.name} has no model_type, which tells what model it is; get "
            "the config.json that belongs to the model"
        )
    check_counts(source.name, config, source.shapes)
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(hf_config(config), trust_remote_code=False)
    except UNKNOWN_MODEL as error:
        if config["model_type"] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise PCDVQError(
                f"config.json of {source.name} describes no {config['model_type']} model that can "
                f"be built ({reason(error)}); get the config.json that belongs to the model"
            ) from error
        code = f" ({CODE})" if "auto_map" in config else ""
        raise PCDVQError(
            f"{architecture} (model_type {config['model_type']}) is not a causal language model "
            f"that this transformers release knows{code}; upgrade transformers or choose another "
            "model"
        ) from error


def check_counts(model: str, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise PCDVQError if `config` has more layers or experts than fit tensors of `shapes`.

    Empty models take time and memory for each.
    """
    stacked = [shape[0] for shape in shapes.values() if len(shape) > 2]
    limits = dict.fromkeys(LAYER_COUNTS, len(shapes))
    limits |= dict.fromkeys(EXPERT_COUNTS, max(len(shapes), *stacked, 0))
    for part in (config, *(part for part in config.values() if isinstance(part, dict))):
        for key, most in limits.items():
            count = part.get(key)
            if isinstance(count, int) and count > most:
                raise PCDVQError(
                    f"config.json of {model} has {key} {count}, but the model has {len(shapes)} "
                    "tensors; get the config.json that belongs to it"
                )


def _architecture(config: dict[str, Any]) -> str:
    named = config.get("architectures")
    named = named if isinstance(named, list) else [named]
    return ", ".join(filter(None, map(str, filter(None, named)))) or "unknown architecture"
