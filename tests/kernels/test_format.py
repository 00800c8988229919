"""The checkpoint format, frozen: packing, codes, rotation (FORMAT.md)."""

import pytest
import torch
from pcdvq_kernels import reference
from pcdvq_kernels.codebook import Codebook, int8_directions
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.hadamard import block_hadamard, choose_block
from pcdvq_kernels.packing import pack_codes, pack_signs, unpack_codes, unpack_signs
from pydantic import ValidationError

SMALL = CodebookSpec(
    codec="signed",
    vector_dim=2,
    signs=True,
    parity=True,
    pattern_bits=1,
    magnitude_bits=1,
    shift=0,
)
SMALL_BOOK = Codebook(
    SMALL,
    torch.tensor([[1, 2], [3, 4], [5, 6], [7, 8]], dtype=torch.int8),
    torch.tensor([1, 10], dtype=torch.uint8),
)

TRELLIS = SMALL.model_copy(
    update={
        "codec": "trellis",
        "pattern_bits": 2,
        "magnitude_bits": 0,
        "rotation_bits": 1,
        "state_bits": 1,
    }
)
TRELLIS_BOOK = Codebook(
    TRELLIS,
    torch.arange(1, 17, dtype=torch.int8).view(8, 2),
    torch.ones(1, dtype=torch.uint8),
)


COMPACT = CodebookSpec(
    codec="compact",
    vector_dim=4,
    signs=False,
    parity=False,
    pattern_bits=12,
    magnitude_bits=0,
    shift=0,
    state_bits=4,
)


def rows_as_levels(code_bits: int) -> Codebook:
    """A codebook of codec `compact` whose level in a row is the row's number less 64."""
    change = {"pattern_bits": code_bits, "state_bits": 5 - (code_bits - 8) // 4}
    spec = CodebookSpec.model_validate(COMPACT.model_dump() | change)
    directions = (torch.arange(128) - 64).to(torch.int8).unsqueeze(1).repeat(1, 4)
    return Codebook(spec, directions, torch.ones(1, dtype=torch.uint8))


def bytes_of(text: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(text)), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("code_bits", "codes", "golden"),
    [
        (16, [0x1234, 0xABCD], "3412cdab"),
        (18, [0x3FFFF, 0, 0x2AAAA, 1], "ffff0300a0aa6a0000"),
        (12, [0xABC, 0x123], "bc3a12"),
        (12, [0xABC], "bc0a"),
        (8, [1, 255], "01ff"),
        (4, [0xA, 0xB, 0xC], "ba0c"),
        (24, [0x010203, 0xFFFFFF], "030201ffffff"),
    ],
)
def test_golden_code_bytes(code_bits: int, codes: list[int], golden: str) -> None:
    packed = pack_codes(torch.tensor([codes]), code_bits)
    assert bytes(packed[0].tolist()).hex() == golden
    assert unpack_codes(packed, code_bits, len(codes)).tolist() == [codes]


