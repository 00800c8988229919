"""Damaged checkpoints: hypothesis strategies for everything that may be wrong with their files."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from pcdvq_kernels.checkpoint import CODEBOOK_FILE, INDEX_FILE, REPORT_FILE

SHARD = "model-00001-of-00001.safetensors"
CONFIG = "config.json"
JSON_FILES = (CONFIG, INDEX_FILE, REPORT_FILE)
TENSOR_FILES = (SHARD, CODEBOOK_FILE)
FILES = (*JSON_FILES, *TENSOR_FILES)


class Files(dict[str, bytes]):
    """Contents by file name, too long to print."""

    def __repr__(self) -> str:
        return f"<{len(self)} files>"


Path_ = tuple[Any, ...]  # keys and indices that lead to a place in a JSON value


@dataclass
class Damaged:
    """Files of a checkpoint; `special` are made of something else than bytes, or left out."""

    files: Files
    special: dict[str, Callable[[Path], None]] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Replace whatever is in `directory`."""
        for path in directory.iterdir():
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        for name, content in self.files.items():
            if name in self.special:
                self.special[name](directory / name)
            else:
                (directory / name).write_bytes(content)


def read_files(directory: Path) -> Files:
    return Files({name: (directory / name).read_bytes() for name in FILES})


# Values that have broken parsers of sizes, names and numbers.
NASTY: tuple[Any, ...] = (
    *(None, True, False, "", {}, [], 0, -1, 1, 2, 3, 7, 8, 9, 16, 17, 32, 64, 127, 128, 255, 256),
    *(2**31 - 1, 2**31, 2**32, -(2**31), 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.5, 1.0, 8.0, 1e400, -1e400, float("nan"), "1", "8", "64", "\u0664", "\u00b2", "nan"),
    *("/etc/passwd", "../x.safetensors", "..", ".", "a/b", "a\0b", "\ud800", "\x1b[2J", "[/red]"),
    *(CODEBOOK_FILE, CONFIG, SHARD, SHARD.upper(), "é" * 300, "x" * 5000, "~", "file:///", "\n"),
    *("trellis", "e8", "pvq", "int8", "int16", "float", "pcdvq", "gptq"),
    *("U8", "I8", "BF16", "F16", "F32", "F64", "I64", "BOOL", "F8_E4M3", "F8_E8M0", "F4"),
    *([0], [1], [8], [0, 8], [8, 0], [2**63, 2], [2**32, 2**32], [0, 2**64 - 1], [-1, 4], [1] * 70),
)
# Longer or deeper than a parser may like, as text.
RAW = (
    "[" * 100_000,
    '{"a":' * 50_000,
    "1" * 5000,
    '"' + "\\ud800" * 3 + '"',
    "\ufeff{}",
    "NaN",
    "{}{}",
    "[" * 900 + "]" * 900,
)

values = st.sampled_from(NASTY) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=4,
)


