"""Recovery fine-tuning: what it changes, that it helps, and that it can be interrupted."""

import json
import random
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import change_config, save_model, tiny_config
from pcdvq_kernels.checkpoint import open_checkpoint
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.cli import app
from pcdvq_quantizer.evaluation.files import ModelFiles, find_reference
from pcdvq_quantizer.evaluation.hf_model import load_causal_lm
from pcdvq_quantizer.finetune import (
    FinetuneOptions,
    Step,
    distillation,
    finetune_checkpoint,
    run,
    training,
)
from pcdvq_quantizer.finetune.distillation import Distillation
from pcdvq_quantizer.finetune.student import Student
from pcdvq_quantizer.finetune.training import Windows
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.run import quantize_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner


def make_checkpoint(directory: Path, config: dict[str, object]) -> Path:
    """A random model `directory`/model, and its 2-bit checkpoint, which is returned."""
    # Weights of the usual size for a random model would give nearly the same logits at any rate.
    model = save_model(directory / "model", config | {"initializer_range": 0.2})
    plan = make_plan(str(model), QuantizeOptions(bits=2.0, calibration="none"))
    checkpoint = quantize_model(plan, directory / "quantized").directory
    change_config(checkpoint, activations="float")  # as dense weights compute
    return checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), tiny_config())


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> FinetuneOptions:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    letters = random.Random(0).choices("abcdefgh ", range(9, 0, -1), k=3000)
    text.write_text("".join(letters))
    return FinetuneOptions(
        str(text), tokens=960, sequence_length=48, windows_per_step=2, learning_rate=0.01
    )


