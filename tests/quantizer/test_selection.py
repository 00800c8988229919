"""Which layers are quantized, which are left and why, and what is said of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import open_checkpoint
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_quantizer import cli
from pcdvq_quantizer.inspection import describe_checkpoint, describe_left, inspect_checkpoint
from pcdvq_quantizer.plan import QuantizeOptions, RunOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.vptq.plan import VPTQOptions
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

MAMBA2 = {"num_heads": 8, "head_dim": 16, "n_groups": 1, "state_size": 16}
OPTIONS = QuantizeOptions(bits=3.0, calibration="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_config())


def test_unsuitable_layers_are_left_and_reported(tmp_path: Path) -> None:
    config = tiny_config(intermediate_size=100)
    source = save_model(tmp_path / "odd", config)
    plan = make_plan(str(source), replace(OPTIONS, codec="pvq"))
    assert "multiple of 8" in plan.selection.skipped["model.layers.0.mlp.down_proj"]
    assert "model.layers.0.mlp.up_proj" in plan.selection.layers
    checkpoint = quantize_model(plan, tmp_path / "out")
    assert "model.layers.0.mlp.down_proj" in checkpoint.config.modules_to_not_convert
    assert "model.layers.0.mlp.down_proj.weight" in checkpoint.tensors


def test_layers_skipped_by_name(model: Path, tmp_path: Path) -> None:
    options = replace(OPTIONS, skip=("model.layers.0.*", "*.down_proj"))
    checkpoint = quantize_model(make_plan(str(model), options), tmp_path / "out")
    assert len(checkpoint.layers) == 6
    assert all(name.startswith("model.layers.1.") for name in checkpoint.layers)
    assert "model.layers.1.mlp.down_proj" in checkpoint.config.modules_to_not_convert


@pytest.mark.parametrize(
    ("pattern", "left"),
    [
        ("re:.*down_proj", 12),
        (r"re:model\.layers\.0\.", 7),
        ("re:.*(q|k|v)_proj$", 8),
        ("lm_head", 14),
        ("model.embed_tokens", 14),
    ],
)
def test_patterns_that_match(model: Path, pattern: str, left: int) -> None:
    plan = make_plan(str(model), replace(OPTIONS, skip=(pattern,)))
    assert len(plan.selection.layers) == left
    assert "skipped by name" in plan.selection.skipped.values()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("model.layers.0.mlp.donw_proj", "--skip .*donw.* instance .*layers.0.mlp.down_proj.*"),
        ("layers.0.*", r"--skip 'layers\.0\.\*' matches no layer of .*tiny, which has for inst"),
        ("model.layers.0.mlp.up_proj.weight", "matches no layer"),
        ("re:down_proj", "'re:down_proj' matches no layer .*mlp.down_proj.* from its beginning"),
        ("re:*.mlp", r"'re:\*\.mlp' is no regular expression \(nothing to repeat"),
        ("", "--skip '' matches no layer"),
    ],
)
@pytest.mark.parametrize("kind", [QuantizeOptions, VPTQOptions])
def test_patterns_that_match_nothing(
    model: Path, pattern: str, message: str, kind: type[RunOptions]
) -> None:
    with pytest.raises(PCDVQError, match=message):
        make_plan(str(model), kind(skip=("model.layers.0.*", pattern)))


def test_skipped_head_stays_as_it_is(model: Path, tmp_path: Path) -> None:
    """Also where embeddings are quantized."""
    options = replace(OPTIONS, skip=("lm_head",), embedding_bits=8)
    checkpoint = quantize_model(make_plan(str(model), options), tmp_path / "out")
    assert checkpoint.embeddings == ("model.embed_tokens",)
    assert "lm_head.weight" in checkpoint.tensors


def test_the_whole_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a model whose experts stay as they are: sums of bytes, and why."""
    config = tiny_config("gpt_oss", num_local_experts=4, head_dim=16, pad_token_id=0)
    model = save_model(tmp_path / "moe", config)
    before = sum(t.nbytes for t in load_file(model / "model.safetensors").values())
    command = ["quantize", str(model), str(tmp_path / "out"), "--calibration", "none"]
    ended = CliRunner().invoke(cli.app, command, catch_exceptions=False).output
    checkpoint = open_checkpoint(tmp_path / "out")
    sentence = describe_checkpoint(checkpoint)
    assert sentence in ended
    assert sentence in (tmp_path / "out" / "README.md").read_text()
    summary = inspect_checkpoint(tmp_path / "out")
    assert summary.whole == sentence
    assert any("experts of this architecture" in line for line in summary.left)
    now = summary.packed_bytes + summary.codebook_bytes + summary.unquantized_bytes
    assert f"{before / 2**20:.1f} MiB before, {now / 2**20:.1f} MiB now" in sentence
    left = {
        name: tensor.bytes
        for name, tensor in checkpoint.tensors.items()
        if name.rpartition(".")[0] not in checkpoint.layers or name.endswith(".bias")
    }
    experts = sum(size for name, size in left.items() if ".experts." in name)
    assert f"{100 * sum(left.values()) / before:.1f} % stay as they were" in sentence
    assert f": {100 * experts / before:.1f} % experts of this architecture; " in sentence
    for reason in ("embedding", "output head", "router", "norms, biases and the like"):
        assert f" % {reason}" in sentence
    report = tmp_path / "out" / "pcdvq_report.json"
    for broken in ({"original_bytes": 0}, {"skipped": {"lm_head": "\x1b[2J"}}):
        report.write_text(json.dumps(json.loads(report.read_text()) | broken))
        with pytest.raises(CheckpointError, match="not the record of a run"):
            describe_checkpoint(checkpoint)
    report.unlink()
    assert "at 16 bits per weight" in describe_checkpoint(checkpoint)
    assert describe_left(checkpoint)[0] == "lm_head (reason not recorded)"


