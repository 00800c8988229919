"""vLLM's engine against Hugging Face's model with the dense weights."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pcdvq_quantizer.hf  # noqa: F401 transformers then loads PCDVQ checkpoints
import pytest
import torch
from engine_worker import (
    NEW_TOKENS,
    Generation,
    compiled_models,
    generate,
    generate_and_reload,
    generate_in_stages,
    generate_twice,
)
from hub import Hub, Repository
from models import change_config, save_model, tiny_config
from pcdvq_kernels.config import CodebookSpec
from pcdvq_quantizer.plan import NONE, QuantizeOptions, make_plan
from pcdvq_quantizer.run import quantize_model
from random_checkpoint import (
    E8,
    INT8,
    ODD_BITS,
    PVQ,
    SHORT_CHAINS,
    TRELLIS,
    TRELLIS_4,
    add_random_adapter,
    tiny_llama,
    write_random_checkpoint,
)
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3MoeConfig,
)

PROMPTS = [[7], list(range(20, 31)), list(range(300, 240, -1))]
# Greatest difference of a logprob: sums in another order, and activations rounded to 16 bits or, of
# quantized layers, to int8, in each of two layers.
ATOL = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 3e-1, torch.int8: 5e-1}

QWEN2 = Qwen2Config(
    hidden_size=896,
    intermediate_size=4864,
    num_hidden_layers=2,
    num_attention_heads=14,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=256,
    tie_word_embeddings=True,
)
PHI3 = Phi3Config(
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=256,
    pad_token_id=0,
)
QWEN3_MOE = Qwen3MoeConfig(
    hidden_size=256,
    intermediate_size=512,
    moe_intermediate_size=192,
    num_experts=5,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    mlp_only_layers=[1],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=320,
    max_position_embeddings=256,
    norm_topk_prob=True,
    tie_word_embeddings=False,
)
MIXTRAL = MixtralConfig(
    hidden_size=256,
    intermediate_size=384,
    num_local_experts=5,
    num_experts_per_tok=2,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=320,
    max_position_embeddings=256,
    tie_word_embeddings=False,
)
TINY = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
ODD_LLAMA = tiny_llama(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3
)
# Layers that are served alone need not have whole chains of rows.
CUT_CHAINS = tiny_llama(hidden_size=104, intermediate_size=192, head_dim=32)

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 64, "mamba_d_state": 16, "mamba_chunk_size": 16}
# Models whose layers are put together in ways of their own, by transformers' names; without
# calibration where a second word says so.
FAMILIES: dict[str, dict[str, object]] = {
    "qwen3": {"head_dim": 32},
    "gemma3_text": {
        "head_dim": 32,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "olmo2": {},
    "mistral uncalibrated": {"head_dim": 32, "sliding_window": 16},
    "mamba2 uncalibrated": {"num_heads": 4, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "granitemoehybrid": {
        **MAMBA,
        "num_local_experts": 0,
        "shared_intermediate_size": 256,
        "layer_types": ["mamba", "attention"],
    },
}


def check(
    generations: list[Generation], model: PreTrainedModel, dtype: torch.dtype = torch.float32
) -> None:
    """Compare every logprob; the chosen token must be the model's own up to the tolerance."""
    for generation in generations:
        with torch.no_grad():
            logits = model(torch.tensor([generation.tokens])).logits[0]
        steps = logits.log_softmax(-1)[-NEW_TOKENS - 1 : -1]
        chosen = generation.tokens[-NEW_TOKENS:]
        for token, found, expected in zip(chosen, generation.logprobs, steps, strict=True):
            assert expected[token] >= expected.max() - ATOL[dtype]
            for other, logprob in found.items():
                assert logprob == pytest.approx(expected[other].item(), abs=ATOL[dtype])


@pytest.mark.parametrize(
    ("config", "spec"),
    [(ODD_LLAMA, ODD_BITS), (CUT_CHAINS, TRELLIS), (QWEN2, PVQ), (PHI3, E8)],
    ids=["llama of odd sizes", "ends inside of chains", "qwen2 with biases", "phi3 fused on disk"],
)
def test_logprobs(
    config: PreTrainedConfig, spec, engine: ProcessPoolExecutor, tmp_path: Path
) -> None:
    model = write_random_checkpoint(tmp_path, config, spec)
    check(engine.submit(generate, tmp_path, PROMPTS, dtype="float32").result(), model)


