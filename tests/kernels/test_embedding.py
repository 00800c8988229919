"""The `pcdvq::embedding` operator: rows of the dense weight."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from linear_cases import SPECS, random_case
from pcdvq_kernels import cpu, fallback, ops  # noqa: F401 (ops registers the operator)
from pcdvq_kernels.codebook import MAX_LEVEL
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

ISAS = cpu.isas()
HALF_STEP = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
ROWS = 37  # a vocabulary of no round size
IDS = torch.tensor([[0, 36, 5, 5], [5, 0, 17, 1]])

op = torch.ops.pcdvq.embedding


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=HALF_STEP[dtype], atol=1e-6 * scale)


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Iterator[None]:
    monkeypatch.setattr(cpu, "LIBRARY", tmp_path / "missing.so")
    cpu._library.cache_clear()
    yield
    cpu._library.cache_clear()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", SPECS)
@pytest.mark.parametrize("k", [8, 72, 576, 1536])
def test_matches_reference(isa: str, codec: str, k: int) -> None:
    case = random_case(codec, 1, ROWS, k)
    found = cpu.embedding(*case.embedding_args(IDS), isa=isa)
    close(found, case.embedding_reference(IDS), torch.float32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", ["int8", "trellis-8x64", "trellis-4x32"])
def test_decodes_exactly(isa: str, codec: str) -> None:
    """Without a rotation nothing is rounded but the product with the scale."""
    case = random_case(codec, 1, ROWS, 576, block=1)
    found = cpu.embedding(*case.embedding_args(IDS), isa=isa)
    assert torch.equal(found, case.embedding_reference(IDS))


def test_every_int8_code() -> None:
    case = random_case("int8", 1, 1, 256 * 8, block=1)
    case.qweight.copy_(torch.arange(256, dtype=torch.uint8).repeat(8).view(1, -1))
    case.row_scale.fill_(1)
    case.signs_in.zero_()
    levels = torch.arange(256, dtype=torch.uint8).view(torch.int8).float().clamp(-MAX_LEVEL)
    for isa in ISAS:
        found = cpu.embedding(*case.embedding_args(torch.tensor([0])), isa=isa)
        assert torch.equal(found, levels.repeat(8).view(1, -1))


@pytest.mark.parametrize("dtype", HALF_STEP)
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_types(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    case = random_case("trellis-8x64", 1, ROWS, 576)
    found = op(*case.embedding_args(IDS.to(ids_dtype), dtype))
    assert found.shape == (2, 4, 576)
    close(found, case.embedding_reference(IDS), dtype)


def test_shapes_of_ids(threads: None) -> None:
    case = random_case("int8", 1, ROWS, 72)
    many = torch.arange(1000) % ROWS
    whole = op(*case.embedding_args(many))
    assert torch.equal(whole, op(*case.embedding_args(torch.arange(ROWS)))[many])
    assert torch.equal(op(*case.embedding_args(many[::3])), whole[::3])
    assert torch.equal(op(*case.embedding_args(many[4])), whole[4])
    assert op(*case.embedding_args(many[:0])).shape == (0, 72)
    assert op(*case.embedding_args(many[:0].view(2, 0))).shape == (2, 0, 72)


@pytest.mark.parametrize("id", [-1, ROWS, 1 << 40, -(1 << 63)])
def test_ids_out_of_range(id: int) -> None:
    case = random_case("int8", 1, ROWS, 72)
    with pytest.raises(PCDVQError, match=rf"ids lie in .*{id}.*rows 0 to {ROWS - 1}"):
        op(*case.embedding_args(torch.tensor([3, id])))


def test_ids_out_of_range_without_library(without_library: None) -> None:
    case = random_case("int8", 1, ROWS, 72)
    with pytest.raises(PCDVQError, match="ids lie in"):
        op(*case.embedding_args(torch.tensor([3, -1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(ROWS, 71, dtype=torch.uint8)}, "qweight"),
        ({"row_scale": torch.zeros(ROWS + 1)}, "qweight"),
        ({"signs_in": torch.zeros(8, dtype=torch.uint8)}, "qweight"),
        ({"codewords": torch.zeros(128, 1, dtype=torch.int8)}, "codewords"),
        ({"block": 16}, "hadamard_block 16 does not divide K = 72"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    case = replace(random_case("int8", 1, ROWS, 72), **change)
    with pytest.raises(PCDVQError, match=message):
        op(*case.embedding_args(IDS))


def test_bad_types() -> None:
    case = random_case("int8", 1, ROWS, 72)
    with pytest.raises(PCDVQError, match=r"ids is torch\.uint8"):
        op(*case.embedding_args(IDS.to(torch.uint8)))
    with pytest.raises(PCDVQError, match=r"dtype is torch\.float64"):
        op(*case.embedding_args(IDS, torch.float64))
    *args, layout, dtype = case.embedding_args(IDS)
    with pytest.raises(PCDVQError, match="vector_dim must be 8, 2 with chains, or 1"):
        op(*args, [*layout[:2], 7, 1, *layout[4:]], dtype)


@pytest.mark.parametrize("codec", SPECS)
def test_fallback(codec: str, without_library: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fallback, "CHUNK_WEIGHTS", 3 * 576)
    case = random_case(codec, 1, ROWS, 576)
    found = op(*case.embedding_args(IDS, torch.bfloat16))
    close(found, case.embedding_reference(IDS), torch.bfloat16)


def test_opcheck() -> None:
    case = random_case("int8", 1, ROWS, 72)
    for dtype in HALF_STEP:
        torch.library.opcheck(op.default, case.embedding_args(IDS, dtype))


def test_compiles_whole() -> None:
    _, *weight, layout, dtype = random_case("int8", 1, ROWS, 72).embedding_args(IDS)
    compiled = torch.compile(
        lambda ids: op(ids, *weight, layout, dtype) + 1.0,
        fullgraph=True,
        dynamic=True,
        backend="aot_eager",
    )
    for ids in (IDS[0], IDS[0, :3]):
        assert torch.equal(compiled(ids), op(ids, *weight, layout, dtype) + 1.0)


def test_rows_past_two_gibibytes() -> None:
    """Rows are found by 64-bit offsets."""
    rows, k = 270_000, 8192
    qweight = torch.empty(rows, k, dtype=torch.uint8)  # touched only where it is read
    case = replace(
        random_case("int8", 1, 1, k, block=4096), qweight=qweight, row_scale=torch.ones(rows)
    )
    qweight[-1].random_(0, 256)
    last = torch.tensor([rows - 1])
    tail = replace(case, qweight=qweight[-1:], row_scale=case.row_scale[-1:])
    found = op(*case.embedding_args(last))
    assert torch.equal(found, op(*tail.embedding_args(torch.tensor([0]))))
