"""The Fisher objective: its measurement, two-sided feedback, and runs that use it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.kronecker import RowFactor, kronecker_ldlq
from pcdvq_quantizer.calibration.ldlq import cholesky_feedback, feedback_of, inverse_cholesky, ldlq
from pcdvq_quantizer.calibration.objectives import fisher
from pcdvq_quantizer.calibration.objectives.base import OutputFisher, Text
from pcdvq_quantizer.calibration.objectives.fisher import FisherObjective
from pcdvq_quantizer.calibration.statistics import Inputs, InputStatistics
from pcdvq_quantizer.codebooks import get_codebook
from pcdvq_quantizer.layer import refit_row_scales
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.selection import select_layers
from pcdvq_quantizer.sources import open_source
from transformers import AutoModelForCausalLM

TEXT = "the quick brown fox jumps over the lazy dog; " * 200
OPTIONS = QuantizeOptions(
    bits=2.0, samples=8, sequence_length=64, objective="fisher", effort="quick"
)


def covariance(size: int, seed: int) -> torch.Tensor:
    """Positive definite fp64 [size, size], eigenvalues from 0.1 to 10."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator).double())[0]
    return basis * torch.logspace(-1, 1, size).double() @ basis.T


def cost(error: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> float:
    error = error.double()
    return ((rows @ error @ columns) * error).sum().item()


@pytest.fixture(scope="module", params=[64, 16], ids=lambda rows: f"chains of {rows}")
def rounding(request: pytest.FixtureRequest) -> tuple:
    """Weights of 300 rows, which two panels and no whole number of blocks hold; 192 columns."""
    book = get_codebook("trellis", 2.5, request.param)
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(300, generator=generator) + 0.5
    weight = torch.randn(300, 192, generator=generator) * book.unit * scale.unsqueeze(1)
    return book, weight, scale, covariance(300, 1), covariance(192, 2)


def test_blocks_are_rounded_to_their_conditional_targets(rounding: tuple) -> None:
    """Against the definition: U^T E V is what rounding each block's target leaves."""
    book, weight, scale, rows, columns = rounding
    spec = book.codebook.spec
    feedback = cholesky_feedback(columns, spec.strip_columns)
    factor = RowFactor.of(rows, spec.row_multiple)
    assert factor.block == spec.chain_rows
    codes, levels = kronecker_ldlq(weight, scale, feedback, factor, book.encoder)
    assert torch.equal(book.codebook.decode(codes)[:300].flatten(1).float(), levels)
    rounded = levels * scale.unsqueeze(1)

    def combine(matrix: torch.Tensor, block: int) -> torch.Tensor:
        """Unit upper triangular in blocks; what it makes of errors is what rounding left."""
        changes = feedback_of(inverse_cholesky(matrix), block).double()
        index = torch.arange(len(matrix)) // block
        later = index.unsqueeze(1) < index
        unit = torch.eye(len(matrix)).double()
        return torch.linalg.inv(unit + torch.where(later, changes, 0.0))

    padded = torch.eye(len(codes)).double()
    padded[:300, :300] = rows
    error = torch.zeros(len(codes), 192).double()
    error[:300] = (weight - rounded).double()
    along = combine(columns, spec.strip_columns)
    residual = (combine(padded, factor.block).T @ error @ along)[:300]
    targets = rounded + residual.float()
    x = (targets / scale.unsqueeze(1)).unflatten(1, (-1, spec.vector_dim)).contiguous()
    again = book.encoder.encode(x, scale.square() * factor.importance)
    assert (again == codes)[:300].float().mean() > 0.99


def test_feedback_between_rows_lowers_the_cost(rounding: tuple) -> None:
    book, weight, scale, rows, columns = rounding
    spec = book.codebook.spec
    feedback = cholesky_feedback(columns, spec.strip_columns)
    alone = RowFactor.of(torch.eye(300).double(), spec.row_multiple)
    results = [
        kronecker_ldlq(weight, scale, feedback, factor, book.encoder)
        for factor in (RowFactor.of(rows, spec.row_multiple), alone)
    ]
    both, one = (cost(levels * scale[:, None] - weight, rows, columns) for _, levels in results)
    assert both < 0.7 * one
    parts = weight / scale.unsqueeze(1)
    codes, _ = ldlq(parts, feedback, book.encoder, scale.square())
    assert (codes == results[1][0]).float().mean() > 0.999


def test_scales_are_refitted_together(rounding: tuple) -> None:
    book, weight, scale, rows, columns = rounding
    _, levels = ldlq(weight / scale[:, None], torch.zeros(192, 192), book.encoder, scale)
    levels[5] = 0
    fitted = refit_row_scales(weight, levels, columns.float(), rows).float()
    assert fitted.isfinite().all()
    least = cost(fitted[:, None] * levels - weight, rows, columns)
    for row in (0, 17, 299):
        for factor in (0.97, 1.03):
            other = fitted.clone()
            other[row] *= factor
            assert cost(other[:, None] * levels - weight, rows, columns) > least


def test_blocks_of_a_share() -> None:
    whole = [covariance(size, size) for size in (32, 32, 10)]
    outputs = OutputFisher(whole)
    assert [len(block) for block in outputs.rows(slice(0, 74))] == [32, 32, 10]
    first, second = outputs.rows(slice(16, 48))
    assert torch.equal(first, whole[0][16:, 16:])
    assert torch.equal(second, whole[1][:16, :16])


def test_weights_of_tokens() -> None:
    """A weight of 2 is a token that is there twice."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 40, 64, generator=generator)
    twice = InputStatistics.gather([Inputs(torch.cat([y, y[:9]]), torch.cat([x, x[:9]]))])
    weights = torch.ones(40)
    weights[:9] = 2.0
    weighted = InputStatistics.gather([Inputs(y, x, weight=weights)])
    torch.testing.assert_close(twice.hessian, weighted.hessian, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(twice.cross, weighted.cross, rtol=1e-4, atol=1e-6)
    assert weighted.tokens == 36  # 49^2 / 67: as many as say as much


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config(hidden_size=128, intermediate_size=256, num_hidden_layers=3)
    return save_model(tmp_path_factory.mktemp("model") / "tiny", config)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_measured_fisher_is_that_of_autograd(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients through the whole model, with the labels that the measurement draws."""
    monkeypatch.setattr(fisher, "ROWS", 96)
    tokens = torch.tensor([list(TEXT[i : i + 48].encode()) for i in (0, 100, 200, 333)])
    source = open_source(str(model))
    linears = select_layers(source).linears
    objective = FisherObjective(tmp_path)
    layered = LayeredModel(source, linears, torch.device("cpu"))
    objective.prepare(layered, linears, Text(tokens, 5), Progress())
    assert not (tmp_path / "fisher").exists()
    name = "model.layers.1.self_attn.o_proj"
    (outputs,) = objective.stage([name]).outputs
    assert [len(block) for block in outputs.blocks] == [96, 32]

    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    linear = reference.get_submodule(name)
    kept: list[torch.Tensor] = []
    linear.register_forward_hook(lambda module, args, y: kept.append(y) or y.retain_grad())
    generator = torch.Generator().manual_seed(5)
    for row in tokens:
        logits = reference(row[None]).logits[0]
        labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
        torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    gradients = torch.stack([y.grad[0] for y in kept])
    costs = gradients.square() @ linear.weight.detach().square().mean(1)
    weights = objective.stage([name]).weights
    torch.testing.assert_close(weights, costs.sqrt() / costs.sqrt().mean(), rtol=1e-3, atol=1e-5)
    scaled = (gradients / costs.sqrt().sqrt().unsqueeze(2))[:, :, :96]
    moments = torch.stack([g.T @ g for g in scaled])
    found = outputs.blocks[0] / outputs.blocks[0].diagonal().mean()
    off = ~torch.eye(96).bool()
    # Off the diagonal the measurement is that of autograd, times one factor: the shrinkage.
    wanted = moments.mean(0) / moments.mean(0).diagonal().mean()
    ratio = (found * wanted)[off].sum() / wanted[off].square().sum()
    assert 0.05 < ratio < 0.97
    torch.testing.assert_close(found[off], ratio * wanted[off], rtol=1e-2, atol=1e-5)


def test_shrinkage_follows_the_noise() -> None:
    """Of what chance makes, little is left; of what both halves have, nearly all."""
    generator = torch.Generator().manual_seed(0)
    chance = [torch.randn(100, 64, generator=generator) for _ in "ab"]
    mix = torch.randn(64, 64, generator=generator) / 8 + torch.eye(64)
    many = [torch.randn(20000, 64, generator=generator) @ mix for _ in "ab"]

    def left(halves: list[torch.Tensor]) -> float:
        """The ratio of the spread of eigenvalues after and before."""
        shrunk = fisher._shrunk([(x.T @ x / len(x)).tril() for x in halves])
        assert shrunk.diagonal().mean().item() == pytest.approx(1.0, rel=1e-4)
        whole = sum(x.T @ x for x in halves)
        return (torch.linalg.cond(shrunk) / torch.linalg.cond(whole)).item()

    assert left(chance) < 0.3
    assert fisher._shrunk([torch.zeros(3, 3)]).equal(torch.eye(3))
    values = torch.linalg.eigvalsh(fisher._shrunk([(x.T @ x).tril() for x in many]))
    assert values.max() / values.min() > 10


def test_run_resumes_and_keeps_what_it_measured(
    model: Path, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = make_plan(str(model), replace(OPTIONS, calibration=text))
    quantize_model(plan, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr("pcdvq_quantizer.plan.quantize_stage", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize_model(plan, tmp_path / "out")
    hessian = make_plan(str(model), replace(OPTIONS, calibration=text, objective="hessian"))
    with pytest.raises(PCDVQError, match="objective = 'fisher', this run has 'hessian'"):
        quantize_model(hessian, tmp_path / "out")
    monkeypatch.setattr(fisher, "run_back", None)
    quantize_model(plan, tmp_path / "out")
    for file in (tmp_path / "whole").glob("*.safetensors"):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()
    assert not list((tmp_path / "out").glob("**/fisher*"))
    quantize_model(hessian, tmp_path / "hessian")
    file = "model-00001-of-00001.safetensors"
    assert (tmp_path / "hessian" / file).read_bytes() != (tmp_path / "out" / file).read_bytes()


def test_gradients_that_are_not_finite(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(model))
    linears = select_layers(source).linears
    layered = LayeredModel(source, linears, torch.device("cpu"))
    tokens = torch.tensor([list(TEXT[:16].encode())])
    head = "pcdvq_quantizer.calibration.gradients._head_gradient"
    monkeypatch.setattr(head, lambda model, hidden, generator: torch.full_like(hidden, torch.nan))
    with pytest.raises(PCDVQError, match=r"model\.layers\.2.*NaN.*--objective hessian"):
        FisherObjective(tmp_path).prepare(layered, linears, Text(tokens, 0), Progress())


def test_layers_no_prediction_depends_on(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One window and no gradients: the squared error of outputs decides, and the run says so."""
    notes: list[str] = []

    class Listener(Progress):
        def note(self, text: str) -> None:
            notes.append(text)

    source = open_source(str(model))
    linears = select_layers(source).linears
    layered = LayeredModel(source, linears, torch.device("cpu"))
    head = "pcdvq_quantizer.calibration.gradients._head_gradient"
    monkeypatch.setattr(head, lambda model, hidden, generator: torch.zeros_like(hidden))
    objective = FisherObjective(tmp_path)
    text = Text(torch.tensor([list(TEXT[:16].encode())]), 0)
    objective.prepare(layered, linears, text, Listener())
    assert "model.layers.0.self_attn.q_proj" in notes[0]
    goal = objective.stage(["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"])
    torch.testing.assert_close(goal.weights, torch.ones(1, 16))
    assert torch.equal(goal.outputs[0].blocks[0], torch.eye(256))


def test_bad_options(model: Path) -> None:
    with pytest.raises(PCDVQError, match="--objective fisher is measured on calibration text"):
        make_plan(str(model), replace(OPTIONS, calibration="none"))
    with pytest.raises(PCDVQError, match=r"no objective 'riemann'.*hessian, fisher"):
        make_plan(str(model), replace(OPTIONS, objective="riemann"))
