"""Compares our dequantization with that of the package `vptq`; prints the cases that are equal."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pcdvq_kernels.vptq.layout import TABLES, VPTQLayout
from pcdvq_kernels.vptq.reference import dequantize
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


def main() -> None:
    cls = import_vptq()
    for case, changes in CASES.items():
        layout, tensors = random_layer(37, 98, **changes)
        # Products with the identity add zeros.
        assert torch.equal(product(cls, layout, tensors).T, dequantize(layout, tensors)), case
    print(*CASES)


if __name__ == "__main__":
    main()
