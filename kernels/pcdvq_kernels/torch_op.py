"""`pcdvq::linear` of CPU tensors without Python between torch's dispatcher and the C++ kernel.

A call from Python through a registration in Python takes about 25 microseconds, as long as the
kernel itself for a layer of 576 columns. `csrc/torch_op.cpp` registers the plain call in C++; any
other (a layout not seen before, arguments to convert or to refuse) comes back to Python.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pcdvq_kernels.arguments import LayoutFields, linear_shape

Linear = Callable[..., Tensor]

# Of libtorch_cpu, in the order of PcdvqTorch of csrc/pcdvq.h.
_FUNCTIONS = (
    "aoti_torch_library_init_impl",
    "torch_library_impl",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_dtype",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_is_contiguous",
    "aoti_torch_get_data_ptr",
    "aoti_torch_empty_strided",
    "torch_list_size",
    "torch_list_get_item",
    "torch_delete_list",
    "torch_delete_stable_ivalue",
    "torch_get_num_threads",
)
_Handles = ctypes.POINTER(ctypes.c_void_p)
_Ints = ctypes.POINTER(ctypes.c_int64)
_Layout = ctypes.c_int64 * len(LayoutFields._fields)
_IN_PYTHON = ctypes.CFUNCTYPE(
    ctypes.c_void_p, _Handles, _Ints, ctypes.c_int32, ctypes.c_void_p, ctypes.c_size_t
)


class _LinearShape(ctypes.Structure):
    """PcdvqLinearShape of csrc/pcdvq.h."""

    _fields_ = (
        ("layout", _Layout),
        *((name, ctypes.c_int64) for name in ("k", "row_bytes", "codewords", "block_bytes")),
    )


def register(library: ctypes.CDLL, linear: Linear) -> bool:
    """Let torch call `library` for `pcdvq::linear` of CPU tensors; the operator must be defined.

    Args:
        library: the compiled kernels.
        linear: the operator in Python, for calls that are not plain.

    Returns:
        Whether this torch has what it takes (2.13); if not, nothing has changed.
    """
    try:
        torch_library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        functions = [getattr(torch_library, name) for name in _FUNCTIONS]
    except (OSError, AttributeError):
        return False
    in_python = _IN_PYTHON(_bridge(library, linear))
    _kept.append(in_python)  # C++ calls it for as long as the process lives
    pointers = [ctypes.cast(function, ctypes.c_void_p) for function in (*functions, in_python)]
    library.pcdvq_torch_register.argtypes = (_Handles,)
    return library.pcdvq_torch_register((ctypes.c_void_p * len(pointers))(*pointers)) == 0


_kept: list[object] = []


def _bridge(library: ctypes.CDLL, linear: Linear) -> Callable[..., int | None]:
    """`linear` for C++: handles in, a handle or a message out."""

    def in_python(
        handles: Any, ints: Any, int_count: int, message: int, message_size: int
    ) -> int | None:
        try:
            x = _take_tensor(handles[0])
            weight = [_take_tensor(handles[i]) for i in range(1, 5)]
            bias = None if handles[5] is None else _take_tensor(handles[5])
            layout = tuple(ints[:int_count])
            y = linear(x, *weight, bias, layout)
            _accept(library, layout, x.shape[-1])
            return _give_tensor(y)
        except Exception as error:  # C++ raises it again
            text = str(error).encode()[: message_size - 1] + b"\0"
            ctypes.memmove(message, text, len(text))
            return None

    return in_python


@cache
def _accept(library: ctypes.CDLL, layout: tuple[int, ...], in_features: int) -> None:
    """Calls with this layout are plain from now on."""
    shape = linear_shape(layout, in_features)
    library.pcdvq_torch_accept(
        ctypes.byref(
            _LinearShape(
                _Layout(*layout),
                in_features,
                shape.row_bytes,
                shape.codewords_shape[0],
                shape.block_bytes,
            )
        )
    )


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, (ctypes.c_void_p,) * 3
_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_void_p)


def _take_tensor(handle: int) -> Tensor:
    """The tensor of a handle that C++ gives away."""
    capsule = _capsule(handle, None, None)
    # The function for a single one leaks the handle.
    (tensor,) = torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([capsule])
    return tensor


def _give_tensor(tensor: Tensor) -> int:
    """A handle to `tensor` that C++ owns."""
    return _pointer(torch._C._aoti.unsafe_alloc_void_ptr_from_tensor(tensor), None)
