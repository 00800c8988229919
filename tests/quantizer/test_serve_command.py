"""`pcdvq serve`: what it hands to `vllm serve`, and when it quantizes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.checkpoint import open_checkpoint
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import cli, serving
from pcdvq_quantizer.redaction import redacted
from typer.testing import CliRunner, Result


class Started(Exception):
    """Stands for vLLM: this process would be it from here on."""


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[list[str], dict]]:
    made: list[tuple[list[str], dict]] = []

    def start(file: str, command: list[str], environment: dict[str, str]) -> None:
        made.append((command, environment))
        raise Started

    monkeypatch.setattr(os, "execvpe", start)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    return made


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", tiny_config(num_hidden_layers=1))


def serve(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


def test_quantizes_once_and_passes_options_on(model: Path, calls: list) -> None:
    options = ("--bits", "2", "--calibration", "none", "--port", "9", "--enforce-eager")
    made = serve(model, *options)
    assert isinstance(made.exception, Started)
    assert "MiB before" in made.output
    assert isinstance(serve(model, *options).exception, Started)
    (command, environment), (again, _) = calls
    assert command == again
    assert Path(command[0]).name == "vllm"
    assert command[1] == "serve"
    assert command[3:] == ["--quantization", "pcdvq", "--port", "9", "--enforce-eager"]
    assert len(environment["VLLM_CPU_OMP_THREADS_BIND"].split(",")) == len(os.sched_getaffinity(0))
    layers = open_checkpoint(Path(command[2])).layers.values()
    assert {layer.codebook for layer in layers} == {"trellis-2", "trellis-2-rows16"}

    assert isinstance(serve(model, "--bits", "3", "--calibration", "none").exception, Started)
    assert calls[2][0][2] != command[2]


def test_checkpoint_is_served_as_it_is(
    model: Path, calls: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    arguments = ["quantize", str(model), str(out), "--bits", "2", "--calibration", "none"]
    assert CliRunner().invoke(cli.app, arguments).exit_code == 0
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "1")
    assert isinstance(serve(out).exception, Started)
    command, environment = calls[0]
    assert command[2] == str(out)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert not (tmp_path / "cache").exists()


def test_checkpoint_of_the_hub_is_served_as_it_is(
    calls: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"quantization_config": {"quant_method": "pcdvq"}}')
    asked = []
    monkeypatch.setattr(serving, "hf_hub_download", lambda *what: asked.append(what) or config)
    assert isinstance(serve("someone/model").exception, Started)
    assert asked == [("someone/model", "config.json")]
    assert calls[0][0][2] == "someone/model"


def test_cache_that_cannot_be_written(
    model: Path, monkeypatch: pytest.MonkeyPatch, calls: list, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = serve(model, "--calibration", "none")
    assert isinstance(result.exception, PCDVQError)
    assert "XDG_CACHE_HOME" in str(result.exception)
    assert not calls


def test_secrets_are_not_shown(
    model: Path, calls: list, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither in the command that is shown, nor in an error; vLLM gets them."""
    options = ("--calibration", "none", "--api-key", "hush1", "hush2", "--port", "9")
    result = serve(model, *options, "--hf-token=hush3")
    assert isinstance(result.exception, Started)
    assert "hush" not in result.output
    assert "--api-key '***' '***' --port 9" in result.output
    assert calls[0][0][-5:] == ["hush1", "hush2", "--port", "9", "--hf-token=hush3"]

    def fail(*arguments: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(os, "execvpe", fail)
    for arguments in ((model, *options), ("--api-key=hush1", model)):
        monkeypatch.setattr("sys.argv", ["pcdvq", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit):
            cli.main()
        shown = capsys.readouterr()
        assert "hush" not in shown.out + shown.err
        assert "error: " in shown.err


def test_model_in_brackets(calls: list) -> None:
    """The name is no markup."""
    assert isinstance(serve("[/red]").exception, PCDVQError)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ("--api-key a b --port 9", "--api-key *** *** --port 9"),
        ("--api_key=a --hf-token b", "--api_key=*** --hf-token ***"),
        ("--api-k a --api a --hf-tok a", "--api-k *** --api *** --hf-tok ***"),
        ("--api-key -a -b --port 9", "--api-key *** *** --port 9"),
        ("--additional-config.api_key=a", "--additional-config.api_key=***"),
        ('--x {"apiKey":"a","b":[{"token":"c"}],"d":1}',
         '--x {"apiKey": "***", "b": [{"token": "***"}], "d": 1}'),
        ("--x {damaged", "--x ***"),
        ("--url https://me:a@host/x?token=a&n=1", "--url https://***@host/x?token=***&n=1"),
        ("--url hf_aaaaaaaaaaaa", "--url ***"),
        ("--max-num-batched-tokens 9 --tokenizer t -tp 2 -O3 --spec-tokens 4",
         "--max-num-batched-tokens 9 --tokenizer t -tp 2 -O3 --spec-tokens 4"),
        ("--port 8000 --model org/name --hf-overrides a=1",
         "--port 8000 --model org/name --hf-overrides a=1"),
    ],
)  # fmt: skip
def test_what_of_options_is_shown(arguments: str, shown: str) -> None:
    words = arguments.split(" ")
    assert list(redacted(words)) == (shown.split(" ") if '{"' not in shown else ["--x", shown[4:]])


def test_header_with_a_secret() -> None:
    shown = redacted(["Authorization: Bearer abc", "x-api-key: abc"])
    assert list(shown) == ["Authorization: *** ***", "x-api-key: ***"]


def test_without_vllm(model: Path, monkeypatch: pytest.MonkeyPatch, calls: list) -> None:
    def missing(*arguments: object) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(os, "execvpe", missing)
    result = serve(model, "--calibration", "none")
    assert "pcdvq doctor" in str(result.exception)
