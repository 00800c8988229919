"""The `pcdvq::moe` operator on the CPU, compiled and not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import MoeCase, moe_case
from pcdvq_kernels import cpu, fallback, ops  # noqa: F401 (ops registers the operator)
from pcdvq_kernels.errors import PCDVQError

ISAS = [isa for isa in ("scalar", "avx2", "avx512") if isa in cpu.isas()]
CODECS = ["trellis-4x64", "trellis-8x32", "trellis-6x16", "e8-16", "int8"]


def close(found: torch.Tensor, case: MoeCase, rtol: float = 0.0) -> None:
    expected = case.reference()
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


@pytest.fixture
def nan_in_empty_tensors():
    """What no kernel writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.usefixtures("nan_in_empty_tensors")
def test_matches_reference(isa: str, codec: str) -> None:
    case = moe_case(codec, 33)
    close(cpu.moe(*case.args(), isa=isa), case)


@pytest.mark.filterwarnings("ignore:PCDVQ layers run")
@pytest.mark.parametrize("codec", CODECS[:2])
def test_fallback_matches_reference(codec: str) -> None:
    case = moe_case(codec, 17)
    close(fallback.moe(*case.args()), case)


@pytest.mark.parametrize("activations", ["float", "int16", "int8"])
@pytest.mark.usefixtures("nan_in_empty_tensors")
def test_a_token_does_not_depend_on_the_others(activations: str) -> None:
    case = moe_case("trellis-8x32", 33)
    case = replace(
        case,
        gate_up=replace(case.gate_up, activations=activations),
        down=replace(case.down, activations=activations),
    )
    together = torch.ops.pcdvq.moe(*case.args())
    for count in (0, 1, 2, 17):
        assert torch.equal(torch.ops.pcdvq.moe(*case.tokens(slice(count)).args()), together[:count])
    order = torch.randperm(33, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.ops.pcdvq.moe(*case.tokens(order).args()), together[order])
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(torch.ops.pcdvq.moe(*case.args()), together)
    finally:
        torch.set_num_threads(threads)
    error = (together - case.reference()).norm() / case.reference().norm()
    assert error < {"float": 1e-5, "int16": 1e-3, "int8": 0.03}[activations]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(dtype: torch.dtype) -> None:
    case = moe_case("trellis-4x64", 17, hidden=576, inner=192)
    case = replace(case, x=case.x.to(dtype), topk_ids=case.topk_ids.int())
    found = torch.ops.pcdvq.moe(*case.args())
    assert found.dtype == dtype
    close(found, case, rtol={torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype])


def test_experts_elsewhere_give_nothing() -> None:
    case = moe_case("trellis-4x64", 3)
    nowhere = replace(case, topk_ids=torch.full_like(case.topk_ids, -1))
    assert not torch.ops.pcdvq.moe(*nowhere.args()).any()
    twice = replace(case, topk_ids=torch.full_like(case.topk_ids, 2))
    close(torch.ops.pcdvq.moe(*twice.args()), twice)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.pcdvq.moe.default, moe_case("int8", 2).args())


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, torch.zeros(2, 80), "gate_up signs_in|gate_up qweight"),
        (0, torch.zeros(2, 72, dtype=torch.int32), "x is torch.int32"),
        (1, torch.zeros(2, 2), "topk_weights"),
        (2, torch.zeros(3, 3, dtype=torch.int64), "topk_ids"),
        (2, torch.zeros(2, 3), "topk_ids"),
        (5, torch.zeros(3, 8, dtype=torch.int8), "codewords"),
    ],
)
@pytest.mark.parametrize("run", [cpu.moe, fallback.moe])
def test_bad_arguments(run, position: int, value: torch.Tensor, message: str) -> None:
    args = list(moe_case("trellis-4x64", 2).args())
    args[position] = value
    with pytest.raises(PCDVQError, match=message):
        run(*args)


def test_gate_and_up_of_different_sizes() -> None:
    args = list(moe_case("trellis-4x64", 2).args())
    args[3] = [args[3][0][:, :-1].contiguous(), args[3][1][:, :-1].contiguous(), args[3][2]]
    with pytest.raises(PCDVQError, match=r"gate_up qweight|gate_up has 126 rows"):
        torch.ops.pcdvq.moe(*args)


@pytest.mark.parametrize("layer", ["gate_up", "down"])
@pytest.mark.parametrize("tensor", range(3), ids=["qweight", "row_scale", "signs_in"])
def test_bad_experts(layer: str, tensor: int) -> None:
    args = list(moe_case("trellis-4x64", 2).args())
    position = 3 if layer == "gate_up" else 4
    args[position] = list(args[position])
    args[position][tensor] = args[position][tensor][:-1]
    with pytest.raises(PCDVQError, match=f"{layer} |gate_up row_scale"):
        torch.ops.pcdvq.moe(*args)
