"""Calibration by several processes: as good as by one, resumed with any number, ended by errors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pcdvq_quantizer.hf  # noqa: F401 transformers then loads PCDVQ checkpoints
import pytest
import torch
from models import save_model, tiny_config
from parallel_work import exchange, fail, lose_a_process, quantize_all
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import cli
from pcdvq_quantizer import launch as launching
from pcdvq_quantizer.calibration import experts
from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.parallel import Processes
from pcdvq_quantizer.launch import launch
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_in_processes, quantize_model
from safetensors.torch import load_file, save_file
from test_calibration import divergence
from test_expert_calibration import MIXTRAL, Notes, save_moe

COUNT = 2
OPTIONS = QuantizeOptions(bits=2.0, samples=7, sequence_length=64, effort="quick")
RUNS = {
    "trellis": OPTIONS,
    "pvq": replace(OPTIONS, codec="pvq", bits=3.0, embedding_bits=8),
    "mixed": replace(OPTIONS, bits=2.7),
    "moe": OPTIONS,
    "fisher": replace(OPTIONS, objective="fisher"),
}
# Feedback between rows ends where the rows of a process do. Of two paths with nearly the same
# cost rounding chooses one, and later layers correct its errors: other codes that are as good.
CHAOTIC = ["fisher", "mixed"]
ALIKE = [name for name in RUNS if name not in CHAOTIC]
FEW_TOKENS = 300  # more than an expert can have in one process
SAME_CODES = 0.98
DIVERGENCE = 0.03  # relative, of the log-probabilities' error


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a mixture of experts, a calibration text."""
    directory = tmp_path_factory.mktemp("parallel")
    # k and v have one segment of 16 rows: one process has none of them.
    config = tiny_config(num_hidden_layers=3, num_key_value_heads=1)
    save_model(directory / "model", config)
    save_moe(directory / "moe", MIXTRAL)
    (directory / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    return directory


def arguments(directory: Path, name: str) -> tuple[str, QuantizeOptions]:
    model = directory / ("moe" if name == "moe" else "model")
    return str(model), replace(RUNS[name], calibration=str(directory / "text.txt"))


@pytest.fixture(scope="module")
def outputs(directory: Path) -> tuple[Path, Path, dict[int, Notes]]:
    """Directories of checkpoints made by one process and by several, and what these told."""
    one, several = directory / "one", directory / "several"
    notes = {1: Notes(), COUNT: Notes()}
    load = LayeredModel.load

    def stop(self: LayeredModel, index: int) -> torch.nn.Module:
        if index == 2:
            raise KeyboardInterrupt
        return load(self, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts, "FEW_TOKENS", FEW_TOKENS)
        for name in RUNS:
            quantize_model(make_plan(*arguments(directory, name)), one / name, progress=notes[1])
        patch.setattr(LayeredModel, "load", stop)
        plan = make_plan(*arguments(directory, "trellis"))
        with pytest.raises(KeyboardInterrupt):
            quantize_model(plan, several / "begun by one")
    runs = [(*arguments(directory, name), several / name) for name in RUNS]
    for name in ("begun by one", "begun by several"):
        runs.append((*arguments(directory, "trellis"), several / name))
    launch(COUNT, quantize_all, (runs, FEW_TOKENS, "begun by several"), notes[COUNT])
    return one, several, notes


def same_codes(one: Path, several: Path) -> float:
    stored = [load_file(path / "model-00001-of-00001.safetensors") for path in (one, several)]
    assert stored[0].keys() == stored[1].keys()
    packed = [torch.cat([t.flatten() for n, t in s.items() if "qweight" in n]) for s in stored]
    return (packed[0] == packed[1]).double().mean().item()


@pytest.mark.parametrize("name", ALIKE)
def test_checkpoint_is_that_of_one_process(
    name: str, directory: Path, outputs: tuple[Path, Path, dict[int, Notes]]
) -> None:
    one, several, _ = outputs
    tokens = torch.tensor([list(b"jumps over the quick brown dog; the lazy fox ")])
    model = Path(arguments(directory, name)[0])
    errors = [divergence(model, out / name, tokens) for out in (one, several)]
    assert errors[1] == pytest.approx(errors[0], rel=DIVERGENCE)
    assert same_codes(one / name, several / name) > SAME_CODES


@pytest.mark.parametrize("name", CHAOTIC)
def test_checkpoint_is_like_that_of_one_process(
    name: str, directory: Path, outputs: tuple[Path, Path, dict[int, Notes]]
) -> None:
    """Rates, and hence sizes, are the same; the error is as often less as more."""
    one, several, _ = outputs
    tokens = torch.tensor([list(b"jumps over the quick brown dog; the lazy fox ")])
    model = Path(arguments(directory, name)[0])
    errors = [divergence(model, out / name, tokens) for out in (one, several)]
    assert errors[1] < 3 * errors[0]
    stored = [load_file(out / name / "model-00001-of-00001.safetensors") for out in (one, several)]
    shapes = [{key: tensor.shape for key, tensor in s.items()} for s in stored]
    assert shapes[0] == shapes[1]


def test_progress_is_that_of_one_process(outputs: tuple[Path, Path, dict[int, Notes]]) -> None:
    """Also which experts have few tokens."""
    _, _, notes = outputs
    assert any("4 of 4 experts" not in note for note in notes[1].notes)
    told = [[note for note in notes[n].notes if "held-out" not in note] for n in (1, COUNT)]
    assert told[0] == told[1]
    assert len(notes[1].notes) == len(told[0]) + len(RUNS)
    assert notes[COUNT].total > 0


def test_resumed_with_another_number(
    directory: Path, outputs: tuple[Path, Path, dict[int, Notes]]
) -> None:
    one, several, _ = outputs
    quantize_model(make_plan(*arguments(directory, "trellis")), several / "begun by several")
    for name in ("begun by one", "begun by several"):
        assert same_codes(one / "trellis", several / name) > SAME_CODES


def test_exchange_and_a_killed_process() -> None:
    notes = Notes()
    with pytest.raises(PCDVQError, match="exit code -9"):
        launch(2, exchange, (), notes)
    assert notes.notes == ["0 of 2"]


@pytest.mark.parametrize("late", [False, True], ids=["first seen", "last seen"])
def test_a_killed_process_is_the_reason(late: bool) -> None:
    """Whether its end is seen before the failure of the others' connections or after it."""
    with pytest.raises(PCDVQError, match=r"exit code -9 \(killed, for want of memory\?\)"):
        launch(3, lose_a_process, (late,), Notes())


def test_error_without_a_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "DEATH_SECONDS", 0.1)
    with pytest.raises(RuntimeError, match="of its own"):
        launch(2, fail, (), Notes())


