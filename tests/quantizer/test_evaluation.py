"""Figures of `pcdvq eval` against plain computations of the same."""

import hashlib
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from models import change_config, save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.cli import app
from pcdvq_quantizer.evaluation import EvaluateOptions, EvaluationReport, evaluate, hf_model
from pcdvq_quantizer.evaluation.data import Sequence
from pcdvq_quantizer.evaluation.hf_model import HFModel
from pcdvq_quantizer.evaluation.scores import standard_error
from pcdvq_quantizer.hf.logits import ChunkedLogits
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

WINDOW, WINDOWS = 40, 3
# Of a mean NLL in nats: the kernels sum in another order than dense fp32 products.
NLL_ATOL = 1e-5


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("eval") / "tiny", tiny_config())


@pytest.fixture(scope="module")
def checkpoint(original: Path) -> Path:
    out = original.with_name("out")
    quantize_model(make_plan(str(original), QuantizeOptions(bits=2.0, calibration="none")), out)
    change_config(out, activations="float")  # as dense weights compute
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 characters, which are 130 tokens: three windows and a rest."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(random.Random(0).choices("abcdefgh ,.\n", k=130)))
    return path


def options(text: Path, **changes: object) -> EvaluateOptions:
    return EvaluateOptions(text=text, window=WINDOW, **changes)


@torch.inference_mode()
def plain_logits(model: Path, text: Path, bos: bool = False) -> tuple[Tensor, Tensor]:
    """Logits of the first windows before each token but the first, and those tokens."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(), add_special_tokens=False, return_tensors="pt").input_ids
    windows = ids[0, : WINDOW * WINDOWS].view(WINDOWS, WINDOW)
    first = torch.full((WINDOWS, 1), tokenizer.bos_token_id)[:, : int(bos)]
    logits = loaded(torch.cat([first, windows], 1)).logits
    return logits[:, int(bos) : -1], windows[:, 1:]


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity(checkpoint: Path, text: Path, bos: bool) -> None:
    logits, targets = plain_logits(checkpoint, text, bos)
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    found = evaluate(str(checkpoint), options(text, bos=bos)).perplexity
    assert found is not None
    assert (found.windows, found.tokens) == (WINDOWS, WINDOWS * (WINDOW - 1))
    assert found.nll == pytest.approx(nll.mean().item(), abs=NLL_ATOL)
    assert found.perplexity == pytest.approx(nll.mean().exp().item(), rel=1e-4)
    error = nll.mean(1).std().item() / WINDOWS**0.5 * found.perplexity
    assert found.perplexity_stderr == pytest.approx(error, rel=1e-2)


def test_packed_weights_give_the_same(checkpoint: Path, text: Path) -> None:
    dense = evaluate(str(checkpoint), options(text))
    packed = evaluate(str(checkpoint), options(text, packed=True))
    assert (dense.weights, packed.weights) == ("dense", "packed")
    assert dense.perplexity is not None
    assert packed.perplexity is not None
    assert packed.perplexity.nll == pytest.approx(dense.perplexity.nll, abs=NLL_ATOL)


def test_one_window_has_no_standard_error(original: Path, text: Path) -> None:
    found = evaluate(str(original), options(text, windows=1)).perplexity
    assert found is not None
    assert (found.windows, found.perplexity_stderr) == (1, None)


def test_standard_error() -> None:
    """A model that predicts NaN is measured, too."""
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(3**-0.5)
    assert standard_error([1.0]) is None
    for bad in (math.inf, math.nan):
        assert math.isnan(standard_error([1.0, bad]))


def test_kl_from_the_original(
    original: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_model, "CHUNK_POSITIONS", 7)
    mine, _ = plain_logits(checkpoint, text)
    theirs, _ = plain_logits(original, text)
    p, q = theirs.log_softmax(-1), mine.log_softmax(-1)
    both = options(text, tasks=("perplexity", "kl"))
    report = evaluate(str(checkpoint), both)
    assert report.kl is not None
    assert report.perplexity is not None
    assert report.kl.reference == str(original)
    assert report.kl.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)
    assert report.kl.kl > 1e-4
    agreement = (mine.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    assert report.kl.top1_agreement == pytest.approx(agreement)
    alone = evaluate(str(checkpoint), options(text)).perplexity
    assert alone is not None
    assert report.perplexity.nll == pytest.approx(alone.nll, abs=NLL_ATOL)
    source = evaluate(str(original), options(text)).perplexity
    assert source is not None
    assert report.kl.reference_perplexity == pytest.approx(source.perplexity, rel=1e-5)


def test_kl_from_itself_is_zero(original: Path, text: Path) -> None:
    itself = options(text, tasks=("kl",), reference=str(original))
    found = evaluate(str(original), itself).kl
    assert found is not None
    assert abs(found.kl) < 1e-9
    assert found.top1_agreement == 1


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 16, "final_logit_softcapping": 0.5, "pad_token_id": 0}),
        ("granite", {"logits_scaling": 8.0}),
        ("qwen3_moe", {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}),
    ],
)
def test_logits_in_chunks_are_the_models(
    model_type: str, fields: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an architecture does to its logits; and without chunks."""
    config = tiny_config(model_type, **fields)
    del config["model_type"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **config)).eval()
    tokens = torch.arange(5, 45)
    with torch.inference_mode():
        expected = model(tokens[None]).logits[0, :-1].log_softmax(1)
    expected = expected.gather(1, tokens[1:, None])[:, 0][-30:]
    monkeypatch.setattr(hf_model, "CHUNK_POSITIONS", 16)
    scorer = HFModel(model)
    assert scorer._logits.chunked
    for scorer._logits.chunked in (True, False):
        found = scorer.log_likelihoods(Sequence(tokens, 30))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_head_that_cannot_be_split_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config()
    del config["model_type"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **config)).eval()
    monkeypatch.setattr(ChunkedLogits, "body", lambda self, ids: torch.zeros(1, len(ids), 64))
    assert not ChunkedLogits(model).chunked


