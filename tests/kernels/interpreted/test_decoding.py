"""Prepacked weights decode exactly: whole tiles, single rows, embeddings."""

from __future__ import annotations

import pytest
import torch
from linear_cases import SPECS, Case, random_case
from pcdvq_kernels import reference
from pcdvq_kernels.codebook import MAX_LEVEL
from pcdvq_kernels.triton import dequantize
from pcdvq_kernels.triton.dequantize import UNITS, levels
from pcdvq_kernels.triton.hadamard import rotate
from test_products import prepacked, weight
from torch import Tensor

ROWS = 40
ROUNDING = {torch.float32: 3e-7, torch.bfloat16: 2**-8, torch.float16: 2**-11}
IDS = torch.tensor([[0, 39, 16], [17, 33, 0]])


def found_levels(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = slice(0, len(case.row_scale))
    return levels(weight(case), case.x.shape[-1], dtype, rows).float() * UNITS


def expected_levels(case: Case) -> Tensor:
    found = reference.decode_levels(case.qweight, case.codebook, case.x.shape[-1])
    return found[: len(case.row_scale)].float()


@pytest.mark.parametrize("codec", SPECS)
def test_levels(codec: str) -> None:
    case = random_case(codec, 1, ROWS, 72)
    assert torch.equal(found_levels(case), expected_levels(case))


@pytest.mark.parametrize("codec", ["trellis-3x64", "trellis-5x32", "trellis-7x16"])
def test_without_instructions_of_nvidia(codec: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dequantize, "INSTRUCTIONS", False)
    case = random_case(codec, 1, 20, 72)
    assert torch.equal(found_levels(case), expected_levels(case))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_levels_are_exact_in_every_type(dtype: torch.dtype) -> None:
    case = random_case("trellis-4x64", 1, 70, 8)
    assert torch.equal(found_levels(case, dtype), expected_levels(case))


@pytest.mark.parametrize("codec", SPECS)
def test_embedding(codec: str) -> None:
    case = random_case(codec, 1, ROWS, 576)
    words, table = prepacked(case)
    _, _, row_scale, signs_in, _, layout, dtype = case.embedding_args(IDS)
    found = torch.ops.pcdvq.embedding(IDS, words, row_scale, signs_in, table, layout, dtype)
    expected = case.embedding_reference(IDS)
    torch.testing.assert_close(found, expected, rtol=3e-7, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("codec", [codec for codec in SPECS if codec.startswith("trellis")])
def test_words_take_the_space_of_codes(codec: str) -> None:
    case = random_case(codec, 1, 128, 256, block=1)
    assert prepacked(case)[0].nbytes == case.qweight.nbytes


def test_every_int8_code() -> None:
    case = random_case("int8", 1, 1, 256, block=1)
    case.qweight.copy_(torch.arange(256, dtype=torch.uint8))
    expected = torch.arange(256, dtype=torch.uint8).view(torch.int8).float().clamp(-MAX_LEVEL)
    assert torch.equal(found_levels(case, torch.float16)[0], expected)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_dense_weight(dtype: torch.dtype) -> None:
    case = random_case("trellis-5x32", 1, 70, 72)
    found = dequantize.dequantize(weight(case), case.signs_in, case.block, dtype)
    expected = reference.dequantize(
        case.qweight, case.row_scale, case.signs_in, case.codebook, case.block
    )
    assert found.dtype == dtype
    limit = 1e-6 * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=ROUNDING[dtype], atol=limit)


def test_ids_that_are_no_rows() -> None:
    case = random_case("int8", 1, ROWS, 72)
    words, table = prepacked(case)
    ids = torch.tensor([-1, ROWS, 1 << 40, 3], dtype=torch.int64)
    _, _, row_scale, signs_in, _, layout, dtype = case.embedding_args(ids)
    found = torch.ops.pcdvq.embedding(ids, words, row_scale, signs_in, table, layout, dtype)
    assert found[:3].isnan().all()
    assert not found[3].isnan().any()


@pytest.mark.parametrize(("k", "block"), [(8, 1), (72, 2), (576, 64), (1536, 512), (4096, 4096)])
@pytest.mark.parametrize("dtype", ROUNDING)
def test_rotation(k: int, block: int, dtype: torch.dtype) -> None:
    case = random_case("int8", 2, 1, k, block=block)
    x = case.x.to(dtype)
    expected = reference.rotate_activations(x, case.signs_in, block)
    found = rotate(x, case.signs_in, block)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=ROUNDING[dtype], atol=1e-5)
