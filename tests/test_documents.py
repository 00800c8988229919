"""The documents: links, and the files, codecs, commands and options they name, are there."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from urllib.parse import unquote

import pytest
from pcdvq_quantizer.cli import app
from pcdvq_quantizer.codebooks import OFFERED
from typer.main import get_command

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`[^`\n]+`")
LINK = re.compile(r"\]\(([^()\s]+)\)")
HEADING = re.compile(r"^#{1,6} +(.+)$", re.MULTILINE)
# Files of this repository, by the ends of their names; others are the reader's.
OURS = re.compile(r"[\w./-]+\.(?:py|h|cpp|md|png|j2|toml)\b")
CODEC = re.compile(r"--codec[ =](\w+)")
COMMAND = re.compile(r"^ *pcdvq (\w+)(.*)$", re.MULTILINE)


def files_of_git() -> list[str]:
    """Tracked files, and new ones that git does not ignore; none outside of a checkout."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


FILES = files_of_git()
DOCUMENTS = [name for name in FILES if name.endswith(".md")]


def anchors(text: str) -> set[str]:
    """Anchors that the headings of a document make, as GitHub names them."""
    headings = HEADING.findall(CODE.sub("", text))
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in plain}


def leads_somewhere(link: str, document: Path, text: str) -> bool:
    """Whether `link` of `document` leads to a file, and to a heading of it if it names one."""
    place, _, anchor = unquote(link).partition("#")
    if place:
        target = (document.parent / place).resolve()
        if not target.is_relative_to(ROOT) or not target.exists():
            return False
        text = target.read_text() if anchor else ""
    return not anchor or anchor in anchors(text)


def broken_links(document: Path, text: str) -> list[str]:
    found = LINK.findall(SPAN.sub("", CODE.sub("", text)))
    links = (link for link in found if not re.match(r"[a-z]+:", link))
    return [link for link in links if not leads_somewhere(link, document, text)]


def missing_files(text: str) -> list[str]:
    """Files of this repository that code spans of `text` name and that are not there."""
    spans = SPAN.findall(CODE.sub("", text))
    named = {match.group() for span in spans for match in OURS.finditer(span)}
    return sorted(n for n in named if not any(f"/{path}".endswith(f"/{n}") for path in FILES))


def unknown_options(text: str) -> list[str]:
    """Commands of `pcdvq` in code blocks of `text`, and options of them, that do not exist."""
    commands = get_command(app).commands
    unknown = []
    for block in CODE.finditer(text):
        for name, arguments in COMMAND.findall(block.group().replace("\\\n", " ")):
            if name not in commands:
                unknown.append(f"pcdvq {name}")
            elif name != "serve":  # which hands other options on to vLLM
                known = {option for each in commands[name].params for option in each.opts}
                given = re.findall(r"(?<!\S)--[\w-]+", arguments.partition("#")[0])
                unknown += [f"pcdvq {name} {option}" for option in given if option not in known]
    return unknown


@pytest.mark.parametrize("name", DOCUMENTS)
def test_document(name: str) -> None:
    document = ROOT / name
    text = document.read_text()
    assert broken_links(document, text) == []
    assert missing_files(text) == []
    assert set(CODEC.findall(text)) <= OFFERED.keys()
    assert unknown_options(text) == []


@pytest.mark.skipif(not FILES, reason="not a checkout")
def test_what_is_wrong_is_found() -> None:
    text = (
        "# A `b` [c](d.md)\n[x](#a-b-c) [y](#a-b) [z](docs/none.md) [w](README.md#none)\n"
        "`kernels/none.h` `cli.py` `mine.txt`\n"
        "```bash\npcdvq none\npcdvq inspect OUT --none  # --not-this\n```\n"
    )
    assert broken_links(ROOT / "x.md", text) == ["d.md", "#a-b", "docs/none.md", "README.md#none"]
    assert missing_files(text) == ["kernels/none.h"]
    assert unknown_options(text) == ["pcdvq none", "pcdvq inspect --none"]
