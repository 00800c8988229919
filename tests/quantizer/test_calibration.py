"""Calibration: error feedback, the two streams, sequential quantization, resuming, bad input."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pcdvq_quantizer.hf  # noqa: F401 transformers then loads PCDVQ checkpoints
import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import PACKED_TENSORS
from pcdvq_kernels.errors import PCDVQError
from pcdvq_kernels.hadamard import block_hadamard
from pcdvq_kernels.reference import dequantize
from pcdvq_quantizer.calibration import run as calibration
from pcdvq_quantizer.calibration.ldlq import cholesky_feedback, ldlq
from pcdvq_quantizer.calibration.stage import quantize_stage
from pcdvq_quantizer.calibration.statistics import Inputs, InputStatistics
from pcdvq_quantizer.calibration.text import (
    load_tokenizer,
    sample_windows,
    tokenize,
)
from pcdvq_quantizer.codebooks import get_codebook
from pcdvq_quantizer.layer import quantize_linear
from pcdvq_quantizer.plan import QuantizeOptions, input_signs, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.sources import open_source
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

OPTIONS = QuantizeOptions(bits=3.0, samples=8, sequence_length=64, effort="quick")


def correlated(columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs fp32 [4 K, K] with a spread of variances in random directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4 * columns, columns, generator=generator)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    return x * torch.logspace(-1.5, 0.5, columns) @ basis


def quadratic(error: torch.Tensor, hessian: torch.Tensor) -> float:
    return ((error @ hessian.to(error.dtype)) * error).sum().item()


@pytest.mark.parametrize(
    ("codec", "bits", "chain_rows"),
    [
        ("trellis", 2.0, 64),
        ("trellis", 2.0, 16),
        ("trellis", 4.0, 32),
        ("e8", 2.0, 0),
        ("pvq", 3.25, 0),
        ("int8", 8.0, 0),
    ],
)
def test_feedback_lowers_the_output_error(codec: str, bits: float, chain_rows: int) -> None:
    """By the ratio that theory gives for small errors: mean of the feedback's D to mean of H."""
    book = get_codebook(codec, bits, chain_rows)
    x = correlated(128).double()
    hessian = x.T @ x / len(x)
    dim, step = book.codebook.spec.vector_dim, book.codebook.spec.strip_columns
    weight = torch.randn(192, 128, generator=torch.Generator().manual_seed(1)) * book.unit
    codes, levels = ldlq(weight, cholesky_feedback(hessian, step), book.encoder, torch.ones(192))
    assert torch.equal(book.codebook.decode(codes).flatten(1).float(), levels)
    nearest = book.codebook.decode(book.encoder.encode(weight.unflatten(1, (-1, dim))))
    error = quadratic(levels - weight, hessian)
    plain = quadratic(nearest.flatten(1).float() - weight, hessian)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    conditional = sum(
        torch.linalg.inv(block.T @ block).trace()
        for block in (upper[i : i + step, i : i + step] for i in range(0, 128, step))
    )
    ratio = (conditional / hessian.trace()).item()
    # Coarse errors carried forward widen what is still to be rounded.
    assert 0.9 * ratio < error / plain < (1.2 if bits >= 4.0 else 1.7) * ratio


def test_white_inputs_need_no_feedback() -> None:
    book = get_codebook("trellis", 3.0, 32)
    weight = torch.randn(20, 64, generator=torch.Generator().manual_seed(2)) * book.unit
    feedback = cholesky_feedback(torch.eye(64, dtype=torch.float64), 4)
    codes, _ = ldlq(weight, feedback, book.encoder, torch.ones(20))
    assert torch.equal(codes, book.encoder.encode(weight.unflatten(1, (-1, 2))))


def stage_result(
    rows: list[int], statistics: InputStatistics, codec: str = "trellis", chain_rows: int = 16
) -> tuple:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(count, 64, generator=generator) for count in rows]
    book = get_codebook(codec, 2.0, chain_rows)
    return weights, book, *quantize_stage(weights, statistics, book, input_signs(64, 0), 32)


@pytest.mark.parametrize(
    ("codec", "chain_rows", "rows"),
    [
        ("trellis", 16, [17, 32]),
        ("trellis", 32, [33, 7]),
        ("trellis", 64, [64, 65]),
        ("e8", 0, [33, 7]),
        ("pvq", 0, [33, 7]),
    ],
)
def test_stage_gives_back_what_is_stored(codec: str, chain_rows: int, rows: list[int]) -> None:
    """Also where a linear starts inside a segment of the one before."""
    statistics = InputStatistics.gather([Inputs(correlated(64), correlated(64))])
    weights, book, layers, dense = stage_result(rows, statistics, codec, chain_rows)
    for weight, layer, decoded in zip(weights, layers, dense, strict=True):
        packed = layer.qweight, layer.row_scale, layer.signs_in
        stored = dequantize(*packed, book.codebook, 32)
        torch.testing.assert_close(stored, decoded, rtol=1e-4, atol=1e-5)
        error = (stored - weight).square().sum() / weight.square().sum()
        assert layer.error.weight == pytest.approx(error.item(), rel=1e-3)
        plain = quantize_linear(weight, book, input_signs(64, 0), 32)
        packed = plain.qweight, plain.row_scale, plain.signs_in
        nearest = dequantize(*packed, book.codebook, 32)
        moments = statistics.hessian
        assert quadratic(stored - weight, moments) < 0.7 * quadratic(nearest - weight, moments)
        assert layer.error.output is not None
        assert 0 < layer.error.output < layer.error.weight