def _places(value: Any, prefix: Path_ = ()) -> list[Path_]:
    """Every place in a JSON value but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    found = []
    for key, inner in items:
        found.append((*prefix, key))
        if isinstance(inner, dict | list):
            found += _places(inner, (*prefix, key))
    return found


@st.composite
def edited(draw: st.DrawFn, value: Any, inside: Path_ = ()) -> Any:
    """`value` with one to three places below `inside` replaced, renamed, repeated or removed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        target = value
        for key in inside:
            target = target[key]
        places = _places(target)
        if not places:
            break
        *way, last = draw(st.sampled_from(places))
        for key in way:
            target = target[key]
        action = draw(st.sampled_from(("replace", "replace", "near", "rename", "remove", "copy")))
        if action == "near" and type(target[last]) is int:
            target[last] += draw(st.sampled_from((-8, -1, 1, 8)))
        elif action in ("replace", "near") or isinstance(target, list):
            target[last] = copy.deepcopy(draw(values))
        elif action == "copy":
            target[draw(st.text(max_size=6))] = copy.deepcopy(target[last])
        elif action == "rename":
            name = draw(st.sampled_from([value for value in NASTY if isinstance(value, str)]))
            target[name] = target.pop(last)
        else:
            del target[last]
    return value


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes, end: int | None = None) -> bytes:
    """`content` with one to four changes before byte `end`."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, min(len(data), len(data) if end is None else end)))
        action = draw(st.sampled_from(("flip", "write", "insert", "delete", "truncate", "repeat")))
        if action == "flip" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif action == "write":
            new = draw(st.binary(min_size=1, max_size=9))
            data[at : at + len(new)] = new
        elif action == "insert":
            data[at:at] = draw(st.binary(min_size=1, max_size=9))
        elif action == "delete":
            del data[at : at + draw(st.integers(1, 9))]
        elif action == "repeat":
            data[at:at] = data[at : at + draw(st.integers(1, 200))]
        else:
            del data[at:]
    return bytes(data)


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes, inside: Path_ = ()) -> bytes:
    kind = draw(st.sampled_from(("edit", "edit", "edit", "bytes", "raw", "twice")))
    if kind == "bytes":
        return draw(damaged_bytes(content))
    if kind == "edit":
        return json.dumps(draw(edited(json.loads(content), inside))).encode()
    text = content.decode()
    if kind == "raw":
        raw = draw(st.sampled_from(RAW))
        if draw(st.booleans()):
            return raw.encode()
        return text.replace('"', f'"x": {raw}, "', 1).encode()
    at = draw(st.sampled_from([i for i, c in enumerate(text) if c == "{"])) + 1
    key = draw(st.sampled_from(("layers", "codebooks", "weight_map", SHARD, "x", "chain_rows")))
    member = json.dumps(key) + ": " + json.dumps(draw(values))
    return f"{text[:at]}{member}, {member}, {text[at:]}".encode()


def split_tensors(content: bytes) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file."""
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def join_tensors(header: bytes, data: bytes, length: int | None = None) -> bytes:
    return (len(header) if length is None else length).to_bytes(8, "little") + header + data


@st.composite
def damaged_tensors(draw: st.DrawFn, content: bytes) -> bytes:
    header, data = split_tensors(content)
    kind = draw(st.sampled_from(("edit", "edit", "header", "length", "data", "data", "bytes")))
    if kind == "edit":
        return join_tensors(json.dumps(draw(edited(header))).encode(), data)
    if kind == "header":
        raw = draw(damaged_json(json.dumps(header).encode()))
        return join_tensors(raw, data)
    if kind == "length":
        length = draw(st.integers(0, 2**64 - 1) | st.integers(0, len(content) + 8))
        return join_tensors(json.dumps(header).encode(), data, length)
    if kind == "bytes":
        return draw(damaged_bytes(content, end=len(content) - len(data)))
    # Other values where the header says that there is a tensor.
    tensors = [header[name]["data_offsets"] for name in sorted(header.keys() - {"__metadata__"})]
    first, last = draw(st.sampled_from([each for each in tensors if each[0] < each[1]]))
    fill = draw(st.sampled_from((b"\x00", b"\xff", b"\x7f", b"\x80", b"\xc0\x7f", b"\x80\x7f")))
    size = draw(st.integers(1, last - first))
    new = (fill * size)[:size]
    return join_tensors(json.dumps(header).encode(), data[:first] + new + data[first + size :])


SPECIAL: tuple[Callable[[Path], None], ...] = (
    lambda path: None,
    lambda path: path.mkdir(),
    lambda path: os.mkfifo(path),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("/etc/passwd"),
    lambda path: path.symlink_to("missing"),
    lambda path: path.write_bytes(b""),
)


@st.composite
def damaged(draw: st.DrawFn, bases: list[Files]) -> Damaged:
    """One of the checkpoints with one or two of its files damaged."""
    result = Damaged(Files(draw(st.sampled_from(bases))))
    names = {draw(st.sampled_from((CONFIG, CONFIG, SHARD, SHARD, CODEBOOK_FILE, *JSON_FILES)))}
    if draw(st.integers(0, 3)) == 0:
        names.add(draw(st.sampled_from(FILES)))
    for name in sorted(names):
        if draw(st.integers(0, 24)) == 0:
            result.special[name] = draw(st.sampled_from(SPECIAL))
        elif name in TENSOR_FILES:
            result.files[name] = draw(damaged_tensors(result.files[name]))
        else:
            inside = ("quantization_config",) if name == CONFIG else ()
            result.files[name] = draw(damaged_json(result.files[name], inside))
    return result
