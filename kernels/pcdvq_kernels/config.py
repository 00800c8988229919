"""The `quantization_config` of a checkpoint (FORMAT.md), parsed strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pcdvq_kernels import pyramid, trellis
from pcdvq_kernels.errors import CheckpointError

FORMAT_VERSION = 2
QUANT_METHOD = "pcdvq"
# That one message names.
MOST_PROBLEMS = 4
# Bits of a code that is made of fields; pyramid codes have limits of their own.
MAX_CODE_BITS, MAX_PATTERN_BITS = 24, 16
# What kernels may round activations to (FORMAT.md).
Activations = Literal["int8", "int16", "float"]
DEFAULT_ACTIVATIONS: Activations = "int8"


class CodebookSpec(BaseModel):
    """Layout of one codebook's codes; the tables are in `Codebook`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    codec: Literal["trellis", "e8", "pvq", "int8"]
    vector_dim: Literal[1, 2, 8]
    pattern_bits: int = Field(ge=1, le=pyramid.MAX_CODE_BITS)
    magnitude_bits: int = Field(default=0, ge=0, le=4)
    shift: int = Field(default=0, ge=0, le=7)
    chain_rows: Literal[0, 16, 32, 64] = Field(default=0, exclude_if=lambda v: not v)
    pulses: Annotated[
        tuple[Annotated[int, Field(ge=1, le=pyramid.MOST_PULSES)], ...],
        # JSON has lists; the key is there for one codec only.
        Field(max_length=pyramid.MOST_MAGNITUDES, strict=False, exclude_if=lambda v: not v),
    ] = ()

    @model_validator(mode="after")
    def _check(self) -> CodebookSpec:
        dim = {"trellis": trellis.PAIR, "int8": 1}.get(self.codec, 8)
        if self.vector_dim != dim:
            raise ValueError(f"codec {self.codec} with vector_dim {self.vector_dim}, not {dim}")
        if (self.codec == "pvq") != bool(self.pulses):
            raise ValueError(f"codec {self.codec} with {len(self.pulses)} magnitudes of pulses")
        if (self.codec == "trellis") != bool(self.chain_rows):
            raise ValueError(f"codec {self.codec} with chain_rows {self.chain_rows}")
        if self.codec in ("trellis", "int8", "pvq") and self.magnitude_bits:
            raise ValueError(f"codec {self.codec} with {self.magnitude_bits} magnitude_bits")
        if self.codec in ("trellis", "int8") and self.shift:
            raise ValueError(f"codec {self.codec} with shift {self.shift}")
        if self.codec == "trellis" and self.pattern_bits not in trellis.CODE_BITS:
            limits = f"{trellis.CODE_BITS[0]} to {trellis.CODE_BITS[-1]}"
            raise ValueError(f"codec trellis has {limits} pattern_bits, not {self.pattern_bits}")
        if self.codec == "int8" and self.pattern_bits != 8:
            raise ValueError(f"codec int8 has 8 pattern_bits, not {self.pattern_bits}")
        if self.codec == "e8":
            self._check_sizes()
        if self.codec == "pvq":
            self._check_pyramids()
        return self

    def _check_sizes(self) -> None:
        if self.code_bits > MAX_CODE_BITS:
            raise ValueError(
                f"a code of {self.code_bits} bits is over the limit of {MAX_CODE_BITS}"
            )
        if self.pattern_bits > MAX_PATTERN_BITS:
            raise ValueError(
                f"{self.pattern_bits} pattern_bits are over the limit of {MAX_PATTERN_BITS}"
            )

    def _check_pyramids(self) -> None:
        if self.code_bits < pyramid.MIN_CODE_BITS:
            raise ValueError(f"codec pvq has {pyramid.MIN_CODE_BITS} pattern bits or more")
        _, end = pyramid.make_ranges(self.pulses, self.code_bits)
        if end > 1 << self.code_bits:
            raise ValueError(f"pulses {self.pulses} need {end} codes of {self.code_bits} bits")

    @property
    def code_bits(self) -> int:
        """Bits of one group's code."""
        return self.pattern_bits + self.magnitude_bits

    @property
    def bits(self) -> float:
        """Nominal bits per weight: codes only."""
        return self.code_bits / self.vector_dim

    @property
    def rows(self) -> int:
        """Rows of the direction table; computed directions need none."""
        return 0 if self.pulses or self.chain_rows else 1 << self.pattern_bits

    @property
    def pyramid_rows(self) -> int:
        """Rows of the tables that decode pyramid codes, 0 where levels are looked up by code."""
        tabulated = not self.pulses or self.code_bits <= pyramid.TABULATED_BITS
        return 0 if tabulated else pyramid.table_rows(self.pulses, self.code_bits)

    @property
    def magnitude_count(self) -> int:
        """Entries of the magnitude table."""
        return len(self.pulses) or 1 << self.magnitude_bits

    @property
    def row_multiple(self) -> int:
        """What the first row of a part of a weight must be a multiple of to decode by itself."""
        return self.chain_rows or 1

    @property
    def direction_length(self) -> int:
        """Weights of a row that share a magnitude; 0: all, those of codec trellis their scale."""
        return 0 if self.chain_rows else self.vector_dim

    @property
    def strip_columns(self) -> int:
        """Columns of which codes are chosen together."""
        return trellis.strip_columns(self.chain_rows) if self.chain_rows else self.vector_dim

    def stored_rows(self, out_features: int) -> int:
        """Rows of `qweight` of a layer of N = `out_features`: whole chains."""
        return -(-out_features // self.row_multiple) * self.row_multiple

    def row_bytes(self, in_features: int) -> int:
        """Bytes of one row of `qweight`."""
        return -(-(in_features // self.vector_dim) * self.code_bits // 8)


class PCDVQCheckpointConfig(BaseModel):
    """The whole `quantization_config` object of config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    quant_method: Literal["pcdvq"]
    format_version: int
    codebooks: dict[str, CodebookSpec]
    layers: dict[str, str]
    hadamard_blocks: dict[str, int]
    max_tp: int = Field(ge=1)
    modules_to_not_convert: list[str]
    embedding: str | None = None
    head: str | None = None
    activations: Activations | None = None

    @model_validator(mode="after")
    def _check(self) -> PCDVQCheckpointConfig:
        for name in (*self.codebooks, *self.layers, *self.modules_to_not_convert):
            if not name.isprintable():
                raise ValueError(f"the name {name!r} has characters that cannot be printed")
        for layer, codebook in self.layers.items():
            if codebook not in self.codebooks:
                known = ", ".join(sorted(self.codebooks))
                raise ValueError(f"layer {layer}: unknown codebook {codebook!r}; known: {known}")
        for name in self.embeddings:
            if name not in self.layers:
                raise ValueError(f"embedding or head {name} is not among the layers")
        for in_features, block in self.hadamard_blocks.items():
            if not in_features.isdecimal() or not int(in_features) or int(in_features) % 8:
                raise ValueError(
                    f"hadamard_blocks: {in_features!r} is not an input size, a multiple of 8"
                )
            if block < 1 or block & (block - 1) or int(in_features) % block:
                raise ValueError(
                    f"hadamard_blocks: {block} is not a power of two that divides {in_features}"
                )
        return self

    @classmethod
    def parse(cls, config: dict[str, Any]) -> PCDVQCheckpointConfig:
        """Parse `config`, a `quantization_config` object.

        Raises:
            CheckpointError: not PCDVQ, an unknown format version or codec, or any malformed field.
        """
        method = config.get("quant_method")
        if method != QUANT_METHOD:
            raise CheckpointError(
                f"not a PCDVQ checkpoint: quant_method is {method!r}, expected {QUANT_METHOD!r}. "
                "Make one with `pcdvq quantize MODEL OUT`."
            )
        version = config.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"format_version is {version!r}, this release reads version {FORMAT_VERSION}. "
                "Upgrade vllm-pcdvq or quantize the model again."
            )
        try:
            return cls.model_validate(config)
        except ValidationError as error:
            lines = [
                f"{'.'.join(map(str, item['loc'])) or 'quantization_config'}: {item['msg']}"
                for item in error.errors()[:MOST_PROBLEMS]
            ]
            raise CheckpointError(
                "bad quantization_config in config.json: " + "; ".join(lines)
            ) from error

    @property
    def embeddings(self) -> list[str]:
        """The quantized layers that hold a vector per token: input embedding and output head."""
        return [name for name in (self.embedding, self.head) if name is not None]

    def block(self, in_features: int) -> int:
        """Hadamard block for layers of `in_features` columns."""
        try:
            return self.hadamard_blocks[str(in_features)]
        except KeyError:
            raise CheckpointError(
                f"hadamard_blocks has no entry for input size {in_features}; quantize again"
            ) from None
