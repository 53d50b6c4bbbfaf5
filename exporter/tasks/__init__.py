"""Tasks: what the images of a shipped model are scored by, one module each.

A task says how well images show what was asked for, and gives the features that sets of images are compared in.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import torch

from engines.errors import unknown
from exporter import catalog


class Task(Protocol):
    """What the `load` of a task module returns; images are [n, c, h, w] in [−1, 1]."""

    NAME_OF_SCORE: str

    def scores(self, images: torch.Tensor, asked: Sequence[str]) -> torch.Tensor:
        """Returns [n] in fp64: the share, 0…1, of what was asked that each image shows."""

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features [n, 64] for Fréchet distance, precision and recall."""


class _Module(Protocol):
    def load(self, weights: Path | None) -> Task: ...


def names() -> list[str]:
    return catalog.modules("tasks")


def load(name: str, weights: Path | None) -> Task:
    """Returns a task by name; `weights` is the safetensors file of its network."""
    if name not in names():
        raise unknown("task", name, names())
    return cast(_Module, importlib.import_module(f"exporter.tasks.{name}")).load(weights)