def bigram_model(directory: Path, successors: dict[str, str]) -> Path:
    """A model that predicts the successor of the last character."""
    config = tiny_config(hidden_size=256, num_hidden_layers=1)
    save_model(directory, config)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.model.embed_tokens.weight.data = torch.eye(256)
    layer = model.model.layers[0]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    model.lm_head.weight.data.zero_()
    for before, after in successors.items():
        model.lm_head.weight.data[ord(after), ord(before)] = 1
    model.save_pretrained(directory)
    return directory


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return path


def test_last_words(tmp_path: Path) -> None:
    model = bigram_model(tmp_path / "bigrams", {"a": " ", " ": "b", "b": "c", "c": "d"})
    texts = ["xx a bcd", "xx a bc", "xx a bcx", "xx x bcd", "xx a xcd", "a " * 30 + "bc"]
    lines = write_lines(tmp_path / "lines.jsonl", *({"text": text} for text in texts))
    words = EvaluateOptions(tasks=("lambada",), lambada=lines)
    found = evaluate(str(model), words).lambada
    assert found is not None
    assert (found.correct, found.lines) == (3, 6)
    assert found.accuracy == 0.5
    found = evaluate(
        str(model), EvaluateOptions(tasks=("lambada",), lambada=lines, limit=2)
    ).lambada
    assert found is not None
    assert (found.correct, found.lines) == (2, 2)


def test_last_words_beside_the_original(tmp_path: Path) -> None:
    model = bigram_model(tmp_path / "model", {"a": " ", " ": "b", "b": "c", "c": "d"})
    original = bigram_model(tmp_path / "original", {"a": " ", " ": "b", "b": "x"})
    texts = ["a bcd", "a b", "a bx", "a bc", "a y"]
    lines = write_lines(tmp_path / "lines.jsonl", *({"text": text} for text in texts))
    words = EvaluateOptions(tasks=("lambada",), lambada=lines, reference=str(original))
    report = evaluate(str(model), words)
    assert report.lambada is not None
    pair = report.lambada.paired
    assert pair is not None
    assert (pair.both, pair.only_model, pair.only_reference) == (1, 2, 1)
    assert (pair.reference_accuracy, pair.difference) == (0.4, pytest.approx(0.2))
    assert pair.difference_stderr == pytest.approx(np.std([0, 1, 1, -1, 0]) / 5**0.5)
    assert any("2 right only here, 1 only there" in row[3] for row in report.rows())
    file = tmp_path / "report.json"
    file.write_text(report.to_json())
    assert EvaluationReport.read(file) == report


