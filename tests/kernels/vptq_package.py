"""Compares our dequantization with that of the package `vptq`; prints what is equal: checkpoint
directories given as arguments, without arguments the random layers of `CASES`."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pcdvq_kernels.vptq.checkpoint import open_vptq_checkpoint
from pcdvq_kernels.vptq.layout import TABLES, VPTQLayout
from pcdvq_kernels.vptq.reference import dequantize
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, VptqConfig
from transformers.quantizers.quantizers_utils import should_convert_module
from vptq_layers import CASES, random_layer


def import_vptq() -> type[torch.nn.Module]:
    """The package's layer; for sentence embeddings alone it wants a package of that name."""
    name = "sentence_transformers"
    sys.modules[name] = ModuleType(name)
    sys.modules[f"{name}.SentenceTransformer"] = inner = ModuleType(f"{name}.SentenceTransformer")
    inner.SentenceTransformer = type("SentenceTransformer", (), {})
    from vptq import VQuantLinear

    return VQuantLinear


def product(cls: type[torch.nn.Module], layout: VPTQLayout, tensors: dict[str, Tensor]) -> Tensor:
    """W^T of a checkpoint's tensors by the package: its product with the identity, in fp32."""
    options = layout.model_dump(include=set(cls.__init__.__code__.co_varnames))
    options |= {"bias": False, "indices_as_float": False, "enable_proxy_error": False}
    linear = cls(**options)
    state = {
        key + (".weight" if key in TABLES else ""): tensor.float()
        if tensor.is_floating_point()
        else tensor
        for key, tensor in tensors.items()
    }
    for key, parameter in linear.named_parameters():
        parameter.requires_grad_(False)
        assert parameter.shape == state[key].shape, key
        parameter.data = state.pop(key)
    assert not state
    return linear(torch.eye(layout.in_features))


@torch.no_grad()
def check_checkpoint(cls: type[torch.nn.Module], directory: Path) -> None:
    """The model as the package's `make_quant_linear` makes it of the directory's configuration."""
    checkpoint = open_vptq_checkpoint(directory)
    config = AutoConfig.from_pretrained(directory)
    quantization = VptqConfig(**config.quantization_config)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, entry in quantization.config_for_layers.items():
        assert should_convert_module(name, quantization.modules_to_not_convert)
        model.set_submodule(name, cls(**entry, enable_proxy_error=False, dtype=torch.float32))
    state = {}
    for file in directory.glob("*.safetensors"):
        for name, tensor in load_file(file).items():
            state[name] = tensor.float() if tensor.is_floating_point() else tensor
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    assert set(missing) <= {"lm_head.weight"}, missing
    assert not unexpected, unexpected
    for name, layout in checkpoint.layouts.items():
        linear = model.get_submodule(name)
        linear.bias = None
        dense = linear(torch.eye(layout.in_features)).T
        assert torch.equal(dense, checkpoint.dequantize(name)), name


def main() -> None:
    cls = import_vptq()
    if directories := sys.argv[1:]:
        for directory in directories:
            check_checkpoint(cls, Path(directory))
        print(*directories)
        return
    for case, changes in CASES.items():
        layout, tensors = random_layer(37, 98, **changes)
        # Products with the identity add zeros.
        assert torch.equal(product(cls, layout, tensors).T, dequantize(layout, tensors)), case
    print(*CASES)


if __name__ == "__main__":
    main()
