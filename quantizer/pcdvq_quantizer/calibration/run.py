"""The calibrated quantization of all decoder layers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from itertools import compress
from pathlib import Path

import torch
from pcdvq_kernels.errors import PCDVQError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pcdvq_quantizer.calibration.allocation import choose_rates
from pcdvq_quantizer.calibration.damping import choose_damping
from pcdvq_quantizer.calibration.decoder import Call, LayeredModel
from pcdvq_quantizer.calibration.experts import FEW_TOKENS, Routed, quantize_experts
from pcdvq_quantizer.calibration.mixture import Windows, calibration_windows
from pcdvq_quantizer.calibration.objectives import HESSIAN, OBJECTIVES, Objective
from pcdvq_quantizer.calibration.objectives.base import StageObjective, Text
from pcdvq_quantizer.calibration.parallel import ALONE, Processes
from pcdvq_quantizer.calibration.replay import Replay, run_original, text_decides
from pcdvq_quantizer.calibration.statistics import Damping, Inputs, InputStatistics
from pcdvq_quantizer.calibration.trust import HeldOut, measure_held_out
from pcdvq_quantizer.calibration.weights import lengths, without_outliers
from pcdvq_quantizer.experts import Experts, experts_of
from pcdvq_quantizer.files import save_whole
from pcdvq_quantizer.plan import PCDVQPlan, Plan, QuantizeOptions, RunOptions
from pcdvq_quantizer.progress import Progress
from pcdvq_quantizer.writer import CheckpointWriter

# Damping is chosen in every so many decoder layers, for it takes several factorisations.
CHOICE_LAYERS = 4
GOOD_BITS = 4.0
STATE_FILE = "calibration.safetensors"


@dataclass
class CalibrationState:
    """Where a calibration stands: all it needs to go on after an interruption.

    Each process has its share of the hidden states; the file holds all of them.

    Attributes:
        next_layer: index of the first decoder layer that is not quantized.
        windows: the calibration text, all of it.
        original: fp32 [S, T, H], hidden states before `next_layer` in the original model.
        quantized: the same in the model quantized so far.
        damping: of each stage of a decoder layer, as last chosen; by the names of its linears.
    """

    next_layer: int
    windows: Windows
    original: Tensor
    quantized: Tensor
    damping: dict[str, Damping] = field(default_factory=dict)

    def save(self, directory: Path, processes: Processes = ALONE) -> None:
        """Process 0 writes what all have."""
        count = len(self.windows.tokens)
        tensors = {
            **vars(self.windows),
            "original": processes.gather(self.original.cpu(), count),
            "quantized": processes.gather(self.quantized.cpu(), count),
        }
        if processes.rank == 0:
            damping = {name: (each.feedback, each.target) for name, each in self.damping.items()}
            metadata = {"next_layer": str(self.next_layer), "damping": json.dumps(damping)}
            save_whole(tensors, directory / STATE_FILE, metadata)

    @classmethod
    def load(
        cls, directory: Path, device: torch.device, processes: Processes = ALONE
    ) -> CalibrationState | None:
        """The state in `directory`, with this process's share of the hidden states, or None."""
        try:
            with safe_open(directory / STATE_FILE, framework="pt") as file:
                names = [field.name for field in fields(Windows)]
                windows = Windows(*(file.get_tensor(name) for name in names))
                share = processes.share(len(windows.tokens))
                hidden = [file.get_slice(name)[share] for name in ("original", "quantized")]
                next_layer = int(file.metadata()["next_layer"])
                chosen = json.loads(file.metadata()["damping"])
        except (FileNotFoundError, SafetensorError):
            return None
        damping = {name: Damping(*each) for name, each in chosen.items()}
        original, quantized = (each.to(device) for each in hidden)
        return cls(next_layer, windows, original, quantized, damping)


