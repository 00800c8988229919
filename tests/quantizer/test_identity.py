"""The same model is the same by its contents, under every name; another one is another."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import REPORT_FILE
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import identity
from pcdvq_quantizer.evaluation.files import ModelFiles, find_reference
from pcdvq_quantizer.finetune import FinetuneOptions, finetune_checkpoint
from pcdvq_quantizer.finetune import run as finetune_run
from pcdvq_quantizer.identity import fingerprint, weights_sha256
from pcdvq_quantizer.output import Output
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.serving import cached_checkpoint
from pcdvq_quantizer.sources import open_source
from pcdvq_quantizer.writer import CheckpointWriter
from safetensors.torch import load_file, save_file

OPTIONS = QuantizeOptions(bits=3.0, calibration="none")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "a" / "output", tiny_config(num_hidden_layers=1))


def retrain(model: Path, elements: int = 1) -> None:
    """Change the first weights in place, and leave sizes as they are."""
    weights = load_file(model / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"].view(-1)[:elements] += 1
    save_file(weights, model / "model.safetensors", {"format": "pt"})


def copied(model: Path, target: Path) -> Path:
    """With the times of the files, as `cp -a`."""
    return Path(shutil.copytree(model, target))


def plan_of(model: str | Path) -> dict[str, object]:
    return make_plan(str(model), OPTIONS).fingerprint()


def test_every_name_of_a_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(model.parent)
    names = ["output", "./output/", "../a/output", model, tmp_path / "link"]
    names.append(copied(model, tmp_path / "copy"))
    places = {cached_checkpoint(make_plan(str(name), OPTIONS)) for name in names}
    assert len({json.dumps(plan_of(name)) for name in names}) == 1
    (place,) = {path.name.rpartition("-")[2] for path in places}
    first = next(iter(places))
    for begun in (first, first.with_name(f"{first.name}.partial")):
        begun.mkdir(parents=True)
        assert {cached_checkpoint(make_plan(str(name), OPTIONS)) for name in names} == {first}
        begun.rmdir()
    assert len(place) == 16


def test_two_models_of_one_name(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same name as typed, configuration, shapes, sizes and times; other weights."""
    other = copied(model, tmp_path / "b" / "output")
    retrain(other)
    times = (model / "model.safetensors").stat().st_mtime_ns
    os.utime(other / "model.safetensors", ns=(times, times))
    places = []
    for directory in (model.parent, other.parent):
        monkeypatch.chdir(directory)
        places.append(cached_checkpoint(make_plan("output", OPTIONS)))
    assert places[0] != places[1]


@pytest.mark.parametrize("sampled", [False, True])
def test_retrained_in_place(model: Path, sampled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if sampled:  # which may miss a single weight, but not when it was written
        monkeypatch.setattr(identity, "BEGINNING_BYTES", 1000)
        monkeypatch.setattr(identity, "SAMPLE_BYTES", 4)
        monkeypatch.setattr(identity, "SAMPLES", 10)
    before = plan_of(model)
    retrain(model)
    assert plan_of(model) != before


def test_samples_tell_of_other_weights(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "BEGINNING_BYTES", 1000)
    monkeypatch.setattr(identity, "SAMPLES", 100)
    monkeypatch.setattr(identity, "SAMPLE_BYTES", 16)
    path = model / "model.safetensors"
    size, read = path.stat().st_size, list(identity._parts(path.stat().st_size))
    assert sum(length for _, length in read) < size / 10
    assert read[-1] == (size - 16, 16)
    before = weights_sha256(open_source(str(model)))
    assert weights_sha256(open_source(str(model))) == before
    retrain(model, 64 * 192)
    assert weights_sha256(open_source(str(model))) != before


def test_other_tokenizer_is_another_model(model: Path) -> None:
    """Its files go into the checkpoint."""
    before, weights = plan_of(model), weights_sha256(open_source(str(model)))
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert plan_of(model) != before
    assert weights_sha256(open_source(str(model))) == weights


def test_run_does_not_go_on_with_another_model(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Output) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Output, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    original = copied(model, tmp_path / "original")
    retrain(model)
    with pytest.raises(PCDVQError, match=r"was begun with model_\w+ = .*; use the same model"):
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    quantize_model(make_plan(str(original), OPTIONS), tmp_path / "out")


def test_model_that_changes_while_it_is_quantized(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = CheckpointWriter.finish

    def slow(*arguments: object) -> object:
        retrain(model)
        return finish(*arguments)

    monkeypatch.setattr(CheckpointWriter, "finish", slow)
    with pytest.raises(PCDVQError, match="a model has changed since the run began"):
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_reference_is_the_model_that_was_quantized(model: Path, tmp_path: Path) -> None:
    out = quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out").directory
    files = ModelFiles.find(str(out))
    assert find_reference(files, None).directory == model
    retrain(model)
    with pytest.raises(PCDVQError, match=r"other weights than the model that .*out was made of"):
        find_reference(files, None)
    assert find_reference(files, str(model)).directory == model
    record = json.loads((out / REPORT_FILE).read_text())
    del record["model_sha256"]  # as of earlier releases
    (out / REPORT_FILE).write_text(json.dumps(record))
    assert find_reference(files, None).directory == model


def test_finetune_knows_both_models(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out").directory
    files, options = ModelFiles.find(str(out)), FinetuneOptions("text")

    def of(reference: Path) -> dict[str, object]:
        return finetune_run._fingerprint(files, ModelFiles.find(str(reference)), options)

    before = of(model)
    monkeypatch.chdir(model.parent)
    assert of(Path("output")) == before
    retrain(model)
    assert of(model) != before
    changed = fingerprint(files.source)
    weights = load_file(out / "model-00001-of-00001.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, out / "model-00001-of-00001.safetensors", {"format": "pt"})
    assert fingerprint(files.source) != changed


def test_finetune_in_place_after_a_kill(model: Path, tmp_path: Path) -> None:
    """OUT is the checkpoint to tune, and was moved aside when the run was killed."""
    out = quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out").directory
    text = tmp_path / "text"
    text.write_text("abcdefgh " * 300)
    partial = Output.at(out).partial
    partial.mkdir()
    (partial / "run.json").write_text("{}")
    shutil.copytree(out, partial / "checkpoint")
    (partial / "checkpoint" / "model-00001-of-00001.safetensors").unlink()
    (partial / "checkpoint" / "pcdvq_codebooks.safetensors").unlink()
    out.rename(partial / "replaced")
    options = FinetuneOptions(str(text), tokens=64, sequence_length=16, holdout=1)
    result = finetune_checkpoint(out, out, options, overwrite=True)
    assert result.steps > 0
    assert not partial.exists()
    with pytest.raises(PCDVQError, match="is needed to write OUT"):
        finetune_checkpoint(out, model, options, overwrite=True)
