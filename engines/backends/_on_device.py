"""Arrays of other libraries that lie on the GPU, by DLPack or by the CUDA array interface, read without a copy."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from engines.errors import UserError

CUDA = (2, 13)  # kDLCUDA and kDLCUDAManaged in dlpack.h
LEGACY_STREAM = 1  # cudaStreamLegacy
KINDS = "iuf"  # kDLInt, kDLUInt, kDLFloat, by number


@dataclass(frozen=True)
class OnDevice:
    """An array on the GPU: `stream` is to be waited for before it is read, all where it is None; `keeps` owns it."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None  # None for one that numpy lacks
    dense: bool
    stream: int | None
    keeps: Any


def on_device(value: Any) -> OnDevice | None:
    """Returns where an array lies on the GPU, or None for one that does not."""
    if hasattr(value, "__dlpack__") and hasattr(value, "__dlpack_device__"):
        kind, number = value.__dlpack_device__()
        if int(kind) not in CUDA:
            return None
        if number != 0:
            raise UserError(f"a feed lies on GPU {number}", fix="engines run on the first one: move it there")
        return from_capsule(value.__dlpack__(stream=LEGACY_STREAM))
    told = getattr(value, "__cuda_array_interface__", None)
    return None if told is None else _from_interface(told, value)


def _from_interface(told: Mapping[str, Any], owner: Any) -> OnDevice:
    """Source: the CUDA array interface, version 3."""
    shape, dtype = tuple(told["shape"]), np.dtype(told["typestr"])
    strides = told.get("strides")
    dense = strides is None or tuple(strides) == tuple(step * dtype.itemsize for step in _steps(shape))
    return OnDevice(int(told["data"][0]), shape, dtype, dense, told.get("stream"), owner)


class _Tensor(ctypes.Structure):
    """DLTensor, which a DLManagedTensor begins with. Source: dlpack.h."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32), ("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)), ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )  # fmt: skip


def from_capsule(capsule: Any) -> OnDevice:
    """Reads a DLPack capsule, which frees what it holds when it goes: it is not taken over."""
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = _Tensor.from_address(pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[: tensor.ndim])
    dense = not tensor.strides or tuple(tensor.strides[: tensor.ndim]) == _steps(shape)
    known = tensor.code < len(KINDS) and tensor.lanes == 1
    dtype = np.dtype(f"{KINDS[tensor.code]}{tensor.bits // 8}") if known else None
    return OnDevice((tensor.data or 0) + tensor.byte_offset, shape, dtype, dense, LEGACY_STREAM, capsule)


def _steps(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns a dense array's strides, in elements."""
    steps = np.cumprod([1, *shape[:0:-1]], dtype=np.int64)[::-1]
    return tuple(int(step) for step in steps[: len(shape)])
