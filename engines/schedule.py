"""Engines whose activations have a scale for every sampling step: which step of its own schedule one is called at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from engines.artifacts import Artifact, Json
from engines.contract import as_numpy
from engines.errors import UserError
from engines.runner import Feeds, Runner

FILE = "step_table.npy"  # fp32 [steps, n]: what such a graph multiplies by, a row for each step
MAX_TABLE_BYTES = 64 << 20
ROW = "step_row"  # the input of a graph that is told the table's row rather than its number
# What numpy.save writes before the numbers of such a table; its own reader evaluates the text as Python.
# Source: numpy.lib.format, version 1.0.
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '<f4', 'fortran_order': False, 'shape': \((\d{1,6}), (\d{1,8})\), \} *\n",
    re.DOTALL,
)
TOLERANCE = 1e-3  # of a timestep, relative: schedulers compute them in fp32


def steps_of(graph: Json, timesteps: Sequence[float], *, nearest: bool = False) -> list[int]:
    """Returns the `step` to feed at each timestep of a sampler's schedule; `graph` is `engine.info["graph"]`.

    The table belongs to one sampler and number of steps, so another schedule is an error; with `nearest`, each of its
    calls gets the scales of the calibrated step whose timestep is nearest: meant for fewer steps, and not validated.
    """
    own = np.asarray(graph["timesteps"], dtype=np.float64)
    asked = as_numpy(timesteps).reshape(-1)
    if asked.dtype.kind not in "iuf":
        raise UserError(f"timesteps are of type {asked.dtype}", fix="give the numbers of a sampler's schedule")
    asked = _finite(asked)
    if own.shape == asked.shape and np.allclose(own, asked, rtol=TOLERANCE, atol=TOLERANCE):
        return list(range(len(own)))
    if nearest:
        return [int(i) for i in np.abs(own[None] - asked[:, None]).argmin(axis=1)]
    if graph["step_input"] is None:
        raise UserError(
            "this engine takes no step: its activations have the same scales at every timestep",
            fix="call it without `step`; it runs under any schedule",
        )
    raise UserError(
        f"the schedule has {len(asked)} steps, {_ends(asked)}; the engine's activations have a scale for each of "
        f"{len(own)} steps, {_ends(own)}",
        fix=f"sample with those {len(own)} steps, quantize again with --steps {len(asked)}, or take the nearest "
        "calibrated step for each: steps_of(…, nearest=True)",
    )


def steps_at(graph: Json, timesteps: Any, *, nearest: bool = False, tolerance: float = TOLERANCE) -> list[int]:
    """Returns the `step` to feed with each of some timesteps, which are in the model's own unit: the calibrated one.

    For callers who see one call at a time, and not the schedule. A timestep that is not calibrated is an error, unless
    the `nearest` is wanted; `tolerance` is relative to the largest. Of steps at the same timestep it is the first.
    """
    own = np.asarray(graph["fed_timesteps"], dtype=np.float64)
    asked = _finite(np.asarray(timesteps).reshape(-1))
    apart = np.abs(own[None] - asked[:, None])
    off = apart.min(axis=1, initial=np.inf) > tolerance * np.abs(own).max(initial=1e-6)
    if off.any() and not nearest:
        raise UserError(
            f"timestep {asked[off][0]:g} is none of those that the engine's activations have scales for: {len(own)} "
            f"steps, {_ends(own)}",
            fix=f"sample with the scheduler and the {len(own)} steps that it was calibrated for (num_inference_steps="
            f"{len(own)}), or take the nearest calibrated step for each: nearest=True",
        )
    return [int(step) for step in apart.argmin(axis=1)]


def _finite(timesteps: NDArray[Any]) -> NDArray[np.float64]:
    found = timesteps.astype(np.float64)
    if not np.isfinite(found).all():
        raise UserError(
            f"timestep {found[~np.isfinite(found)][0]:g} is no number", fix="give those of a sampler's schedule"
        )
    return found


def _ends(timesteps: NDArray[np.float64]) -> str:
    return f"timesteps {timesteps[0]:g} … {timesteps[-1]:g}" if len(timesteps) else "no timesteps"


def with_steps(runner: Runner, graph: Json, engine: Artifact) -> Runner:
    """Returns a runner that checks the feeds' `step`, and looks its row up where the graph wants that."""
    if graph["step_input"] is None:
        return runner
    steps = graph["fed_timesteps"]
    table = read_table(engine, len(steps)) if graph["step_input"] == "row" else None
    return _Stepped(runner, graph["fed_timesteps"], table)