@pytest.mark.parametrize("code_bits", [1, 4, 8, 12, 16, 18, 24])
@pytest.mark.parametrize("groups", [1, 7, 8, 72, 171])
def test_pack_round_trip(code_bits: int, groups: int) -> None:
    codes = torch.randint(0, 1 << code_bits, (3, groups))
    packed = pack_codes(codes, code_bits)
    assert packed.shape == (3, -(-groups * code_bits // 8))
    assert torch.equal(unpack_codes(packed, code_bits, groups), codes)


def test_golden_signs() -> None:
    packed = bytes_of("01f080")
    signs = unpack_signs(packed)
    assert signs.tolist() == [-1] + [1] * 11 + [-1] * 4 + [1] * 7 + [-1]
    assert torch.equal(pack_signs(signs), packed)


def test_golden_decode() -> None:
    """Code 0bMPSS: two signs, a pattern bit, a magnitude bit; an odd sign count picks odd rows."""
    codes = torch.tensor([0b0000, 0b0001, 0b0010, 0b0011, 0b0100, 0b0101, 0b1111])
    levels = [[1, 2], [-3, 4], [3, -4], [-1, -2], [5, 6], [-7, 8], [-50, -60]]
    assert SMALL_BOOK.decode(codes).tolist() == levels


def test_golden_trellis_decode() -> None:
    """Code 0bRBSS: two signs, a base bit, a rotation bit, which is the state of the row below."""
    codes = torch.tensor([[0b0000], [0b1001], [0b0110], [0b1111], [0b0000]])
    levels = [[1, 2], [-4, 3], [15, -16], [-6, -5], [9, 10]]
    assert TRELLIS_BOOK.decode(codes)[:, 0].tolist() == levels


def test_trellis_segments_start_over() -> None:
    codes = torch.full((35, 1), 0b1000)
    first, others = [2, 1], [10, 9]
    levels = TRELLIS_BOOK.decode(codes)[:, 0].tolist()
    assert levels == [first if row in (0, 16, 32) else others for row in range(35)]
    assert TRELLIS_BOOK.decode(codes[16:])[:, 0].tolist() == levels[16:]


def test_golden_trellis_bytes() -> None:
    """Two rows, K = 8: the low nibble of a byte is the first code."""
    qweight = torch.stack([bytes_of("9000"), bytes_of("f610")])
    levels = [[1, 2, -4, 3, 1, 2, 1, 2], [7, -8, -14, -13, 1, 2, -3, 4]]
    assert reference.decode_levels(qweight, TRELLIS_BOOK, 8).tolist() == levels


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "signed"},
        {"state_bits": 0},
        {"magnitude_bits": 1},
        {"rotation_bits": 2},
        {"state_bits": 3},
        {"state_bits": 5},
        {"signs": False, "parity": False},
    ],
)
def test_trellis_layout_out_of_limits(change: dict) -> None:
    with pytest.raises(ValidationError):
        CodebookSpec.model_validate(TRELLIS.model_dump() | change)


def test_golden_windows() -> None:
    """Two bits of a row's stream to a coordinate, in windows of 6, and an extra bit above them."""
    codes = torch.tensor([[0b10000011_0101], [0b00000000_0000]])
    # The row's stream is 1, 0, 0, 0, 0, 0, 1 and 1, the last one from the lowest bit of the eight.
    windows = [[0b010000, 0b000100, 0b000001, 0b110000], [0b001000, 0b000010, 0, 0]]
    extra = [[1, 0, 1, 0], [0, 0, 0, 0]]
    levels = torch.tensor(windows) + 64 * torch.tensor(extra) - 64
    assert torch.equal(rows_as_levels(12).decode(codes)[:, 0].long(), levels)


@pytest.mark.parametrize("code_bits", [8, 12, 16])
def test_windows_bit_by_bit(code_bits: int) -> None:
    codes = torch.randint(0, 1 << code_bits, (35, 3))
    width = (code_bits - 8) // 4
    decoded = rows_as_levels(code_bits).decode(codes) + 64
    for column in range(codes.shape[1]):
        for row, code in enumerate(codes[:, column].tolist()):
            if row % 16 == 0:
                stream = "0" * (5 - width)
            new = f"{code >> (4 * width):08b}"[::-1]  # the lowest bit first
            stream += new[1:]
            for j in range(4):
                end = len(stream) - 7 + 2 * (j + 1)
                bits = (stream + new[0])[end - (7 - width) : end]
                window = int(bits[::-1], 2)
                extra = code >> (width * j) & ((1 << width) - 1)
                assert decoded[row, column, j] == window | extra << (7 - width)


@pytest.mark.parametrize(
    "change",
    [
        {"vector_dim": 8},
        {"signs": True},
        {"pattern_bits": 10},
        {"state_bits": 5},
        {"magnitude_bits": 1},
        {"codec": "trellis"},
        {"codec": "e8"},
    ],
)
def test_compact_layout_out_of_limits(change: dict) -> None:
    with pytest.raises(ValidationError):
        CodebookSpec.model_validate(COMPACT.model_dump() | change)


