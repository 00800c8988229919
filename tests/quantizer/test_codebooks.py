"""The shipped codebooks: layout and error on N(0, 1)."""

import hashlib
from pathlib import Path

import pytest
import torch
from pcdvq_kernels.codebook import MAX_LEVEL
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.packing import pack_codes, unpack_codes
from pcdvq_quantizer import codebooks
from pcdvq_quantizer.codebooks import OFFERED, get_codebook

RATES = [(codec, bits) for codec, rates in OFFERED.items() for bits in rates]
# Mean squared error per weight on N(0, 1) that the codecs were designed to; the rate-distortion
# bounds are 0.0625, 0.0442, 0.0156, 0.0110 (at 3.25 bits) and 0.0039.
EXPECTED_ERROR = {
    ("signed", 2.0): 0.0925,
    ("signed", 2.25): 0.0647,
    ("signed", 3.0): 0.0266,
    ("signed", 4.0): 0.0074,
    ("trellis", 2.0): 0.0800,
    ("trellis", 2.25): 0.0570,
    ("trellis", 3.0): 0.0214,
    ("trellis", 4.0): 0.0060,
    ("compact", 2.0): 0.0821,
    ("compact", 3.0): 0.0224,
    ("compact", 4.0): 0.00615,
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
# The E8 codebooks are generated: these bytes must come out on every machine.
E8_SHA256 = {
    2.0: "68ccd39cd1f5d06cf66464f8b2af350efc00b1542966f858be260de1d6f059ba",
    2.25: "60676be5e9c084aa61009ed76e55ee3277609255434a9f505a3323420c54e486",
}


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_error_on_gaussian_weights(codec: str, bits: float) -> None:
    named = get_codebook(codec, bits)
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(1000, 100, named.codebook.spec.vector_dim, generator=generator)
    decoded = named.codebook.decode(named.encoder.encode(x * named.unit)).float() / named.unit
    error = (decoded - x).square().mean().item()
    assert error <= TOLERANCE * EXPECTED_ERROR[codec, bits]


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_rate_is_what_it_says(codec: str, bits: float) -> None:
    spec = get_codebook(codec, bits).codebook.spec
    assert spec.bits == bits
    assert spec.codec == codec
    assert (spec.magnitude_bits >= 1) == (spec.codec not in ("trellis", "compact", "pvq", "int8"))


@pytest.mark.parametrize(("codec", "bits"), RATES)
def test_encoding_a_codeword_finds_it(codec: str, bits: float) -> None:
    """Decode, encode, decode: codewords are their own nearest (or one as near)."""
    named = get_codebook(codec, bits)
    spec = named.codebook.spec
    codes = torch.randint(0, 1 << spec.code_bits, (20, 100))
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
    assert torch.equal(unpack_codes(pack_codes(codes, spec.code_bits), spec.code_bits, 100), codes)


def test_signed_encoder_beats_or_equals_any_single_flip() -> None:
    """Codes are locally optimal: no other pattern and magnitude under the same signs is nearer."""
    named = get_codebook("signed", 2.0)
    spec = named.codebook.spec
    x = torch.randn(64, 1, 8, generator=torch.Generator().manual_seed(3)) * named.unit
    codes = named.encoder.encode(x)
    fields = torch.arange(1 << (spec.pattern_bits + spec.magnitude_bits)) << spec.sign_bits
    others = (codes & ((1 << spec.sign_bits) - 1)) | fields  # [64, fields]
    distance = (named.codebook.decode(others).float() - x).square().sum(-1)
    chosen = (named.codebook.decode(codes).float() - x).square().sum(-1)
    torch.testing.assert_close(chosen, distance.min(1, keepdim=True).values)


STATES = [(codec, bits) for codec in ("trellis", "compact") for bits in OFFERED[codec]]


@pytest.mark.parametrize(("codec", "bits"), STATES)
def test_row_weights_move_the_error(codec: str, bits: float) -> None:
    """Rows that cost more are stored better, and the weighted error is least with their weights."""
    named = get_codebook(codec, bits)
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
        ("signed", 5.0, "choose 2, 2.25, 3, 4"),
        ("e8", 3.0, "choose 2, 2.25"),
        ("signed", 8.0, "choose 2, 2.25, 3, 4, or codec int8"),
        ("qtip", 2.0, "qtip"),
    ],
)
def test_rates_not_offered(codec: str, bits: float, message: str) -> None:
    with pytest.raises(PCDVQError, match=message):
        get_codebook(codec, bits)
