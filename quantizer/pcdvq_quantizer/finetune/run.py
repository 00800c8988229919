"""The fine-tuning run: a checkpoint and its original in, a whole checkpoint directory out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pcdvq_kernels.checkpoint import REPORT_FILE, Checkpoint, open_checkpoint
from pcdvq_kernels.errors import PCDVQError
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pcdvq_quantizer.calibration.mixture import Wanted, mixed_windows
from pcdvq_quantizer.card import write_model_card
from pcdvq_quantizer.contents import checkpoint_files, copy_file
from pcdvq_quantizer.evaluation.files import ModelFiles, find_reference
from pcdvq_quantizer.evaluation.hf_model import load_causal_lm
from pcdvq_quantizer.files import save_whole
from pcdvq_quantizer.finetune.distillation import Distillation
from pcdvq_quantizer.finetune.options import FinetuneOptions
from pcdvq_quantizer.finetune.student import Student
from pcdvq_quantizer.finetune.training import OnStep, Trainer, TrainingState, Windows
from pcdvq_quantizer.identity import fingerprint, paths_of
from pcdvq_quantizer.limits import check_vocabulary
from pcdvq_quantizer.output import Output
from pcdvq_quantizer.progress import Notes, Progress
from pcdvq_quantizer.record import read_report
from pcdvq_quantizer.texts import text_identity
from pcdvq_quantizer.writer import CheckpointWriter

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
    note: Callable[[str], None] | None = None,
) -> FinetuneResult:
    """Distil the original model into the row scales and norms of `checkpoint`; write `output`.

    Codes, codebooks and speed stay the same. On the hold-out windows the result is never worse
    than `checkpoint`: the best parameters found are written. Work goes to `output`.partial; the
    same call continues there after an interruption. `output` may be `checkpoint` with `overwrite`.
    In memory are both models in fp32, and activations of one window.

    Args:
        note: is told what the user should know, such as that windows are shorter than asked for.

    Raises:
        PCDVQError: a model or the text cannot be read or does not fit, something would be lost at
            `output`, or the partial directory belongs to another run.
    """
    Output.at(output, overwrite).recover()  # which may be `checkpoint`
    opened = open_checkpoint(checkpoint)
    files = ModelFiles.find(str(checkpoint))
    reference = find_reference(files, options.reference)
    check_vocabulary(files.limits.vocabulary, reference.limits.vocabulary)
    notes = Notes(note) if note else Progress()
    for each in (files, reference):
        length = each.limits.fit_window(options.sequence_length, "--sequence-length", 0, notes.note)
        options = replace(options, sequence_length=length)
    place = _output(output, overwrite, files, reference)
    writer = CheckpointWriter(place, _fingerprint(files, reference, options))
    with writer.open(needed_bytes=_bytes(checkpoint)):
        path = writer.work_directory / STATE_FILE
        kept = writer.work_directory / WINDOWS_FILE
        windows = _kept_windows(kept, files, reference, options, notes)
        state, tensors = _train(opened, files, reference, windows, options, path, progress)
        _copy_checkpoint(checkpoint, writer.directory, tensors)
        report = read_report(checkpoint)
        report["finetune"] = _describe(options, reference, state)
        writer.write_json(REPORT_FILE, report)
        write_model_card(writer.directory)
        writer.publish(_models(files, reference))
    published = open_checkpoint(place.path)
    return FinetuneResult(published, state.start_kl, state.best_kl, state.step, state.diverged)


def _kept_windows(
    path: Path,
    files: ModelFiles,
    reference: ModelFiles,
    options: FinetuneOptions,
    progress: Progress,
) -> Windows:
    """The windows an interrupted run left at `path`, or new ones, which are kept there."""
    if not path.exists():
        windows = _make_windows(files, reference, options, progress)
        _hold_out(windows, options)  # nothing is kept of a text that is too short
        save_whole({"windows": windows}, path)
    return _hold_out(load_file(path)["windows"], options)


def _make_windows(
    files: ModelFiles, reference: ModelFiles, options: FinetuneOptions, progress: Progress
) -> Tensor:
    """int64 [S, T], as many as `options` want or the text has."""
    wanted = Wanted(
        options.calibration,
        options.windows + options.holdout,
        options.sequence_length,
        options.seed,
        readers=(files.limits, reference.limits),
        owner=files.name,
    )

    def original() -> AbstractContextManager[PreTrainedModel]:
        return nullcontext(load_causal_lm(reference, "float32").eval())

    return mixed_windows(wanted, files.tokenizer(), original, progress).tokens


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


def _output(output: Path, overwrite: bool, files: ModelFiles, reference: ModelFiles) -> Output:
    place = Output.at(output, overwrite)
    models = paths_of(reference.source)
    if place.path != files.directory.resolve():
        models += paths_of(files.source)
    return replace(place, models=tuple(models))


def _fingerprint(
    files: ModelFiles, reference: ModelFiles, options: FinetuneOptions
) -> dict[str, Any]:
    """Equal for runs that make the same checkpoint."""
    return {
        **asdict(options),
        **text_identity(options.calibration),
        **_models(files, reference),
    }


def _models(files: ModelFiles, reference: ModelFiles) -> dict[str, Any]:
    return {**fingerprint(files.source), "reference": fingerprint(reference.source)}


def _copy_checkpoint(source: Path, target: Path, tensors: dict[str, Tensor]) -> None:
    """Copy the checkpoint in `source` to `target` with `tensors` in the place of its own."""
    for name in checkpoint_files(source):
        changed: dict[str, Tensor] = {}
        if name.endswith(".safetensors"):
            with safe_open(source / name, framework="pt") as file:
                changed = {key: tensors[key] for key in file.keys() if key in tensors}  # noqa: SIM118
        if changed:
            save_whole(load_file(source / name) | changed, target / name, {"format": "pt"})
        else:
            copy_file(name, source, target)


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


def _bytes(directory: Path) -> int:
    return sum((directory / name).stat().st_size for name in checkpoint_files(directory))
