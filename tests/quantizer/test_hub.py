"""`pcdvq push` against a Hub on this machine, and the model card it uploads."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import huggingface_hub.constants
import pytest
import yaml
from hub import TOKEN, Hub, running_hub
from markdown_it import MarkdownIt
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import REPORT_FILE
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import cli
from pcdvq_quantizer.card import write_model_card
from pcdvq_quantizer.codecs import DIRECTION_AND_MAGNITUDE
from pcdvq_quantizer.evaluation.chat import AnswerFigures, ChatFigures
from pcdvq_quantizer.evaluation.data import DataFile
from pcdvq_quantizer.evaluation.report import EvaluationReport, Protocol
from pcdvq_quantizer.evaluation.scores import Accuracy, Perplexity
from pcdvq_quantizer.finetune import FinetuneOptions
from pcdvq_quantizer.hub import push
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from typer.main import get_command
from typer.testing import CliRunner

REPO = "someone/tiny-pcdvq"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with running_hub() as hub:
        yield hub


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("hub")
    source = save_model(directory / "tiny", tiny_config())
    options = QuantizeOptions(bits=3.0, calibration="none", skip=("*.k_proj",))
    return quantize_model(make_plan(str(source), options), directory / "out").directory


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of `pcdvq eval --json`."""
    text, lines = DataFile("wiki.raw", "ab" * 32), DataFile("lambada.jsonl", "cd" * 32)
    answers = AnswerFigures(0.0521, 0.004, 0.07, 0.01, 0.91, 0.9, 99, 3400)
    requests = DataFile("requests.jsonl", "ef" * 32)
    report = EvaluationReport(
        model="/home/someone/out",
        backend="hf",
        dtype="float32",
        weights="dense",
        protocol=Protocol(text, 2048, 40, lines, 500, False, requests, 40, True),
        perplexity=Perplexity(21.1375, 0.8, 3.05, 40, 81880, 9.0),
        kl=None,
        lambada=Accuracy(0.425, 0.022, 212, 500, 9.0),
        seconds=20.0,
        versions={},
        chat=ChatFigures(answers, {"code": answers}, "org/original", bound=True, seconds=60.0),
    )
    path = tmp_path_factory.mktemp("eval") / "eval.json"
    path.write_text(report.to_json())
    return path


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process takes `hub` for the Hub."""
    for name, value in (("ENDPOINT", hub.url), ("HF_HUB_OFFLINE", False)):
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


@pytest.mark.usefixtures("logged_in")
def test_push(hub: Hub, checkpoint: Path, evaluation: Path) -> None:
    """All files arrive; a second upload deletes weights of another name, and nothing else."""
    arguments = ["push", str(checkpoint), REPO, "--eval", str(evaluation)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert f"vllm serve {REPO} --quantization pcdvq" in result.output
    repository = hub.repositories[REPO]
    local = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert repository.files == local
    assert {"config.json", "tokenizer.json", REPORT_FILE, "README.md"} <= local.keys()
    assert not repository.private
    assert (
        "| out | perplexity | 21.137 | 0.800 | wiki.raw, 40 windows" in local["README.md"].decode()
    )
    repository.files |= {"model-00002-of-00002.safetensors": b"old", "notes.txt": b"mine"}
    push(checkpoint, REPO)
    assert repository.files == {**local, "notes.txt": b"mine"}
    with pytest.raises(PCDVQError, match=f"{REPO} exists and is public"):
        push(checkpoint, REPO, private=True)


@pytest.mark.usefixtures("logged_in")
def test_only_what_belongs_to_a_checkpoint_is_uploaded(
    hub: Hub, checkpoint: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(checkpoint, tmp_path / "out")
    files = {path.name for path in out.iterdir()}
    (out / "photos").mkdir()
    for name in (
        ".env",
        "id_rsa",
        "evil.py",
        "x.pkl",
        "run.json",
        "photos/a.json",
        "old.safetensors",
    ):
        (out / name).write_text("mine")
    (out / "LICENSE").write_text("Apache")
    push(out, "someone/clean")
    assert hub.repositories["someone/clean"].files.keys() == {*files, "LICENSE"}
    (out / "LICENSE").unlink()
    (out / "LICENSE").symlink_to(tmp_path / "secret")
    (tmp_path / "secret").write_text("mine")
    with pytest.raises(PCDVQError, match=r"LICENSE is a link to .* put the file itself there"):
        push(out, "someone/linked")
    assert "someone/linked" not in hub.repositories


@pytest.mark.usefixtures("logged_in")
def test_private(hub: Hub, checkpoint: Path) -> None:
    push(checkpoint, "someone/secret", private=True)
    assert hub.repositories["someone/secret"].private


@pytest.mark.usefixtures("logged_in")
def test_refused(hub: Hub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PCDVQError, match=r"the Hub did not take .* as someone/other \(.*401"):
        push(checkpoint, "someone/other")
    assert "someone/other" not in hub.repositories
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(PCDVQError, match="the Hub did not take"):
        push(checkpoint, "someone/other")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(PCDVQError, match="offline"):
        push(checkpoint, "someone/other")


def test_nobody_is_logged_in(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcdvq_quantizer.hub.get_token", lambda: None)
    with pytest.raises(PCDVQError, match="nobody is logged in to the Hub; run `hf auth login`"):
        push(checkpoint, "someone/other")


def test_not_a_checkpoint(tmp_path: Path) -> None:
    source = save_model(tmp_path / "plain", tiny_config())
    with pytest.raises(PCDVQError, match="not a PCDVQ checkpoint"):
        push(source, REPO)


def test_name_without_a_user(checkpoint: Path) -> None:
    with pytest.raises(PCDVQError, match="tiny is not the name of a repository; give USER/REPO"):
        push(checkpoint, "tiny")


def test_card(checkpoint: Path, evaluation: Path) -> None:
    """Sizes from the files, the commands from the record; no paths of the machine it is made on."""
    record = json.loads((checkpoint / REPORT_FILE).read_text())
    tuning = {"calibration": "/data/text.txt", "reference": record["model"], "minutes": None}
    tuned = {**record, "finetune": {"options": {**tuning, "tokens": 4096}}}
    (checkpoint / REPORT_FILE).write_text(json.dumps(tuned))
    try:
        write_model_card(checkpoint, [evaluation])
    finally:
        (checkpoint / REPORT_FILE).write_text(json.dumps(record))
    card = (checkpoint / "README.md").read_text()
    assert "pcdvq quantize tiny OUT --seed 0 --calibration none --samples 24" in card
    rates = "--bits 3 --codec trellis --embedding-bits 16 --max-tp 8"
    assert f"--skip '*.k_proj' {rates} --objective hessian --effort auto\n" in card
    finetune = "pcdvq finetune OUT OUT --calibration text.txt --reference tiny --tokens 4096"
    assert f"{finetune} --overwrite\n" in card
    assert (
        "| out | chat KL, nats | at least 0.0521 | 0.0040 | requests.jsonl, 99 answers of "
        "org/original |" in card
    )
    assert "| out |   same top token | 91.0 %" in card
    assert "| out | last word | 42.5 % | 2.2 % | lambada.jsonl, 500 lines |" in card
    weights = 2 * (64 * 64 * 2 + 32 * 64 + 3 * 64 * 192)
    assert f"({2 * weights / 2**20:.1f} MiB at 16 bits per weight)" in card
    assert str(checkpoint.parent) not in card
    used = [line for line in card.splitlines() if DIRECTION_AND_MAGNITUDE["trellis"] in line]
    assert used == [f"- trellis: {DIRECTION_AND_MAGNITUDE['trellis']}."]
    assert DIRECTION_AND_MAGNITUDE["e8"] not in card


EVIL = "a|b<script>alert(1)</script> `x` [l](u) *b*\n---\n```\n# h \x1b[2J"


def rendered(card: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card)


def test_names_do_nothing_in_the_card(checkpoint: Path, tmp_path: Path) -> None:
    """Whatever a checkpoint, a record or a file of figures calls things, it is text."""
    out = shutil.copytree(checkpoint, tmp_path / "out")
    record = json.loads((out / REPORT_FILE).read_text())
    write_model_card(out)
    plain_card = rendered((out / "README.md").read_text().split("\n---\n", 1)[1])
    name = EVIL.replace("/", "")  # which only the last part of a path is shown of
    options = {"calibration": EVIL, "skip": [EVIL], "seed": 0, EVIL: EVIL}
    (out / REPORT_FILE).write_text(json.dumps({**record, "model": name, "options": options}))
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["modules_to_not_convert"] = [EVIL.split("\n")[0]]
    (out / "config.json").write_text(json.dumps(config))
    report = EvaluationReport(
        name, "hf", EVIL, EVIL,
        Protocol(DataFile(EVIL, EVIL), 64, 5, None, None, bos=False),
        Perplexity(21.1, 0.8, 3.05, 40, 81880, 9.0), None, None, 1.0, {},
    )  # fmt: skip
    (tmp_path / "eval.json").write_text(report.to_json())
    write_model_card(out, [tmp_path / "eval.json"])
    card = (out / "README.md").read_text()
    assert "\x1b" not in card
    front, body = card.removeprefix("---\n").split("\n---\n", 1)
    assert "base_model" not in yaml.safe_load(front)
    page = rendered(body)
    for tag in ("<script", "<em>", '<a href="u', "<hr"):
        assert tag not in page
    for tag in ("<h1>", "<pre>", "<table>", "<tr>"):
        added = 1 if tag == "<table>" else 2 if tag == "<tr>" else 0  # the figures
        assert page.count(tag) == plain_card.count(tag) + added, tag
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    assert {row.count("<td>") for row in rows} <= {0, 2, 5}
    assert page.count("&lt;script&gt;") >= 4


@pytest.mark.parametrize(
    ("record", "commands"),
    [
        ({}, 0),
        ({"options": {"seed": 0}}, 1),
        ({"model": "m", "options": {"seed": float("nan"), "skip": [1, [2]], "a": None}}, 1),
        ({"model": "", "finetune": {}}, 1),
    ],
)
def test_card_of_a_sparse_record(
    checkpoint: Path, tmp_path: Path, record: dict, commands: int
) -> None:
    out = shutil.copytree(checkpoint, tmp_path / "out")
    (out / REPORT_FILE).write_text(json.dumps(record))
    write_model_card(out)
    assert (out / "README.md").read_text().count("\npcdvq ") == commands


@pytest.mark.parametrize(
    "record", [{"options": []}, {"model": 7}, {"finetune": []}, {"errors": {"a": {"weight": "x"}}}]
)
def test_card_of_an_odd_record(checkpoint: Path, tmp_path: Path, record: dict) -> None:
    out = shutil.copytree(checkpoint, tmp_path / "out")
    (out / REPORT_FILE).write_text(json.dumps(record))
    with pytest.raises(PCDVQError, match="is not the record of a run"):
        write_model_card(out)


def test_recorded_options_are_options(checkpoint: Path) -> None:
    """What the card shows can be typed: each field of the options is an option of the command."""
    commands = get_command(cli.app).commands
    for name, options in (("quantize", QuantizeOptions()), ("finetune", FinetuneOptions())):
        flags = {flag for parameter in commands[name].params for flag in parameter.opts}
        assert {f"--{field.replace('_', '-')}" for field in asdict(options)} <= flags
