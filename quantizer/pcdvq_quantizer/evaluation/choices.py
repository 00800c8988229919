"""Multiple-choice tasks that need no download: last words of passages, and generated patterns."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pcdvq_kernels.errors import PCDVQError

from pcdvq_quantizer.evaluation.data import DataFile, Passage, Sequence, read_passages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OPTIONS = 4
SEED = 0  # figures compare only on the same items
PATTERNS = 200  # at most
SHOTS = 3  # solved items before each pattern
NAMES = ("Anna", "Boris", "Clara", "David", "Emma", "Farid", "Greta", "Hugo", "Ines", "Jonas")
THINGS = ("lamp", "coin", "rope", "book", "ring", "drum", "kite", "fork", "bell", "shoe")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "grey")
SERIES = (
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September"),
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    ("A", "B", "C", "D", "E", "F", "G", "H", "I", "J", "K", "L"),
    ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth"),
)


@dataclass(frozen=True)
class Item:
    """A passage to end; `options` are as many words, the first of which is right."""

    passage: Passage
    options: tuple[str, ...]

    def sequences(self, tokenizer: PreTrainedTokenizerBase, bos: bool) -> list[Sequence]:
        """The passage with each option, which is scored."""
        return [self.passage.ending(option, tokenizer, bos) for option in self.options]


def read_cloze(path: Path, limit: int) -> tuple[DataFile, list[Item]]:
    """The first `limit` lines of a JSONL file, the wrong words from those that end other lines.

    Raises:
        PCDVQError: as `read_passages`, or the lines end in fewer than `OPTIONS` words.
    """
    source, passages = read_passages(path, limit)
    words = sorted({passage.word for passage in passages})
    if len(words) < OPTIONS:
        raise PCDVQError(
            f"{path} has {len(words)} different last words to choose from, cloze needs {OPTIONS}; "
            "give more lines or a larger --limit"
        )
    draw = random.Random(SEED)
    items = []
    for passage in passages:
        others = draw.sample(words, OPTIONS)
        wrong = [word for word in others if word != passage.word][: OPTIONS - 1]
        items.append(Item(passage, (passage.word, *wrong)))
    return source, items


def make_patterns(count: int) -> list[Item]:
    """`count` generated items: sums, counting on, looking up, comparing, copying; in equal parts.

    Each comes after `SHOTS` others of its kind with their answers.
    """
    draw = random.Random(SEED)
    kinds: tuple[Callable[[random.Random], tuple[str, list[str]]], ...] = (
        _sum, _next, _owner, _largest, _copy,
    )  # fmt: skip
    items = []
    for number in range(count):
        kind = kinds[number % len(kinds)]
        shots = [kind(draw) for _ in range(SHOTS)]
        question, answers = kind(draw)
        lines = [f"{asked} {options[0]}\n" for asked, options in shots]
        passage = Passage(f"pattern {number}", "".join(lines) + question, answers[0])
        items.append(Item(passage, tuple(answers)))
    return items


def _sum(draw: random.Random) -> tuple[str, list[str]]:
    a, b = draw.randint(1, 20), draw.randint(1, 20)
    wrong = draw.sample([a + b + d for d in (-10, -3, -2, -1, 1, 2, 3, 10) if a + b + d > 0], 3)
    return f"{a} + {b} =", [str(each) for each in (a + b, *wrong)]


def _next(draw: random.Random) -> tuple[str, list[str]]:
    series = draw.choice(SERIES)
    start = draw.randrange(len(series) - 3)
    right = series[start + 3]
    wrong = draw.sample([each for each in series if each != right], OPTIONS - 1)
    return f"{', '.join(series[start : start + 3])},", [right, *wrong]


def _owner(draw: random.Random) -> tuple[str, list[str]]:
    names, things = draw.sample(NAMES, OPTIONS), draw.sample(THINGS, OPTIONS)
    order = draw.sample(range(OPTIONS), OPTIONS)
    facts = " ".join(f"{names[each]} has the {things[each]}." for each in order)
    return f"{facts} The {things[0]} belongs to", names


def _largest(draw: random.Random) -> tuple[str, list[str]]:
    numbers = sorted(draw.sample(range(10, 100), OPTIONS), reverse=True)
    shown = draw.sample(numbers, OPTIONS)
    return f"The largest of {', '.join(map(str, shown))} is", [str(each) for each in numbers]


def _copy(draw: random.Random) -> tuple[str, list[str]]:
    colours = draw.sample(COLOURS, OPTIONS)
    line = " ".join(colours)
    return f"{line} | {line.rpartition(' ')[0]}", [colours[-1], *colours[:-1]]
