"""Rendered shapes, 32×32: an image is as right as the share of its caption's attributes that can be measured in it.

The scores come from geometry (`calib_data.shapes`); a small network serves only for features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from calib_data import shapes
from engines.errors import UserError
from exporter.tasks import _weights

FLIPPED = {"right of": "left of", "below": "above"}
ARRANGEMENTS = [*shapes.PLACES, *FLIPPED.values()]
ONE = [list(shapes.SIZES), list(shapes.COLOURS), list(shapes.AREAS)]
ANSWERS = [
    *map(len, ONE),
    *(1 + len(words) for words in ONE),
    len(ARRANGEMENTS),
]  # classes of each; 0: no second object


class AttributeNet(nn.Module):
    """Says what a picture shows: both objects in reading order, and their arrangement; 64 penultimate features."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 24, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(24, 48, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(48, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 16, 64), nn.GELU(),  # with ReLU 28 of them died in training
        )  # fmt: skip
        self.head = nn.Linear(64, sum(ANSWERS))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Returns logits [n, classes] for each of ANSWERS, of images [n, 3, 32, 32] in [−1, 1]."""
        return self.head(self.body(images)).split(ANSWERS, dim=1)  # type: ignore[no-any-return]


def answers(caption: shapes.Caption) -> list[int]:
    """Returns the class of each of ANSWERS; "a right of b" and "b left of a" are one picture and have the same."""
    flipped = caption.place in FLIPPED
    first, *second = [
        [words.index(word) for words, word in zip(ONE, (one.size, one.colour, one.shape), strict=True)]
        for one in (reversed(caption.objects) if flipped else caption.objects)
    ]
    others = [1 + index for index in second[0]] if second else [0] * len(ONE)
    return [*first, *others, ARRANGEMENTS.index(FLIPPED[caption.place] if flipped else caption.place)]


class Shapes:
    """Scores the attributes right; asked for are captions. Only `features` needs the network."""

    NAME_OF_SCORE = "attribute accuracy"

    def __init__(self, net: AttributeNet | None) -> None:
        self.net = net

    def scores(self, images: torch.Tensor, asked: Sequence[str]) -> torch.Tensor:
        pairs = zip(asked, _pictures(images), strict=True)
        return torch.tensor([shapes.accuracy(shapes.parse(word), image) for word, image in pairs], dtype=torch.float64)

    @torch.no_grad()
    def features(self, images: torch.Tensor) -> torch.Tensor:
        if self.net is None:
            raise UserError(
                "task shapes: features come from a network, and no weights were given",
                fix='set "task_net" in the model\'s sampler.json',
            )
        return self.net.body(images.float())  # type: ignore[no-any-return]


def _pictures(images: torch.Tensor) -> NDArray[np.float32]:
    """Returns arrays of images; what is no finite number shows nothing, as the background does."""
    images = images.cpu().float()
    return torch.where(images.isfinite(), images, torch.from_numpy(shapes.BACKGROUND).float()).numpy()


def load(weights: Path | None) -> Shapes:
    return Shapes(_weights.read(AttributeNet(), weights) if weights else None)


def details(images: torch.Tensor, asked: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns the share right of each kind of attribute, apart for captions with "one object" and "two objects"."""
    right: dict[str, dict[str, list[bool]]] = {}
    for sentence, image in zip(asked, _pictures(images), strict=True):
        caption = shapes.parse(sentence)
        kinds = right.setdefault("one object" if len(caption.objects) == 1 else "two objects", {})
        for kind, values in shapes.attributes(caption, shapes.measure(image)).items():
            kinds.setdefault(kind, []).extend(values)
    return {
        count: {kind: sum(values) / len(values) for kind, values in kinds.items()}
        for count, kinds in sorted(right.items())
    }
