"""Rates of the tensors that hold a vector per token: the input embedding and the output head."""

from __future__ import annotations

from pcdvq_kernels.errors import PCDVQError
from torch import nn
from transformers import PreTrainedModel

from pcdvq_quantizer.codebooks import NamedCodebook, get_codebook

UNQUANTIZED_BITS = 16
_RATES = (4, 8)


def get_embedding_codebook(bits: int, chain_rows: int, effort: str) -> NamedCodebook | None:
    """The codebook for embeddings of `bits` per weight, None where they stay as they are.

    Args:
        bits: 4, 8 or 16.
        chain_rows, effort: of codec `trellis`.

    Raises:
        PCDVQError: the rate is not offered.
    """
    if bits == UNQUANTIZED_BITS:
        return None
    if bits not in _RATES:
        offered = ", ".join(map(str, _RATES))
        raise PCDVQError(
            f"--embedding-bits is {bits}; give {offered}, or {UNQUANTIZED_BITS} to leave "
            "embeddings as they are"
        )
    if bits == 8:
        return get_codebook("int8", 8.0)
    return get_codebook("trellis", float(bits), chain_rows, effort)


def find_embeddings(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Names of the input embedding and of the output head of `model`.

    Returns:
        None for one that the model lacks, or that is not a plain `nn.Embedding` or `nn.Linear`.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return (
        names.get(embedding) if isinstance(embedding, nn.Embedding) else None,
        names.get(head) if isinstance(head, nn.Linear) else None,
    )
