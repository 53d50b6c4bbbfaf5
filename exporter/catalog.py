"""What ships, by file name, without importing any of it."""

from __future__ import annotations

import pkgutil
from pathlib import Path

HERE = Path(__file__).parent


def recipes() -> list[str]:
    return sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))


def modules(folder: str) -> list[str]:
    """Returns the modules of a family's folder (formats, methods, models); a leading underscore marks shared code."""
    return sorted(m.name for m in pkgutil.iter_modules([str(HERE / folder)]) if not m.name.startswith("_"))
