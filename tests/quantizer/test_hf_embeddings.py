"""Quantized embeddings and output heads in transformers against the same with dense weights."""

import copy
import json
from pathlib import Path

import pytest
import torch
from models import tiny_config
from pcdvq_kernels.errors import CheckpointError
from pcdvq_quantizer import cli
from pcdvq_quantizer.hf import PCDVQEmbedding, PCDVQLinear, PCDVQTiedHead
from pcdvq_quantizer.plan import NONE, QuantizeOptions
from test_hf import assert_same, changed_copy, dense_model, logits, quantize
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

UNTIED = tiny_config()
TIED = tiny_config(tie_word_embeddings=True)
# sqrt(72), the scale, is not a number of bf16.
GEMMA = tiny_config("gemma3_text", hidden_size=72, head_dim=16, tie_word_embeddings=True)
EMBEDDING = "model.embed_tokens"


def options(bits: int) -> QuantizeOptions:
    return QuantizeOptions(bits=3.0, embedding_bits=bits, calibration=NONE)


def load(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tmp_path_factory.mktemp("tied"), TIED, options(8))[1]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("config", [UNTIED, TIED, GEMMA], ids=["untied", "tied", "gemma3"])
def test_logits(config: dict[str, object], bits: int, tmp_path: Path) -> None:
    source, checkpoint = quantize(tmp_path, config, options(bits))
    expected = logits(dense_model(source, checkpoint))
    model = load(checkpoint)
    head = PCDVQTiedHead if config["tie_word_embeddings"] else PCDVQLinear
    assert isinstance(model.get_input_embeddings(), PCDVQEmbedding)
    assert type(model.get_output_embeddings()) is head
    assert model.get_input_embeddings().layout.spec.bits == bits
    assert_same(logits(model), expected)

    model.dequantize()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, nn.Embedding)
    assert type(head) is nn.Linear
    assert (head.weight is embedding.weight) == config["tie_word_embeddings"]
    assert_same(logits(model), expected)
    model.save_pretrained(tmp_path / "dense")
    assert_same(logits(load(tmp_path / "dense")), expected)


@pytest.mark.parametrize("config", [TIED, GEMMA], ids=["llama", "gemma3"])
def test_embedding_is_that_of_the_original_in_half_precision(
    config: dict[str, object], tmp_path: Path
) -> None:
    """Equal to the last bit, the rounding of Gemma's scale included."""
    source, checkpoint = quantize(tmp_path, config, options(8))
    expected = dense_model(source, checkpoint).bfloat16().get_input_embeddings()
    ids = torch.arange(0, 250, 7).view(2, -1)
    model = load(checkpoint, torch.bfloat16)
    found = model.get_input_embeddings()(ids)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected(ids))
    assert torch.equal(
        model.dequantize(torch.float16).get_input_embeddings()(ids).bfloat16(),
        load(checkpoint).to(torch.float16).get_input_embeddings()(ids).bfloat16(),
    )


def test_loads_without_complaint(tied: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.get_logger("transformers")
    logger.addHandler(caplog.handler)
    try:
        _, found = AutoModelForCausalLM.from_pretrained(tied, output_loading_info=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not [each for each in caplog.messages if "lm_head" in each or "embed" in each]


def test_tied_head_stays_tied(tied: Path) -> None:
    """Also through a copy and a change of the dtype; it never has tensors of its own."""
    model = copy.deepcopy(load(tied)).to(torch.bfloat16)
    assert not any(name.startswith("lm_head") for name in model.state_dict())
    expected = logits(model)
    model.get_input_embeddings().row_scale.mul_(2)
    assert_same(logits(model), 2 * expected, rtol=0.5)
    hidden = torch.ones(1, 64)
    before = model.lm_head(hidden)
    model.get_input_embeddings().row_scale.mul_(2)
    assert torch.equal(model.lm_head(hidden), 2 * before)


def test_generates(tied: Path) -> None:
    model = load(tied)
    prompt = torch.arange(3, 20).view(1, -1)
    wanted = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    packed = model.generate(prompt, **wanted)
    assert torch.equal(model.dequantize().generate(prompt, **wanted), packed)


def test_another_vocabulary(tied: Path, tmp_path: Path) -> None:
    bad = changed_copy(tied, tmp_path / "bad")
    config = json.loads((bad / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    with pytest.raises(
        CheckpointError, match=r"embed_tokens is \[256, 64\].* makes it \[300, 64\]"
    ):
        load(bad)


def test_an_embedding_that_does_something_else(tied: Path) -> None:
    class Shifted(nn.Embedding):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return super().forward(input_ids) + 1

    model = load(tied)
    model.set_submodule(EMBEDDING, Shifted(256, 64))
    with pytest.raises(CheckpointError, match="no quantized Shifted in transformers"):
        model.hf_quantizer._replacement(model, EMBEDDING)


def test_evaluation(tied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`pcdvq eval` finds the same with packed and with dense weights."""
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + (7 * i * i) % 90) for i in range(600)))
    found = []
    for extra in ([], ["--packed"]):
        out = tmp_path / "out.json"
        command = ["eval", str(tied), "--text", str(text), "--window", "64", "--json", str(out)]
        monkeypatch.setattr("sys.argv", ["pcdvq", *command, *extra])
        with pytest.raises(SystemExit) as exit_:
            cli.main()
        assert exit_.value.code == 0
        found.append(json.loads(out.read_text()))
    assert [each["weights"] for each in found] == ["dense", "packed"]
    perplexities = [each["perplexity"]["perplexity"] for each in found]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=1e-4)
