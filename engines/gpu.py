"""Which NVIDIA GPU this machine has, asked of the driver, so that no CUDA package is needed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR} in cuda.h


@cache
def detect() -> str | None:
    """Returns the first GPU's compute capability as `sm89`, or None on a machine with no usable GPU."""
    driver = _library()
    if driver is None:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    for value, attribute in ((major, _MAJOR), (minor, _MINOR)):
        if driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device):
            return None
    return f"sm{major.value}{minor.value}"


def driver() -> str | None:
    """Returns the newest CUDA version that the driver serves, as `CUDA 13.0`, or None without a driver."""
    library, version = _library(), ctypes.c_int()
    if library is None or library.cuDriverGetVersion(ctypes.byref(version)):
        return None
    return f"CUDA {version.value // 1000}.{version.value % 1000 // 10}"


def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
