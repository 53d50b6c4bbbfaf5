"""Observers: streaming accumulators that pick an activation's range from all recorded steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from exporter.formats import Format
from exporter.samples import even_share
from exporter.tensors import rounded_up

OCTAVE_BITS = 8  # 256 bins to an octave: see Histogram
LOWEST_EXPONENT = -24
BINS = 64 << OCTAVE_BITS  # 64 octaves
COUNTED = 1 << 20  # values of one tensor that a histogram counts, at most: an even share, drawn
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
    """Counts of |x| in bins of equal ratio: 256 to an octave, from 2^-24 to 2^40; smaller ones share the first.

    An octave's bins follow fp32's own exponent and first 8 mantissa bits. They are fine enough for 8-bit integers at
    the top of their range (4 bins to a step) and for any floating-point format, wherever the outliers lie; memory is
    constant; and but for the last bits of the sums the result does not depend on how the data was cut into tensors of
    at most COUNTED values, of which every one counts. `largest` is over all.
    """

    def __init__(self) -> None:
        self.counts = torch.zeros(BINS, dtype=torch.float64)
        self.sums = torch.zeros(BINS, dtype=torch.float64)
        self.largest = 0.0
        self._generator = torch.Generator().manual_seed(0)

    def update(self, x: torch.Tensor) -> None:
        magnitude = x.detach().abs().flatten().float()
        self.largest = max(self.largest, float(magnitude.amax()))
        if len(magnitude) > COUNTED:
            magnitude = magnitude[even_share(len(magnitude), COUNTED, self._generator)]
        bits = magnitude.view(torch.int32) >> (23 - OCTAVE_BITS)
        index = (bits - ((127 + LOWEST_EXPONENT) << OCTAVE_BITS)).clamp_(0, BINS - 1)
        self.counts += torch.bincount(index, minlength=BINS).cpu()
        self.sums += torch.bincount(index, weights=magnitude.double(), minlength=BINS).cpu()

    @property
    def means(self) -> torch.Tensor:
        """The mean of each bin's values, [BINS]; 0 where a bin is empty."""
        return self.sums / self.counts.clamp(min=1)


class Percentile:
    """The magnitude that 99.99 % of the values do not exceed."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: torch.Tensor) -> None:
        self.histogram.update(x)

    def range(self, fmt: Format) -> float:
        counts = self.histogram.counts
        if self.histogram.largest == 0.0:
            return 0.0
        share = counts.cumsum(0) / counts.sum()
        index = int(torch.searchsorted(share, torch.tensor(PERCENTILE / 100, dtype=torch.float64)))
        return float(self.histogram.means[index])


class Mse:
    """The range whose rounding and clipping errors, squared, sum to the least over the histogram."""

    def __init__(self) -> None:
        self.histogram = Histogram()

    def update(self, x: torch.Tensor) -> None:
        self.histogram.update(x)

    def range(self, fmt: Format) -> float:
        return self.fit(fmt)[0]

    def fit(self, fmt: Format) -> tuple[float, float]:
        """Returns the range, and the sum of squared errors that it leaves."""
        if self.histogram.largest == 0.0:
            return 0.0, 0.0
        used = self.histogram.counts > 0
        values, counts = self.histogram.means[used], self.histogram.counts[used]
        clips = CLIPS.double() * self.histogram.largest
        scales = (clips / fmt.max_value)[:, None]
        errors = ((fmt.round(values / scales) * scales - values).square() * counts).sum(dim=1)
        return float(clips[errors.argmin()]), float(errors.min())


class TwoSided:
    """Both sides of zero apart, for codes that have a zero point."""

    def __init__(self) -> None:
        self._sides = {1: Histogram(), -1: Histogram()}

    def update(self, x: torch.Tensor) -> None:
        for sign, histogram in self._sides.items():
            side = sign * x[sign * x > 0]
            if side.numel():
                histogram.update(side)

    def fit(self, fmt: Format, search: bool) -> tuple[float, int]:
        """Returns the scale, as fp16 holds it, and the shift z − 2^(b−1) of codes from the least to the largest value.

        With `search` the end above is the one that leaves the least squared error.
        """
        low, high = -self._sides[-1].largest, self._sides[1].largest
        if low == high:
            return 1.0, 0
        values = torch.cat([sign * side.means[side.counts > 0] for sign, side in self._sides.items()])
        counts = torch.cat([side.counts[side.counts > 0] for side in self._sides.values()])
        ends = CLIPS.double() * high if search and high > 0 else torch.tensor([high], dtype=torch.float64)
        levels, half = 2**fmt.bits - 1, 2 ** (fmt.bits - 1)
        scales = rounded_up((ends - low) / levels).double()
        shifts = (-low / scales).round().clamp(max=levels) - half
        codes = ((values / scales[:, None]).round() + shifts[:, None]).clamp(-half, half - 1)
        errors = (((codes - shifts[:, None]) * scales[:, None] - values).square() * counts).sum(dim=1)
        best = int(errors.argmin())
        return float(scales[best]), int(shifts[best])


FITTING = ("mse",)  # whose errors tell formats apart
OBSERVERS: dict[str, Callable[[], Observer]] = {"absmax": AbsMax, "percentile": Percentile, "mse": Mse}
