"""The demo models that ship with the package."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "models"


def names() -> list[str]:
    return sorted(path.name for path in FOLDER.iterdir() if (path / "model_index.json").is_file())


def folder(name: str) -> Path:
    return FOLDER / name