def test_target_makes_up_for_wrong_inputs_and_residuals() -> None:
    """W* x must be nearer to W x_original + r than W x is, on text it has not seen."""
    x = correlated(64)
    noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(5)) * 0.05
    original = x + x @ noise
    drift = x @ torch.randn(64, 40, generator=torch.Generator().manual_seed(6)) * 0.3
    half = len(x) // 2
    ignoring = InputStatistics.gather([Inputs(x[:half], x[:half])])
    weights, _, _, blind = stage_result([40], ignoring)
    wanted = original @ weights[0].T + drift
    lack = wanted[:half] - x[:half] @ weights[0].T
    seeing = InputStatistics.gather([Inputs(original[:half], x[:half], lack)])
    _, _, _, dense = stage_result([40], seeing)

    def error(weight: torch.Tensor) -> float:
        return (x[half:] @ weight.T - wanted[half:]).square().mean().item()

    assert error(dense[0]) < 0.8 * error(blind[0])
    # Without a drift, what the output lacks follows from the inputs.
    lack = (original[:half] - x[:half]) @ weights[0].T
    both = [Inputs(original[:half], x[:half], each) for each in (lack, None)]
    (_, _, _, by_output), (_, _, _, by_input) = (
        stage_result([40], InputStatistics.gather([each])) for each in both
    )
    assert error(by_output[0]) == pytest.approx(error(by_input[0]), rel=0.02)


@pytest.mark.parametrize("tokens", [1, 20])
def test_degenerate_statistics(tokens: int) -> None:
    """Fewer tokens than columns, and inputs that are always zero."""
    x = correlated(64)[:tokens]
    x[:, 10:30] = 0
    _, _, layers, _ = stage_result([16], InputStatistics.gather([Inputs(x, x)]))
    assert layers[0].row_scale.isfinite().all()
    dead = torch.zeros(4, 64)
    _, _, layers, _ = stage_result([16], InputStatistics.gather([Inputs(dead, dead)]))
    assert layers[0].row_scale.isfinite().all()
    assert layers[0].error.weight < 0.2


def test_rotated_statistics_are_those_of_rotated_inputs() -> None:
    x, y = correlated(64), correlated(64, seed=1)
    signs = input_signs(64, 0)
    rx, ry = block_hadamard(x * signs, 32), block_hadamard(y * signs, 32)
    for lack in (None, y):
        rotated = InputStatistics.gather([Inputs(y, x, lack)]).rotated(signs, 32)
        direct = InputStatistics.gather([Inputs(ry, rx, lack)])
        for name in ("hessian", "cross", "lack"):
            values = getattr(rotated, name), getattr(direct, name)
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    square = rx.double().T @ rx.double() / len(rx)
    torch.testing.assert_close(rotated.hessian, square, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_config(num_hidden_layers=3))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Letters with a pattern, so that the inputs of layers are far from white."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return path


def divergence(model: Path, checkpoint: Path, tokens: torch.Tensor) -> float:
    """Mean squared difference of log-probabilities."""
    with torch.no_grad():
        logits = [
            AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(tokens).logits
            for path in (model, checkpoint)
        ]
    return (logits[0].log_softmax(-1) - logits[1].log_softmax(-1)).square().mean().item()


def test_calibration_is_nearer_to_the_original(model: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, bits=2.0, calibration=str(text))
    quantize_model(make_plan(str(model), options), tmp_path / "calibrated")
    plain = replace(options, calibration="none")
    quantize_model(make_plan(str(model), plain), tmp_path / "plain")
    tokens = torch.tensor([list(b"jumps over the quick brown dog; the lazy fox ")])
    near = divergence(model, tmp_path / "calibrated", tokens)
    assert near < 0.5 * divergence(model, tmp_path / "plain", tokens)


