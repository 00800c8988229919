"""How a published VPTQ layer is stored: its entry in config.json and its tensors.

A weight [N, K] is cut along N into row blocks of `vector_len` rows. Each column of a row block is a
centroid, or the sum of a centroid and a residual; columns of a group share the tables of both.
Before that, K may be permuted, the first `outlier_size` columns then have a table of their own, and
afterwards each column is scaled and shifted. The names are those of the package `vptq`
(https://github.com/microsoft/VPTQ, `VQuantLinear`), whose pairs hold outliers first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from annotated_types import Len
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from pcdvq_kernels.config import MOST_PROBLEMS
from pcdvq_kernels.errors import CheckpointError

QUANT_METHOD = "vptq"
MOST_CENTROIDS = 1 << 16  # the packer's indices have 16 bits
MOST_ROWS = 16  # of a row block, that the kernels serve
INDEX_DTYPES = (torch.int16, torch.uint16, torch.float16)  # 16 bits of an index, under any name
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REMEDY = "The checkpoint is damaged or incomplete: download it again."
# Tensors that are named `<table>.weight` on disk.
TABLES = ("centroids", "res_centroids", "outlier_centroids")

Pair = Annotated[list[int], Len(2, 2)]


class Segment(NamedTuple):
    """Columns that share tables.

    Attributes:
        columns: how many.
        vector_len: rows of a row block.
        index_bits: there are 2 ** index_bits centroids.
        residual_bits: and as many residuals; 0 for none.
    """

    columns: int
    vector_len: int
    index_bits: int
    residual_bits: int

    @property
    def bits(self) -> int:
        """Bits of a code: the index, above it the residual's."""
        return self.index_bits + self.residual_bits

    @property
    def rows(self) -> int:
        """Rows of the table: centroids, then residuals."""
        return (1 << self.index_bits) + (1 << self.residual_bits if self.residual_bits else 0)

    def row_bytes(self) -> int:
        """Bytes of a served row of codes: whole words, and one more that kernels may read."""
        return 4 * (-(-self.columns * self.bits // 32) + 1)


@dataclass(frozen=True)
class TensorSpec:
    """Shape and possible dtypes of a tensor on disk."""

    shape: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]


class VPTQLayout(BaseModel):
    """One layer's entry in `config_for_layers` or `shared_layer_config`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    in_features: int = Field(ge=1)
    out_features: int = Field(ge=1)
    vector_lens: Pair
    num_centroids: Pair
    num_res_centroids: Pair
    group_num: int = Field(ge=1)
    group_size: int = Field(ge=1)
    outlier_size: int = 0
    indices_as_float: bool | None = None
    enable_norm: bool = False
    enable_perm: bool = False
    is_indice_packed: bool = True
    norm_dim: int = 0
    vector_quant_dim: str = "out"
    # Of no consequence for the weight: the layer knows whether it has a bias, the others are
    # options of training.
    bias: Any = None
    enable_proxy_error: Any = None
    debug: Any = None
    device: Any = None
    dtype: Any = None

    @model_validator(mode="after")
    def _check(self) -> VPTQLayout:
        limits = {
            "is_indice_packed must be true: pack the model with the vptq package (pack_model)": (
                self.is_indice_packed
            ),
            f"vector_quant_dim is {self.vector_quant_dim!r}, served is 'out'": (
                self.vector_quant_dim == "out"
            ),
            f"norm_dim is {self.norm_dim}, served is 0": self.norm_dim == 0 or not self.enable_norm,
            f"vector_lens is {self.vector_lens}, served are lengths up to {MOST_ROWS}": (
                1 <= self.vector_lens[1] <= MOST_ROWS and self.vector_lens[0] <= MOST_ROWS
            ),
            f"num_centroids is {self.num_centroids}, the second must be a power of two up to "
            f"{MOST_CENTROIDS}": _is_power(self.num_centroids[1]),
            f"num_res_centroids is {self.num_res_centroids}, the second must be -1, 0 or a power "
            f"of two up to {MOST_CENTROIDS}": self.num_res_centroids[1] <= 0
            or _is_power(self.num_res_centroids[1]),
            f"permuted layers have at most {1 << 16} columns": not self.enable_perm
            or self.in_features <= 1 << 16,
        }
        if self.outliers:
            limits[
                f"{self.outlier_size} outliers of {self.num_centroids[0]} centroids and "
                f"{self.num_res_centroids[0]} residuals; served are 1 or more, 2 to "
                f"{MOST_CENTROIDS} and none"
            ] = (
                self.outlier_size >= 1
                and 2 <= self.num_centroids[0] <= MOST_CENTROIDS
                and self.num_res_centroids[0] <= 0
            )
        for problem, fine in limits.items():
            if not fine:
                raise ValueError(problem)
        columns = self.outliers + self.group_num * self.group_size
        if columns != self.in_features:
            raise ValueError(
                f"{self.outliers} outliers and {self.group_num} groups of {self.group_size} make "
                f"{columns} columns, in_features is {self.in_features}"
            )
        return self

    @classmethod
    def parse(cls, name: str, fields: dict[str, Any], **sizes: int) -> VPTQLayout:
        """Parse the entry of layer `name`.

        Args:
            name: for errors.
            fields: the entry.
            sizes: in_features and out_features; an entry may lack or repeat them.

        Raises:
            CheckpointError: malformed, of other sizes, or a layout that is not served.
        """
        for key, size in sizes.items():
            if fields.get(key, size) != size:
                raise CheckpointError(
                    f"layer {name}: {key} is {fields[key]} in the quantization_config, the model "
                    f"has {size}. {REMEDY}"
                )
        try:
            return cls.model_validate({**fields, **sizes})
        except ValidationError as error:
            problems = "; ".join(
                ": ".join(filter(None, (".".join(map(str, item["loc"])), item["msg"])))
                for item in error.errors()[:MOST_PROBLEMS]
            )
            raise CheckpointError(
                f"layer {name}: cannot serve its entry in the quantization_config: {problems}. "
                "Choose another VPTQ checkpoint of this model, or upgrade vllm-pcdvq."
            ) from error

    @property
    def outliers(self) -> int:
        """Columns with an outlier table."""
        enabled = self.vector_lens[0] > 1 and self.num_centroids[0] > 0
        return self.outlier_size if enabled else 0

    @property
    def residuals(self) -> int:
        return max(0, self.num_res_centroids[1])

    def segments(self) -> list[Segment]:
        """Runs of the permuted columns: outliers if there are any, then every group."""
        found = []
        if self.outliers:
            bits = (self.num_centroids[0] - 1).bit_length()
            found.append(Segment(self.outliers, self.vector_lens[0], bits, 0))
        index_bits = self.num_centroids[1].bit_length() - 1
        residual_bits = max(0, self.residuals.bit_length() - 1)
        group = Segment(self.group_size, self.vector_lens[1], index_bits, residual_bits)
        return found + self.group_num * [group]

    def tensors(self) -> dict[str, TensorSpec]:
        """The layer's tensors on disk, but for its bias.

        Those of `TABLES` have the suffix `.weight` there.
        """
        length, groups = self.vector_lens[1], self.group_num
        blocks, group = -(-self.out_features // length), self.segments()[-1]
        words = -(-self.group_size * group.bits // 32)
        columns = TensorSpec((self.in_features,), FLOAT_DTYPES)
        found = {
            "centroids": TensorSpec((groups, self.num_centroids[1] * length), FLOAT_DTYPES),
            "indices": TensorSpec((groups, blocks, words), (torch.int32,)),
        }
        if self.residuals:
            found["res_centroids"] = TensorSpec((groups, self.residuals * length), FLOAT_DTYPES)
        if self.outliers:
            length = self.vector_lens[0]
            blocks = -(-self.out_features // length)
            found["outlier_centroids"] = TensorSpec(
                (1, self.num_centroids[0] * length), FLOAT_DTYPES
            )
            found["outlier_indices"] = TensorSpec((1, blocks, self.outliers), INDEX_DTYPES)
        if self.enable_perm:
            dtypes = (torch.int16, torch.uint16, torch.int32, torch.int64)
            found["perm"] = TensorSpec((self.in_features,), dtypes)
        if self.enable_norm:
            found |= {"weight_scale": columns, "weight_bias": columns}
        return found

    def check_tensor(self, name: str, key: str, tensor: Tensor) -> None:
        """Raise CheckpointError unless `tensor` is what layer `name` stores as `key`."""
        spec = self.tensors().get(key)
        if spec is None:
            raise CheckpointError(
                f"tensor {name}.{key} is not part of the layer's layout ({self.codec}). {REMEDY}"
            )
        if tensor.dtype not in spec.dtypes or tensor.shape != spec.shape:
            dtypes = " or ".join(str(dtype) for dtype in spec.dtypes)
            raise CheckpointError(
                f"tensor {name}.{key} is {tensor.dtype} {list(tensor.shape)}, expected {dtypes} "
                f"{list(spec.shape)}. {REMEDY}"
            )

    @property
    def codec(self) -> str:
        """As published names say it: vptq v8-k65536-256."""
        return f"vptq v{self.vector_lens[1]}-k{self.num_centroids[1]}-{self.residuals}"

    @property
    def bits(self) -> float:
        """Nominal bits per weight: codes of the groups only."""
        return self.segments()[-1].bits / self.vector_lens[1]


def _is_power(count: int) -> bool:
    return 2 <= count <= MOST_CENTROIDS and not count & (count - 1)


def sixteen_bits(indices: Tensor) -> Tensor:
    """Indices of 16 bits under any dtype, or wider ones, as int64."""
    if indices.dtype.itemsize == 2:
        return indices.contiguous().view(torch.int16).to(torch.int64) & 0xFFFF
    return indices.to(torch.int64)


def permutation(layout: VPTQLayout, tensors: dict[str, Tensor], name: str = "weight") -> Tensor:
    """Column of the weight of each permuted column, int64 [K].

    Raises:
        CheckpointError: not a permutation.
    """
    columns = torch.arange(layout.in_features)
    if not layout.enable_perm:
        return columns
    perm = sixteen_bits(tensors["perm"]).cpu()
    if not torch.equal(perm.sort().values, columns):
        low, high = int(perm.min()), int(perm.max())
        raise CheckpointError(
            f"tensor {name}.perm has {len(perm.unique())} different values from {low} to {high}; "
            f"expected each column from 0 to {layout.in_features - 1} once. {REMEDY}"
        )
    return perm
