"""What errors of a layer cost the model's predictions, to second order.

With g the gradient of the log-probability of labels drawn from the model's predictions to the
output of a linear at a token, a rounding error E = W' - W raises the divergence from these
predictions by about half the sum of (g^T E x)^2 (the Fisher information as curvature). It is taken
for a Kronecker product (as in K-FAC, arXiv 1503.05671): E costs tr(A E B E^T), A the mean of
g g^T / w for the outputs, B that of w x x^T for the inputs. w, the weight of a token, is a power of
what an error there costs. Rounding to it puts errors into directions that hardly matter. This is
the error direction guidance of RSAVQ (arXiv 2510.01240), by two-sided feedback as in YAQA (arXiv
2505.22988); weighting tokens is GuidedQuant's (arXiv 2505.07004).

A is learnt from few tokens, whose gradients differ widely in size. As a matrix of correlations, it
is shrunk towards the identity by as much as the difference of its halves demands, those from even
and from odd windows (Ledoit and Wolf, 2004, "A well-conditioned estimator for large-dimensional
covariance matrices").
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pcdvq_kernels.errors import PCDVQError
from safetensors import safe_open
from torch import Tensor, nn

from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.gradients import DiskStack, run_back
from pcdvq_quantizer.calibration.objectives.base import OutputFisher, StageObjective, Text
from pcdvq_quantizer.calibration.statistics import add_lower_square
from pcdvq_quantizer.experts import experts_of
from pcdvq_quantizer.files import save_whole
from pcdvq_quantizer.progress import Progress

ROWS = 2048  # of a block of A; outputs of different blocks are taken for independent
HALVES = 2
LEAST_DAMPING = 0.03  # of the mean diagonal of A, and on that of the correlations
# On what the halves show: windows of one text have more in common than those of another.
CAUTION = 2.0
MOST_DAMPING = 10.0
# The power of a token's cost that is its weight. With 1 a few tokens would decide: see QUALITY.md.
TEMPER = 0.5


class FisherObjective:
    """Measures with one pass of the original model forwards and back.

    Experts are left to the squared error of outputs: how a token is routed changes with the
    quantization of the layers before, and their A would take as much memory as they do.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files: dict[str, Path] = {}  # of each linear

    def prepare(
        self, model: LayeredModel, linears: list[str], text: Text, progress: Progress
    ) -> None:
        """Write a file for each decoder layer, that of the first last.

        Raises:
            PCDVQError: gradients are not finite.
        """
        files = {layer: self._directory / f"fisher-{layer}.safetensors" for layer in model.layers}
        inner = {
            layer: [n for n in linears if n.startswith(f"{layer}.") and not experts_of(n)]
            for layer in model.layers
        }
        self._files = {name: files[layer] for layer in model.layers for name in inner[layer]}
        if files[model.layers[0]].exists():
            return
        scratch = self._directory / "fisher"
        scratch.mkdir(exist_ok=True)
        progress.start("Measuring what errors cost", len(model.layers))
        unreached: list[str] = []

        @contextmanager
        def observe(index: int, layer: nn.Module) -> Iterator[None]:
            prefix = model.layers[index]
            measured = [
                _LinearFisher(name, layer.get_submodule(name.removeprefix(f"{prefix}.")))
                for name in inner[prefix]
            ]
            yield
            tensors: dict[str, Tensor] = {}
            for each in measured:
                tensors |= each.finish(text.tokens)
                if not each.reached:
                    unreached.append(each.name)
            save_whole(tensors, files[prefix])
            progress.advance(1)

        run_back(model, text.tokens, text.seed, DiskStack(scratch), observe)
        scratch.rmdir()
        if unreached:
            progress.note(
                f"no prediction depends on {', '.join(unreached)} in the calibration text; there "
                "the squared error of outputs decides"
            )

    def stage(self, names: list[str]) -> StageObjective:
        costs, outputs = [], []
        for name in names:
            with safe_open(self._files[name], framework="pt") as file:
                costs.append(file.get_tensor(f"{name}.tokens"))
                count = sum(key.startswith(f"{name}.outputs.") for key in file.keys())  # noqa: SIM118
                blocks = [file.get_tensor(f"{name}.outputs.{index}") for index in range(count)]
            outputs.append(OutputFisher(blocks))
        weights = sum(costs[1:], costs[0]) ** TEMPER
        return StageObjective(weights / weights.mean(), outputs)


