"""Calibration text that the model writes."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from models import save_model, tiny_config
from pcdvq_quantizer.calibration.generate import (
    OPENINGS,
    generate_documents,
    prompts,
    without_loops,
)
from pcdvq_quantizer.chat import bundled
from pcdvq_quantizer.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

PROSE = "It grew in the shade of old walls, and few who passed by knew its name or its use. "


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("generate") / "tiny", tiny_config())


@pytest.fixture(scope="module")
def tokenizer(model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(model)


def test_documents(model: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    whole = AutoModelForCausalLM.from_pretrained(model)

    def write(seed: int) -> list[list[int]]:
        return generate_documents(whole, tokenizer, 2000, seed, Progress())

    state = torch.get_rng_state()
    documents = write(0)
    assert torch.equal(state, torch.get_rng_state())
    assert sum(map(len, documents)) >= 2000
    assert write(0) == documents
    assert write(1) != documents


def test_openings(tokenizer: PreTrainedTokenizerBase) -> None:
    openings = bundled(OPENINGS).read_text(encoding="utf-8").splitlines()
    assert len(openings) > 100
    found = [tuple(ids) for ids in islice(prompts(tokenizer, 0), 2 * len(openings))]
    expected = Counter(tuple(tokenizer(line)["input_ids"]) for line in openings)
    for half in (found[: len(openings)], found[len(openings) :]):
        assert Counter(half) == expected
    assert found[: len(openings)] != found[len(openings) :]


def test_texts_that_loop_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    prose, loop = (tokenizer(text)["input_ids"] for text in (PROSE, PROSE[:20] * 20))
    assert without_loops(tokenizer, [loop, prose, prose]) == [prose, prose]
    assert without_loops(tokenizer, [loop] * 5) == [loop] * 3
