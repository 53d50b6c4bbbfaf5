"""Handwritten digits, 8×8: an image is right when a classifier takes it for the digit asked for."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from engines.errors import UserError
from exporter.tasks import _weights


class TaskNet(nn.Module):
    """A small convolutional classifier of 8×8 images; its 64 penultimate features serve Fréchet distance and recall."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Returns logits [n, classes] of images [n, 1, 8, 8] in [−1, 1]."""
        return self.head(self.body(images))  # type: ignore[no-any-return]


class Digits:
    """Scores 1 or 0; asked for are digits, "0" to "9"."""

    NAME_OF_SCORE = "class accuracy"

    def __init__(self, net: TaskNet) -> None:
        self.net = net

    @torch.no_grad()
    def scores(self, images: torch.Tensor, asked: Sequence[str]) -> torch.Tensor:
        wanted = torch.tensor([_label(word) for word in asked], device=images.device)
        taken: torch.Tensor = self.net(images.float()).argmax(dim=1)
        finite = images.isfinite().flatten(1).all(dim=1)  # argmax takes NaN for the largest, and so for some digit
        return ((taken == wanted) & finite).double()

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.net.body(images.float())  # type: ignore[no-any-return]


def load(weights: Path | None) -> Digits:
    if weights is None:
        raise UserError(
            "task digits: is scored by a network, and no weights were given",
            fix='set "task_net" in the model\'s sampler.json',
        )
    return Digits(_weights.read(TaskNet(), weights))


def _label(word: str) -> int:
    if not (word.isascii() and word.isdigit() and int(word) < 10):
        raise UserError(f"task digits: {word!r} is not a digit", fix="ask for labels from 0 to 9")
    return int(word)
