"""PCDVQ checkpoint format, reference mathematics and kernels."""
