"""Whole runs: model in, checkpoint out, interruptions and bad input."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from gguf import GGUFReader, GGUFWriter
from models import save_model, smollm2_gguf, tiny_config
from pcdvq_kernels import reference
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import files, writer
from pcdvq_quantizer.gguf_metadata import special_token_options
from pcdvq_quantizer.gguf_source import GGUFSource
from pcdvq_quantizer.inspection import inspect_checkpoint
from pcdvq_quantizer.plan import PCDVQPlan, QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.vptq.plan import VPTQOptions
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

OPTIONS = QuantizeOptions(bits=3.0, calibration="none")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny", tiny_config(), "100KB")


def test_checkpoint_holds_the_model(model: Path, tmp_path: Path) -> None:
    checkpoint = quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    assert len(checkpoint.layers) == 14
    assert checkpoint.config.max_tp == OPTIONS.max_tp
    stored = {
        name: tensor
        for file in sorted((tmp_path / "out").glob("model-*.safetensors"))
        for name, tensor in load_file(file).items()
    }
    for name, tensor in original.items():
        layer = name.removesuffix(".weight")
        if layer not in checkpoint.layers:
            assert torch.equal(stored[name], tensor)
            continue
        dense = reference.dequantize(
            *(stored[f"{layer}.{part}"] for part in ("qweight", "row_scale", "signs_in")),
            checkpoint.codebooks[checkpoint.layers[layer].codebook],
            checkpoint.config.block(tensor.shape[1]),
        )
        assert (dense - tensor.float()).square().sum() < 0.04 * tensor.float().square().sum()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("abc").input_ids == [97, 98, 99]
    assert not (tmp_path / "out.partial").exists()


def test_bits_per_weight_come_from_the_files(model: Path, tmp_path: Path) -> None:
    summary = inspect_checkpoint(
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out").directory
    )
    weights = 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 192)
    tensors = [
        tensor
        for file in (tmp_path / "out").glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if name.endswith(("qweight", "row_scale", "signs_in", "directions", "magnitudes"))
    ]
    stored = sum(tensor.nbytes for tensor in tensors)
    assert summary.bits_per_weight == pytest.approx(8 * stored / weights)
    assert json.loads(summary.to_json())["packed_bytes"] + summary.codebook_bytes == stored
    assert all(0 < row.relative_error < 0.04 for row in summary.layers)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("bits", "error"), [(4, 0.012), (8, 0.0002)])
def test_quantized_embeddings(bits: int, error: float, tied: bool, tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=tied, vocab_size=301)
    source = save_model(tmp_path / "model", config)
    options = QuantizeOptions(bits=3.0, embedding_bits=bits, calibration="none")
    checkpoint = quantize_model(make_plan(str(source), options), tmp_path / "out")
    names = ["model.embed_tokens"] if tied else ["model.embed_tokens", "lm_head"]
    assert checkpoint.config.embeddings == names
    assert checkpoint.config.modules_to_not_convert == []
    assert len(checkpoint.linears) == 14
    original = AutoModelForCausalLM.from_pretrained(source).state_dict()
    stored = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    for name in names:
        assert f"{name}.weight" not in stored
        dense = reference.dequantize(
            *(stored[f"{name}.{part}"] for part in ("qweight", "row_scale", "signs_in")),
            checkpoint.codebooks[checkpoint.layers[name].codebook],
            checkpoint.config.block(64),
        )
        weight = original[f"{name}.weight"].float()
        assert dense.shape == (301, 64)
        assert (dense - weight).square().sum() < error * weight.square().sum()


def test_embeddings_do_not_change_the_rate_of_the_linear_layers(
    model: Path, tmp_path: Path
) -> None:
    rates = {}
    for bits in (16, 8):
        options = QuantizeOptions(bits=3.0, embedding_bits=bits, calibration="none")
        out = quantize_model(make_plan(str(model), options), tmp_path / str(bits)).directory
        rates[bits] = inspect_checkpoint(out)
        assert rates[bits].rate in (out / "README.md").read_text()
    assert rates[8].bits_per_weight == rates[16].bits_per_weight
    assert rates[16].bits_per_weight_with_embeddings == rates[16].bits_per_weight
    assert 4 < rates[8].bits_per_weight_with_embeddings < 8
    assert rates[8].rate.endswith("with model.embed_tokens and lm_head")
    quantization_config = json.loads((tmp_path / "16" / "config.json").read_text())
    assert "embedding" not in quantization_config["quantization_config"]


def test_embedding_rates_not_offered(model: Path) -> None:
    with pytest.raises(PCDVQError, match=r"--embedding-bits is 5; give 4, 8, or 16"):
        make_plan(str(model), QuantizeOptions(embedding_bits=5))


def test_same_input_same_bytes(model: Path, tmp_path: Path) -> None:
    for out in ("a", "b"):
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / out)
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_many_shards(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "SHARD_BYTES", 30_000)
    checkpoint = quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    files = {tensor.file.name for tensor in checkpoint.tensors.values()}
    assert len(files) > 2
    assert all(file.endswith(f"-of-{len(files):05d}.safetensors") for file in files)


def test_killed_run_resumes_without_redoing_layers(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    script = (
        "import sys, time; from pathlib import Path; from pcdvq_quantizer import plan, run\n"
        "class Slow(run.Progress):\n"
        "    def advance(self, steps): time.sleep(0.3)\n"
        "options = plan.QuantizeOptions(bits=3.0, calibration='none')\n"
        "run.quantize_model(plan.make_plan(sys.argv[1], options), Path(sys.argv[2]),"
        " progress=Slow())"
    )
    process = subprocess.Popen([sys.executable, "-c", script, str(model), str(out)])
    layers = tmp_path / "out.partial" / "layers"
    deadline = time.monotonic() + 120
    while len(list(layers.glob("*.safetensors"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = {path.name: path.stat().st_mtime_ns for path in layers.glob("*.safetensors")}
    assert 3 <= len(finished) < 14
    assert not out.exists()

    quantized = []
    plan = make_plan(str(model), OPTIONS)
    original = PCDVQPlan.quantize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            PCDVQPlan,
            "quantize",
            lambda plan, name: quantized.append(name) or original(plan, name),
        )
        quantize_model(plan, out)
    assert len(quantized) == 14 - len(finished)
    assert not {f"{name}.safetensors" for name in quantized} & finished.keys()
    quantize_model(plan, tmp_path / "whole")
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "whole" / file.name).read_bytes()


def test_run_killed_at_the_end_resumes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    move = os.replace

    def killed_at_the_last_move(source: Path, target: Path) -> None:
        if target == tmp_path / "out":
            raise KeyboardInterrupt
        move(source, target)

    plan = make_plan(str(model), OPTIONS)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed_at_the_last_move)
        with pytest.raises(KeyboardInterrupt):
            quantize_model(plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(PCDVQPlan, "quantize", None)  # no layer may be done again
    quantize_model(plan, tmp_path / "out")
    assert not {"layers", "run.json", "lock"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_other_options_do_not_resume(model: Path, tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    (partial / "layers").mkdir(parents=True)
    (partial / "checkpoint").mkdir()
    layer = partial / "layers" / "model.layers.0.mlp.up_proj.safetensors"
    layer.touch()
    fingerprint = make_plan(str(model), OPTIONS).fingerprint() | {"bits": 2.0}
    (partial / "run.json").write_text(json.dumps(fingerprint))
    with pytest.raises(PCDVQError, match=r"bits = 2\.0, this run has 3\.0"):
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    layer.unlink()  # as if killed before the first
    quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")


def test_full_disk_leaves_no_output(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, calls = files.save_file, []

    def full_after_five(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments)

    monkeypatch.setattr(files, "save_file", full_after_five)
    with pytest.raises(PCDVQError, match="Free some space"):
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(files, "save_file", save)
    quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")


def test_too_little_space_is_seen_before_the_work(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(PCDVQError, match="are free"):
        quantize_model(make_plan(str(model), OPTIONS), tmp_path / "out")


def test_existing_output_is_kept(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("x")
    with pytest.raises(PCDVQError, match="--overwrite"):
        quantize_model(make_plan(str(model), OPTIONS), out)
    assert (out / "precious").exists()


def test_layers_that_vllm_reorders_are_left(tmp_path: Path) -> None:
    config = tiny_config("bloom", n_layer=2, n_head=4, tie_word_embeddings=True)
    model = str(save_model(tmp_path / "bloom", config))
    for options in (OPTIONS, VPTQOptions(bits=3.0, calibration="none")):
        plan = make_plan(model, options)
        assert len(plan.selection.layers) == 2 * 3
        line = "vLLM's BloomForCausalLM reorders its rows while it loads dense weights"
        assert any(line in each for each in plan.selection.skipped_lines())
        assert "transformer.h.0.self_attention.query_key_value" in plan.selection.left


def test_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository that is in the hub's cache needs no network."""
    repository = tmp_path / "hub" / "models--org--tiny"
    save_model(repository / "snapshots" / ("0" * 40), tiny_config())
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    checkpoint = quantize_model(make_plan("org/tiny", OPTIONS), tmp_path / "out")
    assert len(checkpoint.layers) == 14
    assert "base_model: org/tiny" in (tmp_path / "out" / "README.md").read_text()
    with pytest.raises(PCDVQError, match="org/other is neither a local directory"):
        make_plan("org/other", OPTIONS)


