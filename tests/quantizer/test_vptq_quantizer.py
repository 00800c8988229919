"""VPTQ's method: its steps, its options, and the checkpoints it makes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from models import change_config, save_model, tiny_config
from pcdvq_kernels.errors import CheckpointError, PCDVQError
from pcdvq_kernels.vptq.checkpoint import VPTQCheckpoint, open_vptq_checkpoint
from pcdvq_kernels.vptq.layout import VPTQLayout
from pcdvq_quantizer import cli
from pcdvq_quantizer.calibration.ldlq import cholesky_feedback
from pcdvq_quantizer.evaluation import EvaluateOptions, evaluate
from pcdvq_quantizer.inspection import inspect_checkpoint
from pcdvq_quantizer.plan import make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.vptq import stage
from pcdvq_quantizer.vptq.choice import choose, config_entry
from pcdvq_quantizer.vptq.kmeans import weighted_kmeans
from pcdvq_quantizer.vptq.plan import VPTQOptions
from pcdvq_quantizer.vptq.rounding import Problem, column_costs, refit_tables, round_columns
from pcdvq_quantizer.vptq.stage import Storage, solve
from pcdvq_quantizer.vptq.tables import Tables
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner
from vptq_steps import DAMPING, Steps, published, second_order

PACKAGE = Path(__file__).resolve().parents[1] / "kernels" / "vptq_package.py"
WEIGHT_ERROR = 0.4  # calibration makes it larger for the sake of outputs
BASE = VPTQOptions(samples=8, sequence_length=64)
VARIANTS = {
    "2 bits": replace(BASE, bits=2.0),
    "residuals": replace(BASE, bits=3.0, vector_length=4, residual_centroids=16),
    "all": replace(
        BASE,
        vector_length=3,  # no divisor of the rows
        centroids=32,
        residual_centroids=8,
        outliers=4,
        outlier_centroids=16,
        groups=2,
        normalize="always",
    ),
    "uncalibrated": replace(BASE, bits=2.0, calibration="none"),
}


def uneven(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """A weight whose columns are not alike, and a damped Hessian with a few large inputs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4 * columns, columns, generator=generator)
    basis = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    x = x * torch.logspace(-1, 0.5, columns) @ basis
    x[:, :3] *= 10
    hessian = x.double().T @ x.double() / len(x)
    hessian += DAMPING * hessian.diagonal().mean() * torch.eye(columns)
    weight = torch.randn(rows, columns, generator=generator)
    return weight * torch.logspace(-0.5, 0.5, columns), hessian


def problem(weight: Tensor, hessian: Tensor) -> tuple[Problem, Tensor]:
    """As `stage` makes it without column scales, and the order of columns."""
    order = hessian.diagonal().argsort(descending=True)
    ordered = hessian[order][:, order]
    unit, zero = torch.ones(len(order)), torch.zeros(len(order))
    feedback = cholesky_feedback(ordered, 1)
    cost = column_costs(ordered.float(), feedback)
    return Problem(weight[:, order], ordered.float(), feedback, cost, unit, zero), order


def loss(error: Tensor, hessian: Tensor) -> float:
    return ((error.double() @ hessian) * error).sum().item()


def layout(rows: int, columns: int, **options: object) -> VPTQLayout:
    return choose(VPTQOptions(**options), "layer", (rows, columns), bias=False)


def test_rounds_columns_as_published() -> None:
    """The same codes, for the same tables, as column by column in fp64."""
    weight, hessian = uneven(62, 160)  # 62 is no multiple of the vector length
    posed, order = problem(weight, hessian)
    table = torch.randn(64, 4, generator=torch.Generator().manual_seed(1))
    codes, lacks = round_columns(posed, [Tables(slice(0, 160), table)])
    ordered = hessian[order][:, order]
    expected, errors = second_order(weight[:, order].double(), ordered, [table.double()])
    found = posed.decode([Tables(slice(0, 160), table)], codes)
    assert (found != expected.float()).float().mean() < 0.01  # ties that fp32 decides otherwise
    assert loss(found - posed.aim, ordered) < 1.01 * loss(expected - posed.aim, ordered)
    assert torch.median((lacks - errors).abs()) < 1e-4