def read_table(engine: Artifact, steps: int) -> NDArray[np.float32]:
    """Returns what an engine's steps multiply by, fp32 [steps, n]."""
    path = engine.file(FILE)
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise UserError(f"{path}: more than {MAX_TABLE_BYTES} bytes", fix="build the engine again")
    content = path.read_bytes()
    header = HEADER.match(content)
    if header is None or int(header[1]) != steps or len(content) - header.end() != 4 * steps * int(header[2]):
        raise UserError(f"{path}: is no table of fp32 numbers [{steps}, n]", fix="build the engine again")
    return np.frombuffer(content, np.dtype("<f4"), offset=header.end()).reshape(steps, -1).astype(np.float32)


class _Stepped:
    def __init__(self, runner: Runner, timesteps: Sequence[float], table: NDArray[np.float32] | None) -> None:
        self.name = runner.name
        self._runner, self._steps, self._table = runner, len(timesteps), table
        self._timesteps = np.asarray(timesteps, dtype=np.float64)  # what the model is fed at each step
        self._slack = TOLERANCE * max(1e-6, float(np.abs(self._timesteps).max(initial=0.0)))

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        return self._runner.run(self._with_step(feeds))

    def __getattr__(self, name: str) -> Any:
        """What else its runner can do, such as `refit`."""
        return getattr(self._runner, name)

    def run_dlpack(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs as its runner's does; `step` and `timestep` are read on the host, to be checked."""
        try:
            hosted = {name: as_numpy(feeds[name]) for name in ("step", "timestep") if name in feeds}
        except UserError as error:
            raise UserError(
                f"{self.name}: `step` and `timestep` are checked on the host: {error.what}",
                fix="feed these two from the CPU, in types that numpy has; all else may lie on the GPU",
            ) from error
        found: dict[str, Any] = cast(Any, self._runner).run_dlpack({**feeds, **self._with_step(hosted)})
        return found

    def _with_step(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the feeds with what tells the graph each row's step, which is checked."""
        step = feeds.get("step")
        if step is None:
            raise UserError(f"{self.name}: the feeds hold no `step`", fix=f"feed each row's, 0 … {self._steps - 1}")
        if step.dtype.kind not in "iu":
            raise UserError(f"{self.name}: `step` is {step.dtype}", fix=f"feed whole numbers, 0 … {self._steps - 1}")
        if step.size and not (step.min() >= 0 and step.max() < self._steps):
            bad = next(int(s) for s in step.ravel() if not 0 <= s < self._steps)
            raise UserError(
                f"{self.name}: step {bad}, and activations have scales for the steps 0 … {self._steps - 1}",
                fix="feed the position in the schedule that the engine was calibrated for (the engine's steps_of)",
            )
        self._check_schedule(np.asarray(feeds["timestep"], dtype=np.float64).ravel(), step.ravel())
        fed: dict[str, Any] = dict(feeds)
        if self._table is not None:
            fed[ROW] = self._table[step]
        return fed

    def _check_schedule(self, timesteps: NDArray[np.float64], steps: NDArray[Any]) -> None:
        """Raises a UserError where a row's step is not the calibrated one that is nearest to its timestep."""
        if (np.abs(self._timesteps[steps] - timesteps) <= self._slack).all():
            return
        apart = np.abs(self._timesteps[None] - timesteps[:, None])
        near = apart.min(axis=1, initial=np.inf) + self._slack
        wrong = ~(np.isfinite(timesteps) & (apart[np.arange(len(apart)), steps] <= near))
        if wrong.any():
            row = int(wrong.argmax())
            step = int(steps[row])
            raise UserError(
                f"{self.name}: timestep {timesteps[row]:g} at step {step}, whose scales are for timestep "
                f"{self._timesteps[step]:g}: another schedule than the {self._steps} steps it was calibrated for",
                fix="sample with those, or feed the step that is nearest to each timestep: "
                "steps_of(timesteps, nearest=True) of the engine gives them",
            )
