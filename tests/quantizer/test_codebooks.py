"""The shipped codebooks: layout and error on N(0, 1)."""

import hashlib
from pathlib import Path

import pytest
import torch
from pcdvq_kernels.codebook import MAX_LEVEL
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.packing import pack_codes, unpack_codes
from pcdvq_kernels.trellis import CHAIN_ROWS
from pcdvq_quantizer import codebooks
from pcdvq_quantizer.codebooks import OFFERED, NamedCodebook, get_codebook
from pcdvq_quantizer.codecs import DIRECTION_AND_MAGNITUDE, describe_codecs

RATES = [(codec, bits) for codec, rates in OFFERED.items() for bits in rates]
# Mean squared error per weight on N(0, 1) that the codecs were designed to; the rate-distortion
# bound at R bits is 4^-R: 0.125, 0.0625, 0.0313, 0.0156, 0.0078 and 0.0039 at the rates of trellis.
EXPECTED_ERROR = {
    ("trellis", 1.5): 0.1410,
    ("trellis", 2.0): 0.0736,
    ("trellis", 2.5): 0.0387,
    ("trellis", 3.0): 0.0182,
    ("trellis", 3.5): 0.00925,
    ("trellis", 4.0): 0.00472,
    ("e8", 2.0): 0.0990,
    ("e8", 2.25): 0.0691,
    ("pvq", 2.0): 0.1003,
    ("pvq", 2.25): 0.0711,
    ("pvq", 3.0): 0.0260,
    ("pvq", 3.25): 0.0189,
    ("pvq", 4.0): 0.0068,
    ("int8", 8.0): 0.0000884,
}
TOLERANCE = 1.02
QUICK = 1.7  # times as much, at most, by the quick search
ROWS, WEIGHTS = 320, 1 << 16  # whole chains of any codec; a sample's error is within 1 %
IDS = "trellis-2", "trellis-2-rows32", "trellis-2-rows16"
# The E8 codebooks are generated: these bytes must come out on every machine.
E8_SHA256 = {
    2.0: "68ccd39cd1f5d06cf66464f8b2af350efc00b1542966f858be260de1d6f059ba",
    2.25: "60676be5e9c084aa61009ed76e55ee3277609255434a9f505a3323420c54e486",
}


