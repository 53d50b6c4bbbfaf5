"""Shows what layers read while calibration records run through a float model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from calib_data.store import CalibrationSet
from engines.errors import UserError
from exporter import devices, progress
from exporter.models import Family
from exporter.runners import TorchRunner

ROWS = 64  # at once, at most
See = Callable[[str, torch.Tensor, torch.Tensor], None]  # a layer's path, what it reads, and the step of every row


@contextlib.contextmanager
def watching(
    model: nn.Module, family: Family, paths: Sequence[str], see: See
) -> Iterator[Callable[[dict[str, torch.Tensor]], None]]:
    """Gives a function that runs feeds while `see` is shown the inputs of the layers at `paths`."""
    now = torch.empty(0)

    def hook(path: str) -> Any:
        def look(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not args[0].isfinite().all():
                raise UserError(
                    f"layer {path!r}: its input is NaN or infinite in calibration",
                    fix="the float model overflows there: check the checkpoint and its sampler settings",
                )
            see(path, args[0], now)

        return look

    runner = TorchRunner("float", model, family)

    def run(feeds: dict[str, torch.Tensor]) -> None:
        nonlocal now
        now = feeds["step"].to(devices.of(model))
        runner.run_tensors(feeds)

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def watch_inputs(
    model: nn.Module,
    family: Family,
    paths: Sequence[str],
    data: CalibrationSet,
    see: See,
    what: str,
    *,
    trajectories: int | None = None,
) -> None:
    """Runs calibration records through the model: all, or those of the first `trajectories`, by whole shards."""
    shards = data.first(trajectories)
    with watching(model, family, paths, see) as run:
        for shard in progress.track(shards, len(shards), f"observing {what}"):
            for feeds in data.batches(shards=[shard], rows=family.rows(ROWS)):
                run(feeds)


def watch_by_step(
    model: nn.Module,
    family: Family,
    paths: Sequence[str],
    data: CalibrationSet,
    see: See,
    after: Callable[[int], None],
    what: str,
    *,
    trajectories: int | None = None,
) -> None:
    """Runs calibration records through the model, a step at a time; `after` is told each step that is done."""
    shards = data.first(trajectories)
    with watching(model, family, paths, see) as run:
        for step in progress.track(data.steps, len(data.steps), f"observing {what} (steps)"):
            for shard in shards:
                ((_, feeds),) = data.read(shard, [step])
                rows = family.rows(ROWS)
                for first in range(0, len(feeds["step"]), rows):
                    run({name: value[first : first + rows] for name, value in feeds.items()})
            after(step)