def test_nan_weights_are_named(tmp_path: Path) -> None:
    source = save_model(tmp_path / "nan", tiny_config())
    weights = load_file(source / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(PCDVQError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        quantize_model(make_plan(str(source), OPTIONS), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_cannot_be_quantized(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tiny_config())
    config = json.loads((source / "config.json").read_text())

    def with_config(**changes: object) -> str:
        (source / "config.json").write_text(json.dumps(config | changes))
        return str(source)

    with pytest.raises(PCDVQError, match="already quantized \\(awq\\)"):
        make_plan(with_config(quantization_config={"quant_method": "awq"}), OPTIONS)
    with pytest.raises(PCDVQError, match="NoSuchModel"):
        make_plan(with_config(model_type="no_such", architectures=["NoSuchModel"]), OPTIONS)
    with pytest.raises(PCDVQError, match="--max-tp"):
        make_plan(with_config(), QuantizeOptions(max_tp=0))
    with pytest.raises(PCDVQError, match="neither a local directory"):
        make_plan(str(tmp_path / "missing"), OPTIONS)
    (source / "model.safetensors").rename(source / "consolidated.safetensors")
    with pytest.raises(PCDVQError, match=r"Mistral's own layout.*Hugging Face's layout"):
        make_plan(str(source), OPTIONS)
    (source / "consolidated.safetensors").rename(source / "pytorch_model.bin")
    with pytest.raises(PCDVQError, match="pickled"):
        make_plan(str(source), OPTIONS)
    (source / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(PCDVQError, match="cannot be read"):
        make_plan(str(source), OPTIONS)
    (tmp_path / "bad.gguf").write_bytes(b"not a gguf file at all")
    with pytest.raises(PCDVQError, match="GGUF"):
        make_plan(str(tmp_path / "bad.gguf"), OPTIONS)


def test_gguf_weights_are_those_transformers_loads() -> None:
    path = smollm2_gguf()
    source = GGUFSource(path)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.bfloat16
    )
    state = model.state_dict()
    assert source.shapes.keys() == state.keys() - {"lm_head.weight"}
    for name in list(source.shapes)[:12]:
        assert torch.equal(source.load(name), state[name]), name


@pytest.mark.parametrize(("bos", "options"), [(True, {"add_bos_token": True}), (False, {})])
def test_gguf_says_whether_prompts_begin_with_bos(
    bos: bool, options: dict[str, bool], tmp_path: Path
) -> None:
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_add_bos_token(bos)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert special_token_options(GGUFReader(tmp_path / "tiny.gguf")) == options
