"""`pcdvq report`: one self-contained HTML page about a checkpoint."""

from pcdvq_quantizer.report.page import write_report

__all__ = ["write_report"]
