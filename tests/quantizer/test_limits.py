"""What a model can read: windows fit it, tokens have embeddings, text needs a head."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.cli import app
from pcdvq_quantizer.evaluation import EvaluateOptions, evaluate
from pcdvq_quantizer.finetune import FinetuneOptions, finetune_checkpoint
from pcdvq_quantizer.limits import Limits
from pcdvq_quantizer.plan import SELF, QuantizeOptions, make_plan
from pcdvq_quantizer.record import read_report
from pcdvq_quantizer.run import quantize_model
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

CONTEXT = 64
SHORT = {"num_hidden_layers": 1, "max_position_embeddings": CONTEXT}
# Learned positions, of which the first two are never used, and positions that are computed.
OPT = tiny_config("opt", ffn_dim=128, word_embed_proj_dim=64, pad_token_id=0, **SHORT)
ROPE = tiny_config(**SHORT)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("the quick brown fox jumps over the lazy dog; " * 60)
    return path


@pytest.mark.parametrize(
    ("config", "context", "vocabulary"),
    [
        (ROPE, CONTEXT, 256),
        (OPT, CONTEXT, 256),
        ({"model_type": "gpt2", "n_positions": 77, "vocab_size": 99}, 77, 99),
        ({"model_type": "mpt", "max_seq_len": 78}, 78, 50368),
        ({"model_type": "gemma3", "text_config": {"max_position_embeddings": 79}}, 79, 262208),
        ({"model_type": "bloom", "vocab_size": 99}, None, 99),
        ({"model_type": "mamba", "vocab_size": 99}, None, 99),
        ({"model_type": "llama", "max_position_embeddings": 0}, None, 32000),
        ({"model_type": "no such model"}, None, None),
        ({}, None, None),
    ],
)
def test_limits(config: dict[str, object], context: int | None, vocabulary: int | None) -> None:
    assert Limits.of("m", config) == Limits("m", context, vocabulary)


@pytest.mark.parametrize("config", [OPT, ROPE], ids=["learned", "rope"])
def test_windows_of_the_default_length(
    config: dict[str, object], text: Path, tmp_path: Path
) -> None:
    """Quantize, finetune and eval take what the model reads, and say so."""
    model, out = str(save_model(tmp_path / "model", config)), str(tmp_path / "out")

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, [*arguments], catch_exceptions=False)
        assert result.exit_code == 0
        return " ".join(result.output.split())

    shown = run("quantize", model, out, "--calibration", str(text), "--finetune")
    assert shown.count(f"windows have {CONTEXT} tokens, not the 1024 of --sequence-length") == 2
    assert f"most {CONTEXT} at once" in shown
    assert shown.index("on held-out calibration text") < shown.index(f"{out}: ")
    figures = tmp_path / "figures.json"
    shown = run("eval", out, "--text", str(text), "--bos", "--json", str(figures))
    assert f"windows have {CONTEXT - 1} tokens, not the 2048 of --window" in shown
    assert json.loads(figures.read_text())["protocol"]["window"] == CONTEXT - 1


def test_text_of_a_model_that_reads_little(tmp_path: Path) -> None:
    """Openings, requests and what is added to them fit into learned positions."""
    model = str(save_model(tmp_path / "model", OPT))
    options = QuantizeOptions(calibration=SELF, samples=4, effort="quick")
    assert quantize_model(make_plan(model, options), tmp_path / "out").layers
    tuning = FinetuneOptions(SELF, tokens=1024, holdout=1)
    notes: list[str] = []
    finetune_checkpoint(tmp_path / "out", tmp_path / "tuned", tuning, note=notes.append)
    assert len(notes) == 1


@pytest.mark.parametrize("calibration", ["text", SELF])
def test_tokens_without_an_embedding(calibration: str, text: Path, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", tiny_config(vocab_size=100, num_hidden_layers=1))
    read = str(text) if calibration == "text" else SELF
    message = r"tokenizer of .*model \(\w+, 256 tokens\) makes token [12]\d\d .* for 100 tokens"
    options = QuantizeOptions(calibration=read, samples=2, sequence_length=32)
    with pytest.raises(PCDVQError, match=message):
        quantize_model(make_plan(str(model), options), tmp_path / "out")
    plain = replace(options, calibration="none")
    quantize_model(make_plan(str(model), plain), tmp_path / "out")
    tuning = FinetuneOptions(read, tokens=64, sequence_length=32, holdout=1)
    with pytest.raises(PCDVQError, match=message.replace("model", "out", 1)):
        finetune_checkpoint(tmp_path / "out", tmp_path / "tuned", tuning)
    lines = tmp_path / "lines.jsonl"
    lines.write_text('{"text": "to you"}\n')
    measure = EvaluateOptions(("perplexity",), text, window=32)
    words = EvaluateOptions(("lambada",), lambada=lines)
    answers = EvaluateOptions(("chat",), requests=lines, reference=str(model))
    for wanted in (measure, words, answers):
        with pytest.raises(PCDVQError, match=message):
            evaluate(str(model), wanted)


def test_model_without_a_head(text: Path, tmp_path: Path) -> None:
    """It can be calibrated on a text, but not write one, or be measured with a random head."""
    model = save_model(tmp_path / "model", tiny_config(num_hidden_layers=1))
    tensors = load_file(model / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"architectures": ["LlamaModel"]}))
    options = QuantizeOptions(calibration=str(text), samples=4, sequence_length=32)
    for changes in ({"calibration": SELF}, {"objective": "fisher"}, {"bits": 2.6}):
        plan = make_plan(str(model), replace(options, **changes))
        with pytest.raises(PCDVQError, match=r"nothing as lm_head\.weight, without which"):
            quantize_model(plan, tmp_path / "".join(changes))
    assert quantize_model(make_plan(str(model), options), tmp_path / "out").layers
    assert read_report(tmp_path / "out")["held_out"] is None
    for directory in (model, tmp_path / "out"):
        with pytest.raises(PCDVQError, match=r"does not store lm_head\.weight"):
            evaluate(str(directory), EvaluateOptions(text=text, window=32))
