"""Calibration on the real SmolLM2-135M: the repository's own pages are the text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import pytest
from models import smollm2_gguf
from pcdvq_kernels.checkpoint import REPORT_FILE
from pcdvq_quantizer.evaluation import EvaluateOptions, evaluate
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.sources import open_source
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
# Two decoder layers of thirty, to be fast.
LAYERS = 2
SKIP = ("model.layers.[2-9].*", "model.layers.??.*")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """SmolLM2 as safetensors, which are read many times faster than its GGUF."""
    source = open_source(str(smollm2_gguf()))
    directory = tmp_path_factory.mktemp("smollm2")
    (directory / "config.json").write_text(json.dumps(source.config))
    weights = {name: source.load(name).contiguous() for name in source.shapes}
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    source.copy_files(directory)
    return str(directory)


@dataclass(frozen=True)
class Measured:
    """KL from the original on FORMAT.md, and the mean error of layers' outputs, where measured."""

    kl: float
    output_error: float


@pytest.fixture(scope="module")
def measured(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Measured]:
    """By how the layers were quantized."""
    directory = tmp_path_factory.mktemp("quality")
    text = directory / "text.txt"
    text.write_text(
        (ROOT / "README.md").read_text() + (ROOT / "quantizer" / "QUALITY.md").read_text()
    )
    base = QuantizeOptions(
        bits=2.0, calibration=str(text), samples=6, sequence_length=512, skip=SKIP
    )
    variants = {
        "plain": replace(base, calibration="none"),
        "calibrated": base,
        "e8": replace(base, codec="e8"),
    }
    found = {}
    for name, options in variants.items():
        plan = make_plan(model, options)
        assert len(plan.selection.layers) == LAYERS * 7
        quantize_model(plan, directory / name)
        report = evaluate(
            str(directory / name),
            EvaluateOptions(
                tasks=("kl",),
                text=ROOT / "kernels" / "FORMAT.md",
                windows=2,
                window=512,
                reference=model,
            ),
        )
        errors = json.loads((directory / name / REPORT_FILE).read_text())["errors"].values()
        outputs = [error["output"] for error in errors if error.get("output") is not None]
        found[name] = Measured(report.kl.kl, fmean(outputs) if outputs else math.nan)
    return found


def test_calibration_pays(measured: dict[str, Measured]) -> None:
    assert measured["calibrated"].kl < 0.5 * measured["plain"].kl


def test_trellis_pays(measured: dict[str, Measured]) -> None:
    """By errors: with so little text the KL depends on chance by as much as the codecs differ."""
    assert measured["calibrated"].output_error < 0.85 * measured["e8"].output_error
