"""What ships, by file name, without importing any of it."""

from __future__ import annotations

import pkgutil
from pathlib import Path

HERE = Path(__file__).parent


def recipes() -> list[str]:
    return sorted(path.stem for path in (HERE / "recipes").glob("*.toml"))


def text(recipe: str) -> str:
    """Returns a recipe as it ships."""
    return (HERE / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")


def comment(recipe: str) -> str:
    """Returns a recipe's first line, which says what it is for."""
    with (HERE / "recipes" / f"{recipe}.toml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def modules(folder: str) -> list[str]:
    """Returns the modules of a family's folder (formats, methods, models); a leading underscore marks shared code."""
    return sorted(m.name for m in pkgutil.iter_modules([str(HERE / folder)]) if not m.name.startswith("_"))
