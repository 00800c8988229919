"""Quantization by VPTQ's method (arXiv 2409.17066) into its published layout."""
