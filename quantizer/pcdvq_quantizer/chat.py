"""Requests to a model, in its chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from pcdvq_kernels.errors import PCDVQError
from transformers import PreTrainedTokenizerBase

from pcdvq_quantizer import sources
from pcdvq_quantizer.texts import text_field, values_of

EVALUATION = "evaluation/requests.jsonl"
CALIBRATION = "calibration/requests.jsonl"  # other requests, some of other kinds
# Of templates that tell the model what day it is: texts must not change from day to day.
TODAY = datetime(2025, 7, 1)
# How a model without a chat template is asked.
PLAIN = "Question: {text}\nAnswer:"
PROBE = "Which colour is it?"


@dataclass(frozen=True)
class Request:
    """What a user asks; `kind` is what figures are grouped by."""

    id: str
    kind: str
    text: str


def bundled(name: str) -> Path:
    """A file of this package, such as `EVALUATION`."""
    return Path(str(files("pcdvq_quantizer").joinpath(name)))


def requests_of(content: bytes, path: Path) -> Iterator[Request]:
    """The requests of a JSONL file: `text` and, if wanted, `kind` and `id` in each line.

    Raises:
        PCDVQError: as `texts.values_of`; a line is no object with such fields, or one is blank.
    """
    for number, (where, record) in enumerate(values_of(content, path), 1):
        text = text_field(record, where)
        kind = text_field(record, where, "kind", "requests")
        name = text_field(record, where, "id", str(number))
        for field, value in (("text", text), ("kind", kind), ("id", name)):
            if not value.strip():
                raise PCDVQError(f"{where}: {field!r} is blank; write something, or drop the line")
        yield Request(name, kind, text)


class Chat:
    """Puts requests into the chat template of a tokenizer, or into `PLAIN` where that fails.

    Attributes:
        has_template: whether the model's own template is used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, note: Callable[[str], None]) -> None:
        """`note` is told what is unusual about the template."""
        self._tokenizer = tokenizer
        self._asked_date = False
        self._parts = False  # whether a message's content is a list of parts
        self.has_template = tokenizer.chat_template is not None and self._works(note)
        if self._asked_date:
            note(f"the chat template adds the date of today; it is given {TODAY:%Y-%m-%d} here")

    def prompt(self, text: str) -> list[int]:
        """Token ids of the request `text`, up to where the answer begins."""
        if self.has_template:
            return self._ids(self._render([self._message("user", text)], answering=True))
        return self._tokenizer(PLAIN.format(text=text))["input_ids"]

    @cached_property
    def ends(self) -> set[int]:
        """Tokens that end an answer."""
        found = {self._tokenizer.eos_token_id} - {None}
        if self.has_template and (tail := self._after_answer()):
            special = set(self._tokenizer.all_special_ids)
            found |= {next((token for token in tail if token in special), tail[0])}
        return found

    def closing(self, token: int) -> list[int]:
        """What the template puts after an answer that `token` ended, that token first."""
        tail = self._after_answer() if self.has_template else []
        return tail[tail.index(token) :] if token in tail else [token]

    def _works(self, note: Callable[[str], None]) -> bool:
        reason = "it leaves out what the user asks"
        for self._parts in (False, True):
            try:
                if PROBE in self._render([self._message("user", PROBE)], answering=True):
                    return True
            except Exception as error:  # a template is a program that can fail in any way
                reason = sources.reason(error)
        note(f"the chat template cannot be used ({reason}); requests are asked as plain text")
        return False

    def _message(self, role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}] if self._parts else text}

    def _render(self, messages: list[dict[str, Any]], answering: bool) -> str:
        rendered = self._tokenizer.apply_chat_template(
            messages, add_generation_prompt=answering, tokenize=False, strftime_now=self._date
        )
        assert isinstance(rendered, str)
        return rendered

    def _date(self, form: str) -> str:
        self._asked_date = True
        return TODAY.strftime(form)

    def _ids(self, rendered: str) -> list[int]:
        return self._tokenizer(rendered, add_special_tokens=False)["input_ids"]

    def _after_answer(self) -> list[int]:
        """Tokens that the template puts after an answer; none where it takes no answers."""
        answer = "It is blue"
        messages = [self._message("user", PROBE), self._message("assistant", answer)]
        try:
            _, found, tail = self._render(messages, answering=False).rpartition(answer)
        except Exception:  # as in `_works`
            return []
        return self._ids(tail) if found else []
