"""The last line of a run: the quantized model beside its original on text that was held out."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pcdvq_quantizer.hf  # noqa: F401 transformers then loads PCDVQ checkpoints
import pytest
import torch
from models import save_model, tiny_config
from pcdvq_quantizer.calibration import run as calibration
from pcdvq_quantizer.calibration.mixture import CHAT, TEXT, Windows
from pcdvq_quantizer.calibration.run import remedy
from pcdvq_quantizer.calibration.trust import HeldOut
from pcdvq_quantizer.plan import QuantizeOptions, RunOptions, make_plan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.vptq.plan import VPTQOptions
from transformers import AutoModelForCausalLM, AutoTokenizer

OPTIONS = QuantizeOptions(bits=2.0, samples=6, sequence_length=128)
TEMPLATE = (
    "{% for message in messages %}[{{ message['content'] }}\x02\n{% endfor %}"
    "{% if add_generation_prompt %}]{% endif %}"
)


@pytest.fixture(scope="module", params=[True, False], ids=["instruct", "base"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_model(tmp_path_factory.mktemp("trust") / "tiny", tiny_config())
    if request.param:
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(directory)
    return directory


class Notes(Progress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_run_ends_with_what_was_held_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of the whole models on the held-out windows."""
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60)
    seen: list[Windows] = []
    make = calibration.calibration_windows

    def keep(*arguments: object) -> Windows:
        seen.append(make(*arguments))
        return seen[0]

    monkeypatch.setattr(calibration, "calibration_windows", keep)
    progress = Notes()
    options = replace(OPTIONS, calibration=str(text))
    quantize_model(make_plan(str(model), options), tmp_path / "out", progress=progress)
    (windows,) = seen
    assert len(windows.learnt) == options.samples
    is_base = AutoTokenizer.from_pretrained(model).chat_template is None
    rows = windows.held & (windows.kinds == (TEXT if is_base else CHAT))
    assert windows.held.sum() == (1 if is_base else 2)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for path in (model, tmp_path / "out")
    ]
    models[1].dequantize()
    (tokens,), (said,) = windows.tokens[rows], windows.said[rows]
    with torch.no_grad():
        p, q = (each(tokens[None]).logits[0, :-1].log_softmax(1) for each in models)
    kl = (p.exp() * (p - q)).sum(1)[said[:-1]].mean().item()
    found = HeldOut(**json.loads((tmp_path / "out" / "pcdvq_report.json").read_text())["held_out"])
    assert found.kind == ("text" if is_base else "answers")
    assert found.tokens == said[:-1].sum()
    assert found.kl == pytest.approx(kl, rel=2e-2)
    nll = -q.gather(1, tokens[1:, None])[:, 0][said[:-1]].mean()
    assert found.perplexity == pytest.approx(nll.exp().item(), rel=1e-3)
    assert progress.notes[-1] == found.sentence(remedy(options))


@pytest.mark.parametrize(
    ("changes", "bad"),
    [({}, False), ({"kl": 0.5}, True), ({"kl": float("nan")}, True)],
)
def test_bad_ones_come_with_advice(changes: dict[str, float], bad: bool) -> None:
    good = HeldOut("answers", 0.05, 0.9, 12.0, 11.5, 400)
    sentence = replace(good, **changes).sentence(remedy(QuantizeOptions(bits=3.0)))
    assert "held-out answers (400 tokens)" in sentence
    assert ("answers changed: try --bits 4" in sentence) == bad
    text = replace(good, kind="text", kl=1.0).sentence(remedy(QuantizeOptions(bits=4.0)))
    assert "predictions changed: try more --samples" in text


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (QuantizeOptions(bits=2.0), "try --bits 4, or `pcdvq finetune`"),
        (VPTQOptions(bits=2.0), "try --bits 4"),
        (VPTQOptions(vector_length=4, centroids=16), "try more --samples"),
    ],
)
def test_advice_is_of_the_method(options: RunOptions, advice: str) -> None:
    assert remedy(options).startswith(advice)
    assert ("finetune" in remedy(options)) == ("finetune" in advice)
