"""Mixed rates: sensitivities, the budget, and checkpoints that hold them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.calibration import sensitivity
from pcdvq_quantizer.calibration.allocation import Unit, allocate
from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.sensitivity import measure_sensitivity
from pcdvq_quantizer.codebooks import get_codebook
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.selection import select_layers
from pcdvq_quantizer.sources import open_source
from transformers import AutoModelForCausalLM

TEXT = "a calibration text that is long enough for some windows; " * 60
OPTIONS = QuantizeOptions(bits=3.0, samples=4, sequence_length=64, effort="quick")


def unit(name: str, weights: int, sensitivity: float) -> Unit:
    rates = (2.0, 2.5, 3.0, 4.0)
    return Unit(
        (name,),
        tuple(int(rate * weights) for rate in rates),
        tuple(
            sensitivity * get_codebook("trellis", rate, effort="quick").distortion for rate in rates
        ),
    )


def test_sensitive_layers_get_more() -> None:
    units = [unit("a", 1000, 1.0), unit("b", 1000, 30.0), unit("c", 1000, 0.01)]
    assert allocate(units, 9000) == [2, 3, 0]
    assert allocate(units, 12000) == [3, 3, 3]
    assert allocate(units, 6000) == [0, 0, 0]
    with pytest.raises(PCDVQError, match="takes 6000 bits, over the budget of 5999"):
        allocate(units, 5999)


@pytest.mark.parametrize("budget", range(6000, 12001, 250))
def test_budget_is_kept_and_used(budget: int) -> None:
    units = [unit(str(index), 1000, 2.0**index) for index in range(3)]
    spent = sum(u.bits[rate] for u, rate in zip(units, allocate(units, budget), strict=True))
    assert budget - 1000 < spent <= budget


def test_allocation_is_near_the_best() -> None:
    """Against all choices, where the greedy one may lose its last step."""
    units = [unit(str(index), 800 + 200 * index, 3.0**-index) for index in range(4)]
    budget = 2.7 * sum(800 + 200 * index for index in range(4))

    def loss(choice: list[int]) -> float:
        return sum(u.losses[rate] for u, rate in zip(units, choice, strict=True))

    def bits(choice: list[int]) -> int:
        return sum(u.bits[rate] for u, rate in zip(units, choice, strict=True))

    every = torch.cartesian_prod(*[torch.arange(4)] * 4).tolist()
    best = min(loss(choice) for choice in every if bits(choice) <= budget)
    assert loss(allocate(units, int(budget))) < 1.1 * best


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(hidden_size=256, intermediate_size=512, num_hidden_layers=3)
    return save_model(tmp_path_factory.mktemp("model") / "tiny", config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def test_sensitivity_predicts_the_loss(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in a layer raises the KL as predicted, without the share that feedback leaves."""
    monkeypatch.setattr(sensitivity, "_left_by_feedback", lambda hessian: 1.0)
    source = open_source(str(model))
    linears = select_layers(source).linears
    layered = LayeredModel(source, linears, torch.device("cpu"))
    tokens = torch.tensor([list(TEXT[:64].encode()), list(TEXT[100:164].encode())])
    measured = measure_sensitivity(layered, tokens, linears, 0, Progress())
    assert sorted(name for group in measured for name in group) == sorted(linears)
    assert {len(group) for group in measured} == {1, 2, 3}

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)

    def divergence(group: tuple[str, ...]) -> float:
        noisy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        for name in group:
            weight = noisy.get_parameter(f"{name}.weight").data
            size = weight.square().mean(1, keepdim=True).sqrt() * 0.1
            weight += size * torch.randn(weight.shape, generator=generator)
        with torch.no_grad():
            p, q = (m(tokens).logits.log_softmax(-1) for m in (reference, noisy))
        return (p.exp() * (p - q)).sum().item()

    for group, loss in measured.items():
        assert 0.5 < loss * 0.01 / divergence(group) < 2, group


def test_mixed_checkpoint(model: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, bits=2.9, calibration=str(text))
    checkpoint = quantize_model(make_plan(str(model), options), tmp_path / "out")
    assert 2.6 < checkpoint.bits_per_weight <= 2.9
    assert len(set(checkpoint.layers.values())) > 1
    for index in range(3):
        attention = f"model.layers.{index}.self_attn"
        books = {checkpoint.layers[f"{attention}.{part}_proj"].codebook for part in "qkv"}
        assert len(books) == 1
        mlp = f"model.layers.{index}.mlp"
        gate, up = (checkpoint.layers[f"{mlp}.{part}_proj"].codebook for part in ("gate", "up"))
        assert gate == up


def test_interrupted_choice_of_rates_is_kept(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(str(model), replace(OPTIONS, bits=2.9, calibration=str(text)))
    target = "pcdvq_quantizer.plan.quantize_stage"
    with monkeypatch.context() as patch:
        patch.setattr(target, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_model(plan, tmp_path / "out")
    measure = "pcdvq_quantizer.calibration.allocation.measure_sensitivity"
    monkeypatch.setattr(measure, None)
    assert len(quantize_model(plan, tmp_path / "out").layers) == 21


def test_budget_below_the_lowest_rate(model: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, bits=1.51, calibration=str(text))
    with pytest.raises(PCDVQError, match="raise --bits"):
        quantize_model(make_plan(str(model), options), tmp_path / "out")
