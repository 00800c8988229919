"""`pcdvq eval --backend vllm` gives the figures of `--backend hf`."""

import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import change_config, save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.evaluation import EvaluateOptions, evaluate
from pcdvq_quantizer.evaluation.files import ModelFiles
from pcdvq_quantizer.evaluation.hf_model import Comparison
from pcdvq_quantizer.evaluation.vllm_model import _compare_top
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.vptq.plan import VPTQOptions


def test_vllm_agrees_with_transformers(engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    """On a calibrated checkpoint of several rates."""
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    config = tiny_config(hidden_size=256, intermediate_size=512)
    original = save_model(tmp_path / "tiny", config)
    checkpoint = tmp_path / "out"
    wanted = QuantizeOptions(bits=3.2, calibration=str(text), samples=4, sequence_length=64)
    rates = set(quantize_model(make_plan(str(original), wanted), checkpoint).config.layers.values())
    assert len(rates) > 1
    change_config(checkpoint, activations="float")  # as transformers computes with dense weights
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5)
    (tmp_path / "lines").write_text('{"text": "brown fox"}\n{"text": "lazy dog"}\n')
    (tmp_path / "requests").write_text('{"text": "what?"}\n{"text": "who?"}\n')
    options = {
        "tasks": ("perplexity", "lambada", "chat"),
        "text": text,
        "lambada": tmp_path / "lines",
        "requests": tmp_path / "requests",
        "reference": str(original),
        "window": 60,
        "dtype": "float32",
    }
    for model in (original, checkpoint):
        expected = evaluate(str(model), EvaluateOptions(**options))
        task = engine.submit(evaluate, str(model), EvaluateOptions(**options, backend="vllm"))
        found = task.result()
        assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, abs=1e-4)
        assert found.perplexity.tokens == 3 * 59
        assert found.lambada.correct == expected.lambada.correct
        assert found.chat.all.kl == pytest.approx(expected.chat.all.kl, abs=1e-5)
        assert found.chat.all.first_kl == pytest.approx(expected.chat.all.first_kl, abs=1e-5)
        assert found.chat.all.tokens == expected.chat.all.tokens
        assert not found.chat.bound  # of a vocabulary this small vLLM gives all
        assert (found.backend, found.dtype) == ("vllm", "float32")
        assert found.weights == ("dense" if model == original else "packed")


def test_divergence_from_the_likeliest_tokens() -> None:
    """All tokens give the divergence, the likeliest ones a bound from below that is close."""
    torch.manual_seed(0)
    theirs = (4 * torch.randn(5, 400)).log_softmax(1)
    mine = (theirs + 0.3 * torch.randn(5, 400)).log_softmax(1)
    targets = torch.tensor([0, 7, 1, 399, 3])
    exact = (theirs.exp() * (theirs - mine)).sum(1)
    bounds = []
    for count in (400, 40, 4):
        rows = [
            {
                token: SimpleNamespace(logprob=row[token].item())
                for token in {*row.topk(count).indices.tolist(), target}
            }
            for row, target in zip(mine, targets.tolist(), strict=True)
        ]
        found = Comparison.join([_compare_top(rows, theirs, targets)])
        assert torch.equal(found.agreement.bool(), mine.argmax(1) == theirs.argmax(1))
        for nll, scores in ((found.nll, mine), (found.reference_nll, theirs)):
            torch.testing.assert_close(nll, -scores.gather(1, targets[:, None])[:, 0])
        bounds.append(found.kl)
    torch.testing.assert_close(bounds[0], exact, rtol=1e-4, atol=1e-5)
    assert (bounds[1] <= exact + 1e-5).all()
    assert (bounds[2] <= bounds[1] + 1e-5).all()
    assert bounds[1].sum() > 0.9 * exact.sum()


def test_vllm_serves_what_vptq_makes(engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    config = tiny_config("qwen2", hidden_size=256, num_hidden_layers=1, tie_word_embeddings=True)
    original = save_model(tmp_path / "tiny", config)
    wanted = VPTQOptions(
        vector_length=4,
        centroids=32,
        residual_centroids=16,
        outliers=4,
        outlier_centroids=16,
        groups=2,
        calibration=str(text),
        samples=4,
        sequence_length=64,
    )
    checkpoint = str(quantize_model(make_plan(str(original), wanted), tmp_path / "out").directory)
    options = {"text": text, "window": 60, "windows": 3, "dtype": "float32"}
    expected = evaluate(checkpoint, EvaluateOptions(**options))
    task = engine.submit(evaluate, checkpoint, EvaluateOptions(**options, backend="vllm"))
    found = task.result()
    assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, abs=1e-4)
    assert (expected.weights, found.weights) == ("dense", "packed")


def test_what_vllm_has_no_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It generates a token after each window and line: windows give way, lines are refused."""
    original = save_model(tmp_path / "tiny", tiny_config())
    (tmp_path / "text").write_text("a" * 256)
    started: list[int] = []

    def start(files: ModelFiles, dtype: str, longest: int) -> None:
        started.append(longest)
        raise InterruptedError

    options = EvaluateOptions(text=tmp_path / "text", window=256, backend="vllm")
    with monkeypatch.context() as patch:
        patch.setattr("pcdvq_quantizer.evaluation.run.VLLMModel", start)
        with pytest.raises(InterruptedError):
            evaluate(str(original), options)
    assert started == [255]
    (tmp_path / "lines").write_text(json.dumps({"text": "a " * 126 + "last"}))
    options = EvaluateOptions(("lambada",), lambada=tmp_path / "lines", backend="vllm")
    with pytest.raises(PCDVQError, match="takes 256 tokens, this evaluation needs 257"):
        evaluate(str(original), options)
