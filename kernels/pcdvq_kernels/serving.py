"""Rules of what can be served, for the quantizer to ask before and the plugin to enforce after.

They are about vLLM, which is not needed to ask them.
"""

from __future__ import annotations

from collections.abc import Sequence

from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import choose_block

# Linear layers of one parent that vLLM serves as one, in its order, if the model has them all.
MERGED = (
    ("q_proj", "k_proj", "v_proj"),
    ("q_proj", "k_proj"),
    ("k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("q", "k", "v"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("gate_proj", "up_proj"),
    ("gate_proj", "dense_h_to_4h"),
    ("c_fc_0", "c_fc_1"),
    ("fc1", "fc3"),
    ("w1", "w3"),
)
# Layers that hold two such parts of one size, on disk as well.
HALVES = ("gate_up_proj", "in_proj_ba")
# Linear layers whose rows all ranks have: tensor parallelism splits their columns, or nothing.
UNSPLIT = frozenset(
    (
        *("o_proj", "out_proj", "wo", "dense", "c_proj"),
        *("down_proj", "w2", "fc2", "dense_4h_to_h"),
        *("q_a_proj", "kv_a_proj_with_mqa", "shared_expert_gate"),
    )
)
# vLLM makes vocabularies a multiple of this before it splits them.
VOCABULARY_MULTIPLE = 64
# Of the mixer of Mamba 1, whose linear layers vLLM never quantizes.
MAMBA1 = ("x_proj", "dt_proj")


def misfit_rows(spec: CodebookSpec, part_sizes: Sequence[int], tp_size: int) -> int | None:
    """Rows of a part of a layer that are no whole chains where they must be; None if there is none.

    Args:
        spec: layout of the layer's codes.
        part_sizes: rows of each fused part on one rank.
        tp_size: number of ranks.
    """
    if tp_size == 1 and len(part_sizes) == 1:
        return None  # there is padding after the last row
    return next((rows for rows in part_sizes if rows % spec.row_multiple), None)


def check_split(
    name: str, spec: CodebookSpec, block: int, input_size: int, shard_size: int
) -> None:
    """Check that a row-parallel split leaves whole Hadamard blocks and whole bytes in each shard.

    Args:
        name: the layer, for the error.
        spec: layout of its codes.
        block: its Hadamard block.
        input_size: its columns.
        shard_size: columns of one shard.

    Raises:
        PCDVQError: it does not; the message has a tensor-parallel size that would.
    """

    def fits(columns: int, block: int) -> bool:
        code_bits = columns // spec.vector_dim * spec.code_bits
        return columns % block == 0 and columns % 8 == 0 and code_bits % 8 == 0

    tp_size = input_size // shard_size
    if tp_size == 1 or fits(shard_size, block):
        return
    smaller = [
        size
        for size in range(2, tp_size)
        if tp_size % size == 0 and fits(input_size // size, block)
    ]
    remedy = f"Serve with --tensor-parallel-size {max(smaller, default=1)}"
    if fits(shard_size, choose_block(input_size, tp_size)):
        remedy += f", or quantize again with --max-tp {tp_size}"
    raise PCDVQError(
        f"layer {name} has {input_size} input columns in Hadamard blocks of {block}; "
        f"--tensor-parallel-size {tp_size} would cut them into shards of {shard_size}, which are "
        f"not whole blocks and whole bytes of codes. {remedy}."
    )


def check_rows(name: str, spec: CodebookSpec, part_sizes: list[int], output_size: int) -> None:
    """Check that the parts of a layer on one rank start where their codes decode by themselves.

    Args:
        name: the layer, for the error.
        spec: layout of its codes.
        part_sizes: rows of each fused part on one rank.
        output_size: rows of all parts on all ranks.

    Raises:
        PCDVQError: they do not; the message has a tensor-parallel size at which they would.
    """
    tp_size = output_size // sum(part_sizes)

    def misfit(size: int) -> int | None:
        return misfit_rows(spec, [rows * tp_size // size for rows in part_sizes], size)

    rows = misfit(tp_size)
    if rows is None:
        return
    smaller = [size for size in range(1, tp_size) if tp_size % size == 0 and misfit(size) is None]
    remedy = f"Serve with --tensor-parallel-size {max(smaller)}, or q" if smaller else "Q"
    raise PCDVQError(
        f"layer {name} has a part of {rows} rows on each rank at --tensor-parallel-size {tp_size}; "
        f"its codec {spec.codec} decodes multiples of {spec.row_multiple} rows by themselves. "
        f"{remedy}uantize again with --max-tp {tp_size}."
    )