def gaussian_error(named: NamedCodebook) -> float:
    """Mean squared error of N(0, 1) weights."""
    generator = torch.Generator().manual_seed(7)
    dim = named.codebook.spec.vector_dim
    x = torch.randn(ROWS, WEIGHTS // ROWS // 8 * 8 // dim, dim, generator=generator)
    decoded = named.codebook.decode(named.encoder.encode(x * named.unit)).float() / named.unit
    return (decoded - x).square().mean().item()


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_error_on_gaussian_weights(codec: str, bits: float) -> None:
    assert gaussian_error(get_codebook(codec, bits)) <= TOLERANCE * EXPECTED_ERROR[codec, bits]


@pytest.mark.parametrize("bits", OFFERED["trellis"])
def test_error_of_the_quick_search(bits: float) -> None:
    quick = gaussian_error(get_codebook("trellis", bits, effort="quick"))
    assert quick <= QUICK * EXPECTED_ERROR["trellis", bits]


@pytest.mark.parametrize("chain_rows", CHAIN_ROWS)
def test_error_does_not_depend_on_the_shape_of_chains(chain_rows: int) -> None:
    named = get_codebook("trellis", 2.5, chain_rows)
    assert gaussian_error(named) <= TOLERANCE * EXPECTED_ERROR["trellis", 2.5]


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_rate_is_what_it_says(codec: str, bits: float) -> None:
    spec = get_codebook(codec, bits).codebook.spec
    assert spec.bits == bits
    assert spec.codec == codec
    assert (spec.magnitude_bits >= 1) == (spec.codec == "e8")


@pytest.mark.parametrize(("chain_rows", "id"), list(zip(CHAIN_ROWS, IDS, strict=True)))
def test_chains_of_each_length_have_an_id(chain_rows: int, id: str) -> None:
    """However long the search for their codes."""
    for effort in ("exhaustive", "quick"):
        named = get_codebook("trellis", 2.0, chain_rows, effort)
        assert named.id == id
        assert named.codebook.spec.chain_rows == chain_rows
        assert named.effort == effort


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_encoding_a_codeword_finds_it(codec: str, bits: float) -> None:
    """Decode, encode, decode: codewords are their own nearest (or one as near)."""
    named = get_codebook(codec, bits)
    spec = named.codebook.spec
    codes = torch.randint(0, 1 << spec.code_bits, (64, 40))
    if spec.codec == "e8":
        # Direction and length are chosen apart, so only the direction must come back.
        levels = named.codebook.decode(codes).float()
        again = named.codebook.decode(named.encoder.encode(levels)).float()
        assert torch.cosine_similarity(levels, again).min() > 0.99
        return
    levels = named.codebook.decode(codes)
    if spec.pulses:
        # A level that was cut is not its point's own.
        levels = levels[levels.abs().amax(-1) < MAX_LEVEL].unsqueeze(0)
    assert torch.equal(named.codebook.decode(named.encoder.encode(levels.float())), levels)
    assert torch.equal(unpack_codes(pack_codes(codes, spec.code_bits), spec.code_bits, 40), codes)


@pytest.mark.parametrize("bits", OFFERED["trellis"])
def test_no_single_code_of_a_chain_can_be_better(bits: float) -> None:
    """Codes are locally optimal: another one in the place of any of them is not nearer."""
    named = get_codebook("trellis", bits)
    spec = named.codebook.spec
    x = torch.randn(spec.chain_rows, 1, 2, generator=torch.Generator().manual_seed(3)) * named.unit
    codes = named.encoder.encode(x)  # one chain
    size = 1 << spec.code_bits
    others = codes.T.repeat(spec.chain_rows * size, 1)  # chain by chain
    step = torch.arange(spec.chain_rows).repeat_interleave(size)
    others[torch.arange(len(others)), step] = torch.arange(size).repeat(spec.chain_rows)

    def distance(chains: torch.Tensor) -> torch.Tensor:
        levels = named.codebook.decode(chains.reshape(-1, 1)).float()
        return (levels.view(-1, *x.shape) - x).square().sum((1, 2, 3))

    torch.testing.assert_close(distance(codes.T)[0], distance(others).min())


@pytest.mark.parametrize("effort", ["exhaustive", "quick"])
@pytest.mark.parametrize("bits", OFFERED["trellis"])
def test_row_weights_move_the_error(bits: float, effort: str) -> None:
    """Rows that cost more are stored better, and the weighted error is least with their weights."""
    named = get_codebook("trellis", bits, effort=effort)
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(320, 10, named.codebook.spec.vector_dim, generator=generator) * named.unit
    weight = torch.where(torch.arange(320) % 4 == 0, 1.0, 0.05)

    def row_errors(row_weight: torch.Tensor | None) -> torch.Tensor:
        decoded = named.codebook.decode(named.encoder.encode(x, row_weight)).float()
        return (decoded - x).square().sum((1, 2))

    plain, weighted = row_errors(None), row_errors(weight)
    assert (weight * weighted).sum() < (weight * plain).sum()
    assert weighted[::4].sum() < plain[::4].sum()
    assert plain.sum() < weighted.sum()


def test_every_codec_says_what_its_codes_are() -> None:
    """Each codec that is used once, no other."""
    assert DIRECTION_AND_MAGNITUDE.keys() == OFFERED.keys()
    books = [get_codebook(*rate) for rate in RATES if rate[0] in ("trellis", "int8")]
    trellis, int8 = describe_codecs(book.codebook.spec for book in books)
    assert trellis.startswith("trellis: ")
    assert " 128 weights " in trellis
    assert int8.startswith("int8: ")


@pytest.mark.parametrize("bits", [2.0, 2.25])
def test_e8_codebook_is_deterministic_and_distinct(bits: float) -> None:
    directions = get_codebook("e8", bits).codebook.directions
    assert hashlib.sha256(directions.numpy().tobytes()).hexdigest() == E8_SHA256[bits]
    assert len(directions.unique(dim=0)) == len(directions)


def test_e8_codebook_is_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    get_codebook.cache_clear()
    first = get_codebook("e8", 2.0)
    get_codebook.cache_clear()
    monkeypatch.setattr(codebooks, "make_e8_tables", None)  # a second generation would fail
    second = get_codebook("e8", 2.0)
    assert torch.equal(first.codebook.directions, second.codebook.directions)
    assert torch.equal(first.codebook.magnitudes, second.codebook.magnitudes)
    assert first.unit == second.unit


@pytest.mark.parametrize(
    ("codec", "bits", "message"),
    [
        ("trellis", 5.0, "choose 1.5, 2, 2.5, 3, 3.5, 4"),
        ("trellis", 2.25, "2.5, 3, 3.5, 4, or codec e8, or codec pvq"),
        ("e8", 3.0, "choose 2, 2.25"),
        ("pvq", 8.0, "choose 2, 2.25, 3, 3.25, 4, or codec int8"),
        ("qtip", 2.0, "qtip"),
    ],
)
def test_rates_not_offered(codec: str, bits: float, message: str) -> None:
    with pytest.raises(PCDVQError, match=message):
        get_codebook(codec, bits)