def calibrate(
    plan: Plan, writer: CheckpointWriter, progress: Progress, processes: Processes = ALONE
) -> tuple[Plan, HeldOut | None]:
    """Quantize all decoder layers of `plan`; finished ones go to the writer.

    A run that was interrupted continues after the last decoder layer it finished.

    Args:
        processes: that do it together; all call this. Only process 0 writes.

    Returns:
        (the plan, with the rates that were chosen where those differ by layer; what windows that
        were held out say of the result).

    Raises:
        PCDVQError: the calibration text cannot be used or has fewer windows than there are
            processes, or activations are not finite.
    """
    device = processes.device
    model = LayeredModel(plan.source, plan.selection.layers, device)
    directory = writer.work_directory
    chosen = plan.options.objective if isinstance(plan, PCDVQPlan) else HESSIAN
    objective = OBJECTIVES[chosen](directory)
    with torch.no_grad():
        with processes.first_alone():  # which writes what the others then read
            state = CalibrationState.load(directory, device, processes)
            if state is None:
                _begin(plan, writer, model, progress)
                state = CalibrationState.load(directory, device, processes)
                assert state is not None
            tokens = state.windows.learnt
            check_windows(len(tokens), processes.count)
            if isinstance(plan, PCDVQPlan) and plan.options.is_mixed:
                plan = choose_rates(plan, model, tokens, directory, progress)
            text = Text(tokens, plan.options.seed)
            objective.prepare(model, plan.selection.linears, text, progress)
        progress.start(f"Quantizing {len(plan.selection.layers)} layers", plan.weights)
        if plan.selection.embedding is not None:  # done with the first hidden states
            progress.advance(plan.size(plan.selection.embedding))
        _Calibration(plan, writer, model, objective, progress, processes).run(state)
        held_out = None
        if model.predicts:
            outputs = state.original, state.quantized
            held_out = measure_held_out(model, state.windows, *outputs, processes)
    if held_out is not None:
        progress.note(held_out.sentence(remedy(plan.options)))
    return plan, held_out


def remedy(options: RunOptions) -> str:
    """What may help a model that `options` have changed much."""
    bits = getattr(options, "bits", None)  # of a method whose sizes are given there are none
    if bits is not None and bits < GOOD_BITS:
        tuned = ", or `pcdvq finetune`" if isinstance(options, QuantizeOptions) else ""
        return f"try --bits {GOOD_BITS:g}{tuned}"
    return "try more --samples or other text for --calibration"


def check_windows(windows: int, processes: int) -> None:
    """Raises PCDVQError if there is no window of calibration text for some process."""
    if processes > windows:
        raise PCDVQError(
            f"{processes} processes have {windows} windows of calibration text to share; give "
            "fewer --processes, more --samples, or more text"
        )


def _begin(plan: Plan, writer: CheckpointWriter, model: LayeredModel, progress: Progress) -> None:
    """Save the state before the first decoder layer."""
    model.check()  # before text is written for it
    windows = calibration_windows(plan, model, progress)
    original, _ = model.embed(windows.tokens)
    quantized = original.clone()
    if isinstance(plan, PCDVQPlan) and plan.selection.embedding is not None:
        quantized = _embed_quantized(plan, plan.selection.embedding, writer, model, windows.tokens)
    CalibrationState(0, windows, original, quantized).save(writer.work_directory)


def _embed_quantized(
    plan: PCDVQPlan, name: str, writer: CheckpointWriter, model: LayeredModel, tokens: Tensor
) -> Tensor:
    """What embedding `name`, quantized, makes of `tokens`: fp32 [S, T, H]."""
    layer = plan.quantize(name)
    writer.write_layer(name, layer)
    return model.embed(tokens, plan.dequantize(name, layer))[0]


