"""The `quantization_config` of a checkpoint (FORMAT.md), parsed strictly."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pcdvq_kernels import pyramid, windows
from pcdvq_kernels.errors import CheckpointError

FORMAT_VERSION = 1
QUANT_METHOD = "pcdvq"
# Rows of a weight that a trellis chain runs through before it starts over (FORMAT.md).
SEGMENT_ROWS = 16
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

    codec: Literal["signed", "e8", "trellis", "compact", "int8", "pvq"]
    vector_dim: Literal[1, 2, 4, 8]
    signs: bool
    parity: bool
    pattern_bits: int = Field(ge=1, le=pyramid.MAX_CODE_BITS)
    magnitude_bits: int = Field(ge=0, le=4)
    shift: int = Field(ge=0, le=7)
    rotation_bits: int = Field(default=0, ge=0, le=3)
    state_bits: int = Field(default=0, ge=0, le=5)
    pulses: Annotated[
        tuple[Annotated[int, Field(ge=1, le=pyramid.MOST_PULSES)], ...],
        # JSON has lists; the key is there for one codec only.
        Field(max_length=pyramid.MOST_MAGNITUDES, strict=False, exclude_if=lambda v: not v),
    ] = ()

    @model_validator(mode="after")
    def _check(self) -> CodebookSpec:
        if (self.codec == "pvq") != bool(self.pulses):
            raise ValueError(f"codec {self.codec} with {len(self.pulses)} magnitudes of pulses")
        most_states = {"trellis": 4, "compact": 5}.get(self.codec, 0)
        if not min(most_states, 1) <= self.state_bits <= most_states:
            raise ValueError(f"codec {self.codec} with {self.state_bits} state_bits")
        if (self.codec == "int8") != (self.vector_dim == 1):
            raise ValueError("vector_dim is 1 for codec int8 and for no other")
        if self.codec == "int8" and (self.code_bits, self.rows, self.shift) != (8, 256, 0):
            raise ValueError("codec int8 has 8 pattern bits, nothing else in its codes, no shift")
        if self.windows:
            self._check_windows()
            return self
        self._check_fields()
        if self.pulses:
            self._check_pyramids()
        else:
            self._check_sizes()
        return self

    def _check_windows(self) -> None:
        others = self.signs, self.parity, self.magnitude_bits, self.rotation_bits
        if self.vector_dim != windows.DIM or any(others):
            raise ValueError(f"codec compact has groups of {windows.DIM}, a pattern and states")
        if self.pattern_bits not in windows.CODE_BITS:
            raise ValueError(
                f"codec compact has pattern_bits {windows.CODE_BITS}, not {self.pattern_bits}"
            )
        if self.state_bits != windows.state_bits(self.pattern_bits):
            raise ValueError(
                f"codec compact has {windows.state_bits(self.pattern_bits)} state_bits beside "
                f"{self.pattern_bits} pattern_bits, not {self.state_bits}"
            )

    def _check_fields(self) -> None:
        if self.parity and not self.signs:
            raise ValueError("parity needs signs: it is the parity of the sign bits")
        if self.rotation_bits and 1 << self.rotation_bits != self.vector_dim:
            raise ValueError(f"{self.rotation_bits} rotation_bits do not rotate {self.vector_dim}")
        if (self.rotation_bits or self.state_bits) and not (self.signs and not self.magnitude_bits):
            raise ValueError("states and rotations need signs and no magnitude bits")
        if self.pattern_bits < max(self.rotation_bits, self.state_bits):
            raise ValueError("states and rotations are bits of the pattern")

    def _check_sizes(self) -> None:
        if self.code_bits > MAX_CODE_BITS:
            raise ValueError(
                f"a code of {self.code_bits} bits is over the limit of {MAX_CODE_BITS}"
            )
        if self.pattern_bits > MAX_PATTERN_BITS:
            raise ValueError(
                f"{self.pattern_bits} pattern_bits are over the limit of {MAX_PATTERN_BITS}"
            )
        if self.state_bits + self.base_bits > 16:
            raise ValueError("the direction table is over the limit of 2^17 rows")

    def _check_pyramids(self) -> None:
        if (self.vector_dim, self.sign_bits, self.magnitude_bits) != (pyramid.DIM, 0, 0):
            raise ValueError(f"codec pvq has groups of {pyramid.DIM} and no fields but the pattern")
        if self.code_bits < pyramid.MIN_CODE_BITS:
            raise ValueError(f"codec pvq has {pyramid.MIN_CODE_BITS} pattern bits or more")
        _, end = pyramid.make_ranges(self.pulses, self.code_bits)
        if end > 1 << self.code_bits:
            raise ValueError(f"pulses {self.pulses} need {end} codes of {self.code_bits} bits")

    @property
    def sign_bits(self) -> int:
        return self.vector_dim if self.signs else 0

    @property
    def code_bits(self) -> int:
        """Bits of one group's code."""
        return self.sign_bits + self.pattern_bits + self.magnitude_bits

    @property
    def bits(self) -> float:
        """Nominal bits per weight: codes only."""
        return self.code_bits / self.vector_dim

    @property
    def windows(self) -> bool:
        """Whether coordinates select rows of the direction table one by one."""
        return self.codec == "compact"

    @property
    def rows(self) -> int:
        """Rows of the direction table; pyramids need none."""
        if self.windows:
            return 1 << windows.INDEX_BITS
        return 0 if self.pulses else 1 << (self.state_bits + self.base_bits + self.parity)

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
    def base_bits(self) -> int:
        """Bits of the pattern that select a row of the direction table."""
        return self.pattern_bits - self.rotation_bits

    @property
    def row_multiple(self) -> int:
        """What the first row of a part of a weight must be a multiple of to decode by itself."""
        return SEGMENT_ROWS if self.state_bits else 1

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
