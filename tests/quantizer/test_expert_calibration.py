"""Quantizing mixtures of experts with calibration."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import change_config, save_model, tiny_config
from pcdvq_kernels.checkpoint import Checkpoint
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.calibration import experts as calibration
from pcdvq_quantizer.experts import experts_of
from pcdvq_quantizer.hf import PCDVQLinear
from pcdvq_quantizer.plan import NONE, QuantizeOptions, make_plan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.run import quantize_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

TEXT = "".join(chr(32 + (7 * i * i + 3 * i) % 90) for i in range(4000))
OPTIONS = QuantizeOptions(bits=2.0, samples=8, sequence_length=64, effort="quick")
MIXTRAL = tiny_config("mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=16)
QWEN = tiny_config(
    "qwen2_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=96,
)


class Notes(Progress):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.steps, self.total, self.notes = 0, 0, []

    def start(self, what: str, total: int) -> None:
        self.steps, self.total = 0, total

    def advance(self, steps: int) -> None:
        self.steps += steps

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def save_moe(directory: Path, config: dict[str, object]) -> Path:
    """A random model whose weights are as loud as a trained one's and whose expert 1 is shunned."""
    save_model(directory, config)
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith("proj.weight") or ".experts." in name:
            weight *= 4
        if name.endswith((".mlp.gate.weight", ".block_sparse_moe.gate.weight")):
            weight *= 20
            weight[1] = -weight[0]
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


def error(source: Path, checkpoint: Path) -> float:
    """Of the logits on the calibration text, relative."""
    tokens = torch.tensor([list(TEXT[:128].encode())])

    def logits(model: PreTrainedModel) -> torch.Tensor:
        with torch.inference_mode():
            return model(input_ids=tokens).logits

    expected = logits(AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32))
    found = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    assert any(isinstance(module, PCDVQLinear) for module in found.modules())
    return ((logits(found) - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("config", [MIXTRAL, QWEN], ids=["mixtral", "shared expert"])
def test_calibration(
    config: dict[str, object], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "FEW_TOKENS", 128)
    source = save_moe(tmp_path / "model", config)
    errors, notes = {}, Notes()
    for name in (NONE, str(text)):
        out = tmp_path / ("none" if name == NONE else "text")
        plan = make_plan(str(source), replace(OPTIONS, calibration=name))
        checkpoint = quantize_model(plan, out, progress=notes)
        assert notes.steps == notes.total
        change_config(out, activations="float")
        errors[name] = error(source, out)
    assert errors[str(text)] < 0.8 * errors[NONE]
    assert_shared_signs(checkpoint)
    assert any("experts have less than" in note for note in notes.notes)
    report = json.loads((tmp_path / "text" / "pcdvq_report.json").read_text())
    outputs = [value["output"] for name, value in report["errors"].items() if experts_of(name)]
    assert len(outputs) == 2 * 4 * 3
    assert max(outputs) < 0.5


def assert_shared_signs(checkpoint: Checkpoint) -> None:
    """Of gate and up of all experts of a layer, and of down."""
    stored = load_file(checkpoint.directory / "model-00001-of-00001.safetensors")
    signs = {}
    for name in filter(experts_of, checkpoint.layers):
        key = experts_of(name), checkpoint.layers[name].in_features
        tensor = stored[f"{name}.signs_in"]
        assert torch.equal(signs.setdefault(key, tensor), tensor)


def test_experts_of_a_layer_share_a_rate(text: Path, tmp_path: Path) -> None:
    source = save_moe(tmp_path / "model", {**MIXTRAL, "hidden_size": 128, "head_dim": 32})
    options = replace(OPTIONS, bits=2.9, calibration=str(text))
    checkpoint = quantize_model(make_plan(str(source), options), tmp_path / "out")
    assert 2.3 < checkpoint.bits_per_weight <= 2.9
    rates: dict[str, set[str]] = {}
    for name, layer in checkpoint.layers.items():
        rates.setdefault(experts_of(name) or name, set()).add(layer.codebook)
    assert {len(books) for books in rates.values()} == {1}
    assert len(set.union(*rates.values())) > 1


def test_unknown_experts(text: Path, tmp_path: Path) -> None:
    config = tiny_config("olmoe", num_experts=4, num_experts_per_tok=2, pad_token_id=0)
    source = str(save_model(tmp_path / "model", config))
    plan = make_plan(source, replace(OPTIONS, calibration=NONE))
    assert not any(map(experts_of, plan.selection.layers))
    plan = make_plan(source, replace(OPTIONS, calibration=str(text)))
    with pytest.raises(PCDVQError, match=r"experts.*use --calibration none"):
        quantize_model(plan, tmp_path / "out")