def test_interrupted_calibration_resumes(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(OPTIONS, calibration=str(text), embedding_bits=8)
    plan = make_plan(str(model), options)
    quantize_model(plan, tmp_path / "whole")
    quantize_layer = calibration._Calibration._quantize_layer
    begun: list[int] = []

    def killed_in_the_second(self: Any, index: int, *arguments: Any) -> None:
        begun.append(index)
        if len(begun) == 2:
            raise KeyboardInterrupt
        quantize_layer(self, index, *arguments)

    monkeypatch.setattr(calibration._Calibration, "_quantize_layer", killed_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(plan, tmp_path / "out")
    monkeypatch.setattr(calibration, "calibration_windows", None)  # nor is the text needed again
    quantize_model(plan, tmp_path / "out")
    assert begun == [0, 1, 1, 2]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_other_calibration_text_does_not_resume(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("abcdefgh" * 200)
    options = replace(OPTIONS, calibration=str(text))
    with monkeypatch.context() as patch:
        patch.setattr("pcdvq_quantizer.plan.quantize_stage", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_model(make_plan(str(model), options), tmp_path / "out")
    text.write_text("something else" * 200)
    with pytest.raises(PCDVQError, match="calibration_sha256"):
        quantize_model(make_plan(str(model), options), tmp_path / "out")
    text.write_text("abcdefgh" * 200)
    more = make_plan(str(model), replace(options, samples=9))
    with pytest.raises(PCDVQError, match="samples = 8, this run has 9"):
        quantize_model(more, tmp_path / "out")


def test_text_of_the_model_itself(model: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, samples=2, sequence_length=32)
    for out in ("a", "b"):
        quantize_model(make_plan(str(model), options), tmp_path / out)
    first, second = (
        (tmp_path / out / "model-00001-of-00001.safetensors").read_bytes() for out in "ab"
    )
    assert first == second


def test_windows(model: Path) -> None:
    tokenizer = load_tokenizer(open_source(str(model)))
    windows = sample_windows(tokenizer, tokenize(tokenizer, ["abcdefghij" * 10]), 3, 7)
    assert windows.shape == (3, 7)
    assert windows[0].tolist() == list(b"abcdefg")
    assert sample_windows(tokenizer, [[5] * 20], 9, 7).shape == (2, 7)
    with pytest.raises(PCDVQError, match="6 tokens, less than one window of 7"):
        sample_windows(tokenizer, [[5] * 6], 3, 7)


def test_nan_activations_name_the_layer(model: Path, text: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    save_model(broken, tiny_config(num_hidden_layers=3))
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.input_layernorm.weight"][3] = float("inf")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    options = replace(OPTIONS, calibration=str(text))
    with pytest.raises(PCDVQError, match=r"model\.layers\.1.*NaN"):
        quantize_model(make_plan(str(broken), options), tmp_path / "out")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"samples": 0}, "--samples is 0"),
        ({"sequence_length": 3}, "--sequence-length is 3"),
        ({"bits": 1.4}, "1.5 to 4 bits per weight, not 1.4"),
        ({"bits": 1.9, "codec": "pvq"}, "2 to 4 bits per weight, not 1.9"),
        ({"bits": 4.5}, "1.5 to 4 bits per weight, not 4.5"),
        ({"bits": 2.6, "calibration": "none"}, "needs calibration text"),
        ({"effort": "none"}, "--effort is 'none'; give one of auto, exhaustive, quick"),
        ({"codec": "no"}, "codec 'no' is not offered"),
    ],
)
def test_bad_options(model: Path, changes: dict, match: str) -> None:
    with pytest.raises(PCDVQError, match=match):
        make_plan(str(model), replace(OPTIONS, **changes))


def test_model_without_tokenizer(tmp_path: Path, text: Path) -> None:
    """A tokenizer-less model cannot be calibrated either, and says what to do."""
    source = save_model(tmp_path / "bare", tiny_config())
    for file in source.glob("token*"):
        file.unlink()
    options = replace(OPTIONS, calibration=str(text))
    with pytest.raises(PCDVQError, match=r"no tokenizer.*--calibration none"):
        quantize_model(make_plan(str(source), options), tmp_path / "out")


def test_report_has_errors(model: Path, text: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, calibration=str(text))
    checkpoint = quantize_model(make_plan(str(model), options), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())
    assert report["errors"].keys() == checkpoint.layers.keys()
    for error in report["errors"].values():
        assert 0 < error["output"] < error["weight"]
        assert 0.5 < error["direction"] < 1


def test_chains_of_several_lengths_in_a_stage(text: Path, tmp_path: Path) -> None:
    """Phi's MLP reads what its attention reads, and its rows can be split into longer chains."""
    config = tiny_config("phi", partial_rotary_factor=0.5, intermediate_size=256)
    source = save_model(tmp_path / "model", config)
    options = replace(OPTIONS, calibration=str(text), objective="fisher")
    checkpoint = quantize_model(make_plan(str(source), options), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())
    original = load_file(source / "model.safetensors")
    stored = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    lengths = {}
    for name, layer in checkpoint.layers.items():
        book, weight = checkpoint.codebooks[layer.codebook], original[f"{name}.weight"].float()
        lengths[name.removeprefix("model.layers.0.")] = book.spec.chain_rows
        packed = (stored[f"{name}.{part}"] for part in PACKED_TENSORS)
        dense = dequantize(*packed, book, checkpoint.config.block(weight.shape[1]))
        error = ((dense - weight).square().sum() / weight.square().sum()).item()
        assert report["errors"][name]["weight"] == pytest.approx(error, rel=1e-3)
    assert lengths["self_attn.q_proj"] == 16
    assert lengths["mlp.fc1"] == 64
