"""`pcdvq doctor` on installations that are as they should be, and on broken ones."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest
from pcdvq_kernels import cpu
from pcdvq_quantizer import cli, doctor
from pcdvq_quantizer.doctor import examine
from typer.testing import CliRunner


def finding(check: str) -> doctor.Finding:
    return next(each for each in examine() if each.check == check)


def test_this_installation_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(doctor.THREADS_BIND, "0")
    findings = examine()
    assert [each.check for each in findings] == ["vLLM", "plugin", "kernels", "threads"]
    assert not any(each.remedy for each in findings)
    assert CliRunner().invoke(cli.app, ["doctor"]).exit_code == 0


def test_wrong_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "0.31.2")
    assert finding("vLLM").found == "0.31.2"
    assert "vllm<0.33,>=0.32" in finding("vLLM").remedy
    result = CliRunner().invoke(cli.app, ["doctor"])
    assert result.exit_code == 1
    assert "0.31.2" in result.output


def test_vllm_without_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", missing)
    assert finding("vLLM").fatal
    assert "packaging/vllm" in finding("vLLM").remedy


def test_nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    monkeypatch.setattr(doctor.metadata, "entry_points", lambda group: ())
    assert finding("vLLM").found == "not installed"
    assert finding("plugin").fatal


def test_torchvision_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    monkeypatch.setattr(doctor, "import_module", broken)
    assert "nms does not exist" in finding("torchvision").found
    assert "pip uninstall torchvision" in finding("torchvision").remedy


def test_slow_setups_are_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(doctor.THREADS_BIND, raising=False)
    monkeypatch.setattr(cpu, "available", lambda: False)
    assert "g++" in finding("kernels").remedy
    assert doctor.THREADS_BIND in finding("threads").remedy
    assert not finding("kernels").fatal
    assert not finding("threads").fatal


def test_where_transformers_cannot_be_imported() -> None:
    """That is one of the things it finds the reason of."""
    program = "import sys; sys.modules['transformers'] = None\n"
    program += "from pcdvq_quantizer.cli import app; app(['doctor'])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "Traceback" not in result.stderr
    assert "kernels" in result.stdout
