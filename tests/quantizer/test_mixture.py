"""Calibration windows of text and of requests with the model's answers."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.calibration import conversations, mixture
from pcdvq_quantizer.calibration.conversations import (
    DECISIVE,
    Conversation,
    converse,
    pack,
    passages_as_answers,
)
from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.mixture import (
    CHAT,
    TEXT,
    Wanted,
    calibration_windows,
    mixed_windows,
)
from pcdvq_quantizer.chat import Chat
from pcdvq_quantizer.plan import SELF, QuantizeOptions, make_plan
from pcdvq_quantizer.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

TEMPLATE = (
    "{% for message in messages %}[{{ message['content'] }}\x02\n{% endfor %}"
    "{% if add_generation_prompt %}]{% endif %}"
)
LENGTH = 160


class Notes(Progress):
    """What a run says, and how far it is."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps = self.total = 0

    def start(self, what: str, total: int) -> None:
        self.total += total

    def advance(self, steps: int) -> None:
        self.steps += steps

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("mixture") / "tiny", tiny_config())


@pytest.fixture(scope="module")
def model(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


@pytest.fixture
def tokenizer(directory: Path) -> Tokenizer:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("abcdefgh" * 400)
    return path


def is_text(row: torch.Tensor) -> bool:
    return set(row.tolist()) <= set(b"abcdefgh")


def test_text_and_conversations(model: PreTrainedModel, tokenizer: Tokenizer, text: Path) -> None:
    """In turn; conversations begin where a window does, in the template."""
    progress = Notes()
    wanted = Wanted(str(text), 8, LENGTH, 0)
    found = mixed_windows(wanted, tokenizer, lambda: nullcontext(model), progress)
    windows = found.tokens
    assert windows.shape == (8, LENGTH)
    assert [is_text(row) for row in windows] == [True, False] * 4
    assert found.kinds.tolist() == [TEXT, CHAT] * 4
    assert all(row[0] == ord("[") for row in windows[1::2])
    assert torch.equal((found.weights == DECISIVE).any(1), found.kinds == CHAT)
    assert found.said[::2].all()
    assert not found.said[1::2].all()
    assert progress.steps == progress.total == 4 * LENGTH
    again = mixed_windows(wanted, tokenizer, lambda: nullcontext(model), Progress())
    assert torch.equal(windows, again.tokens)
    other = Wanted(str(text), 8, LENGTH, 1)
    another = mixed_windows(other, tokenizer, lambda: nullcontext(model), Progress())
    assert not torch.equal(windows, another.tokens)


def test_without_a_template(model: PreTrainedModel, tokenizer: Tokenizer, text: Path) -> None:
    """A base model reads mostly the text that was given; some of other kinds."""
    tokenizer.chat_template = None
    wanted = Wanted(str(text), 8, LENGTH, 0)
    windows = mixed_windows(wanted, tokenizer, lambda: nullcontext(model), Progress())
    assert sum(map(is_text, windows.tokens)) == 6


def test_own_text(model: PreTrainedModel, tokenizer: Tokenizer) -> None:
    progress = Notes()
    wanted = Wanted(SELF, 4, LENGTH, 0)
    windows = mixed_windows(wanted, tokenizer, lambda: nullcontext(model), progress)
    assert windows.tokens.shape == (4, LENGTH)
    assert [row[0] == ord("[") for row in windows.tokens] == [False, True] * 2


def test_windows_that_are_held_out(
    model: PreTrainedModel, tokenizer: Tokenizer, text: Path
) -> None:
    """One of each kind, on top of those asked for; of a short text none."""
    wanted = Wanted(str(text), 6, LENGTH, 0, held=1)
    found = mixed_windows(wanted, tokenizer, lambda: nullcontext(model), Progress())
    assert sorted(found.kinds[found.held].tolist()) == [TEXT, CHAT]
    assert found.learnt.shape == (6, LENGTH)
    weights = torch.rand(6, LENGTH)
    spread = found.spread(weights)
    assert torch.equal(spread[~found.held], weights)
    assert not spread[found.held].any()
    for windows, kept in ((4, [TEXT, CHAT]), (1, [])):
        text.write_text("abcdefgh" * (windows * LENGTH // 8))
        found = mixed_windows(wanted, tokenizer, lambda: nullcontext(model), Progress())
        assert sorted(found.kinds[found.held].tolist()) == kept
        assert (found.kinds == TEXT).sum() == windows
        assert (found.kinds == CHAT).sum() == max(2, windows)


def test_short_text_is_refused_before_the_model_is_opened(
    tokenizer: Tokenizer, tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("abc")
    with pytest.raises(PCDVQError, match="less than one window"):
        mixed_windows(Wanted(str(tmp_path / "short"), 8, LENGTH, 0), tokenizer, None, Progress())


def test_a_model_that_does_not_fit(
    directory: Path, tokenizer: Tokenizer, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passages of the text answer, in the template."""
    options = QuantizeOptions(calibration=str(text), samples=4, sequence_length=LENGTH)
    plan = make_plan(str(directory), options)
    layered = LayeredModel(plan.source, plan.selection.layers, torch.device("cpu"))
    assert layered.fits
    assert layered.bytes == 4 * sum(p.numel() for p in layered.model.parameters())
    monkeypatch.setattr(mixture, "load_tokenizer", lambda source: tokenizer)
    monkeypatch.setattr(LayeredModel, "fits", False)
    monkeypatch.setattr(LayeredModel, "whole", None)
    progress = Notes()
    windows = calibration_windows(plan, layered, progress)
    assert [is_text(row) for row in windows.tokens] == [True, False] * 3
    assert any("does not fit into memory" in note for note in progress.notes)
    chat = Chat(tokenizer, print)
    documents = [list(b"abcdefgh" * 400)]
    (row,) = passages_as_answers(chat, documents, 1, 2 * LENGTH, 0).tokens.tolist()
    answer = row.index(ord("]")) + 1
    assert row[answer : answer + 96] == documents[0][:96]
    assert row[answer + 96 : answer + 98] == [2, ord("\n")]


def test_bad_answers_are_left_out(
    model: PreTrainedModel, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless they are nearly all there is."""
    chat = Chat(tokenizer, print)
    good = list(b"some words of 1 answer\x02")
    count = len(conversations.shuffled_requests(0))

    def answers(share: int) -> Notes:
        numbers = iter(range(10**6))

        def say(
            model: object, batch: list[list[int]], *rest: object
        ) -> list[tuple[list[int], ...]]:
            bad = ([2], [5] * 96)
            return [
                (each, good if (n := next(numbers)) % share == 0 else bad[n % 2]) for each in batch
            ]

        progress = Notes()
        with monkeypatch.context() as patch:
            patch.setattr(conversations, "continue_texts", say)
            found = converse(model, chat, 30, LENGTH, 0, progress).tokens
        assert found.shape == (30, LENGTH)
        loops = sum(row[i : i + 9] == [5] * 9 for row in found.tolist() for i in range(LENGTH))
        assert (loops == 0) == (not progress.notes)
        return progress

    assert answers(2).notes == []
    (note, *_) = answers(9).notes
    assert f"of {count} answers of this model" in note
    assert "empty or go in circles" in note


def test_windows_begin_with_a_conversation() -> None:
    lengths = [3, 3, 2, 5, 1]
    ends = torch.tensor(lengths).cumsum(0).tolist()
    conversations = [
        Conversation(list(range(end - length + 1, end + 1)), 1, length)
        for length, end in zip(lengths, ends, strict=True)
    ]
    packed = pack(conversations, 9, 4)
    assert packed.tokens.tolist() == [[1, 2, 3, 4], [7, 8, 9, 10]]
    assert packed.weights.shape == (2, 4)
    assert pack(conversations, 1, 4).tokens.tolist() == [[1, 2, 3, 4]]
    assert pack([], 3, 4).tokens.shape == (0, 4)


def test_what_follows_an_answer(tokenizer: Tokenizer) -> None:
    chat = Chat(tokenizer, print)
    assert Conversation.of(chat, [5], [6, 2]).tokens == [5, 6, 2, ord("\n")]
    assert Conversation.of(chat, [5], [6, 7]).tokens == [5, 6, 7]


def test_answers_begin_with_decisive_tokens() -> None:
    """The last token before the answer predicts its first."""
    conversation = Conversation(list(range(10)), 5, 8)
    weights = conversation.weights
    assert weights == [1.0] * 4 + [DECISIVE] * 4 + [1.0] * 2
    assert conversation.said == [False] * 4 + [True] * 3 + [False] * 3
    assert Conversation([1, 2], 1, 2).weights == [DECISIVE] * 2
