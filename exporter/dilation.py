"""Weight dilation: input channels of a weight are widened as far as no output channel's range grows.

Activations shrink by what weights grow: their quantizer's steps get finer, and the weight's stay what they were.
Source: DilateQuant, arXiv 2409.14307 (methods.md section 2), for asymmetric weight quantizers; the wider form for
symmetric ones is our own.
"""

from __future__ import annotations

import torch

TIE = 1e-4  # factors that exceed 1 by no more are 1: a tie, but for the rounding of fp32
MOST = 1024.0  # a factor's cap: a channel that hardly counts must not be divided into fp16's subnormals


def dilation(
    weight: torch.Tensor, groups: int = 1, *, symmetric: bool = True, per_tensor: bool = False
) -> torch.Tensor:
    """Returns s [in], at least 1, by which the input channels of a weight [out, in / groups, …] may be multiplied.

    Every output channel, or with `per_tensor` the whole weight, keeps its largest magnitude; not `symmetric`, its
    largest and its least value, both counted as 0 where all values lie beyond. A channel of zeros gets 1.
    """
    out, inside = weight.shape[:2]
    parts = weight.detach().double().reshape(groups, out // groups, inside, -1)
    if symmetric:
        largest = parts.abs().amax(dim=(2, 3), keepdim=True)
        room = _room(largest.amax() if per_tensor else largest, parts.abs().amax(dim=3, keepdim=True))
    else:
        sides = []
        for sign in (1, -1):
            side = (sign * parts).clamp(min=0).amax(dim=3, keepdim=True)
            largest = side.amax() if per_tensor else side.amax(dim=2, keepdim=True)
            sides.append(_room(largest, side))
        room = torch.minimum(*sides)
    factor = room.amin(dim=(1, 3)).flatten()
    return torch.where(factor.isfinite() & (factor > 1 + TIE), factor.clamp(max=MOST), 1.0).float()


def _room(largest: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return torch.where(values > 0, largest / values, torch.inf)
