"""Layers that the plugin would refuse stay as they are, and the run says why before any work."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.cli import app
from pcdvq_quantizer.codebooks import get_codebook, offered_rates
from pcdvq_quantizer.plan import NONE, PCDVQPlan, QuantizeOptions, make_plan
from pcdvq_quantizer.served import Heads, find_unserved
from pcdvq_quantizer.vptq.plan import VPTQOptions
from typer.testing import CliRunner

TRELLIS = QuantizeOptions(bits=3.0, calibration=NONE)
ATTENTION, MLP = "model.layers.1.self_attn", "model.layers.1.mlp"


def plan(tmp_path: Path, config: dict[str, object], **options: object) -> PCDVQPlan:
    return make_plan(str(save_model(tmp_path / "model", config)), replace(TRELLIS, **options))


def test_the_rest_of_a_merged_layer_is_left(tmp_path: Path) -> None:
    model = plan(tmp_path, tiny_config(), skip=("*.1.self_attn.q_proj", "*.1.mlp.up_proj"))
    skipped = model.selection.skipped
    reason = "vLLM serves it as one layer with q_proj, which is left"
    assert skipped[f"{ATTENTION}.k_proj"] == skipped[f"{ATTENTION}.v_proj"] == reason
    assert skipped[f"{MLP}.gate_proj"] == reason.replace("q_proj", "up_proj")
    assert skipped.keys().isdisjoint((f"{ATTENTION}.o_proj", f"{MLP}.down_proj"))
    assert len(model.selection.layers) == 7 + 2
    assert set(model.config.modules_to_not_convert) >= {f"{ATTENTION}.k_proj", f"{MLP}.gate_proj"}


def test_the_rest_of_a_merged_layer_is_left_by_vptq(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tiny_config())
    options = VPTQOptions(
        vector_length=4, centroids=16, calibration=NONE, skip=("*.1.self_attn.v_proj",)
    )
    made = make_plan(str(source), options)
    assert made.selection.skipped[f"{ATTENTION}.q_proj"].endswith("with v_proj, which is left")
    assert f"{ATTENTION}.k_proj" in made.quantization_config()["modules_to_not_convert"]
    assert made.split_limit() is None


def test_rows_that_a_codec_does_not_split(tmp_path: Path) -> None:
    """A layer of one part may end anywhere."""
    config = tiny_config(intermediate_size=200)
    model = plan(tmp_path, config)
    for name in ("gate_proj", "up_proj"):
        assert model.selection.skipped[f"{MLP}.{name}"] == (
            "a part of 200 rows, of which codec trellis needs multiples of 16; --codec pvq "
            "quantizes it"
        )
    assert f"{MLP}.down_proj" in model.selection.layers
    assert len(plan(tmp_path, config, codec="pvq").selection.layers) == 14


@pytest.mark.parametrize(
    ("max_tp", "chains"),
    [
        (1, {"q_proj": 32, "k_proj": 32, "o_proj": 64, "up_proj": 64, "down_proj": 64}),
        (4, {"q_proj": 16, "v_proj": 16, "o_proj": 64, "gate_proj": 16, "down_proj": 64}),
    ],
)
def test_chains_are_as_long_as_can_be_served(
    max_tp: int, chains: dict[str, int], tmp_path: Path
) -> None:
    """Those of q are as short as k and v need, since the three are served as one."""
    model = plan(tmp_path, tiny_config(), max_tp=max_tp)
    found = {name.rpartition(".")[2]: book.codebook.spec for name, book in model.codebooks.items()}
    assert {name: found[name].chain_rows for name in chains} == chains


@pytest.mark.parametrize("codec", ["trellis", "pvq"])
@pytest.mark.parametrize(
    ("vocabulary", "max_tp", "rows"), [(257, 4, 16), (257, 2, 32), (257, 1, 64), (256, 4, 64)]
)
def test_chains_of_embeddings(
    codec: str, vocabulary: int, max_tp: int, rows: int, tmp_path: Path
) -> None:
    """They decode by themselves on each rank; of 257 tokens vLLM makes 320."""
    config = tiny_config(vocab_size=vocabulary)
    model = plan(tmp_path, config, codec=codec, embedding_bits=4, max_tp=max_tp)
    for name in ("model.embed_tokens", "lm_head"):
        spec = model.codebooks[name].codebook.spec
        assert (spec.codec, spec.bits, spec.chain_rows) == ("trellis", 4.0, rows)
    assert model.codebooks[f"{MLP}.down_proj"].codebook.spec.codec == codec


def test_experts_have_chains_of_one_length(tmp_path: Path) -> None:
    """Although down, of 64 rows that no rank splits, could have longer ones."""
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    model = plan(tmp_path, tiny_config("qwen3_moe", head_dim=16, **fields), max_tp=4)
    experts = {book.id for name, book in model.codebooks.items() if ".experts." in name}
    assert experts == {"trellis-3-rows16"}
    assert model.codebooks[f"{ATTENTION}.o_proj"].id == "trellis-3"


@pytest.mark.parametrize(
    ("max_tp", "size"), [(1, None), (2, None), (4, 4), (8, 4), (6, None)], ids=str
)
def test_rows_at_tensor_parallel_sizes(max_tp: int, size: int | None, tmp_path: Path) -> None:
    """4 heads allow 4 ranks, of which each would have 24 of 96 rows."""
    model = plan(tmp_path, tiny_config(intermediate_size=96), max_tp=max_tp)
    assert (f"{MLP}.up_proj" in model.selection.layers) == (size is None)
    assert f"{ATTENTION}.k_proj" in model.selection.layers  # 2 heads of 16 rows, some with copies
    if size:
        words = f"a part of 24 rows at tensor-parallel size {size}, .*, or a --max-tp below {size},"
        assert re.match(words, model.selection.skipped[f"{MLP}.up_proj"])


@pytest.mark.parametrize(
    ("config", "left"),
    [
        (tiny_config("phi3", pad_token_id=0, intermediate_size=200), f"{MLP}.gate_up_proj"),
        (
            tiny_config("phi3", pad_token_id=0, num_key_value_heads=1, hidden_size=96),
            f"{ATTENTION}.qkv_proj",
        ),
        (
            tiny_config(
                "qwen3_moe",
                num_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=72,
                head_dim=16,
            ),
            f"{MLP}.experts.3.down_proj",
        ),
    ],
    ids=["halves on disk", "heads on disk", "experts"],
)
def test_other_forms_of_merged_layers(config: dict[str, object], left: str, tmp_path: Path) -> None:
    model = plan(tmp_path, config)
    assert left in model.selection.skipped
    assert left not in model.selection.layers
    assert f"{ATTENTION}.o_proj" in model.selection.layers


HYBRID = {
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}


@pytest.mark.parametrize(
    ("value_heads", "max_tp", "served"),
    [(8, 8, False), (16, 1, True), (16, 2, False), (32, 2, True), (32, 4, False)],
)
def test_tiny_parts_of_hybrids(value_heads: int, max_tp: int, served: bool, tmp_path: Path) -> None:
    """Qwen3-Next has both in one tensor, Qwen3.5 in two."""
    attention = "model.layers.0.linear_attn"
    for model_type, names in (
        ("qwen3_next", ["in_proj_ba"]),
        ("qwen3_5_text", ["in_proj_b", "in_proj_a"]),
    ):
        fields = {**HYBRID, "linear_num_value_heads": value_heads}
        model = plan(tmp_path / model_type, tiny_config(model_type, **fields), max_tp=max_tp)
        for name in names:
            assert (f"{attention}.{name}" in model.selection.layers) == served
        assert f"{attention}.out_proj" in model.selection.layers


def test_mixers_that_vllm_never_quantizes(tmp_path: Path) -> None:
    with pytest.raises(PCDVQError, match=r"nothing to quantize in .*\(MambaForCausalLM\)"):
        plan(tmp_path, tiny_config("mamba"))
    names = [f"layers.0.mixer.{name}" for name in ("in_proj", "x_proj", "dt_proj", "out_proj")]
    layers = dict.fromkeys((*names, "layers.1.mlp.up_proj"), 64)
    found = find_unserved(layers, layers, None, Heads(0, 0, 0), 1)
    assert found == dict.fromkeys(names, "vLLM does not quantize mixers of Mamba 1")


def test_embedding_whose_head_has_a_bias(tmp_path: Path) -> None:
    fields = {"tie_word_embeddings": True, "partial_rotary_factor": 0.5}
    model = plan(tmp_path, tiny_config("phi", **fields), embedding_bits=8)
    assert model.config.embedding is None
    reason = "the output head is tied to it and has a bias"
    assert model.selection.skipped["model.embed_tokens"] == reason


def test_codecs_have_one_rule_at_all_rates() -> None:
    """A layer is chosen before its rate."""
    for codec in ("trellis", "pvq"):
        books = [get_codebook(codec, rate) for rate in offered_rates(codec)]
        assert len({book.codebook.spec.row_multiple for book in books}) == 1


def test_what_the_command_says(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", tiny_config(intermediate_size=96))
    arguments = ["quantize", str(source), str(tmp_path / "out"), "--calibration", "none"]
    result = CliRunner().invoke(app, [*arguments, "--skip", "*.q_proj", "--max-tp", "4"])
    assert result.exit_code == 0
    said = " ".join(result.output.split())
    assert "k_proj (2 of them: vLLM serves it as one layer with q_proj, which is left)" in said
    assert "at tensor-parallel size 4, of which codec trellis needs multiples of 16" in said
    assert "not every tensor-parallel size will do: layer model.layers.0.mlp.down_proj" in said
    assert "would cut them into shards of 24" in said
    assert "Serve with --tensor-parallel-size 1." in said
