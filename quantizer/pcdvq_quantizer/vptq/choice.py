"""What a layer is quantized to: vector length, centroids, residuals, outliers, groups."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq.layout import MOST_CENTROIDS, MOST_ROWS, VPTQLayout

DEFAULT_BITS = 4.0
INDEX_BITS = MOST_CENTROIDS.bit_length() - 1
# Bits per weight by which vectors of a length v are above the rate-distortion bound of N(0, 1) at
# high rates (Zador 1982): log2(2 pi G ((v + 2) / v)^((v + 2) / 2)) / 2, where G is the second
# moment of the best lattice known (Conway and Sloane, Sphere Packings, table 2.3), interpolated
# between 8, 12 and 16.
SHAPE_LOSS = {
    **{2: 0.506, 3: 0.412, 4: 0.350, 5: 0.313, 6: 0.280, 7: 0.255, 8: 0.229},
    **{9: 0.219, 10: 0.208, 11: 0.198, 12: 0.187, 13: 0.179, 14: 0.171, 15: 0.163, 16: 0.154},
}
# Column scales cost 32 / N bits per weight and lower the error by what about 1 / 64 bit does.
NORMALIZED_ROWS = 2048
NORMALIZE = ("auto", "always", "never")


@dataclass(frozen=True)
class LayoutOptions:
    """Options of the layout of layers.

    Attributes:
        bits: of the indices of a weight. What is stored besides them (centroids, outliers,
            permutations, column scales) comes on top. None: as vector length and centroids make
            them, `DEFAULT_BITS` where one of those is None.
        vector_length: weights of a vector, which are in one column and follow each other in rows;
            None: by the size of each layer.
        centroids: of a table; None: by bits and vector length.
        residual_centroids: of the second stage, 0 for none.
        outliers: columns of the largest Hessian diagonal that get a table of their own.
        outlier_vector_length, outlier_centroids: of that table.
        groups: the other columns are divided into, each with tables of its own.
        normalize: one of `NORMALIZE`: scale and shift columns; auto: where there are
            `NORMALIZED_ROWS` or more.
    """

    bits: float | None = None
    vector_length: int | None = None
    centroids: int | None = None
    residual_centroids: int = 0
    outliers: int = 0
    outlier_vector_length: int = 2
    outlier_centroids: int = 256
    groups: int = 1
    normalize: str = "auto"

    @property
    def rate(self) -> float | None:
        """`bits`, or the default where vector length and centroids do not say all."""
        explicit = self.vector_length is not None and self.centroids is not None
        return DEFAULT_BITS if self.bits is None and not explicit else self.bits


def check_options(options: LayoutOptions) -> None:
    """Raises PCDVQError for what no layer could have."""
    for option, value, least, most in (
        ("--vector-length", options.vector_length, 2, MOST_ROWS),
        ("--outlier-vector-length", options.outlier_vector_length, 2, MOST_ROWS),
        ("--outliers", options.outliers, 0, 1 << 16),
        ("--groups", options.groups, 1, 1 << 16),
    ):
        if value is not None and not least <= value <= most:
            raise PCDVQError(f"{option} is {value}; give {least} to {most}")
    for option, value in (
        ("--centroids", options.centroids),
        ("--residual-centroids", options.residual_centroids or None),
        ("--outlier-centroids", options.outlier_centroids),
    ):
        if value is not None and not (2 <= value <= MOST_CENTROIDS and not value & (value - 1)):
            raise PCDVQError(f"{option} is {value}; give a power of two from 2 to {MOST_CENTROIDS}")
    if options.normalize not in NORMALIZE:
        raise PCDVQError(
            f"--normalize is {options.normalize!r}; give one of {', '.join(NORMALIZE)}"
        )
    if not candidates(options):
        raise PCDVQError(_no_candidates(options))


def candidates(options: LayoutOptions) -> list[tuple[int, int]]:
    """(vector length, index bits) that give the rate asked for."""
    lengths = range(2, MOST_ROWS + 1) if options.vector_length is None else [options.vector_length]
    residual_bits = _index_bits(options.residual_centroids)
    found = []
    for length in lengths:
        if options.rate is None:
            assert options.centroids is not None
            found.append((length, _index_bits(options.centroids)))
            continue
        bits = options.rate * length - residual_bits
        fits = math.isclose(bits, round(bits), abs_tol=1e-6) and 1 <= round(bits) <= INDEX_BITS
        if fits and options.centroids in (None, 1 << round(bits)):
            found.append((length, round(bits)))
    return found


def _no_candidates(options: LayoutOptions) -> str:
    asked = f"--bits {options.rate:g}"
    if options.residual_centroids:
        asked += f" with --residual-centroids {options.residual_centroids}"
    if options.vector_length and options.centroids:
        bits = _index_bits(options.centroids) + _index_bits(options.residual_centroids)
        return (
            f"--vector-length {options.vector_length} and the centroids make "
            f"{bits / options.vector_length:g} bits per weight, not {asked}; drop --bits"
        )
    if options.vector_length:
        return (
            f"{asked} and --vector-length {options.vector_length} leave no index of 1 to "
            f"{INDEX_BITS} whole bits; change one of them, or give --centroids in place of --bits"
        )
    return (
        f"{asked} is no whole number of bits (1 to {INDEX_BITS}) for a vector of up to "
        f"{MOST_ROWS} weights; choose a multiple of 0.25 up to 4 or of 0.5 up to 8, or give "
        "--vector-length and --centroids"
    )


def choose(options: LayoutOptions, name: str, shape: tuple[int, int], bias: bool) -> VPTQLayout:
    """The layout of layer `name`.

    Longer vectors lower the error at equal index bits, and their tables cost more: of those
    possible the one with the least sum of table bits and `SHAPE_LOSS` per weight is taken.

    Args:
        options: checked.
        name: for errors.
        shape: [N, K].
        bias: whether the layer has one.

    Raises:
        PCDVQError: the layer is too small, or cannot be divided so.
    """
    rows, columns = shape
    grouped = columns - options.outliers
    if grouped < options.groups:
        raise PCDVQError(
            f"{name} has {columns} columns, too few for --outliers {options.outliers} and "
            f"--groups {options.groups}; give fewer, or leave the layer with --skip {name}"
        )
    if rest := grouped % options.groups:
        raise PCDVQError(
            f"{name} has {columns} columns; --outliers {options.outliers} leaves {grouped}, which "
            f"--groups {options.groups} does not divide; give --outliers {options.outliers + rest}"
        )
    weights = rows * columns

    def cost(candidate: tuple[int, int]) -> float:
        length, bits = candidate
        entries = (1 << bits) + options.residual_centroids
        return 16 * length * entries * options.groups / weights + SHAPE_LOSS[length]

    length, bits = min(candidates(options), key=cost)
    vectors = -(-rows // length) * grouped // options.groups
    for option, count, most in (
        ("centroids", 1 << bits, vectors),
        ("--residual-centroids", options.residual_centroids, vectors),
        (
            "--outlier-centroids",
            options.outlier_centroids if options.outliers else 0,
            -(-rows // options.outlier_vector_length) * options.outliers,
        ),
    ):
        if count > most:
            raise PCDVQError(
                f"{name} [{rows}, {columns}] has {most} vectors for {count} {option}; give fewer, "
                f"or leave the layer with --skip {name}"
            )
    outliers = (
        (options.outlier_vector_length, options.outlier_centroids) if options.outliers else None
    )
    auto = options.normalize == "auto" and rows >= NORMALIZED_ROWS
    return VPTQLayout.parse(
        name,
        {
            "bias": bias,
            "enable_norm": auto or options.normalize == "always",
            # Indices stand at their column; only runs of columns need an order of their own.
            "enable_perm": options.outliers > 0 or options.groups > 1,
            "group_num": options.groups,
            "group_size": grouped // options.groups,
            "in_features": columns,
            "indices_as_float": False,
            "is_indice_packed": True,
            "num_centroids": [outliers[1] if outliers else -1, 1 << bits],
            "num_res_centroids": [-1, options.residual_centroids or -1],
            "out_features": rows,
            "outlier_size": options.outliers,
            "vector_lens": [outliers[0] if outliers else -1, length],
        },
    )


def config_entry(layout: VPTQLayout) -> dict[str, Any]:
    """The entry of a layer in `config_for_layers`, with the keys that the package `vptq` takes."""
    left = {"norm_dim", "vector_quant_dim", "enable_proxy_error", "debug", "device", "dtype"}
    return layout.model_dump(exclude=left)


def _index_bits(count: int) -> int:
    return max(0, count.bit_length() - 1)