def test_int8_codes_are_the_levels() -> None:
    spec = CodebookSpec(
        codec="int8",
        vector_dim=1,
        signs=False,
        parity=False,
        pattern_bits=8,
        magnitude_bits=0,
        shift=0,
    )
    one = torch.ones(1, dtype=torch.uint8)
    book = Codebook(spec, int8_directions(), one)
    assert book.decode(torch.tensor([0, 1, 127, 128, 129, 255])).flatten().tolist() == [
        *(0, 1, 127),
        *(-127, -127, -1),
    ]
    with pytest.raises(CheckpointError, match="not those of codec int8"):
        Codebook(spec, int8_directions().neg(), one)
    for changes in ({"vector_dim": 2}, {"codec": "e8"}, {"magnitude_bits": 1}, {"shift": 1}):
        with pytest.raises(ValueError, match="int8"):
            CodebookSpec.model_validate(spec.model_dump() | changes)


def test_shift_rounds_to_nearest_half_up() -> None:
    spec = SMALL.model_copy(
        update={"signs": False, "parity": False, "shift": 7, "magnitude_bits": 0}
    )
    directions = torch.tensor([[3, -3], [5, -5]], dtype=torch.int8)
    book = Codebook(spec, directions, torch.tensor([64], dtype=torch.uint8))
    assert book.decode(torch.tensor([0, 1])).tolist() == [[2, -1], [3, -2]]


def test_golden_dequantize() -> None:
    """One row, K = 8, block 2: levels, then Hadamard, signs and row scale by hand."""
    qweight = pack_codes(torch.tensor([[0b0000, 0b0001, 0b0100, 0b0011]]), 4)
    signs_in = bytes_of("02")  # column 1 negated
    weight = reference.dequantize(
        qweight, torch.tensor([0.5], dtype=torch.bfloat16), signs_in, SMALL_BOOK, block=2
    )
    root = 2**-0.5
    expected = [3, 1, 1, -7, 11, -1, -3, 1]  # sums and differences of (1,2) (-3,4) (5,6) (-1,-2)
    assert weight.tolist()[0] == pytest.approx([0.5 * root * value for value in expected])


def test_reference_linear_is_the_dense_product() -> None:
    qweight = torch.randint(0, 256, (5, 36), dtype=torch.uint8)
    scale, signs_in = torch.rand(5).bfloat16(), torch.randint(0, 256, (9,), dtype=torch.uint8)
    x, bias = torch.randn(3, 72), torch.randn(5)
    dense = reference.dequantize(qweight[:, :18], scale, signs_in, SMALL_BOOK, block=8)
    y = reference.linear(x, qweight[:, :18], scale, signs_in, SMALL_BOOK, 8, bias)
    torch.testing.assert_close(y, x @ dense.T + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 8, 64])
def test_hadamard_is_its_own_inverse(block: int) -> None:
    x = torch.randn(3, 192, dtype=torch.float64)
    torch.testing.assert_close(block_hadamard(block_hadamard(x, block), block), x)
    torch.testing.assert_close(block_hadamard(x, block).norm(dim=1), x.norm(dim=1))


def test_hadamard_is_sylvester_ordered() -> None:
    expected = torch.tensor([[1, 1, 1, 1], [1, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]) / 2
    assert torch.equal(block_hadamard(torch.eye(4), 4), expected)


@pytest.mark.parametrize(
    ("in_features", "max_tp", "block"),
    [
        (576, 8, 64),
        (896, 8, 64),
        (896, 1, 128),
        (1536, 8, 64),
        (4864, 4, 64),
        (4096, 8, 512),
        (14336, 8, 256),
        (8, 8, 8),
        (72, 2, 8),
        (65536, 1, 4096),
    ],
)
def test_block_choice(in_features: int, max_tp: int, block: int) -> None:
    assert choose_block(in_features, max_tp) == block


@pytest.mark.parametrize(
    ("directions", "magnitudes", "message"),
    [
        ([[1, 2], [3, 4], [5, 6], [7, -8]], [1, 10], "-8"),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], [0, 10], r"\[0, 10\]"),
        ([[1, 2], [3, 4], [5, 6], [7, 8]], [1, 200], "200"),
        ([[1, 2], [3, 4], [5, 6], [7, 80]], [1, 10], "800"),
        ([[1, 2], [3, 4], [5, 6]], [1, 10], r"\[3, 2\]"),
    ],
)
def test_codebook_out_of_limits(directions: list, magnitudes: list, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Codebook(
            SMALL,
            torch.tensor(directions, dtype=torch.int8),
            torch.tensor(magnitudes, dtype=torch.uint8),
        )
