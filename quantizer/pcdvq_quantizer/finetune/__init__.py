"""Recovery fine-tuning: row scales and norms are distilled from the original model."""

from pcdvq_quantizer.finetune.options import FinetuneOptions
from pcdvq_quantizer.finetune.run import FinetuneResult, finetune_checkpoint
from pcdvq_quantizer.finetune.training import Step

__all__ = ["FinetuneOptions", "FinetuneResult", "Step", "finetune_checkpoint"]
