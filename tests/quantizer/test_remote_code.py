"""No code that a model brings along is run, whatever stands on standard input."""

from __future__ import annotations

import ast
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from gguf_files import write_gguf
from models import save_model, tiny_config
from pcdvq_kernels.errors import PCDVQError
from pcdvq_quantizer.calibration.text import load_tokenizer
from pcdvq_quantizer.evaluation.files import ModelFiles
from pcdvq_quantizer.evaluation.hf_model import load_causal_lm
from pcdvq_quantizer.plan import QuantizeOptions, make_plan
from pcdvq_quantizer.sources import open_source

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels/pcdvq_kernels", "quantizer/pcdvq_quantizer", "vllm_pcdvq", "benchmarks")
# Makers of configurations, tokenizers and models from anybody's files.
METHODS = ("from_pretrained", "from_config")
FUNCTIONS = ("LLM", "AsyncLLM", "EngineArgs", "AsyncEngineArgs", "pipeline", "load_dataset")
OPTIONS = QuantizeOptions(calibration="none")


def loading_calls(tree: ast.AST) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        if isinstance(function, ast.Attribute):
            owner = ast.unparse(function.value)
            # vLLM's own `from_config` of quantization methods reads no file.
            ours = function.attr == "from_config" and not owner.rpartition(".")[2].startswith(
                "Auto"
            )
            if (function.attr in METHODS and not ours) or function.attr in FUNCTIONS:
                yield node
        elif isinstance(function, ast.Name) and function.id in FUNCTIONS:
            yield node


def refuses_code(call: ast.Call) -> bool:
    return any(
        keyword.arg == "trust_remote_code"
        and isinstance(keyword.value, ast.Constant)
        and keyword.value.value is False
        for keyword in call.keywords
    )


def test_every_loading_call_refuses_code() -> None:
    calls = [
        (f"{path.relative_to(ROOT)}:{call.lineno}", refuses_code(call))
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*.py")
        for call in loading_calls(ast.parse(path.read_text()))
    ]
    assert len(calls) > 12
    assert [place for place, refuses in calls if not refuses] == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("AutoConfig.from_pretrained(x)", [False]),
        ("transformers.AutoModel.from_config(x, trust_remote_code=True)", [False]),
        ("LLM(x, trust_remote_code=False)", [True]),
        ("PCDVQConfig.from_config(x)", []),
    ],
)
def test_how_calls_are_found(code: str, found: list[bool]) -> None:
    assert [refuses_code(call) for call in loading_calls(ast.parse(code))] == found


@pytest.fixture
def trapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """A model that needs code of its own, and the trace that this code would leave."""
    monkeypatch.setattr("builtins.input", lambda *arguments: "y")
    model, trace = save_model(tmp_path / "model", tiny_config()), tmp_path / "trace"
    code = "from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
    code += f"open({str(trace)!r}, 'w').close()\n"
    code += "class Config(LlamaConfig):\n    model_type = 'trap'\n"
    code += "class Model(LlamaForCausalLM):\n    config_class = Config\n"
    code += "class Tokenizer(PreTrainedTokenizerFast):\n    pass\n"
    (model / "trap.py").write_text(code)
    classes = {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}
    for file, changes in {
        "config.json": {"model_type": "trap", "auto_map": classes},
        "tokenizer_config.json": {
            "tokenizer_class": "Tokenizer",
            "auto_map": {"AutoTokenizer": [None, "trap.Tokenizer"]},
        },
    }.items():
        fields = json.loads((model / file).read_text()) | changes
        (model / file).write_text(json.dumps(fields))
    return model, trace


@pytest.mark.parametrize(
    "use",
    [
        lambda model: load_tokenizer(open_source(model)),
        lambda model: ModelFiles.find(model).tokenizer(),
        lambda model: load_causal_lm(ModelFiles.find(model), "float32"),
        lambda model: make_plan(model, OPTIONS),
    ],
    ids=["calibration", "tokenizer", "evaluation", "quantization"],
)
def test_code_of_a_model_leaves_no_trace(
    use: Callable[[str], object], trapped: tuple[Path, Path]
) -> None:
    model, trace = trapped
    with pytest.raises(PCDVQError, match="never run"):
        use(str(model))
    assert not trace.exists()


def test_code_beside_a_gguf_file_leaves_no_trace(trapped: tuple[Path, Path]) -> None:
    model, trace = trapped
    source = open_source(str(write_gguf(model / "tiny.gguf")))
    with pytest.raises(PCDVQError, match="never run"):
        source.copy_files(model)
    assert not trace.exists()