def test_error_of_one_process_is_one_line(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Only the last window has the token that the first norm makes infinite."""
    broken = save_model(directory / "broken", tiny_config())
    weights = load_file(broken / "model.safetensors")
    weights["model.embed_tokens.weight"][:, 7] = 0
    weights["model.embed_tokens.weight"][ord("#")] = torch.eye(64)[7]
    weights["model.layers.0.input_layernorm.weight"][7] = 3e38
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    text = directory / "broken.txt"
    text.write_text("a b c d " * 31 + "########")
    limits = ["--samples", "4", "--sequence-length", "64", "--calibration", str(text)]
    command = ["pcdvq", "quantize", str(broken), str(directory / "out"), "--processes", "2"]
    monkeypatch.setattr("sys.argv", command + limits)
    capfd.readouterr()
    with pytest.raises(SystemExit):
        cli.main()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: output of model.layers.0 in the original model holds NaN")
    assert not (directory / "out").exists()


def test_too_many_processes(directory: Path) -> None:
    model, options = arguments(directory, "trellis")
    with pytest.raises(PCDVQError, match="8 processes have 7 windows"):
        quantize_in_processes(8, model, options, directory / "out")
    with pytest.raises(PCDVQError, match="of which there is none"):
        quantize_in_processes(2, model, replace(options, calibration="none"), directory / "out")


@pytest.mark.parametrize(("total", "unit", "count"), [(7, 1, 3), (32, 16, 3), (33, 16, 2)])
def test_shares(total: int, unit: int, count: int) -> None:
    shares = [Processes(rank, count).share(total, unit) for rank in range(count)]
    assert [row for share in shares for row in range(total)[share]] == list(range(total))
    assert all(share.start % unit == 0 for share in shares)
