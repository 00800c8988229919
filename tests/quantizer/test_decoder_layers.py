"""Decoder layers: how they are called, run in stages, and put together again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import selection
from pcdvq_quantizer.calibration.decoder import Call, LayeredModel
from pcdvq_quantizer.calibration.replay import Replay, run_original
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.selection import select_layers
from pcdvq_quantizer.sources import open_source
from torch import nn
from transformers import AutoModelForCausalLM

OPTIONS = QuantizeOptions(bits=3.0, samples=8, sequence_length=64, effort="quick")

STAGES = {
    "llama": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "qwen2": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "qwen3": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "olmo2": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "gemma3_text": [("q", "k", "v"), ("o",), ("gate", "up"), ("down",)],
    "phi3": [("qkv",), ("o",), ("gate_up",), ("down",)],
    "opt": [("q", "k", "v"), ("out",), ("fc1",), ("fc2",)],
    "biogpt": [("q", "k", "v"), ("out",), ("fc1",), ("fc2",)],
    "gpt_neo": [("q", "k", "v"), ("out",), ("c_fc",), ("c",)],
    "bloom": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "gpt_neox": [("query_key_value",), ("dense",), ("dense_h_to_4h",), ("dense_4h_to_h",)],
    "mpt": [("Wqkv",), ("out",), ("up",), ("down",)],
    "falcon_h1": [("in",), ("out",), ("q", "k", "v"), ("o",), ("up", "gate"), ("down",)],
}
# Those that norm what they add to the residual stream, or add two things at once.
ADD_NO_LINEAR = ("gemma3_text", "olmo2", "falcon_h1", "gpt_neox")
OTHER_FIELDS: dict[str, dict[str, object]] = {
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256},
}
FALCON_H1 = {"mamba_d_ssm": 128, "mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16}


@pytest.mark.parametrize("model_type", STAGES)
def test_replay_of_an_unchanged_layer_is_its_forward(
    model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of linears that could not be served."""
    monkeypatch.setattr(selection, "reordered", lambda *args: None)
    extra = {"pad_token_id": 0} if model_type in ("phi3", "olmo2", "opt", "biogpt") else {}
    extra |= OTHER_FIELDS.get(model_type, {})
    extra |= {"head_dim": 16, "sliding_window": 16} if model_type == "gemma3_text" else {}
    extra |= {**FALCON_H1, "head_dim": 16} if model_type == "falcon_h1" else {}
    source = open_source(str(save_model(tmp_path / "model", tiny_config(model_type, **extra))))
    linears = select_layers(source).linears
    model = LayeredModel(source, linears, torch.device("cpu"))
    tokens = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    with torch.no_grad():
        expected = reference(tokens, output_hidden_states=True)
        hidden, calls = model.embed(tokens)
        torch.testing.assert_close(hidden, expected.hidden_states[0])
        for index, name in enumerate(model.layers):
            inner = [n.removeprefix(f"{name}.") for n in linears if n.startswith(f"{name}.")]
            layer = model.load(index)
            output, stages = run_original(layer, calls[index], hidden, inner)
            kinds = [
                tuple(n.split(".")[-1].removesuffix("_proj") for n in s.linears) for s in stages
            ]
            assert kinds == STAGES[model_type]
            adds = [stage.residual is not None for stage in stages]
            # Those that add are the second of two, the first of which may be left.
            pairs = [False, model_type not in ADD_NO_LINEAR] * len(stages)
            assert adds == pairs[-len(stages) :]
            replay = Replay(layer, calls[index], hidden, stages)
            for number, stage in enumerate(stages):
                for x, original in zip(replay.inputs(number), stage.inputs, strict=True):
                    torch.testing.assert_close(x, original)
                if stage.residual is not None:
                    for stream, original in zip(replay.residual, stage.residual, strict=True):
                        torch.testing.assert_close(stream, original)
            torch.testing.assert_close(replay.output(), output)
            model.unload(index)
            hidden = output
        logits = torch.stack([model.logits(row) for row in hidden])
        torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changes", [{"objective": "fisher"}, {"bits": 3.7}, {"codec": "pvq"}])
