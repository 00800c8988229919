"""Offline quantizer: writes PCDVQ checkpoints. Needs no vLLM."""
