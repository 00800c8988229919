"""The quantization run: a model in, a whole checkpoint directory out."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from pcdvq_kernels.checkpoint import REPORT_FILE
from pcdvq_kernels.errors import PCDVQError
from torch import Tensor

from pcdvq_quantizer.calibration.parallel import ALONE, Processes
from pcdvq_quantizer.calibration.run import calibrate, check_windows
from pcdvq_quantizer.calibration.trust import HeldOut
from pcdvq_quantizer.card import write_model_card
from pcdvq_quantizer.checkpoints import AnyCheckpoint, open_any_checkpoint
from pcdvq_quantizer.identity import fingerprint, paths_of
from pcdvq_quantizer.launch import launch
from pcdvq_quantizer.layer import LayerError, QuantizedLayer
from pcdvq_quantizer.output import Output
from pcdvq_quantizer.plan import NONE, Plan, RunOptions, make_plan
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.source_check import check_values
from pcdvq_quantizer.writer import CheckpointWriter, Shard, plan_shards


def quantize_in_processes(
    count: int,
    model: str,
    options: RunOptions,
    output: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> AnyCheckpoint:
    """`quantize_model` of the plan for `model` and `options`, by `count` processes of this machine.

    A run may be continued with another number of them.

    Raises:
        PCDVQError: as `quantize_model`; there is nothing to do in parallel; one was killed.
    """
    if options.calibration == NONE:
        raise PCDVQError(
            f"{count} processes share the calibration, of which there is none; drop --processes "
            "or --calibration none"
        )
    check_windows(options.samples, count)
    arguments = (model, options, output, overwrite)
    launch(count, quantize_share, arguments, progress or Progress())
    return open_any_checkpoint(Output.at(output).path)


def quantize_share(
    processes: Processes,
    progress: Progress,
    model: str,
    options: RunOptions,
    output: Path,
    overwrite: bool,
) -> None:
    """What each process of `quantize_in_processes` does."""
    plan = make_plan(model, options)
    if processes.rank == 0:
        quantize_model(plan, output, overwrite, progress, processes)
    else:
        writer = CheckpointWriter(Output.at(output), {})  # which process 0 has opened
        calibrate(plan, writer, progress, processes)


def quantize_model(
    plan: Plan,
    output: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    processes: Processes = ALONE,
) -> AnyCheckpoint:
    """Quantize and write the checkpoint `output`, which appears whole or not at all.

    Work goes to `output`.partial, layer by layer; a run that was interrupted and is started again
    with the same model and options continues there.

    Args:
        processes: of which this is process 0; the others call `calibrate`.

    Raises:
        PCDVQError: something would be lost at `output`, the disk is full, weights are not finite,
            the calibration text cannot be used, or the partial directory belongs to another run.
    """
    started = time.monotonic()
    progress = progress or Progress()
    place = Output.at(output, overwrite, paths_of(plan.source))
    writer = CheckpointWriter(place, plan.fingerprint())
    held_out: HeldOut | None = None
    with writer.open(needed_bytes=plan.output_bytes):
        check_values(plan.source, plan.copied)  # which are read last: no work is lost
        plan.source.copy_files(writer.directory)  # first, since it may be refused
        if plan.options.calibration == NONE:
            progress.start(f"Quantizing {len(plan.selection.layers)} layers", plan.weights)
        else:
            plan, held_out = calibrate(plan, writer, progress, processes)
        source = plan.source
        packed = {name: plan.packed_bytes(name) for name in plan.selection.layers}
        shards = plan_shards(((name, source.bytes(name)) for name in source.shapes), packed)
        for shard in shards:
            if not writer.is_written(shard):
                _make_shard(plan, shard, writer, progress)
        errors = writer.finish(shards, plan.distinct_codebooks)
        config = source.config | {"quantization_config": plan.quantization_config()}
        writer.write_json("config.json", config)
        identity = fingerprint(source)
        report = {
            "model": source.name,
            "model_sha256": identity["model_sha256"],
            "options": asdict(plan.options),
            "seconds": round(time.monotonic() - started, 1),
            "errors": errors,
            "held_out": held_out and asdict(held_out),
            "skipped": plan.selection.skipped,
            "original_bytes": sum(map(source.bytes, source.shapes)),
        }
        writer.write_json(REPORT_FILE, report)
        write_model_card(writer.directory)
        return writer.publish(identity)


def _make_shard(plan: Plan, shard: Shard, writer: CheckpointWriter, progress: Progress) -> None:
    tensors: dict[str, Tensor] = {}
    errors: dict[str, LayerError] = {}
    for name in shard.layers:
        layer: QuantizedLayer | None = writer.read_layer(name)
        if layer is None:
            layer = plan.quantize(name)
            writer.write_layer(name, layer)
            progress.advance(plan.size(name))
        tensors |= layer.tensors(prefix=f"{name}.")
        errors[name] = layer.error
    tensors |= {name: plan.source.load(name).contiguous() for name in shard.copied}
    writer.write_shard(shard, tensors, errors)