def test_command_line(original: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    lines = write_lines(tmp_path / "lines.jsonl", {"text": "one two"}, {"text": "three four"})
    arguments = ["eval", str(checkpoint), "--tasks", "perplexity, kl,lambada", "--text", str(text)]
    arguments += ["--lambada", str(lines), "--windows", "2", "--window", "32", "--json"]
    result = CliRunner().invoke(app, [*arguments, "-"], catch_exceptions=False)
    found = json.loads(result.stdout)
    assert found.keys() == EvaluationReport.__dataclass_fields__.keys()
    assert found["protocol"] == {
        "text": {"file": "text.txt", "sha256": hashlib.sha256(text.read_bytes()).hexdigest()},
        "window": 32,
        "windows": 2,
        "lambada": {
            "file": "lines.jsonl",
            "sha256": hashlib.sha256(lines.read_bytes()).hexdigest(),
        },
        "lines": 2,
        "bos": False,
        "requests": None,
        "answer_tokens": None,
        "chat_template": None,
    }
    assert found["perplexity"]["tokens"] == found["kl"]["tokens"] == 62
    assert found["lambada"]["lines"] == 2
    assert found["versions"]["torch"] == torch.__version__
    assert "perplexity" in result.stderr
    file = tmp_path / "report.json"
    result = CliRunner().invoke(app, [*arguments, str(file)], catch_exceptions=False)
    assert "perplexity" in result.stdout
    again = json.loads(file.read_text())
    assert again["perplexity"]["nll"] == found["perplexity"]["nll"]
    with pytest.raises(PCDVQError, match="no directory"):
        CliRunner().invoke(app, [*arguments, str(tmp_path / "no" / "file")], catch_exceptions=False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tasks": ("perplexity", "arc")}, "'arc' is not offered; choose from perplexity, kl"),
        ({"tasks": ()}, "'' is not offered"),
        ({"backend": "llama.cpp"}, "choose from hf, vllm"),
        ({"dtype": "int8"}, "choose from auto, float32"),
        ({"windows": 0}, "--windows is 0; give 1 or more"),
        ({"window": 1}, "--window is 1; give 2 or more"),
        ({"limit": 0}, "--limit is 0; give 1 or more"),
        ({}, "--text FILE"),
        ({"tasks": ("lambada",)}, "--lambada FILE"),
        ({"tasks": ("kl",), "text": Path("t"), "backend": "vllm"}, "--backend hf"),
    ],
)
def test_options_that_do_not_fit(changes: dict[str, object], message: str) -> None:
    with pytest.raises(PCDVQError, match=message):
        EvaluateOptions(**changes)


def refused(model: Path, message: str, **changes: object) -> None:
    with pytest.raises(PCDVQError, match=message):
        evaluate(str(model), EvaluateOptions(**changes))


def test_texts_that_do_not_fit(original: Path, text: Path, tmp_path: Path) -> None:
    refused(original, "nowhere.txt cannot be read: No such file", text=tmp_path / "nowhere.txt")
    refused(original, "130 tokens, less than one window of 131", text=text, window=131)
    (tmp_path / "latin").write_bytes(b"\xe4\xf6\xfc")
    refused(original, "not UTF-8", text=tmp_path / "latin")


def test_lines_that_do_not_fit(original: Path, tmp_path: Path) -> None:
    for name, content, message in (
        ("field", '{"sentence": "a b"}', r"line 1: no string field 'text' .found fields sentence"),
        ("word", '{"text": "word"}', "line 1 has no last word"),
        ("end", '{"text": "word "}', "line 1 has no last word"),
        ("long", json.dumps({"text": "word " * 60 + "end"}), "takes 256 tokens.*needs 303"),
    ):
        (tmp_path / name).write_text(content)
        refused(original, message, tasks=("lambada",), lambada=tmp_path / name)


def test_models_that_do_not_fit(
    original: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    common = {"text": text, "window": WINDOW}
    refused(original, "name it with --reference", tasks=("kl",), **common)
    other = save_model(tmp_path / "other", tiny_config(vocab_size=320))
    kl = {"tasks": ("kl",), **common}
    refused(checkpoint, "has 256 tokens, its original 320", reference=str(other), **kl)
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in checkpoint.iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    report = json.loads((moved / "pcdvq_report.json").read_text())
    (moved / "pcdvq_report.json").write_text(json.dumps(report | {"model": "org/gone"}))
    refused(moved, "org/gone by its report, which cannot be opened", **kl)
    for file in moved.glob("tokenizer*"):
        file.unlink()
    refused(moved, "has no tokenizer that transformers can load", **common)
    refused(tmp_path / "nothing", "neither a local directory", **common)
