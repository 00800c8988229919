"""Products of the Triton kernels against the fp32 reference."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from linear_cases import BLOCKS, SPECS, Case, random_case
from moe_cases import moe_case
from pcdvq_kernels import ops, reference
from pcdvq_kernels.arguments import LayoutFields
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.ops import Layout
from pcdvq_kernels.triton import backend, moe
from pcdvq_kernels.triton.format import format_of
from pcdvq_kernels.triton.hadamard import rotate_quantize
from pcdvq_kernels.triton.linear import Weight, linear
from pcdvq_kernels.triton.tuning import Device, LinearConfig, linear_config
from torch import Tensor

INT8_ERROR = 0.012  # norm of the error that int8 activations may make, of the output's norm
DENSE_ERROR = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
ROWS = 40  # no multiple of a tile's 64, nor of a chain's rows


def prepacked(case: Case) -> tuple[Tensor, Tensor]:
    layout = Layout(case.block, case.codebook.spec)
    words = ops.prepack_weight(case.qweight, case.codewords, layout, case.x.shape[-1])
    return words, ops.prepack_codewords(case.codewords, layout.spec)


def weight(case: Case) -> Weight:
    layout = LayoutFields(*case.args()[-1])
    return Weight(prepacked(case)[0], case.row_scale, format_of(layout))


def run(case: Case) -> Tensor:
    words, table = prepacked(case)
    x, _, row_scale, signs_in, _, bias, layout = case.args()
    return torch.ops.pcdvq.linear(x, words, row_scale, signs_in, table, bias, layout)


def relative_error(found: Tensor, case: Case) -> float:
    expected = case.reference()
    centred = expected if case.bias is None else expected - case.bias.float()
    return ((found.float() - expected).norm() / centred.norm()).item()


@pytest.mark.parametrize("codec", SPECS)
def test_every_codec(codec: str) -> None:
    case = random_case(codec, 2, ROWS, 136, block=8, bias=True)
    assert relative_error(run(case), case) < INT8_ERROR


@pytest.mark.parametrize("m", [1, 2, 8, 16, 17, 33, 64])
def test_tokens_and_types(m: int) -> None:
    dtype = (torch.float16, torch.bfloat16)[m % 3 % 2]
    case = random_case("int8" if m > 17 else "trellis-4x64", m, ROWS, 576, bias=m % 2 == 0)
    case = case.with_x(case.x.to(dtype))
    y = run(case)
    assert y.dtype == dtype
    assert relative_error(y, case) < INT8_ERROR


@pytest.mark.parametrize("m", [8, 33])
@pytest.mark.parametrize("codec", ["trellis-5x32", "trellis-6x16"])
def test_tokens_of_other_rates(codec: str, m: int) -> None:
    case = random_case(codec, m, 72, 72, bias=True)
    assert relative_error(run(case), case) < INT8_ERROR


@pytest.mark.parametrize(
    ("codec", "k"), [("trellis-8x32", 8), ("e8-18", 512), ("trellis-3x64", 896)]
)
def test_columns(codec: str, k: int) -> None:
    case = random_case(codec, 3, 33, k, block={512: 512}.get(k) or BLOCKS[k])
    assert relative_error(run(case), case) < INT8_ERROR


def test_long_rows_of_every_split() -> None:
    case = random_case("trellis-3x16", 9, 64, 1536, bias=True)
    x = rotate_quantize(case.x, case.signs_in, case.block, 16)
    for config in (LinearConfig(16), LinearConfig(16, splits=5)):
        y = linear(x, weight(case), case.bias, torch.float32, config)
        assert relative_error(y, case) < INT8_ERROR


@pytest.mark.parametrize("codec", ["trellis-4x64", "trellis-7x16", "e8-16"])
def test_products_are_exact(codec: str) -> None:
    """With activations that int8 represents, only the sums are rounded."""
    case = random_case(codec, 4, 80, 256, block=1)
    x = torch.randint(-127, 128, (4, 256), generator=torch.Generator().manual_seed(0)).float()
    x[:, ::128] = 127
    case = replace(case.with_x(x), row_scale=torch.ones(80))
    assert torch.equal(run(case), case.reference())


def test_what_is_no_number() -> None:
    """NaN and infinities of a token make its outputs NaN, and no other's."""
    case = random_case("int8", 4, ROWS, 576)
    x = case.x.clone()
    x[1, 70], x[3, 500] = torch.nan, torch.inf
    y = run(case.with_x(x))
    assert y[1].isnan().all()
    assert y[3].isnan().all()
    assert torch.equal(y[[0, 2]], run(case)[[0, 2]])


@pytest.mark.parametrize("size", [1e-30, 1e-37, 1e-38, 1e-44, 0.0])
def test_tiny_activations(size: float) -> None:
    case = random_case("int8", 2, ROWS, 72)
    case = case.with_x(case.x * size)
    torch.testing.assert_close(run(case), case.reference(), rtol=0, atol=max(0.3 * size, 1e-34))


def test_no_tokens_no_rows_and_other_shapes() -> None:
    case = random_case("int8", 6, ROWS, 72)
    y = run(case)
    assert run(case.with_x(case.x[:0])).shape == (0, ROWS)
    assert torch.equal(run(case.with_x(case.x.view(2, 3, 72))), y.view(2, 3, ROWS))
    assert torch.equal(run(case.with_x(case.x.T.contiguous().T)), y)
    none = replace(case, qweight=case.qweight[:0], row_scale=case.row_scale[:0])
    assert run(none).shape == (6, 0)


