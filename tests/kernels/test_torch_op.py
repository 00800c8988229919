"""`pcdvq::linear` of CPU tensors: torch calls C++, and C++ calls Python for what is not plain."""

from __future__ import annotations

import resource
from dataclasses import replace

import pytest
import torch
from linear_cases import random_case
from pcdvq_kernels import cpu, ops, torch_op

pytestmark = pytest.mark.skipif(
    not cpu.available() or ops.prepacks(torch.device("cpu")), reason="no compiled CPU kernels"
)
operator = torch.ops.pcdvq.linear.default


@pytest.fixture
def in_python(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each call of the kernel from Python."""
    calls: list[int] = []
    pack = cpu._LINEAR.pack

    class Counted:
        size = cpu._LINEAR.size

        @staticmethod
        def pack(*fields: int) -> bytes:
            calls.append(1)
            return pack(*fields)

    monkeypatch.setattr(cpu, "_LINEAR", Counted)
    return calls


@pytest.mark.parametrize("shape", [(1,), (2, 3), (0,), (1, 1, 5, 2), ()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
def test_plain_calls_do_not_enter_python(shape, dtype, bias, in_python):
    case = random_case("trellis-6x64", 1, 33, 576, bias=bias is not None)
    if bias is not None:
        case = replace(case, bias=case.bias.to(bias))
    operator(*case.args())  # now the layout is known
    case = case.with_x(torch.randn(*shape, 576).to(dtype))
    in_python.clear()
    y = operator(*case.args())
    assert not in_python
    assert y.dtype == dtype
    assert y.shape == (*shape, 33)
    assert y.is_contiguous()
    assert torch.equal(y, ops.linear(*case.args()))


def test_other_calls_give_the_same(in_python):
    case = random_case("trellis-4x64", 4, 33, 576, bias=True)
    expected = operator(*case.args())
    for other in (
        replace(case, bias=case.bias.double()),
        case.with_x(torch.stack([case.x, case.x], 2)[..., 0]),
        case.with_x(case.x.view(*[1] * 9, 4, 576)),
    ):
        in_python.clear()
        assert torch.equal(operator(*other.args()).view(4, 33), expected)
        assert in_python


def test_arguments_that_do_not_fit_are_refused_after_a_plain_call():
    case = random_case("trellis-4x64", 4, 33, 576, bias=True)
    operator(*case.args())
    for change in (
        {"qweight": case.qweight[:-1]},
        {"qweight": case.qweight.int()},
        {"qweight": case.qweight.T.contiguous().T},
        {"qweight": case.qweight.flatten()},
        {"row_scale": case.row_scale[:-1]},
        {"row_scale": case.row_scale.double()},
        {"signs_in": case.signs_in[:-1]},
        {"bias": case.bias[:-1]},
        {"bias": case.bias.int()},
    ):
        (name,) = change
        with pytest.raises(RuntimeError, match=rf"{name}|row_scale|bias is .*expected"):
            operator(*replace(case, **change).args())
    *arguments, layout = case.args()
    for wrong in (layout[:3], layout * 2, [7, *layout[1:]]):
        with pytest.raises(RuntimeError, match=r"layout|hadamard_block"):
            operator(*arguments, wrong)


def test_result_does_not_depend_on_threads():
    case = random_case("trellis-6x64", 17, 72, 576)
    expected = operator(*case.args())
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 + threads)
        assert torch.equal(operator(*case.args()), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bias", [torch.float32, torch.float64])  # plain, and through Python
def test_nothing_leaks(bias):
    case = random_case("trellis-4x64", 1, 16, 72, bias=True)
    case = replace(case, bias=case.bias.to(bias))

    def grown() -> int:
        """KiB that the process has taken after many calls."""
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for _ in range(10_000):
            operator(*case.args())
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before

    grown()
    assert grown() < 500  # a leaked handle is 32 bytes at least, a tensor over 200


def test_torch_without_the_interface(monkeypatch):
    monkeypatch.setattr(torch_op, "_FUNCTIONS", ("no_such_function",))
    assert not torch_op.register(cpu.loaded(), ops.linear)
