"""Measuring quality: perplexity, KL divergence from the original model, LAMBADA."""

from pcdvq_quantizer.evaluation.options import EvaluateOptions
from pcdvq_quantizer.evaluation.report import EvaluationReport
from pcdvq_quantizer.evaluation.run import evaluate

__all__ = ["EvaluateOptions", "EvaluationReport", "evaluate"]
