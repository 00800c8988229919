"""Errors of the command line: one line, and a traceback for who asks for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from pcdvq_quantizer import cli, inspection
from typer.testing import CliRunner


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["pcdvq", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pcdvq inspect` with a bug."""
    monkeypatch.delenv("PCDVQ_DEBUG", raising=False)

    def fail(checkpoint: Path) -> None:
        raise ZeroDivisionError("[/red]\nsecond line")

    monkeypatch.setattr(inspection, "inspect_checkpoint", fail)


def test_help_fits_a_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    text = CliRunner(env={"COLUMNS": "80", "LINES": "24"}).invoke(cli.app, ["--help"]).output
    assert len(text.splitlines()) <= 30
    for command in ("quantize", "inspect", "serve", "doctor"):
        assert command in text


def test_bad_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "[bold]model[/bold]"
    assert run(monkeypatch, "inspect", str(missing)) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {missing}/config.json is missing.")


def test_unexpected_error(
    broken: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "inspect", "a b") == 1
    assert capsys.readouterr().err == (
        "error: ZeroDivisionError: [/red] (unexpected; to see where, run: "
        "pcdvq --debug inspect 'a b')\n"
    )


def test_traceback_on_demand(broken: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pcdvq", "--debug", "inspect", "x"])
    with pytest.raises(ZeroDivisionError):
        cli.main()
    monkeypatch.setattr("sys.argv", ["pcdvq", "inspect", "x"])
    monkeypatch.setenv("PCDVQ_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main()


@pytest.mark.parametrize("name", ["a\x1b[2Jb", "a\nb", "\ud800", "x" * 5000])
def test_names_in_messages_are_printable_and_short(name: str) -> None:
    message = str(cli.PCDVQError(f"layer {name} is wrong"))
    assert message.isprintable()
    assert len(message) < 1100
