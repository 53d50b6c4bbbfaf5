"""The gate: holds a run's scores, times and sizes against a baseline's, a row each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from engines.artifacts import Json
from exporter.baseline import Measured, Speed
from exporter.bench import ROUNDS
from exporter.losses import (
    FAIL,
    MOST_SAMPLES,
    NOT_ENOUGH,
    PASS,
    Ends,
    Loss,
    deviations,
    loss,
    verdict,
    wanted_images,
    with_unseen,
)
from exporter.report import NOISY
from exporter.thresholds import Thresholds


@dataclass(frozen=True)
class Score:
    """How a score is told: its title, and the formats of its values and of what of them is lost."""

    title: str
    value: str
    lost: str
    is_loss: bool = False  # of each image, against the float model: more is worse

    def told(self, value: float) -> str:
        return self.value.format(value)

    def told_lost(self, value: float) -> str:
        return self.lost.format(value)


SCORES = {
    "psnr_db": Score("PSNR", "{:.2f} dB", "{:.2f} dB"),
    "ssim": Score("SSIM", "{:.4f}", "{:.4f}"),
    "cosine": Score("cosine", "{:.5f}", "{:.5f}"),
    "task_score": Score("task score lost", "{:.2%}", "{:.2%}", is_loss=True),
}
TIME = Score("time", "{:.3f} × float", "{:+.1%}")
WEIGHTS = Score("weights", "{:,} B", "{:+.1%}")


@dataclass(frozen=True)
class Row:
    """One judged score. `noise`: between two runs of other noise; `detects`: the loss that fails 9 times in 10.

    A figure that a row does not have is None; `wanted` is how many samples would tell, where these do not.
    """

    name: str
    score: Score
    verdict: str
    message: str
    limit: float
    baseline: float | None = None
    now: float | None = None
    lost: float | None = None
    interval: tuple[float, float] | None = None
    noise: float | None = None
    detects: float | None = None
    wanted: int | None = None

    def to_json(self) -> Json:
        return {key: value for key, value in vars(self).items() if key != "score"}


def overall(rows: Sequence[Row], failed_checks: Sequence[str]) -> str:
    """Returns the verdict of a whole gate; one that judged nothing cannot tell."""
    found = {row.verdict for row in rows}
    return FAIL if FAIL in found or failed_checks else NOT_ENOUGH if NOT_ENOUGH in found or not rows else PASS


def paired(old: Measured, new: Measured) -> bool:
    """Whether image i of both runs is of the same noise and caption."""
    return (old.seed, old.captions, old.images) == (new.seed, new.captions, new.images)


def judge(old: Measured, new: Measured, limits: Thresholds) -> list[Row]:
    """Judges a run against a baseline, score by score; what no limit is given for is left out."""
    both = [name for name in limits.most_lost if name in old.scores and name in new.scores]
    least = [name for name in limits.least if name in new.scores]
    speeds = [name for name in old.speeds if _is_judged(name)] if _speeds_compare(old, new, limits) else []
    ends = Ends.of(limits.false_alarm, len(both) + len(least) + len(speeds))
    rows = [_score_row(name, old, new, limits, ends) for name in both]
    rows += [_least_row(name, new, limits, ends) for name in least]
    rows += [
        _speed_row(name, old.speeds[name], new.speeds.get(name), limits.most_slower or 0.0, ends) for name in speeds
    ]
    if limits.most_larger is not None:
        rows += [
            _weights_row(name, old.weights[name], new.weights.get(name), limits.most_larger) for name in old.weights
        ]
    return rows


def not_judged(old: Measured, new: Measured, limits: Thresholds) -> list[str]:
    """Returns what a limit is given for and is not judged, and why."""
    asked = dict.fromkeys((*limits.most_lost, *limits.least))
    found = [f"{SCORES[name].title}: this run has none" for name in asked if name not in new.scores]
    found += [f"{SCORES[name].title}: the baseline has none" for name in limits.most_lost if name not in old.scores]
    if limits.most_larger is not None:
        found += [f"weights of {n}: the baseline has none" for n in new.weights if n not in old.weights]
    if limits.most_slower is not None and old.machine != new.machine:
        found.append(f"times: the baseline's are of another machine ({old.machine}; this one: {new.machine})")
    elif limits.most_slower is not None:
        fresh = [name for name in new.speeds if _is_judged(name) and name not in old.speeds]
        found += [f"time of {name}: the baseline has none; --update takes it in" for name in fresh]
    return found


def _speeds_compare(old: Measured, new: Measured, limits: Thresholds) -> bool:
    """Whether ratios of times may be compared: they hold on one kind of machine only."""
    return limits.most_slower is not None and old.machine == new.machine


def _is_judged(speed: str) -> bool:
    """Whether a time is an engine's: the quantized PyTorch model is a simulation, whose speed nobody ships."""
    return not speed.startswith("quantized ")


def undecided_times(new: Measured, limits: Thresholds) -> list[str]:
    """Returns the times of a new baseline that are undecided even held against themselves, and what to do."""
    found = [row for row in judge(new, new, limits) if row.score == TIME and row.verdict != PASS]
    return [
        f"{row.name}: too noisy to judge later runs by; even held against itself it is {row.verdict!r}: {row.message}; "
        f"or leave [throughput] out of the thresholds (now: {limits.source})"
        for row in found
    ]