@pytest.mark.parametrize("name", FAMILIES)
def test_models(name: str, engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    """A checkpoint of the quantizer's own: trellis, calibrated to several rates."""
    model_type, _, variant = name.partition(" ")
    fields = {"vocab_size": 320, "hidden_size": 128, "intermediate_size": 256}
    fields |= {"initializer_range": 0.15, "pad_token_id": 0, **FAMILIES[name]}
    source = save_model(tmp_path / "model", tiny_config(model_type, **fields))
    text = tmp_path / "text"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 10)
    calibrated = QuantizeOptions(bits=3.7, calibration=str(text), samples=2, sequence_length=48)
    options = QuantizeOptions(bits=3.0, calibration=NONE) if variant else calibrated
    checkpoint = quantize_model(make_plan(str(source), options), tmp_path / "out")
    assert variant or len(set(checkpoint.config.layers.values())) > 1
    change_config(checkpoint.directory, activations="float")  # as dense weights compute
    generations = engine.submit(generate, checkpoint.directory, PROMPTS, dtype="float32").result()
    dense = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype=torch.float32)
    check(generations, dense.dequantize())


@pytest.mark.parametrize("embeddings", [INT8, TRELLIS_4], ids=["8 bits", "4 bits"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_quantized_embeddings(
    config: type[PreTrainedConfig],
    embeddings: CodebookSpec,
    tied: bool,
    engine: ProcessPoolExecutor,
    tmp_path: Path,
) -> None:
    """vLLM's Llama names no embedding and ties through its head, its Qwen2 does neither."""
    fields = config(**TINY, vocab_size=333, tie_word_embeddings=tied)
    model = write_random_checkpoint(tmp_path, fields, embeddings=embeddings)
    check(engine.submit(generate, tmp_path, PROMPTS, dtype="float32").result(), model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(
    dtype: torch.dtype, own_engine: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """In a process where no dense product has asked for the CPU's tiles before vLLM's attention."""
    model = write_random_checkpoint(tmp_path, ODD_LLAMA, dtype=dtype, embeddings=INT8)
    check(own_engine.submit(generate, tmp_path, PROMPTS).result(), model, dtype)


def test_quantized_embeddings_compiled(
    compiling_engine: ProcessPoolExecutor, tmp_path: Path
) -> None:
    config = tiny_llama(tie_word_embeddings=True)
    model = write_random_checkpoint(tmp_path, config, embeddings=INT8)
    arguments = {"dtype": "float32", "enforce_eager": False}
    check(compiling_engine.submit(generate, tmp_path, PROMPTS, **arguments).result(), model)


def test_compiled(compiling_engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path, tiny_llama())
    arguments = {"dtype": "float32", "enforce_eager": False}
    check(compiling_engine.submit(generate, tmp_path, PROMPTS, **arguments).result(), model)
    assert compiling_engine.submit(compiled_models).result() == 1


PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}


@pytest.mark.parametrize(
    ("config", "spec", "arguments"),
    [
        (MIXTRAL, TRELLIS, PARALLEL),
        (QWEN3_MOE, SHORT_CHAINS, {**PARALLEL, "enable_expert_parallel": True}),
    ],
    ids=["mixtral, tensor parallel", "qwen3, expert parallel"],
)
def test_experts_of_two_ranks(
    config: PreTrainedConfig,
    spec: CodebookSpec,
    arguments: dict[str, object],
    engine: ProcessPoolExecutor,
    tmp_path: Path,
) -> None:
    model = write_random_checkpoint(tmp_path, config, spec, max_tp=2)
    generations = engine.submit(generate, tmp_path, PROMPTS, dtype="float32", **arguments).result()
    check(generations, model)


def test_experts_and_reload(engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    paths = [tmp_path / "a", tmp_path / "b"]
    models = [
        write_random_checkpoint(path, QWEN3_MOE, TRELLIS, seed=seed)
        for seed, path in enumerate(paths)
    ]
    served = engine.submit(
        generate_and_reload, paths[0], paths[1:], PROMPTS, dtype="float32"
    ).result()
    for generations, model in zip(served, models, strict=True):
        check(generations, model)


def test_tensor_parallel(engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path, tiny_llama(), max_tp=2)
    generations = engine.submit(generate, tmp_path, PROMPTS, dtype="float32", **PARALLEL).result()
    check(generations, model)


def test_pipeline_parallel(engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    model = write_random_checkpoint(tmp_path, tiny_llama(), embeddings=INT8)
    arguments = {"dtype": "float32", "pipeline_parallel_size": 2}
    check(engine.submit(generate_in_stages, tmp_path, PROMPTS, **arguments).result(), model)


def test_quantized_embeddings_tensor_parallel(engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    """The second rank starts with row 160, inside of a chain."""
    config = tiny_llama(vocab_size=301)
    model = write_random_checkpoint(tmp_path, config, max_tp=2, embeddings=TRELLIS_4)
    generations = engine.submit(generate, tmp_path, PROMPTS, dtype="float32", **PARALLEL).result()
    check(generations, model)


def test_features(own_engine: ProcessPoolExecutor, tmp_path: Path) -> None:
    """Prefix caching, chunked prefill and speculation, all at once, change nothing."""
    model = write_random_checkpoint(tmp_path, tiny_llama())
    arguments = {
        "block_size": 32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 16,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 3,
        },
    }
    prompts = [*PROMPTS, [5, 6, 7, 8] * 16]
    task = own_engine.submit(generate_twice, tmp_path, prompts, dtype="float32", **arguments)
    results, counted = task.result()
    for generations in results:
        check(generations, model)
    assert counted["vllm:prefix_cache_hits"] >= 64
    assert counted["vllm:spec_decode_num_draft_tokens"] > 0


def test_repository_of_the_hub(hub_engine: tuple[Hub, ProcessPoolExecutor], tmp_path: Path) -> None:
    """By its id: downloaded by vLLM, and before that the codebooks by the plugin."""
    model = write_random_checkpoint(tmp_path / "local", tiny_llama())
    files = {path.name: path.read_bytes() for path in (tmp_path / "local").iterdir()}
    hub, engine = hub_engine
    hub.repositories["someone/tiny"] = Repository(private=False, files=files)
    check(engine.submit(generate, "someone/tiny", PROMPTS, dtype="float32").result(), model)


@pytest.mark.parametrize(
    ("activations", "embeddings"),
    [("float", None), ("int8", None), ("float", INT8), ("int8", TRELLIS_4)],
    ids=["float", "int8", "float, embeddings of 8 bits", "int8, embeddings of 4 bits"],
)
def test_dummy_weights_and_reload(
    activations: str, embeddings: CodebookSpec | None, engine: ProcessPoolExecutor, tmp_path: Path
) -> None:
    """Dummy weights serve; real ones, and other real ones, can take their place."""
    paths = [tmp_path / "a", tmp_path / "b"]
    models = [
        write_random_checkpoint(path, tiny_llama(), seed=seed, embeddings=embeddings)
        for seed, path in enumerate(paths)
    ]
    for path in paths:
        change_config(path, activations=activations)
    dummy, *reloaded = engine.submit(
        generate_and_reload,
        paths[0],
        [*paths, paths[0]],
        PROMPTS,
        dtype="float32",
        load_format="dummy",
    ).result()
    assert len(dummy) == len(PROMPTS)
    rounded = {"float": torch.float32, "int8": torch.int8}[activations]
    for generations, model in zip(reloaded, [*models, models[0]], strict=True):
        check(generations, model, rounded)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("embeddings", [None, INT8], ids=["embeddings left", "8 bits"])
def test_lora(
    embeddings: CodebookSpec | None, tied: bool, engine: ProcessPoolExecutor, tmp_path: Path
) -> None:
    config = tiny_llama(tie_word_embeddings=tied)
    model = write_random_checkpoint(tmp_path, config, embeddings=embeddings)
    add_random_adapter(tmp_path / "adapter", model)
    generations = engine.submit(
        generate, tmp_path, PROMPTS, tmp_path / "adapter", dtype="float32"
    ).result()
    check(generations, model)
