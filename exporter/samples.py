"""The calibration rows that blocks are trained on and judged by, and even shares of anything long."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from calib_data.store import CalibrationSet
from exporter import progress

CHUNK = 64  # rows of a file, at most: what the model is run on at once, and what a training batch is drawn from
APART = 8  # one trajectory in so many judges what was learned: whatever trains fits what it trains on

Rows = dict[str, torch.Tensor]
Place = tuple[int, int, int]  # step's position, shard's, row


class Samples:
    """Rows of a calibration set, as evenly over steps as they come and drawn over shards, in a seeded random order.

    `chunks` to train on, `training` of them, and behind them those of trajectories that are kept apart, to judge by.
    """

    def __init__(self, data: CalibrationSet, rows: int, chunk: int = CHUNK, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        train, judge = _places(data)
        if not judge:
            progress.note(
                f"note: {data.artifact.info['samples']} trajectories are too few to keep any apart: what is learned is "
                f"judged by what it was learned from; calibrate with {APART} or more"
            )
        if len(train) < rows:
            progress.note(f"note: training on {len(train)} rows, all that the calibration set has, instead of {rows}")
        self.chunks = _chunks(data, _drawn(train, rows, generator), chunk, generator)
        self.training = len(self.chunks)
        self.chunks += _chunks(data, _drawn(judge, max(1, rows // APART), generator), chunk, generator)


def _places(data: CalibrationSet) -> tuple[list[Place], list[Place]]:
    """Returns where the rows to train on lie, and those of every eighth trajectory, the same ones at every step.

    With guidance a record's second half is of the same trajectories as its first.
    """
    counts = [len(next(data.read(shard, data.steps[:1]))[1]["step"]) for shard in data.shards]
    halves = 2 if sum(counts) == 2 * data.artifact.info["samples"] else 1
    train: list[Place] = []
    judge: list[Place] = []
    first = 0
    for shard, count in enumerate(counts):
        for row in range(count):
            number = first + row % (count // halves)
            kind = judge if number % APART == APART - 1 else train
            kind += [(step, shard, row) for step in range(len(data.steps))]
        first += count // halves
    return train, judge


def _drawn(places: Sequence[Place], count: int, generator: torch.Generator) -> list[Place]:
    """Returns `count` places in random order, of every step as many but for one."""
    shuffled = [places[i] for i in torch.randperm(len(places), generator=generator).tolist()]
    taken: dict[int, int] = {}
    rounds = []
    for place in shuffled:
        taken[place[0]] = taken.get(place[0], 0) + 1
        rounds.append(taken[place[0]])
    order = sorted(range(len(shuffled)), key=rounds.__getitem__)  # stable: within a round steps stay in random order
    return [shuffled[i] for i in order[:count]]


def _chunks(data: CalibrationSet, places: Sequence[Place], size: int, generator: torch.Generator) -> list[Rows]:
    records: dict[tuple[int, int], list[int]] = {}
    for step, shard, row in places:
        records.setdefault((shard, step), []).append(row)
    if not places:
        return []
    order = torch.randperm(len(places), generator=generator)
    target, filled = order.argsort(), 0  # where each row goes, so that none is held twice
    whole: Rows = {}
    for (shard, step), rows in sorted(records.items()):
        ((_, feeds),) = data.read(data.shards[shard], [data.steps[step]])
        if not whole:
            whole = {name: value.new_empty(len(places), *value.shape[1:]) for name, value in feeds.items()}
        for name, value in feeds.items():
            whole[name][target[filled : filled + len(rows)]] = value[rows]
        filled += len(rows)
    return [{name: value[i : i + size] for name, value in whole.items()} for i in range(0, len(order), size)]


def even_share(count: int, most: int, generator: torch.Generator) -> torch.Tensor:
    """Returns indices of at most `most` of `count` things in order, one drawn from each of as many equal stretches.

    A fixed stride would fall on the same column or channel again and again where the sizes share a factor.
    """
    if count <= most:
        return torch.arange(count)
    starts = torch.arange(most, dtype=torch.float64)
    return ((starts + torch.rand(most, generator=generator, dtype=torch.float64)) * (count / most)).long()