def _score_row(name: str, old: Measured, new: Measured, limits: Thresholds, ends: Ends) -> Row:
    score, count = SCORES[name], min(old.images, new.images)
    sign = -1 if score.is_loss else 1
    before, after = (sign * np.array(side.scores[name], np.float64) for side in (old, new))
    found = loss(before, after, ends, pairs=paired(old, new))
    if score.is_loss:
        found = with_unseen(found, count, limits.most_lost[name], ends)
    row = _row(score, found, limits.most_lost[name], count, limits.samples, ends)
    return replace(row, baseline=float(np.mean(old.scores[name])), now=float(np.mean(new.scores[name])))


def _least_row(name: str, new: Measured, limits: Thresholds, ends: Ends) -> Row:
    score, values = SCORES[name], np.array(new.scores[name], np.float64)
    found = loss(np.full(len(values), limits.least[name]), values, ends, pairs=True)
    row = _row(score, found, 0.0, len(values), limits.samples, ends)
    return replace(row, name=f"{score.title}, at least", baseline=limits.least[name], now=float(values.mean()))


def _row(score: Score, found: Loss, limit: float, count: int, least: int, ends: Ends) -> Row:
    """Returns the row of a loss, of which `count` images tell."""
    decided = verdict(found.low, found.high, limit) if count >= least else NOT_ENOUGH
    lost, low, high = (score.told_lost(value) for value in (found.value, found.low, found.high))
    message, wanted = f"lost {lost} ({low} … {high}), limit {score.told_lost(limit)}", None
    if decided == NOT_ENOUGH:
        wanted = max(least, wanted_images(found, limit, count, ends, score.is_loss))
        many = f"{wanted:,} or more" if wanted < MOST_SAMPLES else "more than a million"
        message += f": {count} images cannot tell, it takes {many} (validate --images, the baseline's run too)"
    return Row(
        score.title, score, decided, message, limit, lost=found.value, interval=(found.low, found.high),
        noise=found.between_seeds, detects=limit + ends.detected_errors * found.error, wanted=wanted,
    )  # fmt: skip


def _speed_row(name: str, old: Speed, new: Speed | None, limit: float, ends: Ends) -> Row:
    """Judges an engine's time over the float model's against the baseline's such ratio."""
    title = f"time of {name}"
    if new is None:
        return Row(title, TIME, NOT_ENOUGH, "this run has no such time: build the engine", limit, baseline=old.ratio)
    slower, error = math.log(new.ratio / old.ratio), math.hypot(_log_error(old), _log_error(new))
    low, lost, high = (math.expm1(slower + n * error) for n in (-ends.errors[0], 0.0, ends.errors[1]))
    busy = max(*old.p95_over_p50, *new.p95_over_p50)
    decided = verdict(low, high, limit) if busy <= NOISY else NOT_ENOUGH
    message = f"slower by {lost:+.1%} ({low:+.1%} … {high:+.1%}), limit {limit:+.1%}"
    if decided == NOT_ENOUGH:
        message += f": {_why_not(old, new)}, with nothing beside it"
    detects = (1 + limit) * math.exp(ends.detected_errors * error) - 1
    return Row(
        title, TIME, decided, message, limit, baseline=old.ratio, now=new.ratio, lost=lost, interval=(low, high),
        noise=math.expm1(error), detects=detects,
    )  # fmt: skip


def _why_not(old: Speed, new: Speed) -> str:
    """Returns why times do not tell, and what to do."""
    again, anew = "remove report.json and validate again", "take the baseline anew (--update)"
    for side, speed, fix in (("", new, again), ("the baseline's ", old, anew)):
        if (busy := max(speed.p95_over_p50)) > NOISY:
            return f"{side}p95 was {busy:.1f} × p50, the machine was busy; {fix}"
    return f"the times scatter too much; {again}"


def _log_error(speed: Speed) -> float:
    """Returns the standard error of a ratio's logarithm, from the spread of both times.

    Calls within a turn share what the machine was doing, so `bench`'s turns are what is counted. The spread is taken as
    a normal one's, whose p95 lies 1.645 deviations above its median; a median's error is √(π/2) of a mean's. Times have
    longer tails above than below, which makes this a generous margin.
    """
    scatter = [math.log(spread) / deviations(0.95) for spread in speed.p95_over_p50]
    return math.sqrt(math.pi / 2 / ROUNDS) * math.hypot(*scatter)


def _weights_row(name: str, old: int, new: int | None, limit: float) -> Row:
    if new is None:
        told = "this run has no such engine: build it"
        return Row(f"weights of {name}", WEIGHTS, NOT_ENOUGH, told, limit, baseline=old)
    larger = new / old - 1
    message = f"{new:,} bytes against {old:,}: {larger:+.1%}, limit {limit:+.1%}"
    return Row(
        f"weights of {name}", WEIGHTS, verdict(larger, larger, limit), message, limit, baseline=old, now=new,
        lost=larger, interval=(larger, larger),
    )  # fmt: skip
