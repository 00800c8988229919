"""The fine-tuning run: a checkpoint and its original in, a whole checkpoint directory out."""

from __future__ import annotations

import hashlib
import shutil
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pcdvq_kernels.checkpoint import (
    REPORT_FILE,
    ROW_SCALE,
    Checkpoint,
    open_checkpoint,
    read_json,
)
from pcdvq_kernels.errors import PCDVQError
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pcdvq_quantizer.calibration.mixture import Wanted, mixed_windows
from pcdvq_quantizer.card import write_model_card
from pcdvq_quantizer.evaluation.files import ModelFiles, find_reference
from pcdvq_quantizer.evaluation.hf_model import load_causal_lm
from pcdvq_quantizer.finetune.distillation import Distillation
from pcdvq_quantizer.finetune.options import FinetuneOptions
from pcdvq_quantizer.finetune.student import Student
from pcdvq_quantizer.finetune.training import OnStep, Trainer, TrainingState, Windows
from pcdvq_quantizer.plan import text_sha256
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.writer import RUN_FILE, CheckpointWriter, save_whole

STATE_FILE = "finetune.safetensors"
WINDOWS_FILE = "windows.safetensors"


@dataclass(frozen=True)
class FinetuneResult:
    """What a run did.

    Attributes:
        checkpoint: the new one.
        kl_before, kl_after: KL(original || checkpoint) on the hold-out windows, nats per token.
        steps: steps done.
        diverged: training ended early because the KL rose far above `kl_before`, or was NaN.
    """

    checkpoint: Checkpoint
    kl_before: float
    kl_after: float
    steps: int
    diverged: bool


def finetune_checkpoint(
    checkpoint: Path,
    output: Path,
    options: FinetuneOptions,
    overwrite: bool = False,
    progress: OnStep | None = None,
) -> FinetuneResult:
    """Distil the original model into the row scales and norms of `checkpoint`; write `output`.

    Codes, codebooks and speed stay the same. On the hold-out windows the result is never worse
    than `checkpoint`: the best parameters found are written. Work goes to `output`.partial; the
    same call continues there after an interruption. `output` may be `checkpoint` with `overwrite`.
    In memory are both models in fp32, and activations of one window.

    Raises:
        PCDVQError: a model or the text cannot be read or does not fit, `output` exists, or the
            partial directory belongs to another run.
    """
    opened = open_checkpoint(checkpoint)
    files = ModelFiles.find(str(checkpoint))
    reference = find_reference(files, options.reference)
    writer = CheckpointWriter(output, _fingerprint(opened, reference, options), overwrite)
    with writer.open(needed_bytes=_bytes(checkpoint)):
        path = writer.work_directory / STATE_FILE
        windows = _kept_windows(writer.work_directory / WINDOWS_FILE, files, reference, options)
        state, tensors = _train(opened, files, reference, windows, options, path, progress)
        _copy_checkpoint(checkpoint, writer.directory, tensors)
        report = _read_report(checkpoint)
        report["finetune"] = _describe(options, reference, state)
        writer.write_json(REPORT_FILE, report)
        write_model_card(writer.directory)
        writer.publish()
    published = open_checkpoint(output)
    return FinetuneResult(published, state.start_kl, state.best_kl, state.step, state.diverged)


def _kept_windows(
    path: Path, files: ModelFiles, reference: ModelFiles, options: FinetuneOptions
) -> Windows:
    """The windows an interrupted run left at `path`, or new ones, which are kept there."""
    if not path.exists():
        windows = _make_windows(files, reference, options)
        _hold_out(windows, options)  # nothing is kept of a text that is too short
        save_whole({"windows": windows}, path)
    return _hold_out(load_file(path)["windows"], options)


def _make_windows(files: ModelFiles, reference: ModelFiles, options: FinetuneOptions) -> Tensor:
    """int64 [S, T], as many as `options` want or the text has."""
    if files.context is not None and options.sequence_length > files.context:
        raise PCDVQError(
            f"--sequence-length is {options.sequence_length}, {files.name} takes "
            f"{files.context} tokens; "
            "give a smaller one"
        )
    count = options.windows + options.holdout
    wanted = Wanted(options.calibration, count, options.sequence_length, options.seed)

    def original() -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(load_causal_lm(reference, "float32").eval())

    return mixed_windows(wanted, files.tokenizer(), original, Progress()).tokens


def _hold_out(windows: Tensor, options: FinetuneOptions) -> Windows:
    if len(windows) <= options.holdout:
        raise PCDVQError(
            f"calibration text has {len(windows)} windows of {options.sequence_length} tokens, "
            f"{options.holdout} are held out; give more text or a smaller --sequence-length"
        )
    # Spread over the text, away from its ends.
    places = torch.linspace(0, len(windows), options.holdout + 2)[1:-1].long()
    held = torch.zeros(len(windows), dtype=torch.bool).index_fill_(0, places, True)
    return Windows(windows[~held], windows[held])


def _train(
    checkpoint: Checkpoint,
    files: ModelFiles,
    reference: ModelFiles,
    windows: Windows,
    options: FinetuneOptions,
    path: Path,
    progress: OnStep | None,
) -> tuple[TrainingState, dict[str, Tensor]]:
    """Returns the state at the end and the tensors to store, by name."""
    student = Student(load_causal_lm(files, "float32"), checkpoint)
    original = load_causal_lm(reference, "float32").eval().requires_grad_(False)
    student.share_frozen(original)
    if options.gradient_checkpointing:
        student.recompute_layers()
    device = student.model.device
    windows = Windows(windows.training.to(device), windows.holdout.to(device))
    distillation = Distillation(student.model, original)
    state = Trainer(student, distillation, windows, options, path).run(progress)
    return state, student.tensors(state.best)


def _fingerprint(
    checkpoint: Checkpoint, reference: ModelFiles, options: FinetuneOptions
) -> dict[str, Any]:
    """Equal for runs that make the same checkpoint."""
    scales = hashlib.sha256()
    for layer in checkpoint.layers:
        name = f"{layer}.{ROW_SCALE}"
        with safe_open(checkpoint.tensors[name].file, framework="pt") as file:
            scales.update(file.get_tensor(name).float().numpy().tobytes())
    return {
        "checkpoint": str(checkpoint.directory),
        "checkpoint_sha256": scales.hexdigest(),
        "calibration_sha256": text_sha256(options.calibration),
        **asdict(options),
        "reference": reference.name,
    }


def _copy_checkpoint(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    """Copy all files of `source` to `target` with `tensors` in the place of theirs."""
    for path in sorted(source.iterdir()):
        if not path.is_file() or path.name in (RUN_FILE, "lock"):
            continue
        changed: dict[str, Tensor] = {}
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                changed = {name: tensors[name] for name in file.keys() if name in tensors}  # noqa: SIM118
        if changed:
            save_file(load_file(path) | changed, target / path.name, {"format": "pt"})
        else:
            shutil.copyfile(path, target / path.name)


def _describe(
    options: FinetuneOptions, reference: ModelFiles, state: TrainingState
) -> dict[str, Any]:
    """The report's section."""
    return {
        "options": asdict(options) | {"reference": reference.name},
        "steps": state.step,
        "kl_before": state.start_kl,
        "kl_after": state.best_kl,
        "diverged": state.diverged,
        "holdout_kl": [{"step": step, "kl": kl} for step, kl in state.validations],
        "seconds": round(state.seconds, 1),
    }


def _read_report(directory: Path) -> dict[str, Any]:
    return read_json(directory / REPORT_FILE) if (directory / REPORT_FILE).exists() else {}


def _bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.is_file())
