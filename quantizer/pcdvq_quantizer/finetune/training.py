"""The training loop: Adam on relative changes, validated, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

import torch
from pcdvq_kernels.errors import PCDVQError
from safetensors import safe_open
from torch import Tensor

from pcdvq_quantizer.files import save_whole
from pcdvq_quantizer.finetune.distillation import Distillation
from pcdvq_quantizer.finetune.options import FinetuneOptions
from pcdvq_quantizer.finetune.student import Student

BETAS = (0.9, 0.95)  # steps are few: a longer memory would be mostly of the first ones
LEARNING_RATE = 0.0125  # per nat of the KL at the start
MAX_LEARNING_RATE = 0.01
DIVERGED = 1.1  # times the KL at the start; a little more is the noise of high rates
WARMUP_SHARE = 0.1
VALIDATIONS = 6
NUMBERS = ("step", "seconds", "validations", "diverged")


@dataclass(frozen=True)
class Windows:
    """Token ids to train and to validate on, int64 [S, T] each."""

    training: Tensor
    holdout: Tensor


@dataclass(frozen=True)
class Step:
    """Where a run is.

    Attributes:
        done, total: steps.
        kl: of the step's own windows, before it.
        holdout_kl: as last measured.
        tokens_per_second: of the step.
    """

    done: int
    total: int
    kl: float
    holdout_kl: float
    tokens_per_second: float


OnStep = Callable[[Step], None]


@dataclass
class TrainingState:
    """All that a run needs to continue, besides its options.

    Attributes:
        delta: fp32 [P], relative changes; `best` those with the lowest hold-out KL.
        optimizer: Adam's state of the parameters, empty before the first step.
        step: steps done.
        seconds: spent on them and on validation.
        validations: (steps done, hold-out KL); the first is of the checkpoint as it came.
        diverged: whether training ended for that.
    """

    delta: Tensor
    best: Tensor
    optimizer: dict[str, Tensor] = field(default_factory=dict)
    step: int = 0
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    diverged: bool = False

    @property
    def start_kl(self) -> float:
        return self.validations[0][1]

    @property
    def best_kl(self) -> float:
        return min(kl for _, kl in self.validations if math.isfinite(kl))

    def save(self, path: Path) -> None:
        """Write it to `path`, whole or not at all."""
        tensors = {"delta": self.delta, "best": self.best, **self.optimizer}
        numbers = {name: getattr(self, name) for name in NUMBERS}
        # Delta and best are one tensor where the last validation was the best.
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        save_whole(tensors, path, {"numbers": json.dumps(numbers)})

    @classmethod
    def load(cls, path: Path, student: Student) -> TrainingState:
        """What an interrupted run left at `path`, or the beginning of a run."""
        device = student.model.device
        if path.exists():
            with safe_open(path, framework="pt", device=str(device)) as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                numbers = json.loads(file.metadata()["numbers"])
            return cls(tensors.pop("delta"), tensors.pop("best"), tensors, **numbers)
        delta = torch.zeros(student.size, device=device)
        return cls(delta, delta.clone())


class Trainer:
    """Trains `student` from `state` on; the state is saved to `path` after each step."""

    def __init__(
        self,
        student: Student,
        distillation: Distillation,
        windows: Windows,
        options: FinetuneOptions,
        path: Path,
    ) -> None:
        self._student, self._distillation = student, distillation
        self._windows, self._options, self._path = windows, options, path
        self.state = TrainingState.load(path, student)
        self._order = _order(len(windows.training), options)
        self._every = max(1, math.ceil(options.steps / VALIDATIONS))

    def run(self, progress: OnStep | None = None) -> TrainingState:
        """Train to the last step, the time limit, or divergence."""
        state, steps = self.state, self._options.steps
        delta = torch.nn.Parameter(state.delta)
        optimizer = torch.optim.Adam([delta], betas=BETAS)
        if state.optimizer:
            optimizer.state[delta] = state.optimizer
        originals = [self._distillation.original_body(ids) for ids in self._windows.holdout]
        self._student.set(delta.detach())
        if not state.validations:
            self._validate(originals)
        while state.step < steps and not state.diverged and self._share_done() < 1:
            started = time.monotonic()
            optimizer.param_groups[0]["lr"] = self._learning_rate()
            windows = self._step_windows()
            kl = fmean(self._distillation.accumulate(ids, 1 / len(windows)) for ids in windows)
            delta.grad = self._student.take_gradient()
            if not math.isfinite(kl) or not delta.grad.isfinite().all():
                state.diverged = True
                break
            optimizer.step()
            self._student.set(delta.detach())
            state.step += 1
            state.optimizer = optimizer.state[delta]
            seconds = time.monotonic() - started
            state.seconds += seconds
            if state.step % self._every == 0 or state.step == steps or self._share_done() >= 1:
                self._validate(originals)
            state.save(self._path)
            if progress:
                speed = windows.numel() / seconds
                progress(Step(state.step, steps, kl, state.validations[-1][1], speed))
        return state

    def _validate(self, originals: list[Tensor | None]) -> None:
        """Measure the hold-out KL of the student as it is and judge it."""
        started, state = time.monotonic(), self.state
        pairs = zip(self._windows.holdout, originals, strict=True)
        kl = fmean(self._distillation.measure(ids, original) for ids, original in pairs)
        if not state.validations and not math.isfinite(kl):
            raise PCDVQError(
                f"the KL of the checkpoint from its original is {kl} before any training; check "
                "both with `pcdvq eval`"
            )
        if state.validations and kl < state.best_kl:
            state.best = state.delta.clone()
        state.validations.append((state.step, kl))
        state.diverged = not kl <= DIVERGED * state.start_kl  # also where it is NaN
        state.seconds += time.monotonic() - started

    def _share_done(self) -> float:
        """Of the run, by steps or by time."""
        share = self.state.step / self._options.steps
        if self._options.minutes is None:
            return share
        return max(share, self.state.seconds / (60 * self._options.minutes))

    def _learning_rate(self) -> float:
        """Linear warm-up, then half a cosine down to 0."""
        warm = (self.state.step + 1) / max(1.0, WARMUP_SHARE * self._options.steps)
        decay = 0.5 * (1 + math.cos(math.pi * self._share_done()))
        usual = min(LEARNING_RATE * self.state.start_kl, MAX_LEARNING_RATE)
        peak = self._options.learning_rate or usual
        return peak * min(1.0, warm) * decay

    def _step_windows(self) -> Tensor:
        count = self._options.step_windows
        first = self.state.step * count
        return self._windows.training[self._order[first : first + count]]


def _order(windows: int, options: FinetuneOptions) -> Tensor:
    """Which of `windows` each step takes: all of them in random order, as often as is needed."""
    generator = torch.Generator().manual_seed(options.seed)
    rounds = math.ceil(options.windows / windows)
    return torch.cat([torch.randperm(windows, generator=generator) for _ in range(rounds)])
