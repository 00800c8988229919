"""The options of `pcdvq quantize`, by method, and long ones of `pcdvq eval`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from pcdvq_kernels.errors import PCDVQError

if TYPE_CHECKING:
    from pcdvq_quantizer.plan import RunOptions


class Method(StrEnum):
    pcdvq = "pcdvq"
    vptq = "vptq"


class Codec(StrEnum):
    trellis = "trellis"
    e8 = "e8"
    pvq = "pvq"
    int8 = "int8"


class Normalize(StrEnum):
    auto = "auto"
    always = "always"
    never = "never"


VPTQ = "Options of --method vptq"

MethodOption = Annotated[
    Method,
    typer.Option(help="pcdvq, or vptq: tables of centroids for each layer, the published layout."),
]
Bits = Annotated[
    float,
    typer.Option(
        help="Bits per weight: 1.5, 2, 2.5, 3, 3.5, 4, or an average between: each layer then gets "
        "a rate by its sensitivity. 8 with codec int8. vptq: of indices."
    ),
]
CodecOption = Annotated[
    Codec,
    typer.Option(
        help="trellis: best and fastest; e8: the paper's codebook (2 and 2.25); pvq: integer "
        "pyramids (2, 2.25, 3, 3.25, 4); int8: 8 bits."
    ),
]
Tasks = Annotated[
    str, typer.Option(help="Of perplexity, kl, lambada, chat, cloze, patterns; with commas.")
]
Requests = Annotated[
    Path | None,
    typer.Option(
        help='JSONL for chat: {"text": ..., "kind": ...} per line; default: 99 requests of eleven '
        "kinds that come with this package."
    ),
]
Reference = Annotated[
    str | None,
    typer.Option(
        help="Original, for kl and chat (default: by the report); lambada, cloze and patterns are "
        "compared with it."
    ),
]
VectorLength = Annotated[
    int | None,
    typer.Option(help="Weights of a vector; default: by layer size.", rich_help_panel=VPTQ),
]
Centroids = Annotated[
    int | None,
    typer.Option(help="Of a table; default: by --bits and vector length.", rich_help_panel=VPTQ),
]
ResidualCentroids = Annotated[
    int, typer.Option(help="Of the second stage; 0: none.", rich_help_panel=VPTQ)
]
Outliers = Annotated[
    int,
    typer.Option(help="Columns with a table of their own, in each layer.", rich_help_panel=VPTQ),
]
OutlierVectorLength = Annotated[
    int, typer.Option(help="Vector length of outliers.", rich_help_panel=VPTQ)
]
OutlierCentroids = Annotated[
    int, typer.Option(help="Of the table of outliers.", rich_help_panel=VPTQ)
]
Groups = Annotated[
    int,
    typer.Option(help="Of columns, each with tables of its own.", rich_help_panel=VPTQ),
]
NormalizeOption = Annotated[
    Normalize,
    typer.Option(help="Scale and shift columns; auto: of large layers.", rich_help_panel=VPTQ),
]


def run_options(context: typer.Context) -> RunOptions:
    """The options of the method that the parameters of `pcdvq quantize` name.

    Raises:
        PCDVQError: options of another method were given.
    """
    from pcdvq_quantizer.plan import QuantizeOptions
    from pcdvq_quantizer.vptq.plan import VPTQOptions

    kinds: dict[Method, type[RunOptions]] = {
        Method.pcdvq: QuantizeOptions,
        Method.vptq: VPTQOptions,
    }
    values = context.params
    kind = kinds[values["method"]]
    own = {field.name for field in fields(kind)}
    sources = {name: context.get_parameter_source(name) for name in values}
    given = {name for name, source in sources.items() if source and source.name == "COMMANDLINE"}
    for method, other in kinds.items():
        if wrong := sorted(given & {field.name for field in fields(other)} - own - {"method"}):
            raise PCDVQError(
                f"--{wrong[0].replace('_', '-')} is an option of --method {method}; drop it, or "
                "give that method"
            )
    chosen: dict[str, Any] = {name: value for name, value in values.items() if name in own}
    chosen["skip"] = tuple(chosen["skip"] or ())
    if kind is VPTQOptions and "bits" not in given:
        del chosen["bits"]
    for name, value in chosen.items():
        if isinstance(value, StrEnum):  # which are strings to everyone else
            chosen[name] = str(value)
    make: Callable[..., RunOptions] = kind
    return make(**chosen)
