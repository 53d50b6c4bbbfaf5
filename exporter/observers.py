"""Observers: streaming accumulators that pick an activation's range from all recorded steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch

from exporter.formats import Format

BINS = 4096  # of |x|; finer than an 8-bit format's steps at any clip the search tries
PERCENTILE = 99.99  # of |x|; a choice: the value most tools use for 8 bits
# Clips tried, as shares of the largest magnitude. Source: methods.md section 1, "111 clips evenly over 0.1 … 1.2";
# beyond 1 nothing is clipped and steps only widen for integers, but a floating-point grid may fall better.
CLIPS = torch.linspace(0.1, 1.2, 111)


class Observer(Protocol):
    """Sees every recorded tensor once; `range` is what the format's max_value is then scaled to."""

    def update(self, x: torch.Tensor) -> None: ...

    def range(self, fmt: Format) -> float: ...


class AbsMax:
    """The largest magnitude seen."""

    def __init__(self) -> None:
        self.value = 0.0

    def update(self, x: torch.Tensor) -> None:
        self.value = max(self.value, float(x.abs().amax()))

    def range(self, fmt: Format) -> float:
        return self.value


class Histogram:
    """Counts of |x| in BINS equal bins over [0, top); top doubles, and bins merge in pairs, as larger values come.

    Memory is constant, and the result does not depend on how the data was cut into tensors: top is always the
    smallest power of two above the largest value.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.top = 0.0
        self.largest = 0.0
        self.zeros = 0  # seen before any other value gave the bins a width

    def update(self, x: torch.Tensor) -> None:
        magnitude = x.detach().abs().flatten().float()
        largest = float(magnitude.amax())
        if largest == 0.0 and self.top == 0.0:
            self.zeros += magnitude.numel()
            return
        self._grow(largest)
        self.largest = max(self.largest, largest)
        self.counts += torch.histc(magnitude, BINS, 0.0, self.top).double()

    def _grow(self, largest: float) -> None:
        need = 2.0 ** math.ceil(math.log2(largest)) if largest > 0 else 0.0
        if self.top == 0.0:
            self.top = need
            self.counts[0] += self.zeros
        while self.top < need:
            self.counts = torch.cat(
                [self.counts.reshape(-1, 2).sum(dim=1), torch.zeros(BINS // 2, dtype=torch.float64)]
            )
            self.top *= 2.0

    @property
    def centers(self) -> torch.Tensor:
        return (torch.arange(BINS, dtype=torch.float64) + 0.5) * (self.top / BINS)


class Percentile:
    """The magnitude that 99.99 % of the values do not exceed."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: torch.Tensor) -> None:
        self.histogram.update(x)

    def range(self, fmt: Format) -> float:
        counts = self.histogram.counts
        if counts.sum() == 0:
            return 0.0
        share = counts.cumsum(0) / counts.sum()
        index = int(torch.searchsorted(share, torch.tensor(PERCENTILE / 100, dtype=torch.float64)))
        edge = (min(index, BINS - 1) + 1) * self.histogram.top / BINS
        return min(edge, self.histogram.largest)


class Mse:
    """The range whose rounding and clipping errors, squared, sum to the least over the histogram."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: torch.Tensor) -> None:
        self.histogram.update(x)

    def range(self, fmt: Format) -> float:
        if self.histogram.largest == 0.0:
            return 0.0
        used = self.histogram.counts > 0
        values, counts = self.histogram.centers[used], self.histogram.counts[used]
        clips = CLIPS.double() * self.histogram.largest
        scales = (clips / fmt.max_value)[:, None]
        errors = ((fmt.round(values / scales) * scales - values).square() * counts).sum(dim=1)
        return float(clips[errors.argmin()])


OBSERVERS: dict[str, Callable[[], Observer]] = {"absmax": AbsMax, "percentile": Percentile, "mse": Mse}