@pytest.mark.parametrize(
    ("length", "centroids", "residuals"), [(4, 64, 0), (4, 16, 16), (3, 16, 0), (2, 64, 0)]
)
def test_error_is_not_above_the_published_algorithms(
    length: int, centroids: int, residuals: int
) -> None:
    weight, hessian = uneven(256, 96)
    posed, order = problem(weight, hessian)
    wanted = layout(
        *weight.shape, vector_length=length, centroids=centroids, residual_centroids=residuals
    )
    tables, codes = solve(posed, wanted, Storage(torch.bfloat16, 0))
    mine = loss(posed.decode(tables, codes) - posed.aim, hessian[order][:, order])
    steps = Steps(length, centroids, residuals)
    theirs = loss(published(weight, hessian, steps) - weight, hessian)
    assert mine < 1.01 * theirs  # other draws of k-means differ by as much


def test_refitted_tables_are_the_least_squares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcdvq_quantizer.vptq.rounding.STEPS", 200)
    weight, hessian = uneven(24, 32)
    posed, _ = problem(weight, hessian)
    generator = torch.Generator().manual_seed(1)
    tables = [
        Tables(slice(0, 8), torch.randn(4, 2, generator=generator)),
        Tables(slice(8, 32), torch.randn(8, 4, generator=generator), torch.randn(4, 4)),
    ]
    codes, _ = round_columns(posed, tables)
    fitted = refit_tables(posed, tables, codes)
    parts = [part.requires_grad_() for table in fitted for part in table.parts()]
    left = iter(parts)
    again = [table.replaced([next(left) for _ in table.parts()]) for table in fitted]
    error = posed.decode(again, codes) - posed.aim
    total = ((error @ posed.hessian) * error).sum()
    gradients = torch.autograd.grad(total, parts)
    scale = (posed.aim @ posed.hessian).abs().sum()
    assert max(gradient.abs().max() for gradient in gradients) < 1e-5 * scale
    assert total < loss(posed.decode(tables, codes) - posed.aim, posed.hessian.double())


