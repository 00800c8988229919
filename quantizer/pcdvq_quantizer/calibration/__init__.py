"""Calibrated quantization: layer by layer, with error feedback, against the original model."""
