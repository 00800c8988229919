"""Pyramid codes against their definition (FORMAT.md, "Pyramid codes")."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import product

import pytest
import torch
from linear_cases import SPECS, Case, random_case
from pcdvq_kernels import cpu, pyramid
from pcdvq_kernels.codebook import Codebook
from pcdvq_kernels.config import CodebookSpec
from pcdvq_kernels.errors import CheckpointError
from pcdvq_kernels.packing import pack_codes
from pydantic import ValidationError
from torch import Tensor

SPEC = CodebookSpec(
    codec="pvq",
    vector_dim=8,
    pattern_bits=12,
    magnitude_bits=0,
    shift=1,
    pulses=(3, 1, 2),
)
MAGNITUDES = torch.tensor([30, 61, 128], dtype=torch.uint8)
NO_DIRECTIONS = torch.empty(0, 8, dtype=torch.int8)
BOOK = Codebook(SPEC, NO_DIRECTIONS, MAGNITUDES)
LARGEST = SPEC.model_copy(update={"pattern_bits": 32, "pulses": (1, pyramid.MOST_PULSES)})
PYRAMIDS = {codec: spec for codec, spec in SPECS.items() if spec.pulses} | {"largest": LARGEST}


@cache
def defined_points(dim: int, pulses: int) -> list[tuple[int, ...]]:
    """P(dim, pulses): all vectors of the sum, in lexicographic order."""
    vectors = product(range(-pulses, pulses + 1), repeat=dim)
    return [vector for vector in vectors if sum(map(abs, vector)) == pulses]


def defined_levels(book: Codebook) -> list[list[int]]:
    """The levels of every code, by the text of the format."""
    spec, codes = book.spec, []
    step = 1 << (spec.code_bits - 12)
    for magnitude, total in zip(book.magnitudes.tolist(), spec.pulses, strict=True):
        for first in range(total + 1):
            codes += [codes[-1]] * (-len(codes) % step) if codes else []
            for halves in product(defined_points(4, first), defined_points(4, total - first)):
                scaled = (y * magnitude + (1 << spec.shift >> 1) for y in sum(halves, ()))
                codes.append([max(-127, min(127, value >> spec.shift)) for value in scaled])
    return codes + [codes[-1]] * ((1 << spec.code_bits) - len(codes))


def edge_codes(spec: CodebookSpec) -> Tensor:
    """Codes at which a range, its last code, or a quotient begins or ends; int64 [codes]."""
    ranges, end = pyramid.make_ranges(spec.pulses, spec.code_bits)
    edges = [0, end - 1, end, (1 << spec.code_bits) - 1]
    for item in ranges:
        divisor = pyramid.count_points(pyramid.HALF, item.second)
        quotients = (0, 1, item.size // divisor // 2, item.size // divisor - 1)
        near = [item.start + quotient * divisor + i for quotient in quotients for i in (-1, 0, 1)]
        edges += [*near, item.start + item.size - 1, item.start + item.size]
    return torch.tensor(edges).clamp(0, (1 << spec.code_bits) - 1).unique()


def test_golden_codes() -> None:
    """688 codes of three pulses, 88 of them in the last four coordinates; then 16 of one pulse."""
    codes = torch.tensor([0, 1, 87, 88, 600, 687, 688, 4095])
    assert BOOK.decode(codes).tolist() == [
        [0, 0, 0, 0, -45, 0, 0, 0],
        [0, 0, 0, 0, -30, -15, 0, 0],
        [0, 0, 0, 0, 45, 0, 0, 0],
        [-15, 0, 0, 0, -30, 0, 0, 0],
        [-45, 0, 0, 0, 0, 0, 0, 0],
        [45, 0, 0, 0, 0, 0, 0, 0],
        [0, 0, 0, 0, -30, 0, 0, 0],
        [127, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_every_code_by_the_definition() -> None:
    assert BOOK.decode(torch.arange(1 << 12)).tolist() == defined_levels(BOOK)
    spec = SPEC.model_copy(update={"pattern_bits": 15, "pulses": (4, 3, 1)})
    book = Codebook(spec, NO_DIRECTIONS, MAGNITUDES)
    assert book.decode(torch.arange(1 << 15)).tolist() == defined_levels(book)


def test_numbers_of_points() -> None:
    for dim, pulses in product(range(1, 6), range(5)):
        points = defined_points(dim, pulses)
        assert pyramid.count_points(dim, pulses) == len(points)
        assert pyramid.make_points(dim, pulses).tolist() == list(map(list, points))
    # Fischer's table of N = 8.
    assert [pyramid.count_points(8, k) for k in (1, 2, 3, 4, 5)] == [16, 128, 688, 2816, 9424]


@pytest.mark.parametrize("pulses", [1, 2, 3, 4, 5])
def test_every_point_has_a_code_of_its_own(pulses: int) -> None:
    points = pyramid.make_points(8, pulses)
    magnitude = torch.ones(len(points), dtype=torch.int64)
    codes = pyramid.encode(points, magnitude, (1, pulses), 16)
    book = Codebook(
        SPEC.model_copy(update={"pattern_bits": 16, "shift": 0, "pulses": (1, pulses)}),
        NO_DIRECTIONS,
        torch.ones(2, dtype=torch.uint8),
    )
    assert torch.equal(book.decode(codes), points)
    assert len(codes.unique()) == len(points)


@pytest.mark.parametrize("layout", PYRAMIDS.values(), ids=PYRAMIDS)
def test_encoding_inverts_decoding(layout: CodebookSpec) -> None:
    """For points of every range, sampled, at the magnitude 1."""
    spec = layout.model_copy(update={"shift": 0})
    ones = torch.ones(len(spec.pulses), dtype=torch.uint8)
    book = Codebook(spec, NO_DIRECTIONS, ones)
    ranges, _ = pyramid.make_ranges(spec.pulses, spec.code_bits)
    generator = torch.Generator().manual_seed(0)
    for item in ranges:
        codes = item.start + torch.randint(0, item.size, (50,), generator=generator)
        points = book.decode(codes)
        assert (points.abs().sum(1) == spec.pulses[item.magnitude]).all()
        magnitude = torch.full((50,), item.magnitude)
        assert torch.equal(pyramid.encode(points, magnitude, spec.pulses, spec.code_bits), codes)


@pytest.mark.parametrize("isa", cpu.isas())
@pytest.mark.parametrize("spec", PYRAMIDS.values(), ids=PYRAMIDS)
def test_kernels_at_the_edges_of_ranges(isa: str, spec: CodebookSpec) -> None:
    magnitudes = torch.arange(1, len(spec.pulses) + 1, dtype=torch.uint8) * 9
    book = Codebook(spec, NO_DIRECTIONS, magnitudes)
    codes = edge_codes(spec)
    codes = torch.cat([codes, codes[: -len(codes) % 16]]).view(1, -1)
    k = 8 * codes.shape[1]
    case = Case(
        x=torch.zeros(1, k),
        qweight=pack_codes(codes, spec.code_bits),
        row_scale=torch.ones(1),
        signs_in=torch.zeros(k // 8, dtype=torch.uint8),
        codebook=book,
        codewords=book.codewords(),
        block=1,
    )
    found = cpu.embedding(*case.embedding_args(torch.tensor([0])), isa=isa)
    assert torch.equal(found[0], book.decode(codes).float().flatten())


def test_quotients_of_any_table_fit_the_kernels() -> None:
    """What pyramid_avx2.h asks: numbers below 2^31 and quotients below 2^17."""
    most = pyramid.MOST_PULSES
    counts = [pyramid.count_points(pyramid.HALF, k) for k in range(most + 1)]
    assert max(counts[k] * counts[most - k] for k in range(most + 1)) < 1 << 31
    assert counts[most] < 1 << 17


@pytest.mark.parametrize(
    "change",
    [
        {"codec": "e8"},
        {"pulses": ()},
        {"pulses": (0, 1)},
        {"pulses": (3, 3, 3, 3, 3, 3)},
        {"pulses": (37,)},
        {"pulses": (1,) * 65},
        {"pattern_bits": 11},
        {"pattern_bits": 33},
        {"magnitude_bits": 1},
        {"vector_dim": 4},
        {"signs": True},
        {"state_bits": 1},
        {"rotation_bits": 3},
    ],
)
def test_layout_out_of_limits(change: dict) -> None:
    with pytest.raises(ValidationError):
        CodebookSpec.model_validate(SPEC.model_dump() | change)


def test_layout_as_json() -> None:
    assert CodebookSpec.model_validate(SPEC.model_dump(mode="json")) == SPEC
    assert "pulses" not in SPECS["e8-16"].model_dump()


@pytest.mark.parametrize(
    ("directions", "magnitudes", "message"),
    [
        (torch.zeros(1, 8, dtype=torch.int8), MAGNITUDES, r"directions is .* asks for .*\[0, 8\]"),
        (NO_DIRECTIONS, MAGNITUDES[:2], r"magnitudes is .* \[2\]"),
        (NO_DIRECTIONS, MAGNITUDES - 30, r"\[0, 98\]"),
        (NO_DIRECTIONS, MAGNITUDES + 1, r"\[31, 129\]"),
    ],
)
def test_tables_out_of_limits(directions: Tensor, magnitudes: Tensor, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        Codebook(SPEC, directions, magnitudes)


@pytest.mark.parametrize(("field", "value"), [(2, 11), (2, 33), (3, 1), (4, 64), (6, -1), (6, 5)])
def test_bad_layouts_of_the_operator(field: int, value: int) -> None:
    *args, layout = random_case("pvq-26", 1, 3, 72).args()
    layout[field] = value
    with pytest.raises((ValueError, RuntimeError), match=r"layout is|codewords is"):
        torch.ops.pcdvq.linear(*args, layout)


def test_codes_that_are_looked_up_and_computed_alike() -> None:
    """The same pyramids in 18 and 19 bits, on either side of `TABULATED_BITS`."""
    books = [
        replace(BOOK, spec=SPEC.model_copy(update={"pattern_bits": bits, "pulses": (5, 4, 2)}))
        for bits in (18, 19)
    ]
    assert [book.spec.pyramid_rows > 0 for book in books] == [False, True]
    for magnitude, total in enumerate(books[0].spec.pulses):
        points = pyramid.make_points(8, total)
        number = torch.full((len(points),), magnitude)
        codes = [pyramid.encode(points, number, (5, 4, 2), bits) for bits in (18, 19)]
        assert torch.equal(books[0].decode(codes[0]), books[1].decode(codes[1]))
