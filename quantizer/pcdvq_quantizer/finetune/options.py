"""What a fine-tuning run does."""

from __future__ import annotations

from dataclasses import dataclass

from pcdvq_kernels.errors import PCDVQError

from pcdvq_quantizer.plan import SELF

MAX_WINDOWS_PER_STEP = 4
WANTED_STEPS = 100


@dataclass(frozen=True)
class FinetuneOptions:
    """Options of one fine-tuning run, checked when made.

    Attributes:
        calibration: text file, JSONL file or dataset (`calibration.text.read_documents`), or SELF.
        reference: the original model; None is the one the checkpoint's report names.
        tokens: to train on; a shorter text is gone through several times.
        sequence_length: tokens of a window, fewer where the models read fewer.
        holdout: windows kept for validation.
        windows_per_step: None is up to 4, fewer where that leaves less than 100 steps.
        minutes: time limit for training, interrupted runs included; the learning rate is at its
            end by then. None: no limit.
        learning_rate: peak relative change of a parameter per step; None is 0.0125 times the KL
            at the start, at most 0.01: a model stands the less the nearer it is to its original.
        gradient_checkpointing: compute each decoder layer twice rather than keep what its backward
            pass needs.
        seed: of the order of windows.
    """

    calibration: str = SELF
    reference: str | None = None
    tokens: int = 65_536
    sequence_length: int = 1024
    holdout: int = 4
    windows_per_step: int | None = None
    minutes: float | None = None
    learning_rate: float | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise PCDVQError for numbers no run can have."""
        for option, number, least in (
            ("sequence-length", self.sequence_length, 2),
            ("tokens", self.tokens, self.sequence_length),
            ("holdout", self.holdout, 1),
            ("windows-per-step", self.windows_per_step or 1, 1),
        ):
            if number < least:
                raise PCDVQError(f"--{option} is {number}; give {least} or more")
        if self.windows_per_step == 0:
            raise PCDVQError("--windows-per-step is 0; give 1 or more")
        if self.minutes is not None and not self.minutes > 0:
            raise PCDVQError(f"--minutes is {self.minutes}; give more than 0")
        if self.learning_rate is not None and not 0 < self.learning_rate < 1:
            raise PCDVQError(
                f"--learning-rate is {self.learning_rate}; give a relative change per step between "
                "0 and 1, such as 0.005"
            )

    @property
    def windows(self) -> int:
        """Windows to train on."""
        return self.tokens // self.sequence_length

    @property
    def step_windows(self) -> int:
        """Windows per step."""
        if self.windows_per_step is not None:
            return min(self.windows_per_step, self.windows)
        return min(MAX_WINDOWS_PER_STEP, max(1, self.windows // WANTED_STEPS))

    @property
    def steps(self) -> int:
        return self.windows // self.step_windows