def test_kmeans_weighs_points(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two heavy points get centroids of their own, also when few of the points are drawn."""
    points = torch.randn(4000, 2, generator=torch.Generator().manual_seed(0))
    weight = torch.ones(4000)
    points[100:102] = torch.tensor([[0.1, 0.2], [0.3, -0.2]])
    weight[100:102] = 1e6
    for most in (1 << 19, 64):
        monkeypatch.setattr("pcdvq_quantizer.vptq.kmeans.MOST_POINTS", most)
        monkeypatch.setattr("pcdvq_quantizer.vptq.kmeans.POINTS_PER_CENTROID", 1)
        centroids = weighted_kmeans(points, weight, 16, seed=0)
        assert torch.cdist(points[100:102], centroids).amin(1).max() < 1e-3
    assert (
        weighted_kmeans(points[:3], weight[:3], 8, seed=0)[:3]
        .sort(0)
        .values.equal(points[:3].sort(0).values)
    )


@pytest.mark.parametrize(
    ("bits", "shape", "expected"),
    [
        (2.0, (1536, 576), (4, 256)),
        (2.0, (192, 576), (3, 64)),
        (3.0, (1536, 576), (3, 512)),
        (3.0, (192, 576), (2, 64)),
        (2.0, (4096, 4096), (6, 4096)),
    ],
)
def test_larger_layers_have_longer_vectors(
    bits: float, shape: tuple[int, int], expected: tuple[int, int]
) -> None:
    chosen = layout(*shape, bits=bits)
    assert (chosen.vector_lens[1], chosen.num_centroids[1]) == expected
    assert chosen.enable_norm == (shape[0] == 4096)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"centroids": 100}, "--centroids is 100; give a power of two from 2 to 65536"),
        ({"residual_centroids": 1 << 17}, "--residual-centroids is 131072; give a power"),
        ({"vector_length": 17}, "--vector-length is 17; give 2 to 16"),
        ({"bits": 2.3}, "--bits 2.3 is no whole number of bits"),
        ({"bits": 2.5, "vector_length": 3}, "--bits 2.5 and --vector-length 3 leave no index"),
        (
            {"bits": 3.0, "vector_length": 4, "centroids": 256},
            "--vector-length 4 and the centroids make 2 bits per weight, not --bits 3; drop --bits",
        ),
        ({"groups": 0}, "--groups is 0; give 1 to"),
        ({"normalize": "no"}, "--normalize is 'no'; give one of auto, always, never"),
        ({"samples": 0}, "--samples is 0; give 1 or more"),
        (
            {"outliers": 5, "groups": 2},
            "leaves 187, which --groups 2 does not divide; give --outliers 6",
        ),
        ({"outliers": 64}, "has 64 columns, too few for --outliers 64"),
        (
            {"vector_length": 8, "centroids": 512},
            r"k_proj \[32, 64\] has 256 vectors for 512 centroids; give fewer, or .* --skip",
        ),
    ],
)
def test_bad_options(model: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(PCDVQError, match=message):
        make_plan(str(model), VPTQOptions(**options))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("qwen2", tie_word_embeddings=True)  # with biases
    return save_model(tmp_path_factory.mktemp("model") / "tiny", config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("The quick brown fox jumps over the lazy dog. " * 30)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(model: Path, text: str) -> dict[str, VPTQCheckpoint]:
    made = {}
    for name, options in VARIANTS.items():
        if options.calibration != "none":
            options = replace(options, calibration=text)
        out = model.with_name(name.replace(" ", "_"))
        checkpoint = quantize_model(make_plan(str(model), options), out)
        assert isinstance(checkpoint, VPTQCheckpoint)
        made[name] = checkpoint
    return made


def stored(checkpoint: VPTQCheckpoint) -> dict[str, Tensor]:
    files = sorted(checkpoint.directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", VARIANTS)
def test_checkpoint_holds_the_model(
    name: str, checkpoints: dict[str, VPTQCheckpoint], model: Path
) -> None:
    checkpoint = checkpoints[name]
    original = AutoModelForCausalLM.from_pretrained(model).state_dict()
    tensors = stored(checkpoint)
    packed = 0
    for layer, info in checkpoint.layers.items():
        dense, weight = checkpoint.dequantize(layer), original[f"{layer}.weight"].float()
        assert (dense - weight).square().sum() < WEIGHT_ERROR * weight.square().sum()
        if layer.endswith("q_proj"):
            assert torch.equal(tensors[f"{layer}.bias"], original[f"{layer}.bias"])
        packed += info.bytes
    others = {key for key in original if key.removesuffix(".weight") not in checkpoint.layers}
    for key in others - {"lm_head.weight"}:
        assert torch.equal(tensors[key], original[key])
    assert packed == sum(
        tensor.nbytes
        for key, tensor in tensors.items()
        if not key.endswith(".bias") and key not in original
    )
    summary = inspect_checkpoint(checkpoint.directory)
    weights = sum(info.weights for info in checkpoint.layers.values())
    assert summary.bits_per_weight == 8 * packed / weights
    assert all(0 < row.relative_error < WEIGHT_ERROR for row in summary.layers)
    assert "[VPTQ](https" in (checkpoint.directory / "README.md").read_text()


def test_calibration_helps(checkpoints: dict[str, VPTQCheckpoint], text: str) -> None:
    options = EvaluateOptions(tasks=("perplexity", "kl"), text=Path(text), window=64)
    reports = {
        name: evaluate(str(checkpoints[name].directory), options)
        for name in ("2 bits", "uncalibrated")
    }
    assert reports["2 bits"].kl.kl < 0.7 * reports["uncalibrated"].kl.kl


def test_evaluates_dequantized_weights(
    checkpoints: dict[str, VPTQCheckpoint], model: Path, text: str
) -> None:
    checkpoint = checkpoints["all"]
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for layer in checkpoint.layers:
        dense.get_submodule(layer).weight.data = checkpoint.dequantize(layer)
    options = EvaluateOptions(text=Path(text), window=64, windows=2)
    found = evaluate(str(checkpoint.directory), options)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(Path(text).read_text(), add_special_tokens=False).input_ids[:128]
    rows = torch.tensor(tokens).view(2, 1, 64)
    with torch.no_grad():
        loss = torch.stack([dense(row, labels=row).loss for row in rows]).mean()
    assert found.perplexity.nll == pytest.approx(loss.item(), abs=1e-5)
    assert found.weights == "dense"


@pytest.mark.skipif(find_spec("vptq") is None, reason="the package vptq is not installed")
def test_the_vptq_package_reads_them(checkpoints: dict[str, VPTQCheckpoint]) -> None:
    """Bit for bit, through transformers' `VptqConfig`."""
    paths = [str(checkpoint.directory) for checkpoint in checkpoints.values()]
    command = [sys.executable, str(PACKAGE), *paths]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == " ".join(paths)


def test_what_is_stored_is_what_was_calibrated(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupted run continues after its last decoder layer, to the same bytes."""
    options = replace(VARIANTS["all"], calibration=text)
    made: list[Tensor] = []
    original = stage.quantize_stage

    def keep(*args: object) -> object:
        if len(made) > 7:  # in the second decoder layer
            raise KeyboardInterrupt
        layers, dense = original(*args)
        made.extend(dense)
        return layers, dense

    monkeypatch.setattr("pcdvq_quantizer.vptq.plan.quantize_stage", keep)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        quantize_model(make_plan(str(model), options), out)
    monkeypatch.setattr("pcdvq_quantizer.vptq.plan.quantize_stage", original)
    checkpoint = quantize_model(make_plan(str(model), options), out)
    assert torch.equal(made[0], checkpoint.dequantize("model.layers.0.self_attn.q_proj"))
    whole = quantize_model(make_plan(str(model), options), tmp_path / "whole")
    for file in out.glob("*.safetensors"):
        assert file.read_bytes() == (whole.directory / file.name).read_bytes()


def test_config_is_the_published_one(checkpoints: dict[str, VPTQCheckpoint]) -> None:
    directory = checkpoints["all"].directory
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "vptq"
    assert config["modules_to_not_convert"] == ["lm_head"]
    entry = config["config_for_layers"]["model.layers.0.self_attn.q_proj"]
    assert entry == config_entry(checkpoints["all"].layouts["model.layers.0.self_attn.q_proj"])
    assert entry["bias"] is True
    assert (entry["outlier_size"], entry["group_num"], entry["group_size"]) == (4, 2, 30)


def test_damaged_checkpoints(checkpoints: dict[str, VPTQCheckpoint], tmp_path: Path) -> None:
    source = checkpoints["2 bits"].directory
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in source.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    layers = json.loads((copy / "config.json").read_text())["quantization_config"]
    entries = layers["config_for_layers"]
    name = "model.layers.0.mlp.up_proj"
    wrong = {**entries[name], "num_centroids": [-1, 32]}
    change_config(copy, config_for_layers={**entries, name: wrong})
    with pytest.raises(CheckpointError, match=r"up_proj\.(centroids\.weight|indices) is"):
        open_vptq_checkpoint(copy)
    change_config(copy, config_for_layers={**entries, "other": entries[name]})
    with pytest.raises(CheckpointError, match=r"other\.\S+ is missing"):
        inspect_checkpoint(copy)
    change_config(copy, config_for_layers={})
    with pytest.raises(CheckpointError, match="config_for_layers; choose another"):
        open_vptq_checkpoint(copy)


def test_experts_are_refused(tmp_path: Path) -> None:
    config = tiny_config("qwen3_moe", num_experts=2, moe_intermediate_size=64)
    moe = save_model(tmp_path / "moe", config)
    with pytest.raises(PCDVQError, match=r"experts.* --skip '\*\.experts\.\*'"):
        make_plan(str(moe), VPTQOptions())


def test_command_line(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[VPTQOptions] = []

    def plan(model: str, options: VPTQOptions) -> SimpleNamespace:
        given.append(options)
        raise PCDVQError("enough")

    monkeypatch.setattr("pcdvq_quantizer.plan.make_plan", plan)
    run = CliRunner().invoke
    arguments = ["quantize", str(model), str(tmp_path / "out"), "--method", "vptq"]
    run(cli.app, [*arguments, "--vector-length", "4", "--centroids", "16", "--skip", "x.*"])
    assert given == [VPTQOptions(vector_length=4, centroids=16, skip=("x.*",))]
    for extra, message in (
        (["--codec", "e8"], "--codec is an option of --method pcdvq"),
        (["--finetune"], "--finetune is for --method pcdvq"),
        (["--method", "pcdvq", "--outliers", "1"], "--outliers is an option of --method vptq"),
    ):
        result = run(cli.app, [*arguments, *extra])
        assert message in str(result.exception)