def tensors(directory: Path) -> dict[str, Tensor]:
    return {
        name: tensor
        for file in directory.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def load(directory: Path) -> PreTrainedModel:
    return load_causal_lm(ModelFiles.find(str(directory)), "float32").eval()


def plain_kl(original: PreTrainedModel, model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean KL over all positions of `windows` [S, T], all logits at once."""
    target, found = (each(windows).logits.log_softmax(-1) for each in (original, model))
    return nn.functional.kl_div(
        found.flatten(0, 1), target.flatten(0, 1), log_target=True, reduction="batchmean"
    )


def windows_of(checkpoint: Path, options: FinetuneOptions) -> Windows:
    files = ModelFiles.find(str(checkpoint))
    reference = find_reference(files, None)
    return run._hold_out(run._make_windows(files, reference, options, Progress()), options)


def test_result_is_better_and_serves_as_measured(
    checkpoint: Path, options: FinetuneOptions, tmp_path: Path
) -> None:
    result = finetune_checkpoint(checkpoint, tmp_path / "out", options)
    assert result.kl_after < 0.9 * result.kl_before
    assert (result.steps, result.diverged) == (10, False)
    holdout = windows_of(checkpoint, options).holdout
    original = load(checkpoint.parent / "model")
    model = load(tmp_path / "out")
    with torch.no_grad():
        before = plain_kl(original, load(checkpoint), holdout)
        # On the packed codes, by the operator that serves.
        packed = plain_kl(original, model, holdout)
        model.dequantize()
        dense = plain_kl(original, model, holdout)
    assert before.item() == pytest.approx(result.kl_before, rel=1e-3)
    assert packed.item() == pytest.approx(result.kl_after, rel=1e-3)
    assert dense.item() == pytest.approx(result.kl_after, rel=1e-4)


def test_only_row_scales_and_norms_change(
    checkpoint: Path, options: FinetuneOptions, tmp_path: Path
) -> None:
    finetune_checkpoint(checkpoint, tmp_path / "out", options)
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    free = {name for name in before if name.endswith(("row_scale", "norm.weight"))}
    assert changed == free
    assert all(before[name].dtype == after[name].dtype for name in before)
    opened = open_checkpoint(tmp_path / "out")
    assert opened.bits_per_weight == open_checkpoint(checkpoint).bits_per_weight
    files = {path.name for path in checkpoint.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert not (tmp_path / "out.partial").exists()
    report = json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())
    assert report["finetune"]["kl_after"] < report["finetune"]["kl_before"]
    old = json.loads((checkpoint / "pcdvq_report.json").read_text())
    assert {key: value for key, value in report.items() if key != "finetune"} == old


@pytest.mark.parametrize("chunk", [7, 256])
@pytest.mark.parametrize(
    "config",
    [
        tiny_config(),
        tiny_config("qwen2", tie_word_embeddings=True),
        tiny_config("gemma3_text", head_dim=16, sliding_window=16, final_logit_softcapping=5.0),
    ],
    ids=lambda config: config["model_type"],
)
def test_gradient(
    config: dict[str, object], chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunked and hand-made, it is that of the plain formula."""
    monkeypatch.setattr(distillation, "CHUNK_POSITIONS", chunk)
    checkpoint = make_checkpoint(tmp_path, config)
    original = load(tmp_path / "model").requires_grad_(False)
    student = Student(load(checkpoint), open_checkpoint(checkpoint))
    windows = torch.randint(3, 200, (2, 30), generator=torch.Generator().manual_seed(0))
    plain = plain_kl(original, student.model, windows)
    plain.backward()
    expected = student.take_gradient()
    distil = Distillation(student.model, original)
    kls = [distil.accumulate(ids, 0.5) for ids in windows]
    assert sum(kls) / 2 == pytest.approx(plain.item(), rel=1e-4)
    assert sum(map(distil.measure, windows)) / 2 == pytest.approx(plain.item(), rel=1e-4)
    found = student.take_gradient()
    assert found.abs().min() > 0
    assert torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_relative_change_of_gemma_norms_is_of_one_plus_weight(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path, tiny_config("gemma3_text", head_dim=16))
    student = Student(load(checkpoint), open_checkpoint(checkpoint))
    norms = [each for each in student.trainables if each.name.endswith("norm.weight")]
    assert len(norms) == 2 * 6 + 1
    for norm in norms:
        assert torch.equal(norm.unit, 1 + norm.start)
    scales = [each for each in student.trainables if each.name.endswith("row_scale")]
    assert all(torch.equal(scale.unit, scale.start) for scale in scales)


def test_layer_norms_with_biases(options: FinetuneOptions, tmp_path: Path) -> None:
    config = tiny_config("stablelm", use_qkv_bias=True)
    checkpoint = make_checkpoint(tmp_path, config)
    result = finetune_checkpoint(checkpoint, tmp_path / "out", options)
    assert result.kl_after < result.kl_before
    before, after = tensors(checkpoint), tensors(tmp_path / "out")
    assert not torch.equal(before["model.norm.weight"], after["model.norm.weight"])
    bias = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(before[bias], after[bias])


def test_interrupted_run_continues_to_the_same_bytes(
    checkpoint: Path, options: FinetuneOptions, tmp_path: Path
) -> None:
    seen: list[int] = []

    def stop(step: Step) -> None:
        if step.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune_checkpoint(checkpoint, tmp_path / "out", options, progress=stop)
    assert not (tmp_path / "out").exists()
    changed = replace(options, learning_rate=0.02)
    with pytest.raises(PCDVQError, match=r"learning_rate = 0\.01, this run has 0\.02"):
        finetune_checkpoint(checkpoint, tmp_path / "out", changed)
    finetune_checkpoint(
        checkpoint, tmp_path / "out", options, progress=lambda step: seen.append(step.done)
    )
    assert seen == list(range(5, 11))
    finetune_checkpoint(checkpoint, tmp_path / "whole", options)
    for name, tensor in tensors(tmp_path / "whole").items():
        assert torch.equal(tensor, tensors(tmp_path / "out")[name]), name


def test_divergence_keeps_the_best(
    checkpoint: Path, options: FinetuneOptions, tmp_path: Path
) -> None:
    wild = replace(options, learning_rate=0.99)
    result = finetune_checkpoint(checkpoint, tmp_path / "out", wild)
    assert result.diverged
    assert result.steps < wild.steps
    assert result.kl_after == result.kl_before
    for name, tensor in tensors(checkpoint).items():
        assert torch.equal(tensor, tensors(tmp_path / "out")[name]), name
    report = json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())
    assert report["finetune"]["diverged"]


def test_nan_in_training_keeps_the_best(
    checkpoint: Path,
    options: FinetuneOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    accumulate, calls = Distillation.accumulate, []

    def nan_in_the_end(self: Distillation, ids: Tensor, share: float) -> float:
        calls.append(ids)
        return accumulate(self, ids, share if len(calls) < 15 else float("nan"))

    monkeypatch.setattr(Distillation, "accumulate", nan_in_the_end)
    result = finetune_checkpoint(checkpoint, tmp_path / "out", options)
    assert result.diverged
    assert result.steps == 7
    assert result.kl_after < result.kl_before
    assert all(tensor.isfinite().all() for tensor in tensors(tmp_path / "out").values())


def test_recomputed_layers_give_the_same(
    checkpoint: Path, options: FinetuneOptions, tmp_path: Path
) -> None:
    results = [
        finetune_checkpoint(
            checkpoint, tmp_path / str(flag), replace(options, gradient_checkpointing=flag)
        )
        for flag in (False, True)
    ]
    assert results[0].kl_after == pytest.approx(results[1].kl_after, rel=1e-5)


def test_time_limit(
    checkpoint: Path, options: FinetuneOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each validation and each step take one second; every second step is validated.
    clock = SimpleNamespace(monotonic=count().__next__)
    monkeypatch.setattr(training, "time", clock)
    limited = replace(options, minutes=7 / 60)
    result = finetune_checkpoint(checkpoint, tmp_path / "out", limited)
    assert result.steps == 4
    assert result.kl_after < result.kl_before
    report = json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())
    assert [each["step"] for each in report["finetune"]["holdout_kl"]] == [0, 2, 4]


def test_text_is_repeated_and_holdout_kept_apart(
    checkpoint: Path, options: FinetuneOptions
) -> None:
    windows = windows_of(checkpoint, replace(options, tokens=10**6))
    assert len(windows.holdout) == 4
    # A third as many windows of what the model makes of requests come to those of the text.
    assert len(windows.training) == 3000 // 48 + 21 - 4
    both = torch.cat([windows.training, windows.holdout])
    assert len(both.unique(dim=0)) == len(both)


def test_command_in_place(checkpoint: Path, options: FinetuneOptions, tmp_path: Path) -> None:
    make_checkpoint(tmp_path, tiny_config())
    out = str(tmp_path / "quantized")
    arguments = ["--calibration", options.calibration, "--tokens", "960"]
    arguments += ["--sequence-length", "48", "--learning-rate", "0.01", "--overwrite"]
    result = CliRunner().invoke(app, ["finetune", out, out, *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    assert "KL from the original on held-out text" in " ".join(result.output.split())
    report = json.loads((tmp_path / "quantized" / "pcdvq_report.json").read_text())
    assert report["finetune"]["kl_after"] < report["finetune"]["kl_before"]


def test_bad_input(checkpoint: Path, options: FinetuneOptions, tmp_path: Path) -> None:
    def refused(match: str, source: Path = checkpoint, **changes: object) -> None:
        with pytest.raises(PCDVQError, match=match):
            finetune_checkpoint(source, tmp_path / "out", replace(options, **changes))
        assert not (tmp_path / "out").exists()

    refused("--tokens is 10; give 48 or more", tokens=10)
    refused("--sequence-length is 1", sequence_length=1)
    refused("--holdout is 0", holdout=0)
    refused("--windows-per-step is 0", windows_per_step=0)
    refused("--minutes", minutes=0.0)
    refused("--learning-rate is 2", learning_rate=2.0)
    refused("83 windows of 48 tokens, 99 are held out", holdout=99)
    refused("less than one window", calibration=_short_text(tmp_path), tokens=960)
    refused("neither a local directory", reference=str(tmp_path / "missing"))
    other = save_model(tmp_path / "other", tiny_config(vocab_size=300))
    refused("256 tokens, its original 300", reference=str(other))
    refused("not a PCDVQ checkpoint", source=checkpoint.parent / "model")
    (tmp_path / "full").mkdir()
    with pytest.raises(PCDVQError, match="--overwrite"):
        finetune_checkpoint(checkpoint, tmp_path / "full", options)


def _short_text(directory: Path) -> str:
    path = directory / "short.txt"
    path.write_text("too short")
    return str(path)


def test_text_of_the_original_itself(checkpoint: Path, tmp_path: Path) -> None:
    options = FinetuneOptions(tokens=96, sequence_length=48, holdout=1)
    result = finetune_checkpoint(checkpoint, tmp_path / "out", options)
    assert result.kl_after <= result.kl_before
