"""Triton kernels of the operators, for GPUs (GPU.md).

`format` says how weights are laid out on a GPU, `prepack` brings a checkpoint's codes there,
`decode` turns them into tensor-core operands; `linear`, `moe`, `hadamard` and `dequantize` are the
kernels; `tuning` chooses their launch parameters; `backend` puts them behind the operators.
"""
