"""VPTQ's rounding here beside the published algorithm's own steps, on some layers of SmolLM2.

Both get tables of the same size and the Hessians of the original model's inputs, with the same
damping; the other layers stay as they are. Prints what each costs (tr(E H E^T), E the error of the
weight) and the perplexity of both models.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from pcdvq_quantizer.calibration.ldlq import cholesky_feedback
from pcdvq_quantizer.vptq.choice import choose
from pcdvq_quantizer.vptq.plan import VPTQOptions
from pcdvq_quantizer.vptq.rounding import Problem, column_costs
from pcdvq_quantizer.vptq.stage import Storage, solve
from rich.console import Console
from smollm2 import load_smollm2, save_tokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from demo import PCDVQ, smollm2_gguf

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from vptq_steps import DAMPING, Steps, published

WINDOW = 1024  # tokens of calibration text
console = Console(highlight=False, soft_wrap=True)


@torch.no_grad()
def hessians(model: PreTrainedModel, names: list[str], windows: list[Tensor]) -> dict[str, Tensor]:
    """Second moments of the inputs of linears `names`, fp64 [K, K], damped."""
    sums: dict[str, Tensor] = {}

    def watch(name: str) -> None:
        def add(_: nn.Module, inputs: tuple[Tensor]) -> None:
            x = inputs[0].flatten(0, -2).double()
            sums[name] = sums.get(name, 0) + x.T @ x / (len(windows) * WINDOW)

        model.get_submodule(name).register_forward_pre_hook(add)

    for name in names:
        watch(name)
    for window in windows:
        model.model(window[None])
    for hessian in sums.values():
        hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    return sums


def round_here(weight: Tensor, hessian: Tensor, bits: int) -> tuple[Tensor, Steps]:
    """`weight` as `--method vptq --bits` rounds it, and the tables' sizes it took."""
    layout = choose(VPTQOptions(bits=bits), "layer", tuple(weight.shape), bias=False)
    order = hessian.diagonal().argsort(descending=True)
    ordered = hessian[order][:, order]
    feedback = cholesky_feedback(ordered, 1)
    cost = column_costs(ordered.float(), feedback)
    unit, zero = torch.ones(len(order)), torch.zeros(len(order))
    problem = Problem(weight[:, order], ordered.float(), feedback, cost, unit, zero)
    tables, codes = solve(problem, layout, Storage(torch.bfloat16, 0))
    rounded = problem.decode(tables, codes)[:, order.argsort()]
    return rounded, Steps(layout.vector_lens[1], layout.num_centroids[1])


def perplexity(model: PreTrainedModel, out: Path, text: Path, windows: int) -> float:
    """Of `model`, which is written to `out`."""
    model.save_pretrained(out)
    save_tokenizer(out)
    arguments = ["--text", text, "--windows", str(windows), "--json", "-"]
    done = subprocess.run([PCDVQ, "eval", out, *arguments], check=True, capture_output=True)
    return json.loads(done.stdout)["perplexity"]["perplexity"]


def main(
    calibration: Annotated[Path, typer.Option(help="Text to calibrate on.")],
    text: Annotated[Path, typer.Option(help="Text to measure on.")],
    bits: Annotated[int, typer.Option(help="Of the indices.")] = 3,
    layer: Annotated[list[int], typer.Option(help="Decoder layers.")] = [2, 12, 24],  # noqa: B006
    samples: Annotated[int, typer.Option(help="Windows to calibrate on.")] = 12,
    windows: Annotated[int, typer.Option(help="Windows of 2048 tokens to measure on.")] = 6,
    work: Annotated[Path, typer.Option(help="Where both models are written.")] = Path(
        "bench_methods"
    ),
) -> None:
    """Compare both on these layers; on three of them for about 20 minutes."""
    gguf = smollm2_gguf()
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, trust_remote_code=False
    )
    tokens = tokenizer(calibration.read_text(), add_special_tokens=False).input_ids
    cuts = torch.tensor(tokens[: samples * WINDOW]).view(samples, WINDOW)
    models = {which: load_smollm2(torch.float32) for which in ("here", "published")}
    names = [
        name
        for name, module in models["here"].named_modules()
        if isinstance(module, nn.Linear) and any(f"layers.{i}." in name for i in layer)
    ]
    found = hessians(load_smollm2(torch.float32), names, list(cuts))
    for name in names:
        weight, hessian = models["here"].get_submodule(name).weight.data, found[name]
        rounded, steps = round_here(weight, hessian, bits)
        results = {"here": rounded, "published": published(weight, hessian, steps).float()}
        costs = {}
        for which, result in results.items():
            error = (result - weight).double()
            costs[which] = ((error @ hessian) * error).sum().item()
            models[which].get_submodule(name).weight.data = result
        ratio = costs["here"] / costs["published"]
        console.print(f"{name:<34} {steps.length} x {steps.centroids}: {ratio:.3f} of published")
    for which, model in models.items():
        found_perplexity = perplexity(model, work / f"vptq-{which}", text, windows)
        console.print(f"{which}: perplexity {found_perplexity:.3f}")


if __name__ == "__main__":
    typer.run(main)
