"""A run's sample pictures, small, as data URIs that a page carries itself."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from engines.artifacts import Json, digest_file
from exporter.images import SHOWN
from exporter.report import drawable

SIDE = 192  # pixels; what is larger is reduced by a whole factor
BUDGET = 2_000_000  # characters of all pictures together, of the 5 MB that a page may weigh
MOST_BYTES = 1 << 30  # of samples.safetensors: 20 pictures of 1024² in colour, twice, are half of it
GAIN = 10.0  # of differences


def thumbnails(folder: Path, digest: object, runner: str, in_pixels: bool) -> Json:
    """Returns `rows` of a run's pictures, float, the runner's and their difference, or `why` there are none."""
    path = folder / SHOWN
    if not path.is_file():
        return {"rows": [], "why": f"{SHOWN} is not there"}
    if path.stat().st_size > MOST_BYTES or digest_file(path) != digest:
        return {"rows": [], "why": f"{SHOWN} is not the one this report was written with"}
    shown = load_file(path)
    return rows(shown["float"], shown[runner], in_pixels)


def rows(reference: torch.Tensor, judged: torch.Tensor, in_pixels: bool) -> Json:
    """Draws the first pictures [n, …] of two sets, as many as the budget holds.

    Latents are drawn in grey: their first channel, in units of the float one's largest.
    """
    found: list[Mapping[str, str]] = []
    left, factor = BUDGET, 1
    if reference.ndim == 3:  # a row per token, no channels
        reference, judged = reference[:, None], judged[:, None]
    for ours, theirs in zip(reference, judged, strict=True):
        unit = 1.0 if in_pixels else float(ours.abs().amax().clamp(min=1e-6))
        factor = max(1, max(ours.shape[1:]) // SIDE)
        row = {
            "float": _uri(_reduced(ours / unit, factor)),
            "quantized": _uri(_reduced(theirs / unit, factor)),
            "difference": _uri(_strongest(GAIN / unit * (theirs - ours), factor)),
        }
        left -= sum(map(len, row.values()))
        if left < 0:
            break
        found.append(row)
    side = reference.shape[-1] // factor
    return {"rows": found, "width": side, "of": len(reference), "reduced": factor, "in_pixels": in_pixels}


def _reduced(image: torch.Tensor, factor: int) -> torch.Tensor:
    """Returns the means of cells of factor × factor."""
    return image.float() if factor == 1 else F.avg_pool2d(image.float(), factor)


def _strongest(difference: torch.Tensor, factor: int) -> torch.Tensor:
    """Returns of each cell the value that lies farthest from zero: a mean would hide what a difference shows."""
    if factor == 1:
        return difference.float()
    high, low = F.max_pool2d(difference.float(), factor), -F.max_pool2d(-difference.float(), factor)
    return torch.where(high >= -low, high, low)


def _uri(image: torch.Tensor) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray((drawable(image) * 255).round().to(torch.uint8).numpy()).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
