"""Ranges of activations: what layers read over all recorded steps, and the scales that come of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from calib_data.store import CalibrationSet
from exporter import devices, observers, progress
from exporter.attention import PointSpec
from exporter.models import Family
from exporter.plan import Plan
from exporter.ranges import Ranges
from exporter.recipe import ActivationSpec
from exporter.tensors import scale_for
from exporter.watch import watch_by_step, watch_inputs

State = dict[str, torch.Tensor]
LEAST_SCALE = 2.0**-14  # of a step: fp16's smallest normal number, so that the power of two under it is exact there


class Readers:
    """Tells layers that read one tensor and are quantized alike: the first of them, their leader, speaks for all.

    They are those that are given the very same tensor, one right after the other.
    """

    def __init__(self, rules: Mapping[str, ActivationSpec]) -> None:
        self.leader: dict[str, str] = {}
        self._rules = rules
        self._x: torch.Tensor | None = None
        self._leaders: list[str] = []

    def leads(self, path: str, x: torch.Tensor) -> bool:
        if self._x is not x:
            self._x, self._leaders = x, []
        alike = [leader for leader in self._leaders if self._rules[leader] == self._rules[path]]
        if not alike:
            self._leaders.append(path)
        return self.leader.setdefault(path, alike[0] if alike else path) == path


class Stepped:
    """What one layer reads at the step that is under way, and the scales of those before."""

    def __init__(self, rule: ActivationSpec, steps: int) -> None:
        self._rule, self._steps = rule, steps
        self._scales: dict[int, float] = {}
        self._shifts: dict[int, int] = {}
        self._seen = self._fresh()

    def _fresh(self) -> observers.Observer | observers.TwoSided:
        return observers.TwoSided() if self._rule.zero_point else observers.OBSERVERS[self._rule.observer]()

    def update(self, x: torch.Tensor) -> None:
        self._seen.update(x)

    def finish(self, step: int) -> None:
        fmt = self._rule.format
        if isinstance(self._seen, observers.TwoSided):
            self._scales[step], self._shifts[step] = self._seen.fit(fmt, self._rule.observer in observers.FITTING)
        else:
            self._scales[step] = float(scale_for(torch.tensor(self._seen.range(fmt)), fmt))
        self._seen = self._fresh()

    @property
    def clamped(self) -> int:
        """How many of the scales found are below the least that there is."""
        return sum(scale < LEAST_SCALE for scale in self._scales.values())

    def state(self) -> State:
        """Returns a scale, and with zero points a shift, for every step, [steps]; steps not seen have the nearest's."""
        known = torch.tensor(sorted(self._scales))
        nearest = known[(torch.arange(self._steps)[:, None] - known).abs().argmin(dim=1)].tolist()
        found = {"activation_scale": torch.tensor([self._scales[step] for step in nearest]).clamp(min=LEAST_SCALE)}
        if self._shifts:
            found["activation_shift"] = torch.tensor([float(self._shifts[step]) for step in nearest])
        return found


def observe(
    model: nn.Module, family: Family, plan: Plan, data: CalibrationSet, *, trajectories: int | None = None
) -> tuple[Plan, dict[str, State], Ranges]:
    """Returns what the quantizers of layers' inputs and of attentions' points hold, and the ranges seen.

    Of the first `trajectories`, or of all. Readers of one tensor get the same tensors. The plan says how many steps
    have a scale, and has the formats that were chosen where a rule leaves them open.
    """
    rules = {path: rule.activation for path, rule in plan.rules.items() if path in plan.specs and rule.activation}
    rules |= plan.products
    table, readers = Ranges(data.steps), Readers(rules)
    count = len(data.artifact.info["timesteps"])
    seen: dict[str, Any] = {}

    def see(path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        if not readers.leads(path, x):
            return
        table.update(path, x, steps)
        rule = rules[path]
        if path not in seen:  # where no row belongs to a step, one scale serves all
            stepped = rule.granularity == "step" and len(x) == len(steps)
            seen[path] = Stepped(rule, count) if stepped else observers.OBSERVERS[rule.observer]()
        seen[path].update(x)

    def after(step: int) -> None:
        for one in seen.values():
            if isinstance(one, Stepped):
                one.finish(step)

    if any(rule.granularity == "step" for rule in rules.values()):
        watch_by_step(model, family, list(rules), data, see, after, "activation ranges", trajectories=trajectories)
    elif rules:
        watch_inputs(model, family, list(rules), data, see, "activation ranges", trajectories=trajectories)
    table.share(readers.leader)
    one = [
        p
        for p, rule in rules.items()
        if rule.granularity == "step" and not isinstance(seen[readers.leader[p]], Stepped)
    ]
    if one:
        progress.note(
            f"note: {len(one)} layers read other rows than one for each step fed, and have one scale: {one[0]!r} …"
        )
    if few := {path: one.clamped for path, one in seen.items() if isinstance(one, Stepped) and one.clamped}:
        progress.note(
            f"note: {sum(few.values())} scales of a step, of {len(few)} layers, are smaller than graphs hold and are "
            f"{LEAST_SCALE:.3g}, so those inputs have fewer codes: {next(iter(few))!r} …"
        )
    states: dict[str, State] = {}
    device = devices.of(model)
    specs, points = dict(plan.specs), {}
    for path, rule in rules.items():
        leader, fmt = readers.leader[path], rule.format
        observer = seen[leader]
        if leader in states:
            states[path] = states[leader]
            fmt = specs[leader].activation or fmt if leader in specs else fmt
        elif isinstance(observer, Stepped):
            states[path] = {name: value.to(device) for name, value in observer.state().items()}
        else:
            if rule.candidates:
                fmt = min(rule.candidates, key=lambda one: observer.fit(one)[1])
            scale = scale_for(torch.tensor(observer.range(fmt), dtype=torch.float64), fmt)
            states[path] = {"activation_scale": scale.to(device)}
        steps = count if isinstance(observer, Stepped) else 0
        if path in specs:
            shifted = bool(steps) and rule.zero_point
            specs[path] = replace(specs[path], activation=fmt, steps=steps, shifted=shifted)
        else:
            points[path] = PointSpec(fmt, steps)
    return replace(plan, specs=specs, points=points), states, table
