"""Second moments of layers' inputs, E[x xᵀ]: what an error δ of a weight costs at the output is δᵀ E[x xᵀ] δ."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn import functional as F

from exporter.modules import float_layer
from exporter.samples import even_share

GROUP_BYTES = 1 << 30  # of moments held at once: more layers take another pass over the calibration set
TRAJECTORIES = 64  # of the calibration set: what training wants more of adds nothing to a mean of outer products
ROWS = 1024  # of each batch, spread evenly: beyond that a moment hardly changes, and its time would


def width(model: nn.Module, path: str) -> int:
    """Returns how many numbers an output of the layer sums; 0 for convolutions in groups, which have several sets."""
    layer = float_layer(model, path)
    return 0 if isinstance(layer, nn.Conv2d) and layer.groups > 1 else layer.weight[0].numel()


def groups(model: nn.Module, paths: Sequence[str], *, diagonal: bool = False) -> Iterator[list[str]]:
    """Yields the paths in groups whose moments take at most GROUP_BYTES, unless one layer's alone take more."""
    group: list[str] = []
    held = 0
    for path in paths:
        size = 4 * width(model, path) ** (1 if diagonal else 2)
        if group and held + size > GROUP_BYTES:
            yield group
            group, held = [], 0
        group.append(path)
        held += size
    if group:
        yield group


class Moments:
    """Sums x xᵀ over what layers read, or only its `diagonal`."""

    def __init__(self, model: nn.Module, paths: Sequence[str], *, diagonal: bool = False) -> None:
        self._layers = {path: float_layer(model, path) for path in paths}
        self._diagonal = diagonal
        self._sums = {
            path: layer.weight.new_zeros([width(model, path)] * (1 if diagonal else 2))
            for path, layer in self._layers.items()
        }
        self._counts = dict.fromkeys(paths, 0)
        self._generator = torch.Generator().manual_seed(0)

    def see(self, path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        rows = _rows(self._layers[path], x, self._generator)
        if self._diagonal:
            self._sums[path] += rows.square().sum(dim=0)
        else:
            self._sums[path].addmm_(rows.T, rows)
        self._counts[path] += len(rows)

    def mean(self, path: str) -> torch.Tensor:
        """Returns E[x xᵀ], [in, in], or E[x²], [in], in the order of the weight's own inputs, and forgets the sum."""
        return self._sums.pop(path) / self._counts[path]


def _rows(layer: nn.Module, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns what outputs are computed from, [n, in], for at most ROWS of them."""
    if not isinstance(layer, nn.Conv2d):
        rows = x.flatten(0, -2)
        return rows[even_share(len(rows), ROWS, generator)]
    assert not isinstance(layer.padding, str)
    up, left = layer.padding
    patches = F.pad(x, (left, left, up, up))
    for axis in (2, 3):  # views: only what is taken below is copied
        size, stride, gap = (one[axis - 2] for one in (layer.kernel_size, layer.stride, layer.dilation))
        patches = patches.unfold(axis, (size - 1) * gap + 1, stride)[..., ::gap]
    patches = patches.permute(0, 2, 3, 1, 4, 5)  # [n, h, w, in, kh, kw]
    taken = even_share(patches.shape[:3].numel(), ROWS, generator)
    return patches[torch.unravel_index(taken, patches.shape[:3])].flatten(1)
