"""The native kernels for looked-up weights in ONNX Runtime: where they lie, or why they do not.

The install builds them from `codebook_ops.cpp` where it finds a compiler and ONNX Runtime's headers (setup.py); without
them the bodies of standard nodes that graphs carry run instead, slower and to the same numbers.
"""

from __future__ import annotations

from pathlib import Path

LIBRARY = Path(__file__).with_name("codebook_ops.so")
WHY_NOT = Path(__file__).with_name("why_not.txt")  # what the install met when it could not build the library


def library() -> Path | None:
    """Returns the library of custom ops, or None if this install has none."""
    return LIBRARY if LIBRARY.is_file() else None


def why_not() -> str:
    """Returns why there is no library."""
    if WHY_NOT.is_file():
        return WHY_NOT.read_text(encoding="utf-8").strip()
    return "the package was not installed by its own build"
