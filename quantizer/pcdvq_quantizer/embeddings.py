"""Rates of the tensors that hold a vector per token: the input embedding and the output head."""

from __future__ import annotations

from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.serving import VOCABULARY_MULTIPLE
from pcdvq_kernels.trellis import CHAIN_ROWS
from torch import nn
from transformers import PreTrainedModel

from pcdvq_quantizer.codebooks import NamedCodebook, get_codebook
from pcdvq_quantizer.served import Heads, choose_chain_rows

UNQUANTIZED_BITS = 16
_RATES = (4, 8)


def get_embedding_codebooks(
    layers: dict[str, int], bits: int, effort: str, heads: Heads, tp: int
) -> dict[str, NamedCodebook]:
    """The codebook of each embedding, whatever the codec of other layers.

    Args:
        layers: rows of the embeddings to quantize.
        bits: per weight, 4 or 8; 16 where there is none to quantize.
        effort: of the search for codes of codec `trellis`.
        heads: the model's.
        tp: tensor-parallel size to keep possible.

    Raises:
        PCDVQError: the rate is not offered.
    """
    if bits not in (*_RATES, UNQUANTIZED_BITS):
        offered = ", ".join(map(str, _RATES))
        raise PCDVQError(
            f"--embedding-bits is {bits}; give {offered}, or {UNQUANTIZED_BITS} to leave "
            "embeddings as they are"
        )
    if bits == 8:
        return dict.fromkeys(layers, get_codebook("int8", 8.0))
    served = {
        name: -(-rows // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE for name, rows in layers.items()
    }
    spec = get_codebook("trellis", 4.0, min(CHAIN_ROWS)).codebook.spec
    chain_rows = choose_chain_rows(served, spec, heads, tp)
    return {name: get_codebook("trellis", 4.0, chain_rows[name], effort) for name in layers}


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
