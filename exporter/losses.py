"""What was lost against a baseline, with its interval; and what that says about a limit.

A verdict is `pass` where the interval's upper end is within the limit, `fail` where its lower end is beyond, and
`not enough samples` otherwise. Any of the k scores may fail the gate, so each lower end is one of level/k: by
Bonferroni's inequality a gate where nothing lost more than its limit fails at most as often as its level says. All
scores must pass, so an upper end of the whole level is enough: a gate passes falsely only where the score that lost too
much does. Source: Berger 1982, doi 10.1080/00401706.1982.10487790 (intersection and union of tests).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from exporter.metrics import bootstrap_means

PASS, FAIL, NOT_ENOUGH = "pass", "fail", "not enough samples"
POWER = 0.9  # of the losses that a gate is said to detect, and of the samples it asks for
RESAMPLES = 4000  # so that the end of level/k lies among tens of resamples, for level/k = 0.005 and more
MOST_SAMPLES = 1_000_000  # more are no advice

Values = NDArray[np.float64]


def verdict(low: float, high: float, limit: float) -> str:
    """Returns what an interval of a loss says about a limit."""
    slack = 1e-9  # of sums of equal numbers in another order
    return PASS if high <= limit + slack else FAIL if low > limit + slack else NOT_ENOUGH


@dataclass(frozen=True)
class Ends:
    """The levels of an interval's ends: of the lower one, which decides a failure, and of the upper."""

    lower: float
    upper: float

    @classmethod
    def of(cls, level: float, judged: int) -> Ends:
        return cls(level / max(judged, 1), level)

    @property
    def errors(self) -> tuple[float, float]:
        """Returns how many standard errors from the middle the two ends of a normal loss lie."""
        return deviations(1 - self.lower), deviations(1 - self.upper)

    @property
    def detected_errors(self) -> float:
        """Returns how many standard errors beyond its limit a loss is found, 9 times in 10."""
        return self.errors[0] + deviations(POWER)


def deviations(share: float) -> float:
    """Returns below how many standard deviations a share of a normal distribution lies."""
    return NormalDist().inv_cdf(share)


@dataclass(frozen=True)
class Loss:
    """What was lost, its interval, its standard error, and the standard error between two runs of other noise."""

    value: float
    low: float
    high: float
    error: float
    between_seeds: float


def loss(old: Values, new: Values, ends: Ends, *, pairs: bool) -> Loss:
    """Returns by how much the mean of `new` lies under that of `old`, by bootstrap of images, in pairs or apart."""
    means = bootstrap_means(old - new, RESAMPLES) if pairs else _apart(old, new)
    between = math.hypot(_error(old), _error(new))
    error = (_error(old - new) if pairs else between) or between
    count = min(len(old), len(new))
    low, high = np.quantile(means, [_expanded(ends.lower, count), 1 - _expanded(ends.upper, count)])
    return Loss(float(old.mean() - new.mean()), float(low), float(high), error, between)


def _expanded(level: float, count: int) -> float:
    """Returns the share of resamples to cut off for a level: resamples of few images scatter too little.

    Source: Hesterberg 2015, arXiv 1411.5279, section 5.3 (expanded percentiles): Φ(√(n/(n − 1))·t(level)), with n − 1
    degrees of freedom. Without it 48 images fail a gate of 5 % 7 to 8 times in 100.
    """
    if count < 2:
        return 0.0
    return NormalDist().cdf(math.sqrt(count / (count - 1)) * float(stats.t.ppf(level, count - 1)))


def _apart(old: Values, new: Values) -> Values:
    return bootstrap_means(old, RESAMPLES, seed=0) - bootstrap_means(new, RESAMPLES, seed=1)


def _error(values: Values) -> float:
    """Returns the standard error of a mean."""
    return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def with_unseen(found: Loss, count: int, limit: float, ends: Ends) -> Loss:
    """Returns a loss of a task score with room for what so few images may not have shown.

    Where none of n images is worse, resamples have no worse one either, yet a share p of all images may be: with
    probability (1 − p)ⁿ none is seen, which is the level at p = 1 − level^(1/n), about 3/n at 5 %. A loss at the limit
    scatters by √(limit/n), as counts of rare images do, however little this one does.
    Source: Hanley and Lippman-Hand 1983, doi 10.1001/jama.1983.03330370053031.
    """
    unseen = found.value + 1 - ends.upper ** (1 / count)
    return replace(found, high=max(found.high, unseen), error=max(found.error, math.sqrt(limit / count)))


def wanted_images(found: Loss, limit: float, count: int, ends: Ends, shares: bool) -> int:
    """Returns how many images would decide, 9 times in 10, if the loss were just what was measured."""
    distance = abs(limit - found.value)
    if distance < 1e-9:
        return MOST_SAMPLES
    errors = ends.errors[0 if found.value > limit else 1] + deviations(POWER)
    wanted = count * (errors * found.error / distance) ** 2 if math.isfinite(found.error) else 0.0
    if shares and found.value < limit and distance < 1:
        wanted = max(wanted, math.log(ends.upper) / math.log1p(-distance))
    return min(MOST_SAMPLES, math.ceil(wanted))
