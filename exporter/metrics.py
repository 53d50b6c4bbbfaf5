"""Errors and image metrics, as plain functions of arrays."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.errors import UserError


def sqnr_db(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Returns 10·log10(Σ reference² / Σ (reference − other)²) in dB; +inf when equal, −inf with a NaN or infinity."""
    reference, other = reference.double(), other.double()
    noise = (reference - other).square().sum().item()
    signal = reference.square().sum().item()
    if not math.isfinite(noise):
        return -math.inf
    return math.inf if noise == 0 else 10 * math.log10(max(signal, 1e-300) / noise)


def psnr_db(reference: torch.Tensor, other: torch.Tensor, data_range: float) -> torch.Tensor:
    """Returns 10·log10(range² / mse) per image, [n], of images [n, c, h, w], at most 120 dB and at least −120 dB.

    The caps keep the mean a number when some images are equal, which lies beyond fp32's own rounding, or hold NaN.
    """
    mse = (reference.double() - other.double()).square().flatten(1).mean(dim=1)
    mse = mse.nan_to_num(nan=float("inf"))
    return (10 * torch.log10(data_range**2 / mse)).clamp(-120.0, 120.0)


def mean_ci95(values: NDArray[np.float64] | torch.Tensor) -> tuple[float, list[float]]:
    """Returns the mean and its 95 % confidence interval by the normal approximation (1.96 standard errors)."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    half = 1.96 * float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else math.inf
    return mean, [mean - half, mean + half]


class TaskNet(nn.Module):
    """A small convolutional classifier of 8×8 images; its 64 penultimate features serve Fréchet distance and recall."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, classes)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Returns features [n, 64] of images [n, 1, 8, 8] in [−1, 1]."""
        return self.body(images)  # type: ignore[no-any-return]

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))  # type: ignore[no-any-return]


def load_task_net(path: Path) -> TaskNet:
    """Reads a TaskNet from safetensors."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    net = TaskNet()
    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path}: not the weights of a task network ({error})", fix="restore the shipped file"
        ) from error
    return net.eval()


def class_accuracy(net: TaskNet, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Returns the share, 0…1, of images [n, 1, 8, 8] that `net` takes for their label."""
    with torch.no_grad():
        return float((net(images.float()).argmax(dim=1) == labels).double().mean())


def frechet_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns |μa − μb|² + tr(Σa + Σb − 2·(Σa·Σb)^½) of features [n, d].

    Source: Heusel et al. 2017, arXiv 1706.08500, equation 6. The trace of the root is the sum of the roots of the
    eigenvalues of Σa·Σb, which are real and not negative.
    """
    a, b = a.double(), b.double()
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    roots = torch.linalg.eigvals(cov_a @ cov_b).real.clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    return float(mean + cov_a.trace() + cov_b.trace() - 2 * roots)


def knn_recall(real: torch.Tensor, generated: torch.Tensor, k: int = 3) -> float:
    """Returns the share of real features that lie within the k-th-neighbour ball of some generated feature.

    Source: Kynkäänniemi et al. 2019, arXiv 1904.06991, equation 2 (recall), k = 3.
    """
    radii = torch.cdist(generated, generated).kthvalue(k + 1, dim=1).values  # +1: a point is its own neighbour
    return float((torch.cdist(real, generated) <= radii[None, :]).any(dim=1).double().mean())
