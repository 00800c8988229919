"""Reading text and JSONL: calibration and evaluation alike."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.calibration.text import read_documents
from pcdvq_quantizer.evaluation.data import Sequence, read_passages, read_windows
from pcdvq_quantizer.texts import text_identity
from transformers import AutoTokenizer, PreTrainedTokenizerBase

PLAIN = "one two\nthree\n\nfour five six\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(
        save_model(tmp_path_factory.mktemp("model") / "m", tiny_config())
    )


def last_words(path: Path, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Sequence]:
    _, passages = read_passages(path, limit)
    return [passage.sequence(tokenizer, bos=False) for passage in passages]


@pytest.mark.parametrize(
    "content",
    [
        PLAIN.replace("\n", "\r\n").encode(),
        PLAIN.replace("\n", "\r").encode(),
        codecs.BOM_UTF8 + PLAIN.encode(),
    ],
    ids=["crlf", "cr", "bom"],
)
def test_text_is_that_of_the_plain_file(
    content: bytes, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    assert read_documents(str(path)) == [PLAIN]
    _, (window,) = read_windows(path, tokenizer, len(PLAIN), 9, bos=False)
    assert window.tokens.tolist() == list(PLAIN.encode())
    path.write_bytes(codecs.BOM_UTF8 + b'{"text": "one\\r\\ntwo"}\r\n\r\n{"text": "\\rthree four"}')
    path = path.rename(path.with_suffix(".JSONL"))
    assert read_documents(str(path)) == ["one\ntwo", "\nthree four"]
    path.write_bytes(codecs.BOM_UTF8 + b'{"text": "one two\\r\\n"}\r\n\r\n{"text": "three four"}')
    lines = last_words(path, tokenizer, 9)
    assert [bytes(line.tokens.tolist()) for line in lines] == [b"one two\n", b"three four"]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x1c", "\x1e"])
def test_characters_that_end_no_line(
    character: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """JSON strings may hold them as they are, unless they are control characters."""
    text = f"one{character}two three"
    escaped = json.dumps({"text": text}, ensure_ascii=character < " ")
    path = tmp_path / "lines.jsonl"
    path.write_text(f"{escaped}\n{escaped}\n", encoding="utf-8")
    assert read_documents(str(path)) == [text, text]
    assert len(last_words(path, tokenizer, 9)) == 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n", "is empty"),
        (b"\xe4\xf6\xfc", r"not UTF-8 text \(byte 0\)"),
        ("text".encode("utf-16"), "is UTF-16, not UTF-8"),
        ("text".encode("utf-32"), "is UTF-32, not UTF-8"),
        (b"text\0text", "NUL"),
        (b'{"content": "x"}', r"line 1: no string field 'text' \(found fields content\)"),
        (b'\n{"text": "a b"}\n{"text": 1}', "line 3: no string field 'text'"),
        (b"[1]", r"no string field 'text' \(found list\)"),
        (b'{"text": "a b"}\n{', "line 2 is not JSON"),
        (b"[" * 100_000, "line 1 is not JSON"),
        (b"1" * 5000, "line 1 is not JSON"),
        (b'{"text": "a \\ud83d"}', r"half of a surrogate pair \(\\ud83d\)"),
    ],
)
def test_bad_text(
    content: bytes, message: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Calibration and evaluation refuse it with the same words."""
    path = tmp_path / "lines.jsonl"
    path.write_bytes(content)
    with pytest.raises(PCDVQError, match=message):
        read_documents(str(path))
    with pytest.raises(PCDVQError, match=message):
        last_words(path, tokenizer, 9)


def test_limit_is_of_records(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    """What comes after the last one is nobody's concern."""
    path = tmp_path / "lines.jsonl"
    path.write_text('{"text": "a b"}\n\n{"text": "c d"}\nnonsense')
    assert len(last_words(path, tokenizer, 2)) == 2


def test_files_that_cannot_be_read(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(PCDVQError, match=r"nowhere cannot be read: No such file"):
        read_windows(tmp_path / "nowhere", tokenizer, 8, 1, bos=False)
    with pytest.raises(PCDVQError, match="cannot be read: Is a directory"):
        read_windows(tmp_path, tokenizer, 8, 1, bos=False)
    for name in ("x" * 5000, "~no-such-user/text"):
        assert text_identity(name)["calibration_sha256"] is None
        with pytest.raises(PCDVQError, match=r"is not a file|neither a file"):
            read_documents(name)