class _LinearFisher:
    """Adds up the gradients to the outputs of one linear."""

    def __init__(self, name: str, linear: nn.Module) -> None:
        self.name = name
        assert isinstance(linear, nn.Linear)
        self._linear = linear
        # A rounding error of a row grows with its weights.
        self._spread = linear.weight.square().mean(1)  # [N]
        self._sums: dict[tuple[int, int], Tensor] = {}  # of A, by first row and half
        self._tokens: list[Tensor] = []
        self._handle = linear.register_forward_hook(self._watch)

    def _watch(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        g = gradient.flatten(0, -2)  # [T, N]
        cost = g.square() @ self._spread
        half = len(self._tokens) % HALVES
        self._tokens.append(cost.cpu())
        g = g * cost.clamp_min(1e-30).pow(-TEMPER / 2).unsqueeze(1)
        for start in range(0, g.shape[1], ROWS):
            part = g[:, start : start + ROWS]
            sums = self._sums.setdefault(
                (start, half), part.new_zeros(part.shape[1], part.shape[1])
            )
            add_lower_square(sums, part)

    @property
    def reached(self) -> bool:
        """Whether predictions depend on this linear."""
        return any(tokens.any() for tokens in self._tokens)

    def finish(self, text: Tensor) -> dict[str, Tensor]:
        """The tensors of this linear, for the `text` [S, T] that was run.

        Raises:
            PCDVQError: gradients are not finite.
        """
        self._handle.remove()
        cost = torch.stack(self._tokens) if self.reached else torch.ones(text.shape)
        if not cost.isfinite().all():
            raise PCDVQError(
                f"gradients to the outputs of {self.name} are NaN or infinite on the calibration "
                "text; use --objective hessian"
            )
        tensors = {f"{self.name}.tokens": cost}
        for number, start in enumerate(range(0, self._linear.out_features, ROWS)):
            block = torch.eye(min(ROWS, self._linear.out_features - start))
            if self.reached:
                halves = [
                    self._sums[start, half].cpu() / len(range(half, len(text), HALVES))
                    for half in range(min(HALVES, len(text)))
                ]
                block = _shrunk(halves)
            tensors[f"{self.name}.outputs.{number}"] = block
        return tensors


def _shrunk(halves: list[Tensor]) -> Tensor:
    """The mean of moments, shrunk as correlations and damped.

    Args:
        halves: fp32 [N, N], lower triangles of moments that differ by chance; perhaps only one.

    Returns:
        fp32 [N, N], positive definite, mean diagonal 1.
    """
    variance = sum(halves[1:], halves[0]).diagonal()
    if not variance.any():
        return torch.eye(len(variance))
    deviation = (variance + LEAST_DAMPING * variance.mean()).sqrt()
    halves = [(half.tril() + half.tril(-1).T) / deviation.outer(deviation) for half in halves]
    correlation = sum(halves[1:], halves[0]) / len(halves)
    mean = correlation.diagonal().mean().item()
    share = MOST_DAMPING
    if len(halves) == HALVES:
        noise = (halves[0] - halves[1]).square().sum().item() / 4
        structure = correlation.square().sum().item() - len(correlation) * mean**2
        found = CAUTION * noise / max(structure - noise, 1e-30)
        share = min(max(found, LEAST_DAMPING), MOST_DAMPING)
    correlation.diagonal().add_(share * mean)
    moments = correlation * deviation.outer(deviation)
    return moments / moments.diagonal().mean()
