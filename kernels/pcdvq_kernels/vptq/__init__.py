"""VPTQ weights (arXiv 2409.17066), as published checkpoints store them: format and kernels."""
