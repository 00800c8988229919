"""Arguments that no operator must take, whatever the others are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from linear_cases import random_case
from moe_cases import moe_case
from pcdvq_kernels import cpu, fallback, ops
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.vptq import ops as vptq_ops
from pcdvq_kernels.vptq.weight import pack_tables, pack_weight
from torch import Tensor
from vptq_layers import random_layer

pytestmark = pytest.mark.skipif(ops.prepacks(torch.device("cpu")), reason="packed as words")
IDS = torch.tensor([[0, 6], [3, 3]])
REFUSED = (PCDVQError, RuntimeError)  # the latter where torch calls C++ without Python
FAR = [1 << 31, 1 << 32, (1 << 32) + 1, (1 << 63) - 1]


def _vptq_args() -> tuple[Any, ...]:
    layout, tensors = random_layer(16, 64)
    weight = pack_weight(layout, tensors, pack_tables(layout, tensors, torch.device("cpu")))
    return torch.randn(2, 64), *weight.args(), torch.randn(16), weight.layout


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear": lambda: random_case("trellis-4x64", 2, 7, 72, bias=True).args(),
    "embedding": lambda: random_case("trellis-4x64", 1, 7, 72).embedding_args(IDS),
    "moe": lambda: moe_case("trellis-4x64", 2).args(),
    "vptq_linear": _vptq_args,
}
every_operator = pytest.mark.parametrize("name", CALLS)


def changed(args: tuple[Any, ...], change: Callable[[Tensor], Tensor]) -> Iterator[list[Any]]:
    """The arguments with one tensor changed, for each of them."""
    for position, value in enumerate(args):
        if isinstance(value, Tensor):
            yield [*args[:position], change(value), *args[position + 1 :]]
        elif isinstance(value, list) and isinstance(value[0], Tensor):
            for inner in range(len(value)):
                parts = [*value[:inner], change(value[inner]), *value[inner + 1 :]]
                yield [*args[:position], parts, *args[position + 1 :]]


@every_operator
def test_a_tensor_on_another_device(name: str) -> None:
    operator, args = getattr(torch.ops.pcdvq, name), CALLS[name]()
    for tensor in (lambda t: t.to("meta"), lambda t: t.to("meta")[..., :1]):
        for one in changed(args, tensor):
            with pytest.raises(PCDVQError, match=r"on different devices \(cpu, meta\)"):
                operator(*one)


@every_operator
def test_shapes_alone(name: str) -> None:
    def meta(value: Any) -> Any:
        if isinstance(value, list):
            return [meta(each) for each in value]
        return value.to("meta") if isinstance(value, Tensor) else value

    operator, args = getattr(torch.ops.pcdvq, name), CALLS[name]()
    y, found = operator(*args), operator(*map(meta, args))
    assert (found.device.type, found.shape, found.dtype) == ("meta", y.shape, y.dtype)


@every_operator
@pytest.mark.parametrize(
    "change",
    [lambda t: t.to_sparse(), lambda t: t.to(torch.complex64), lambda t: t.bool()],
    ids=["sparse", "complex", "bool"],
)
def test_other_kinds_of_tensors(name: str, change: Callable[[Tensor], Tensor]) -> None:
    operator = getattr(torch.ops.pcdvq, name)
    for args in changed(CALLS[name](), change):
        with pytest.raises(REFUSED, match=r"expected|must|layout|strides"):
            operator(*args)


@pytest.mark.parametrize("change", [torch.Tensor.to_sparse, lambda t: t.to("meta")])
def test_kernels_check_what_they_are_given(change: Callable[[Tensor], Tensor]) -> None:
    for name in ("linear", "embedding", "moe"):
        for run in [getattr(fallback, name), *([getattr(cpu, name)] if cpu.available() else [])]:
            for args in changed(CALLS[name](), change):
                with pytest.raises(PCDVQError, match="expected"):
                    run(*args)
    for args in changed(CALLS["vptq_linear"](), change):
        with pytest.raises(PCDVQError, match=r"expected|tables are"):
            vptq_ops.check(*args)


@pytest.mark.parametrize("run", ["cpu", "fallback"])
@pytest.mark.filterwarnings("ignore:PCDVQ layers run")
def test_expert_ids(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if run == "fallback":
        monkeypatch.setattr(cpu, "available", lambda: False)
    case = moe_case("trellis-4x64", 2)
    x, weights, ids, *experts = case.args()
    nowhere = torch.ops.pcdvq.moe(x, weights, torch.full_like(ids, -1), *experts)
    for far in (-1 << 63, -1 << 32, 1 - (1 << 32), -2):  # 1 - 2 ** 32 is 1 in 32 bits
        found = torch.ops.pcdvq.moe(x, weights, torch.full_like(ids, far), *experts)
        assert torch.equal(found, nowhere)
    for far in (case.experts, *FAR):
        wrong = ids.clone()
        wrong[-1, -1] = far
        with pytest.raises(PCDVQError, match=rf"topk_ids lie in .*{far}\].* are 0 to 6"):
            torch.ops.pcdvq.moe(x, weights, wrong, *experts)
    with pytest.raises(PCDVQError, match="topk_ids lie in"):
        torch.ops.pcdvq.moe(x, weights, torch.full_like(ids, case.experts).int(), *experts)


@pytest.mark.parametrize("run", ["cpu", "fallback"])
@pytest.mark.parametrize("column", [-1, 64, (1 << 31) - 1, -1 << 31])
@pytest.mark.filterwarnings("ignore:PCDVQ layers run")
def test_columns(run: str, column: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if run == "fallback":
        monkeypatch.setattr(cpu, "available", lambda: False)
    args = _vptq_args()
    args[1][63] = column
    with pytest.raises(PCDVQError, match=rf"columns lie in .*{column}.*x has columns 0 to 63"):
        torch.ops.pcdvq.vptq_linear(*args)


@pytest.mark.parametrize("value", [-(1 << 63), -(1 << 40), -1, 1 << 40, (1 << 63) - 1])
@pytest.mark.parametrize("codec", ["trellis-4x64", "trellis-5x32", "e8-18", "pvq-24"])
def test_numbers_of_a_layout(codec: str, value: int) -> None:
    for name in ("linear", "embedding"):
        case = random_case(codec, 2, 7, 72)
        args = list(case.args() if name == "linear" else case.embedding_args(IDS))
        at = next(i for i, arg in enumerate(args) if isinstance(arg, list))
        for field in range(len(args[at])):
            layout = [*args[at][:field], value, *args[at][field + 1 :]]
            # A table of many rows is one that is not there.
            with pytest.raises(REFUSED, match=r"layout is|codewords is|does not divide"):
                getattr(torch.ops.pcdvq, name)(*args[:at], layout, *args[at + 1 :])


@pytest.mark.parametrize("value", [-(1 << 63), -1, 1 << 40, (1 << 63) - 1])
def test_numbers_of_a_vptq_layout(value: int) -> None:
    *args, layout = _vptq_args()
    for field in range(len(layout)):
        wrong = [*layout[:field], value, *layout[field + 1 :]]
        with pytest.raises(PCDVQError, match=r"layout begins|out of bounds|expected"):
            torch.ops.pcdvq.vptq_linear(*args, wrong)


@pytest.mark.parametrize("position", [3, 4])
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_lists_of_other_lengths(position: int, count: int) -> None:
    args = list(CALLS["moe"]())
    args[position] = [*args[position], args[position][0]][:count]
    with pytest.raises(PCDVQError, match=f"has {count} tensors; expected qweight, row_scale and"):
        torch.ops.pcdvq.moe(*args)


def test_words_where_nothing_reads_them() -> None:
    linear, embedding, moe, vptq = (list(CALLS[name]()) for name in CALLS)
    linear[1], embedding[1] = linear[1].int(), embedding[1].int()
    moe[3] = [moe[3][0].int(), *moe[3][1:]]
    vptq[4] = [code.view(torch.int32) for code in vptq[4]]
    for name, args in zip(CALLS, (linear, embedding, moe, vptq), strict=True):
        with pytest.raises(REFUSED, match="int32 words for the Triton kernels"):
            getattr(torch.ops.pcdvq, name)(*args)


def test_codes_of_two_kinds() -> None:
    layout, tensors = random_layer(16, 64, outliers=(8, 8, 256))
    weight = pack_weight(layout, tensors, pack_tables(layout, tensors, torch.device("cpu")))
    columns, scale, shift, codes, tables = weight.args()
    assert len(codes) == 2
    mixed = [codes[0], codes[1].view(torch.int32)]
    with pytest.raises(PCDVQError, match=r"codes is torch\.int32"):
        torch.ops.pcdvq.vptq_linear(
            torch.randn(2, 64), columns, scale, shift, mixed, tables, None, weight.layout
        )


def test_a_backend_that_does_not_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PCDVQ_BACKEND", "tritn")
    with pytest.raises(PCDVQError, match=r"PCDVQ_BACKEND .* is 'tritn'; choose from torch and"):
        ops.prepacks(torch.device("cpu"))
    monkeypatch.setenv("PCDVQ_BACKEND", "")
    assert not ops.prepacks(torch.device("cpu"))
