"""The version of export-engine, part of every artifact's request."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

__version__ = "0.1.0"


@cache
def code_version() -> str:
    """Returns the version and a digest of the program's own source, so that changed code never serves old artifacts."""
    root = Path(__file__).parent.parent
    folders, kinds = ("engines", "exporter", "calib_data"), ("*.py", "*.cpp", "*.inc")
    found = (file for name in folders for kind in kinds for file in (root / name).rglob(kind))
    sources = sorted(file for file in found if root / "engines/cpp" not in file.parents)  # runs bundles, makes none
    digest = hashlib.sha256()
    for file in sources:
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"