def test_experts_are_quantized_all_or_none(tmp_path: Path) -> None:
    config = tiny_config(
        "qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64, head_dim=16
    )
    model = str(save_model(tmp_path / "moe", config))
    plan = make_plan(model, OPTIONS)
    assert len(plan.selection.layers) == 2 * (4 + 8 * 3)
    lines = plan.selection.skipped_lines()
    assert "model.layers.*.mlp.gate (2 of them: router)" in lines
    plan = make_plan(model, replace(OPTIONS, skip=("model.layers.1.*.5.up_proj",)))
    assert len(plan.selection.layers) == 2 * 4 + 8 * 3
    reason = "another layer of the experts is skipped"
    assert plan.selection.skipped["model.layers.1.mlp.experts.0.down_proj"] == reason
    assert len(plan.selection.skipped_lines()) < 10


MAMBA2 = {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1, "chunk_size": 16}


@pytest.mark.parametrize(
    ("model_type", "fields", "layer", "reason"),
    [
        ("olmoe", {"num_experts": 4}, "mlp.experts.0.up_proj", "experts of this architecture"),
        ("granitemoe", {}, "block_sparse_moe.input_linear", "experts of this architecture"),
        ("granitemoe", {}, "block_sparse_moe.router.layer", "router"),
        ("gpt_neox", {}, "embed_out", "output head"),
        ("mamba2", MAMBA2, "mixer.conv1d", "not a linear layer"),
    ],
)
def test_reasons(
    model_type: str, fields: dict[str, object], layer: str, reason: str, tmp_path: Path
) -> None:
    """Also of layers that transformers has under another name than they have on disk."""
    config = tiny_config(model_type, pad_token_id=0, **fields)
    plan = make_plan(str(save_model(tmp_path / "model", config)), OPTIONS)
    found = {name: why for name, why in plan.selection.skipped.items() if name.endswith(layer)}
    assert set(found.values()) == {reason}


def test_layers_that_transformers_does_not_know(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tiny_config())
    weights = load_file(source / "model.safetensors")
    extra = {f"model.layers.2.{name}.weight": torch.zeros(64, 64) for name in ("proj", "gate")}
    save_file(weights | extra, source / "model.safetensors", {"format": "pt"})
    skipped = make_plan(str(source), OPTIONS).selection.skipped
    assert skipped["model.layers.2.proj"] == "no layer that transformers knows"
