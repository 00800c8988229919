"""What of a model goes along into a checkpoint, with which modes, and what pages may replace."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import huggingface_hub.constants
import pytest
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer import cli
from pcdvq_quantizer.contents import companions
from pcdvq_quantizer.files import check_page, write_page
from pcdvq_quantizer.layer import LayerError, StoredLayer
from pcdvq_quantizer.output import Output
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from pcdvq_quantizer.writer import CheckpointWriter
from typer.testing import CliRunner


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A directory to work in, which has a model."""
    save_model(tmp_path / "place" / "model", tiny_config(num_hidden_layers=1))
    return tmp_path / "place"


def quantize(model: Path, out: Path) -> None:
    options = QuantizeOptions(bits=2.0, calibration="none")
    quantize_model(make_plan(str(model), options), out, overwrite=True)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_umask_decides_who_may_read(place: Path, umask: int) -> None:
    previous = os.umask(umask)
    try:
        quantize(place / "model", place / "out")
    finally:
        os.umask(previous)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (place / "out").iterdir()}
    assert modes == {0o666 & ~umask}


SECRETS = (".env", "id_rsa", "evil.py", "x.pkl", "LICENSE.py", "tokenizer.json.bak", "notes.json")
ALLOWED = ("LICENSE", "chat_template.jinja", "added_tokens.json", "preprocessor_config.json")


def test_only_allowed_kinds_go_along(place: Path) -> None:
    model = place / "model"
    for name in (*SECRETS, *ALLOWED):
        (model / name).write_text("{}")
    (model / "link.json").symlink_to("/etc/passwd")
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tools.jinja").write_text("tools")
    quantize(model, place / "out")
    found = {path.name for path in (place / "out").iterdir()}
    assert not {*SECRETS, "link.json"} & found
    assert {*ALLOWED, "tokenizer.json", "tokenizer_config.json"} <= found
    assert (place / "out" / "additional_chat_templates" / "tools.jinja").read_text() == "tools"
    quantize(model, place / "out")  # all of that is a checkpoint, which may be replaced


def test_links_lead_to_the_model_or_the_hubs_cache(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, secret = place / "model", place / "secret"
    secret.write_text("mine")
    (model / "LICENSE").symlink_to(secret)
    with pytest.raises(PCDVQError, match=r"LICENSE is a link to .*secret, which is no part of"):
        quantize(model, place / "out")
    assert {path.name for path in place.iterdir()} == {"model", "secret"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(place))
    quantize(model, place / "out")
    assert (place / "out" / "LICENSE").read_text() == "mine"
    assert not (place / "out" / "LICENSE").is_symlink()
    (model / "LICENSE").unlink()
    (model / "LICENSE").symlink_to("nowhere")
    with pytest.raises(PCDVQError, match="LICENSE is not a regular file"):
        quantize(model, place / "out")


def test_pipe_in_the_place_of_a_tokenizer(place: Path) -> None:
    (place / "model" / "vocab.json").unlink(missing_ok=True)
    os.mkfifo(place / "model" / "vocab.json")
    with pytest.raises(PCDVQError, match=r"vocab\.json is not a regular file"):
        quantize(place / "model", place / "out")


def test_names_of_companions(tmp_path: Path) -> None:
    good = ("tokenizer.model", "tokenizer.model.v3", "qwen.tiktoken", "LICENSE-MODEL", "NOTICE.txt")
    bad = ("tokenizer.py", "LICENSE.pkl", "config.json", "model.safetensors", "a.jinja.py", "x.md")
    for name in (*good, *bad):
        (tmp_path / name).touch()
    assert companions(tmp_path) == sorted(good)


def test_pages_replace_only_their_own_kind(tmp_path: Path) -> None:
    """Links are followed; hard links keep what they had; devices are written to."""

    def is_ours(path: Path) -> bool:
        return path.read_text().startswith("ours")

    page, other = tmp_path / "page", tmp_path / "other"
    page.write_text("ours 1")
    other.hardlink_to(page)
    (tmp_path / "link").symlink_to(page)
    for name in ("page", "link", "new", "empty"):
        (tmp_path / "empty").write_text("")
        write_page(check_page(tmp_path / name, "--json", "page", is_ours), "ours 2", "--json")
        assert (tmp_path / name).read_text() == "ours 2"
    assert (tmp_path / "link").is_symlink()
    assert other.read_text() == "ours 1"
    other.unlink()
    other.write_text("mine")
    for path, message in (
        (other, "exists and is no page; choose another --json"),
        (tmp_path, "exists and is no page"),
        (tmp_path / "none" / "page", "there is no directory"),
    ):
        with pytest.raises(PCDVQError, match=message):
            check_page(path, "--json", "page", is_ours)
    write_page(check_page(Path(os.devnull), "--json", "page", is_ours), "text", "--json")
    assert not Path(os.devnull).is_file()


def test_eval_keeps_other_files(place: Path) -> None:
    weights = place / "model" / "model.safetensors"
    before = weights.read_bytes()
    arguments = ["eval", str(place / "out"), "--text", "t.txt", "--json", str(weights)]
    result = CliRunner().invoke(cli.app, arguments)
    assert "is no report of pcdvq eval" in str(result.exception)
    assert weights.read_bytes() == before


def test_names_of_layers_are_no_paths(place: Path) -> None:
    writer = CheckpointWriter(Output.at(place / "out"), {})
    with writer.open(0):
        for name in ("../../../evil", "/evil", "a" * 5000, "a" * 5001):
            writer.write_layer(name, StoredLayer({}, LayerError(len(name), 0.0)))
            stored = writer.read_layer(name)
            assert stored
            assert stored.error.weight == len(name)
        assert len(list(writer.work_directory.iterdir())) == 4
    assert json.loads((place / "out.partial" / "run.json").read_text()) == {}
