"""What the rounding of a layer is to keep small; an objective is one module here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pcdvq_quantizer.calibration.objectives.base import Objective
from pcdvq_quantizer.calibration.objectives.fisher import FisherObjective
from pcdvq_quantizer.calibration.objectives.hessian import HessianObjective

HESSIAN = "hessian"  # errors of outputs, the default
# By name, made with the directory of a run, where an objective keeps what it measures.
OBJECTIVES: dict[str, Callable[[Path], Objective]] = {
    HESSIAN: HessianObjective,
    "fisher": FisherObjective,
}

__all__ = ["HESSIAN", "OBJECTIVES", "Objective"]