@pytest.mark.parametrize("dtype", DENSE_ERROR)
def test_prefill(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many tokens: dense products, a bounded part of the weight at a time."""
    monkeypatch.setattr(backend, "MOST_DECODE_TOKENS", 4)
    monkeypatch.setattr(backend, "SCRATCH_BYTES", 1)
    case = random_case("trellis-6x16", 5, 72, 136, block=8, bias=True)
    case = case.with_x(case.x.to(dtype))
    y = run(case)
    assert y.dtype == dtype
    assert relative_error(y, case) < DENSE_ERROR[dtype]


def test_one_loud_block_does_not_drown_the_others() -> None:
    """A scale per 128 columns: an outlier costs precision where it is."""
    case = random_case("int8", 2, ROWS, 576)
    x = case.x.clone()
    x[:, :64] *= 1000
    loud = random_case("int8", 2, ROWS, 576).with_x(x)
    found = run(loud) - run(loud.with_x(x * (torch.arange(576) < 128)))
    quiet = loud.with_x(x * (torch.arange(576) >= 128))
    assert ((found - quiet.reference()).norm() / quiet.reference().norm()).item() < 0.02


def test_mixture_of_experts() -> None:
    first = random_case("trellis-5x32", 5, ROWS, 256, block=64)
    second = replace(first, qweight=first.qweight.flip(0), row_scale=first.row_scale.flip(0))
    experts = [weight(first), weight(second)]
    stacked = Weight(
        torch.stack([expert.words for expert in experts]),
        torch.stack([expert.row_scale for expert in experts]),
        experts[0].fmt,
    )
    # Assignments 2 token + choice to expert 0, 1 and none; 10 is padding, the last block unused.
    blocks = [[0, 3, 5, 8], [1, 2, 4, 6, 9], [7], []]
    ids = torch.tensor([block + [10] * (8 - len(block)) for block in blocks], dtype=torch.int32)
    routing = moe.Routing(
        ids.flatten(),
        torch.tensor([0, 1, -1, 0], dtype=torch.int32),
        torch.tensor([24], dtype=torch.int32),
        block_size=8,
        top_k=2,
    )
    y = moe.moe_linear(first.x, stacked, first.signs_in, first.block, routing)
    expected = torch.zeros(10, ROWS)
    for case, block in zip((first, second), blocks[:2], strict=True):
        expected[block] = case.reference()[torch.tensor(block) // 2]
    assert ((y - expected).norm() / expected.norm()).item() < INT8_ERROR
    assert not y[7].any()


@pytest.mark.parametrize("tokens", [1, 17])
def test_experts_of_the_operator(tokens: int) -> None:
    """Experts without tokens, choices of experts elsewhere, blocks of 8 and of 16."""
    case = moe_case("trellis-3x16", tokens, hidden=256, inner=72, experts=3, top_k=2)
    x, weights, ids, gate_up, down, codewords, *layouts = case.args()
    layout = Layout(case.gate_up.block, case.gate_up.codebook.spec)
    experts = [
        [ops.prepack_experts(part[0], codewords, layout, 8 * len(part[2])), *part[1:]]
        for part in (gate_up, down)
    ]
    table = ops.prepack_codewords(codewords, layout.spec)
    found = torch.ops.pcdvq.moe(x, weights, ids, *experts, table, *layouts)
    expected = case.reference()
    assert ((found - expected).norm() / expected.norm()).item() < 3 * INT8_ERROR
    none = torch.ops.pcdvq.moe(x[:0], weights[:0], ids[:0], *experts, table, *layouts)
    assert none.shape == (0, 256)
    with pytest.raises(PCDVQError, match="signs_in"):
        torch.ops.pcdvq.moe(x, weights, ids, experts[1], experts[0], table, *layouts)


def test_rotated_and_quantized_activations() -> None:
    case = random_case("int8", 3, 1, 896, block=128)
    x = rotate_quantize(case.x, case.signs_in, case.block, 8)
    values = x.values.view(torch.int8).view(8, 7, 4, 4, 8).transpose(2, 3).reshape(8, 7, 128)
    dense = values.float() * x.scales.T.unsqueeze(-1)
    expected = reference.rotate_activations(case.x, case.signs_in, 128).view(3, 7, 128)
    step = expected.abs().amax(-1, keepdim=True) / 127
    assert ((dense[:3] - expected).abs() <= 0.5001 * step).all()
    assert not dense[3:].any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 80)}, "signs_in"),
        ({"row_scale": torch.zeros(ROWS + 64)}, "qweight"),
        ({"row_scale": torch.zeros(ROWS, dtype=torch.bfloat16)}, "row_scale"),
        ({"signs_in": torch.zeros(8, dtype=torch.uint8)}, "signs_in"),
        ({"block": 16}, "hadamard_block 16 does not divide K = 72"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    case = random_case("trellis-4x64", 2, ROWS, 72)
    words, table = prepacked(case)
    x, _, row_scale, signs_in, _, bias, layout = replace(case, **change).args()
    with pytest.raises(PCDVQError, match=message):
        torch.ops.pcdvq.linear(x, words, row_scale, signs_in, table, bias, layout)


def test_opcheck() -> None:
    case = random_case("int8", 2, ROWS, 72, bias=True)
    words, table = prepacked(case)
    x, _, row_scale, signs_in, _, bias, layout = case.args()
    args = (x, words, row_scale, signs_in, table, bias, layout)
    torch.library.opcheck(torch.ops.pcdvq.linear.default, args)


def test_every_processor_gets_its_warps() -> None:
    fmt = format_of(LayoutFields(*random_case("trellis-4x64", 1, 8, 72).args()[-1]))
    gpu = Device("some GPU", "sm_90", 132)
    few = linear_config(1, 4096, 4096, fmt, gpu)
    assert few == LinearConfig(m_tile=8, splits=16)
    assert linear_config(16, 128256, 4096, fmt, gpu) == LinearConfig(16, splits=2)
