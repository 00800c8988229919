"""Which layers of a model the plugin would refuse to serve quantized, known before any work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import Any, NamedTuple

from pcdvq_kernels.config import CodebookSpec, PCDVQCheckpointConfig
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.serving import HALVES, MAMBA1, MERGED, UNSPLIT, check_split, misfit_rows
from pcdvq_kernels.trellis import CHAIN_ROWS

from pcdvq_quantizer.experts import experts_of

KEYS_AND_VALUES = ("k_proj", "v_proj", "key", "value", "wk", "wv", "k", "v")
# Of which vLLM moves whole heads while it loads them (`pcdvq_kernels.row_orders`).
MOVED_BY_HEADS = frozenset(("query_key_value",))
FUSED_QKV = ("qkv_proj", "query_key_value", "Wqkv")


class Part(NamedTuple):
    """Rows of a layer that are split among ranks by themselves.

    Attributes:
        rows: on all ranks.
        most_ranks: that share them; more of them have copies. 0: no such limit.
    """

    rows: int
    most_ranks: int = 0

    def ranks(self, tp_size: int) -> int:
        """How many of `tp_size` ranks have different rows."""
        return min(tp_size, self.most_ranks) if self.most_ranks else tp_size


@dataclass(frozen=True)
class Heads:
    """What a model's config.json says of its attention; 0 where it does not."""

    heads: int
    kv_heads: int
    head_dim: int

    @classmethod
    def of(cls, config: dict[str, Any]) -> Heads:
        text = config.get("text_config")
        config = text if isinstance(text, dict) else config

        def number(key: str, default: int) -> int:
            value = config.get(key)
            return value if isinstance(value, int) and value > 0 else default

        heads = number("num_attention_heads", 0)
        head_dim = number("head_dim", number("hidden_size", 0) // max(1, heads))
        return cls(heads, number("num_key_value_heads", heads), head_dim)

    def tensor_parallel_sizes(self, max_tp: int) -> list[int]:
        """Divisors of `max_tp` among which vLLM could share out the heads, rising."""
        return [
            size
            for size in range(1, max_tp + 1)
            if max_tp % size == 0 and (size == 1 or (self.heads and self.heads % size == 0))
        ]

    def parts(self, name: str, rows: int) -> list[Part]:
        """Parts of the layer `name` of `rows` rows."""
        if name in KEYS_AND_VALUES:
            return [Part(rows, self.kv_heads)]
        if name in HALVES and rows % 2 == 0:
            return [Part(rows // 2)] * 2
        q, kv = (count * self.head_dim for count in (self.heads, self.kv_heads))
        if name in FUSED_QKV and q + 2 * kv == rows:
            return [Part(q), *[Part(kv, self.kv_heads)] * 2]
        return [Part(rows)]


def find_unserved(
    linears: Iterable[str], layers: dict[str, int], spec: CodebookSpec | None, heads: Heads, tp: int
) -> dict[str, str]:
    """Layers that must stay as they are, or the plugin would refuse the checkpoint.

    Args:
        linears: names of all linear layers of the model.
        layers: rows of those to quantize.
        spec: layout of their codes; None for a method that splits any rows.
        heads: the model's.
        tp: tensor-parallel size to keep possible.

    Returns:
        name to reason.
    """
    found: dict[str, str] = {}
    for parent, names in _siblings(linears).items():
        if names.issuperset(MAMBA1):
            found |= {parent + name: "vLLM does not quantize mixers of Mamba 1" for name in names}
        merged = [group for group in MERGED if names.issuperset(group)]
        for group in (*merged, *((name,) for name in names.difference(*merged))):
            rows = [(name, layers[parent + name]) for name in group if parent + name in layers]
            if reason := spec and _cut_segments(parent, rows, spec, heads, tp):
                found |= {parent + name: reason for name in group}
        found = dict(_parted(parent, merged, layers.keys() - found)) | found
    return {name: reason for name, reason in found.items() if name in layers}


def choose_chain_rows(
    layers: dict[str, int], spec: CodebookSpec, heads: Heads, tp: int
) -> dict[str, int]:
    """The longest chains of each layer that can be served.

    Layers served as one have the same, and all experts of a decoder layer.

    Args:
        layers: rows of those to quantize, all of which can be served with the shortest chains.
        spec: layout of their codes with those.
        heads: the model's.
        tp: tensor-parallel size to keep possible.

    Returns:
        Of codec trellis one of `trellis.CHAIN_ROWS` for each layer.
    """
    if not spec.chain_rows:
        return dict.fromkeys(layers, 0)
    chosen = dict.fromkeys(layers, CHAIN_ROWS[0])
    for parent, names in _siblings(layers).items():
        merged = [group for group in MERGED if names.issuperset(group)]
        for group in (*merged, *((name,) for name in names.difference(*merged))):
            rows = [(name, layers[parent + name]) for name in group]
            longest = next(
                length
                for length in CHAIN_ROWS
                if length == spec.chain_rows
                or (
                    not _cut_segments(parent, rows, _with_chains(spec, length), heads, tp)
                    and not (MOVED_BY_HEADS.intersection(group) and heads.head_dim % length)
                )
            )
            for name in group:
                chosen[parent + name] = min(chosen[parent + name], longest)
    shortest: dict[str | None, int] = {}
    for name, length in chosen.items():
        whole = experts_of(name)
        shortest[whole] = min(length, shortest.get(whole, length))
    return {n: shortest[experts_of(n)] if experts_of(n) else chosen[n] for n in chosen}


def _with_chains(spec: CodebookSpec, chain_rows: int) -> CodebookSpec:
    return spec.model_copy(update={"chain_rows": chain_rows})


def _siblings(names: Iterable[str]) -> dict[str, set[str]]:
    """Last parts of names by what is before them."""
    siblings: dict[str, set[str]] = {}
    for name in names:
        parent, dot, last = name.rpartition(".")
        siblings.setdefault(parent + dot, set()).add(last)
    return siblings


def _cut_segments(
    parent: str, layers: list[tuple[str, int]], spec: CodebookSpec, heads: Heads, tp: int
) -> str | None:
    """Why layers that are served as one cannot have codes like `spec`; None if they can.

    Args:
        parent: what their names begin with.
        layers: last part of the name, and rows, in the order in which they are served.
    """
    parts = [part for name, rows in layers for part in heads.parts(name, rows)]
    if any(experts_of(parent + name) for name, _ in layers):
        parts *= 2  # those of other experts follow
    split = UNSPLIT.isdisjoint(name for name, _ in layers)
    sizes = heads.tensor_parallel_sizes(tp) if split else [1]
    for size in sizes:
        if any(part.rows % part.ranks(size) for part in parts):
            continue  # nor could vLLM split it unquantized
        rows = misfit_rows(spec, [part.rows // part.ranks(size) for part in parts], size)
        if rows is not None:
            at, remedy = "", "--codec pvq"
            if size > 1:
                at = f" at tensor-parallel size {size}"
                remedy += f", or a --max-tp below {size},"
            return (
                f"a part of {rows} rows{at}, of which codec {spec.codec} needs multiples of "
                f"{spec.row_multiple}; {remedy} quantizes it"
            )
    return None


def _parted(
    parent: str, merged: Sequence[tuple[str, ...]], layers: Set[str]
) -> Iterator[tuple[str, str]]:
    """Layers served as one with others that stay as they are."""
    for group in merged:
        left = next((name for name in group if parent + name not in layers), None)
        for name in group if left else ():
            yield parent + name, f"vLLM serves it as one layer with {left}, which is left"


def describe_splits(
    shapes: dict[str, tuple[int, int]],
    config: PCDVQCheckpointConfig,
    heads: Heads,
) -> str | None:
    """Why no server can have `config.max_tp` ranks, None if one can.

    Args:
        shapes: of the quantized layers.
        config: of the checkpoint to be.
        heads: the model's.
    """
    for size in reversed(heads.tensor_parallel_sizes(config.max_tp)):
        for name, (_, columns) in shapes.items():
            if name.rpartition(".")[2] in UNSPLIT and columns % size == 0:
                spec = config.codebooks[config.layers[name]]
                try:
                    check_split(name, spec, config.block(columns), columns, columns // size)
                except PCDVQError as error:
                    return str(error)
    return None