def test_linears_that_are_children_of_the_layer(changes: dict[str, Any], tmp_path: Path) -> None:
    """By all that is measured on the way, with text that the model writes."""
    sizes = {"hidden_size": 128, "word_embed_proj_dim": 128, "ffn_dim": 128}
    config = tiny_config("opt", pad_token_id=0, **sizes)
    model = str(save_model(tmp_path / "model", config))
    plan = make_plan(model, replace(OPTIONS, samples=2, **changes))
    checkpoint = quantize_model(plan, tmp_path / "out")
    assert len(checkpoint.layers) == 12
    report = json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())
    assert all(0 < error["output"] < error["weight"] for error in report["errors"].values())


class Odd(nn.Module):
    """A decoder layer that is called, and calls others, as few are."""

    def __init__(self, twice: bool = False, shares: bool = False) -> None:
        super().__init__()
        self.norm, self.first, self.second = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.twice, self.shares = twice, shares

    def forward(
        self, x: torch.Tensor, scale: float, kept: dict[str, torch.Tensor], *, shift: torch.Tensor
    ) -> tuple[torch.Tensor, None, torch.Tensor]:
        x = x + self.first(input=self.norm(input=x) + shift)
        if self.shares:
            kept["x"] = x
        inner = self.norm(input=x)
        for _ in range(1 + self.twice):
            inner = self.second(input=inner.flatten(0, 1)).view_as(x)
        return x + inner * scale, None, inner


def test_layers_called_in_other_ways() -> None:
    """By position and by name, with tuples out, and linears without the batch dimension."""
    torch.manual_seed(0)
    hidden, call = torch.randn(3, 5, 8), Call((1.0, {}), {"shift": torch.randn(8)})
    layer, linears = Odd(), ["first", "second"]
    with torch.no_grad():
        output, stages = run_original(layer, call, hidden, linears)
        assert [stage.linears for stage in stages] == [("first",), ("second",)]
        assert all(stage.residual is not None for stage in stages)
        replay = Replay(layer, call, hidden, stages)
        for number, stage in enumerate(stages):
            for x, original in zip(replay.inputs(number), stage.inputs, strict=True):
                torch.testing.assert_close(x, original)
        torch.testing.assert_close(replay.output(), output)
        with pytest.raises(PCDVQError, match="second runs more than once"):
            run_original(Odd(twice=True), call, hidden, linears)
        with pytest.raises(PCDVQError, match="Odd keeps keys or values for layers after it"):
            run_original(Odd(shares=True), call, hidden, linears)


GEMMA_3N = {
    "head_dim": 16,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 256,
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "layer_types": ["full_attention", "sliding_attention"],
    "activation_sparsity_pattern": [0.0, 0.0],
    "intermediate_size": [192, 192],
}


@pytest.mark.parametrize(
    ("model_type", "extra", "reason"),
    [
        ("gemma3n_text", GEMMA_3N, "several streams"),
        ("rwkv", {"attention_hidden_size": 64}, "values to unpack"),
        ("zamba2", {"n_mamba_heads": 8, "mamba_headdim": 16, "mamba_d_state": 8}, "read more of"),
    ],
)
def test_layers_that_hand_on_more_are_refused(
    model_type: str, extra: dict[str, object], reason: str, tmp_path: Path
) -> None:
    """Before the model writes text, and with what to do."""
    layers = {"layers_block_type": ["mamba", "hybrid"]} if model_type == "zamba2" else {}
    config = tiny_config(model_type, pad_token_id=0, **extra, **layers)
    plan = make_plan(str(save_model(tmp_path / "model", config)), OPTIONS)
    with pytest.raises(PCDVQError, match=rf"{reason}.*use --calibration none"):
        quantize_model(plan, tmp_path / "out")
