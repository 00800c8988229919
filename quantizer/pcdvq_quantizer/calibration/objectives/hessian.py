"""The squared error of a layer's outputs, E |(W' - W) x|^2, all outputs and tokens alike."""

from __future__ import annotations

from pathlib import Path

from pcdvq_quantizer.calibration.decoder import LayeredModel
from pcdvq_quantizer.calibration.objectives.base import StageObjective, Text
from pcdvq_quantizer.progress import Progress


class HessianObjective:
    """Needs no measurement."""

    def __init__(self, directory: Path) -> None:
        del directory

    def prepare(
        self, model: LayeredModel, linears: list[str], text: Text, progress: Progress
    ) -> None:
        """Nothing to measure."""

    def stage(self, names: list[str]) -> StageObjective:
        return StageObjective()