class _Calibration:
    """Quantizes decoder layers in order, each on the output of those before it.

    Two streams of hidden states run through the model: the original's, and the quantized model's.
    """

    def __init__(
        self,
        plan: Plan,
        writer: CheckpointWriter,
        model: LayeredModel,
        objective: Objective,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self._plan = plan
        self._writer = writer
        self._model = model
        self._objective = objective
        self._progress = progress
        self._processes = processes

    def run(self, state: CalibrationState) -> None:
        _, calls = self._model.embed(state.windows.tokens[:1])
        for index, name in enumerate(self._model.layers):
            if index < state.next_layer:
                self._progress.advance(sum(map(self._plan.size, self._linears(name))))
                continue
            self._quantize_layer(index, calls[index], state)
            state.next_layer += 1
            state.save(self._writer.work_directory, self._processes)

    def _quantize_layer(self, index: int, call: Call, state: CalibrationState) -> None:
        """Quantize decoder layer `index` and move both streams of `state` past it."""
        name = self._model.layers[index]
        layer = self._model.load(index)
        linears = [experts_of(linear) or linear for linear in self._linears(name)]
        inner = [linear.removeprefix(f"{name}.") for linear in dict.fromkeys(linears)]
        original, stages = run_original(layer, call, state.original, inner)
        _check_finite(original, f"output of {name} in the original model")
        if not self._processes.agree([(s.linears, s.residual is None) for s in stages]):
            raise text_decides()
        replay = Replay(layer, call, state.quantized, stages)
        share = self._processes.share(len(state.windows.tokens))
        kinds = state.windows.kinds[share].tolist()
        costs = state.windows.weights * ~state.windows.held[:, None]
        length = self._processes.gather(lengths(state.original, original), len(costs))
        costs = without_outliers(costs, length)[share]
        for number, stage in enumerate(stages):
            experts = layer.get_submodule(stage.linears[0])
            if isinstance(experts, Experts):
                learnt = ~state.windows.held[share]
                path = f"{name}.{stage.linears[0]}"
                self._quantize_experts(path, experts, replay, number, learnt.tolist())
            else:
                names = [f"{name}.{linear}" for linear in stage.linears]
                goal = self._objective.stage(names)
                weights = costs
                if goal.weights is not None:
                    weights = state.windows.spread(goal.weights)[share]
                pairs = _pairs(replay, number, weights, kinds)
                found = InputStatistics.gather_kinds(pairs, self._processes)
                statistics = self._damped(names, found, index, state.damping)
                self._quantize_linears(names, statistics, goal)
            stage.inputs.clear()
        state.original, state.quantized = original, replay.output()
        self._model.unload(index)

    def _damped(
        self,
        names: list[str],
        kinds: list[InputStatistics],
        index: int,
        chosen: dict[str, Damping],
    ) -> InputStatistics:
        """The moments of all `kinds` of text, with the damping of linears `names` in layer `index`.

        It is chosen in some layers, and kept for those after.
        """
        moments = InputStatistics.merge(kinds)
        if len(kinds) == 1:
            return moments
        stage = " ".join(name.removeprefix(f"{self._model.layers[index]}.") for name in names)
        start = chosen.get(stage)
        if start is None or index % CHOICE_LAYERS == 0:
            weight = torch.cat([self._model.model.get_parameter(f"{n}.weight").data for n in names])

            def choose() -> tuple[Tensor]:
                best = choose_damping(kinds, weight, start or moments.damping)
                return (torch.tensor([best.feedback, best.target], dtype=torch.float64),)

            chosen[stage] = Damping(*self._processes.once(choose)[0].tolist())
        return replace(moments, chosen=chosen[stage])

    def _quantize_linears(
        self, names: list[str], statistics: InputStatistics, goal: StageObjective | None = None
    ) -> None:
        """Quantize linears that read inputs of these moments, in place."""
        _check_finite(statistics.hessian, f"input of {names[0]}")
        weights = [self._model.model.get_parameter(f"{name}.weight") for name in names]
        packed, dense = self._plan.quantize_stage(
            names, [weight.data.cpu() for weight in weights], statistics, self._processes, goal
        )
        if self._processes.rank == 0:
            for name, layer in zip(names, packed, strict=True):
                self._writer.write_layer(name, layer)
        for weight, decoded in zip(weights, dense, strict=True):
            weight.data = decoded.to(weight.device)
        self._progress.advance(sum(map(self._plan.size, names)))

    def _quantize_experts(
        self, name: str, experts: Experts, replay: Replay, number: int, learnt: list[bool]
    ) -> None:
        """Quantize the experts `name`, stage `number` of a decoder layer, on windows `learnt`."""
        arguments = zip(*compress(replay.arguments(number), learnt), strict=True)
        inputs = list(compress(replay.stages[number].inputs, learnt))
        routed = Routed(torch.cat(inputs), *(torch.cat(each) for each in arguments))
        few = quantize_experts(name, experts, routed, self._quantize_linears, self._processes)
        if few:
            self._progress.note(
                f"{name}: {len(few)} of {len(experts)} experts have less than {FEW_TOKENS} tokens "
                "of the calibration text and were calibrated on all of it; give more --samples."
            )

    def _linears(self, layer: str) -> list[str]:
        return [name for name in self._plan.selection.layers if name.startswith(f"{layer}.")]


def _pairs(replay: Replay, number: int, weights: Tensor, kinds: list[int]) -> Iterator[Inputs]:
    """Inputs of stage `number` in both models; its linears are the original's.

    `weights` fp32 [S, T] are those of tokens, `kinds` those of windows.
    """
    stage = replay.stages[number]
    weight = replay.layer.get_parameter(f"{stage.linears[0]}.weight")
    for sequence, x in enumerate(replay.inputs(number)):
        original, lack = stage.inputs[sequence], None
        if stage.residual is not None:
            drift = stage.residual[sequence] - replay.residual[sequence]
            lack = drift.addmm(original - x, weight.T)
        yield Inputs(original, x, lack, weights[sequence], kinds[sequence])


def _check_finite(values: Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise PCDVQError(
            f"{what} holds NaN or infinity on the calibration text; check that the model works, or "
            "quantize with --calibration none"
        )
