"""The checkpoint format, frozen: packing, codes, rotation (FORMAT.md)."""

import pytest
import torch
from pcdvq_kernels import reference, trellis
from pcdvq_kernels.codebook import Codebook, int8_directions
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.hadamard import block_hadamard, choose_block
from pcdvq_kernels.packing import pack_codes, pack_signs, unpack_codes, unpack_signs
from pydantic import ValidationError

SMALL = CodebookSpec(codec="e8", vector_dim=8, pattern_bits=1, magnitude_bits=1)
DIRECTIONS = [[1, 2, -3, 4, 5, -6, 7, 8], [-8, 7, 6, 5, -4, 3, 2, 1]]
SMALL_BOOK = Codebook(
    SMALL,
    torch.tensor(DIRECTIONS, dtype=torch.int8),
    torch.tensor([1, 10], dtype=torch.uint8),
)


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
    """Code 0bMP: a pattern bit, a magnitude bit."""
    levels = SMALL_BOOK.decode(torch.tensor([0b00, 0b01, 0b10, 0b11])).tolist()
    tens = [[10 * level for level in row] for row in DIRECTIONS]
    assert levels == [*DIRECTIONS, *tens]


def test_golden_windows() -> None:
    """Of 0x0102 the product has the bytes 8A, 71, 21, 72, of 0xFFFF BB, 69, FF, FF."""
    windows = torch.tensor([0, 0x0102, 0xFFFF])
    pairs = [[0, 0], [(0x8A + 0x21 + 1) // 2, (0x71 + 0x72 + 1) // 2], [221, 180]]
    assert (trellis.window_levels(windows, 4) + 128).tolist() == pairs
    assert (trellis.window_levels(windows, 8) + 128).tolist() == [0, (86 + 114) // 2, 201]


@pytest.mark.parametrize("chain_rows", trellis.CHAIN_ROWS)
@pytest.mark.parametrize("code_bits", trellis.CODE_BITS)
def test_chains_bit_by_bit(code_bits: int, chain_rows: int) -> None:
    """FORMAT.md's text, with strings of bits."""
    columns = 128 // chain_rows
    codes = torch.randint(0, 1 << code_bits, (2 * chain_rows, columns))  # two strips
    found = trellis.decode(codes, code_bits, chain_rows)
    for segment in range(2):
        for strip in range(2):
            places = [
                (segment * chain_rows + row, strip * columns // 2 + pair)
                for pair in range(columns // 2)
                for row in range(chain_rows)
            ]
            ring = "".join(f"{codes[place].item():0{code_bits}b}" for place in places)
            for step, place in enumerate(places):
                ends = [(step + 1) * code_bits]
                if code_bits >= 6:
                    ends.insert(0, step * code_bits + (code_bits + 1) // 2)
                windows = [
                    int("".join(ring[i % len(ring)] for i in range(e - 16, e)), 2) for e in ends
                ]
                levels = trellis.window_levels(torch.tensor(windows), code_bits).flatten()
                assert found[place].tolist() == levels.tolist()


def test_golden_trellis_bytes() -> None:
    """A code of 4 bits is a nibble, the first one low; row 0 follows row 63."""
    codebook = get_trellis(4, 64)
    qweight = torch.zeros(64, 4, dtype=torch.uint8)  # K = 16
    qweight[0, 1], qweight[63, 1] = 0x21, 0x43  # pairs 2 and 3
    levels = reference.decode_levels(qweight, codebook, 16)
    assert (
        levels[0, 4:8].tolist()
        == trellis.window_levels(torch.tensor([0x0031, 0x0042]), 4).flatten().tolist()
    )
    assert (
        levels[1, 4:8].tolist()
        == trellis.window_levels(torch.tensor([0x0310, 0x0420]), 4).flatten().tolist()
    )
    assert (levels[:, :4] == -128).all()


def get_trellis(code_bits: int, chain_rows: int) -> Codebook:
    spec = CodebookSpec(
        codec="trellis", vector_dim=2, pattern_bits=code_bits, chain_rows=chain_rows
    )
    empty = torch.empty(0, 2, dtype=torch.int8)
    return Codebook(spec, empty, torch.ones(1, dtype=torch.uint8))


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "e8"},
        {"vector_dim": 8},
        {"pattern_bits": 2},
        {"pattern_bits": 9},
        {"magnitude_bits": 1},
        {"chain_rows": 0},
        {"chain_rows": 8},
        {"shift": 1},
        {"pulses": (3,)},
    ],
)
def test_trellis_layout_out_of_limits(change: dict) -> None:
    with pytest.raises(ValidationError):
        CodebookSpec.model_validate(get_trellis(4, 64).spec.model_dump() | change)


def test_int8_codes_are_the_levels() -> None:
    spec = CodebookSpec(codec="int8", vector_dim=1, pattern_bits=8)
    one = torch.ones(1, dtype=torch.uint8)
    book = Codebook(spec, int8_directions(), one)
    assert book.decode(torch.tensor([0, 1, 127, 128, 129, 255])).flatten().tolist() == [
        *(0, 1, 127),
        *(-127, -127, -1),
    ]
    with pytest.raises(CheckpointError, match="not those of codec int8"):
        Codebook(spec, int8_directions().neg(), one)
    for changes in ({"vector_dim": 2}, {"codec": "e8"}, {"magnitude_bits": 1}, {"shift": 1}):
        with pytest.raises(ValueError, match="codec"):
            CodebookSpec.model_validate(spec.model_dump() | changes)


def test_shift_rounds_to_nearest_half_up() -> None:
    spec = SMALL.model_copy(update={"shift": 7, "magnitude_bits": 0})
    directions = torch.tensor([[3, -3, 0, 0, 0, 0, 0, 0], [5, -5, 0, 0, 0, 0, 0, 0]])
    book = Codebook(spec, directions.to(torch.int8), torch.tensor([64], dtype=torch.uint8))
    assert book.decode(torch.tensor([0, 1]))[:, :2].tolist() == [[2, -1], [3, -2]]


def test_golden_dequantize() -> None:
    """One row, K = 8, block 2: levels, then Hadamard, signs and row scale by hand."""
    qweight = pack_codes(torch.tensor([[0b00]]), 2)
    signs_in = bytes_of("02")  # column 1 negated
    weight = reference.dequantize(
        qweight, torch.tensor([0.5], dtype=torch.bfloat16), signs_in, SMALL_BOOK, block=2
    )
    root = 2**-0.5
    expected = [3, 1, 1, -7, -1, 11, 15, -1]  # sums and differences of (1,2) (-3,4) (5,-6) (7,8)
    assert weight.tolist()[0] == pytest.approx([0.5 * root * value for value in expected])


def test_reference_linear_is_the_dense_product() -> None:
    codebook = get_trellis(4, 16)
    qweight = torch.randint(0, 256, (16, 18), dtype=torch.uint8)
    scale, signs_in = torch.rand(5).bfloat16(), torch.randint(0, 256, (9,), dtype=torch.uint8)
    x, bias = torch.randn(3, 72), torch.randn(5)
    dense = reference.dequantize(qweight, scale, signs_in, codebook, block=8)
    y = reference.linear(x, qweight, scale, signs_in, codebook, 8, bias)
    torch.testing.assert_close(y, x @ dense.T + bias, rtol=1e-4, atol=1e-3)


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
    ("last", "rows", "magnitudes", "message"),
    [
        (-128, 2, [1, 10], "-128"),
        (8, 2, [0, 10], r"\[0, 10\]"),
        (8, 2, [1, 200], "200"),
        (80, 2, [1, 10], "800"),
        (8, 1, [1, 10], r"\[1, 8\]"),
    ],
)
def test_codebook_out_of_limits(last: int, rows: int, magnitudes: list, message: str) -> None:
    directions = torch.tensor(DIRECTIONS, dtype=torch.int8)
    directions[0, -1] = last
    with pytest.raises(CheckpointError, match=message):
        Codebook(SMALL, directions[:rows], torch.tensor(magnitudes, dtype=torch.uint8))
