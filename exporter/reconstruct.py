"""Reconstruction: the one loop in which methods train, whatever they train, one block at a time or all jointly.

One at a time (`BlockCalls`): blocks go in the model's order, a block's inputs come from the model whose earlier blocks
are quantized already. Jointly (`ModelCalls`): the quantized model runs from what the float one was fed, and every
block's output counts. Targets are the float model's, written to disk first; samples are rows of the calibration set,
spread over all its steps. State is saved as training goes: a run that was killed ends where it would have ended.
"""

from __future__ import annotations

import contextlib
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from calib_data.tensors import load_tensors, save_tensors, save_whole
from engines.artifacts import Json, read_json, write_json
from engines.errors import UserError
from exporter import devices, progress, steps
from exporter.metrics import finite
from exporter.models import Family
from exporter.runners import TorchRunner
from exporter.samples import Samples

SAVE_SECONDS, SAVE_SHARE = 60.0, 0.05  # between two savings of what is being trained; of the time, what saving may take
STATE, RECORD = "training.safetensors", "record.json"  # in a folder of training: what goes on, and what it came to
OUTPUT = ""  # the path of the model itself, whose output is one more target where blocks are trained jointly
Rows = dict[str, torch.Tensor]


class Phase(ABC):
    """What a method trains at a time, by Adam; `name` says what."""

    name: str
    iterations: int

    @abstractmethod
    def groups(self) -> Sequence[tuple[Sequence[nn.Parameter], float]]:
        """Returns parameters in groups, each with the rate it starts at."""

    def share_of_rate(self, done: float) -> float:
        """Returns what is left of the rates when the share `done` is over: all for half of it, then a line to 0.

        Held to the end, 8-bit rounding came out worse than it went in, by 0.6 dB of images on digits-dit: what differs
        little flips to and fro with the batches. Falling from the start, 4-bit integers came out 0.6 dB worse than so.
        """
        return min(1.0, 2 * (1 - done))

    def regularizer(self, done: float) -> torch.Tensor | float:
        """Returns what is added to the relative error when the share `done` of the iterations is over."""
        return 0.0

    def settle(self) -> None:  # noqa: B027  most have nothing to settle
        """Told after every iteration; what is settled by now may be set fast, within the parameters."""

    def train(self, training: bool) -> None:  # noqa: B027  nor to tell apart
        """Told True before the iterations, False after: what ships is in force then."""

    def facts(self) -> Json:
        """Returns what else reports say of what was trained, after the iterations."""
        return {}


class _Reached(Exception):
    """The block that was waited for was called."""


def record_targets(model: nn.Module, family: Family, paths: Sequence[str], samples: Samples, folder: Path) -> None:
    """Writes float outputs as `<path>/target-<chunk>.safetensors`, of every path, unless a run before has."""
    now, written, finished = 0, 0, folder / "targets"
    if finished.exists():
        return

    def hook(path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal written
            tensors = {str(i): t.contiguous() for i, t in enumerate(_tensors(output))}
            written += sum(tensor.nbytes for tensor in tensors.values())
            _target(folder, path, now).parent.mkdir(parents=True, exist_ok=True)
            save_tensors(tensors, _target(folder, path, now))

        return keep

    chunks = samples.chunks
    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    runner = TorchRunner("float", model, family)
    try:
        for now, feeds in enumerate(progress.track(chunks, len(chunks), "float outputs of blocks")):
            runner.run_tensors(feeds)
            if now == 0:
                _check_space(folder, written * (len(chunks) - 1))
    finally:
        for handle in handles:
            handle.remove()
    finished.touch()


def forget(path: str, folder: Path) -> None:
    """Removes the calls and targets of a block that is done."""
    for pattern in ("target-*", "call-*"):
        for file in (folder / path).glob(pattern):
            file.unlink()


def _target(folder: Path, path: str, chunk: int) -> Path:
    return folder / path / f"target-{chunk:05d}.safetensors"


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Reads a file of targets or calls."""
    return load_tensors(path, f"remove {path.parent.parent}, and the same command records and trains anew")


def _check_space(folder: Path, needed: int) -> None:
    if needed > (free := shutil.disk_usage(folder).free):
        raise UserError(
            f"{folder}: the blocks' outputs want {needed / 1e9:.1f} GB more of disk, and {free / 1e9:.1f} GB are free",
            fix="free some, and the same command goes on; or train on fewer rows (the method's option `rows`)",
            keeps=True,
        )


class Calls(ABC):
    """What is trained on, in chunks of rows; those behind the first `training` are kept apart, to judge by."""

    def __init__(self, model: nn.Module, samples: Samples) -> None:
        self._device = devices.of(model)
        self._training, self._chunks = samples.training, len(samples.chunks)
        self._rows = len(samples.chunks[0]["step"])

    @abstractmethod
    def read(self, chunk: int) -> Rows:
        """Returns a chunk's inputs and targets, on the CPU; every tensor has its rows along its first axis."""

    @abstractmethod
    def loss(self, rows: Rows) -> torch.Tensor:
        """Returns the error of what is trained, relative to its targets."""

    def fault(self) -> str:
        """Says where the last loss, which is not finite, went wrong first; nothing where that is plain."""
        return ""

    def parts(self, size: int) -> int:
        """Returns of how many chunks `size` rows are drawn: one, or where chunks are smaller as few as it takes."""
        return min(-(-size // self._rows), self._training)

    def batch(self, size: int, generator: torch.Generator) -> Iterator[Rows]:
        """Yields `size` rows, drawn, in `parts`, chunk by chunk.

        So no more rows are computed at once than the model is run on; where there are fewer to train on, all of them.
        """
        count = self.parts(size)
        for part, number in enumerate(torch.randint(self._training, (count,), generator=generator).tolist()):
            chunk = self.read(number)
            share = size // count + (part < size % count)
            index = torch.randperm(len(next(iter(chunk.values()))), generator=generator)[:share]
            yield {name: tensor[index].to(self._device) for name, tensor in chunk.items()}

    def error(self) -> float:
        """Returns the relative error over the rows kept apart; over all, where there are too few to keep any."""
        judges = range(self._training, self._chunks) or range(self._training)
        with torch.no_grad():
            chunks = ({name: t.to(self._device) for name, t in self.read(i).items()} for i in judges)
            errors = [float(self.loss(chunk)) for chunk in chunks]
        return sum(errors) / len(errors)


class BlockCalls(Calls):
    """One block's calls and targets: `hold` bytes in memory, the rest read from disk batchwise."""

    def __init__(
        self, model: nn.Module, family: Family, block: str, samples: Samples, folder: Path, *, hold: int
    ) -> None:
        super().__init__(model, samples)
        self._block = model.get_submodule(block)
        self._held: list[Rows | Path] = []
        self._leaves: list[Any] = []  # of the last call: what is not batched is the same in all
        self._batched: set[str] | None = None
        self._spec: Any = None
        held = 0
        for number, call in enumerate(_captured(model, family, block, samples)):
            self._leaves, self._spec = pytree.tree_flatten(call)
            rows = len(samples.chunks[number]["step"])
            leaves = {f"in{i}": leaf for i, leaf in enumerate(self._leaves) if _is_batched(leaf, rows)}
            tensors = {name: leaf.cpu().contiguous() for name, leaf in leaves.items()}
            tensors["step"] = samples.chunks[number]["step"]
            self._batched = tensors.keys() & (tensors.keys() if self._batched is None else self._batched)
            targets = _read(_target(folder, block, number))
            tensors |= {f"out{name}": target for name, target in targets.items()}
            held += sum(tensor.nbytes for tensor in tensors.values())
            if number == 0:
                _check_space(folder, held * len(samples.chunks) - hold)
            if held > hold:
                path = folder / block / f"call-{number:05d}.safetensors"
                save_tensors(tensors, path)
                self._held.append(path)
            else:
                self._held.append(tensors)

    def read(self, chunk: int) -> Rows:
        held = self._held[chunk]
        tensors = _read(held) if isinstance(held, Path) else held
        return {name: t for name, t in tensors.items() if name.startswith("out") or name in (self._batched or ())}

    def loss(self, rows: Rows) -> torch.Tensor:
        leaves = [rows.get(f"in{i}", leaf) for i, leaf in enumerate(self._leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        targets = [rows[f"out{i}"] for i in range(sum(name.startswith("out") for name in rows))]
        with steps.at(steps.Position(rows["step"])):
            return relative_error(self._block(*args, **kwargs), targets)


class ModelCalls(Calls):
    """The whole model's calls: the error is the mean over the blocks' outputs, plus that of the model's own.

    Source: VQ4DiT (methods.md section 3): the mean over blocks; the output's share is our choice (facts.md section 6).
    """

    def __init__(self, model: nn.Module, family: Family, blocks: Sequence[str], samples: Samples, folder: Path) -> None:
        super().__init__(model, samples)
        self._samples, self._folder, self._blocks = samples, folder, blocks
        self._modules = {path: model.get_submodule(path) for path in (*blocks, OUTPUT)}
        self._errors: dict[str, torch.Tensor] = {}  # of the last call
        self._runner = TorchRunner("trained", model, family)

    def read(self, chunk: int) -> Rows:
        rows = {f"feed/{name}": value for name, value in self._samples.chunks[chunk].items()}
        for path in self._modules:
            targets = _read(_target(self._folder, path, chunk))
            rows |= {f"{path}/{name}": target for name, target in targets.items()}
        return rows

    def loss(self, rows: Rows) -> torch.Tensor:
        errors: dict[str, torch.Tensor] = {}

        def compare(path: str) -> Callable[..., None]:
            def see(_module: nn.Module, _inputs: Any, output: Any) -> None:
                targets = [rows[f"{path}/{i}"] for i in range(len(_tensors(output)))]
                errors[path] = relative_error(output, targets)

            return see

        handles = [module.register_forward_hook(compare(path)) for path, module in self._modules.items()]
        try:
            self._runner.call({n.removeprefix("feed/"): t for n, t in rows.items() if n.startswith("feed/")})
        finally:
            for handle in handles:
                handle.remove()
        self._errors = errors
        return torch.stack([errors[path] for path in self._blocks]).mean() + errors[OUTPUT]

    def fault(self) -> str:
        bad = next((path for path in (*self._blocks, OUTPUT) if not self._errors[path].isfinite()), None)
        if bad is None:
            return ""
        return f", first in block {bad!r}" if bad else ", in the model's own output"


def _captured(model: nn.Module, family: Family, block: str, samples: Samples) -> Iterator[tuple[Any, Any]]:
    """Yields what the block is called with for every chunk; the model runs no further than there."""
    caught: list[tuple[Any, Any]] = []

    def catch(_module: nn.Module, args: Any, kwargs: Any) -> None:
        caught.append((args, kwargs))
        raise _Reached

    handle = model.get_submodule(block).register_forward_pre_hook(catch, with_kwargs=True)
    runner = TorchRunner("quantized prefix", model, family)
    try:
        for feeds in samples.chunks:
            with contextlib.suppress(_Reached):
                runner.run_tensors(feeds)
            yield caught.pop()
    finally:
        handle.remove()


def _is_batched(value: Any, rows: int) -> bool:
    return isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def relative_error(output: Any, targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns the squared error of a module's outputs over their targets' square, summed over the outputs."""
    pairs = zip(_tensors(output), targets, strict=True)
    return torch.stack([(y - t).square().mean() / t.square().mean().clamp(min=1e-12) for y, t in pairs]).sum()


def train(calls: Calls, phases: Sequence[Phase], batch: int, what: str, folder: Path) -> None:
    """Trains phase by phase; one that ends farther from the float outputs than it began is taken back.

    That is judged on trajectories that were not trained on. What is under way is saved in `folder` from time to time,
    and gone on with where it is found there; `forget_state` removes it, once the result is safe.
    """
    folder.mkdir(parents=True, exist_ok=True)
    saved = _Saved(folder / STATE, phases)
    for number, phase in enumerate(phases):
        if number < saved.phase or not phase.iterations:
            continue
        parameters = _parameters(phase)
        if not parameters:
            continue
        if number > saved.phase or saved.before is None:
            saved.begin(number, parameters, calls.error())
        phase.train(True)
        _iterate(calls, phase, batch, f"{what}: {phase.name}", saved)
        phase.train(False)
        error = calls.error()
        kept = error <= saved.error  # NaN is no gain
        errors = {"error_before": finite(saved.error), "error_after": finite(error)}
        found = {"iterations": phase.iterations, **errors, "kept": kept}
        if not kept:
            _set(parameters, saved.before or [])
        found |= phase.facts()
        _note(folder, phase.name, found)


def forget_state(folder: Path) -> None:
    """Removes what training went on from."""
    (folder / STATE).unlink(missing_ok=True)


def _note(folder: Path, phase: str, found: Json) -> None:
    write_json(folder / RECORD, (record_of(folder) or {}) | {phase: found})


def record_of(folder: Path) -> Json | None:
    """Returns, by phase, what training in a folder came to: the errors it is judged by, and whether it was kept."""
    path = folder / RECORD
    return read_json(path) if path.exists() else None


def _parameters(phase: Phase) -> list[nn.Parameter]:
    return [parameter for group, _ in phase.groups() for parameter in group]


def _set(parameters: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)


def _iterate(calls: Calls, phase: Phase, batch: int, what: str, saved: _Saved) -> None:
    generator = torch.Generator().manual_seed(0)
    groups = [(list(group), rate) for group, rate in phase.groups() if group]
    optimizer = torch.optim.Adam([{"params": group, "lr": rate} for group, rate in groups], fused=True)
    first = saved.restore(optimizer, generator)
    if first:
        progress.note(f"{what}: goes on from iteration {first} of {phase.iterations}, where it was stopped")
    for iteration in progress.track(range(first, phase.iterations), phase.iterations, what, done=first):
        for group, (_, rate) in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = rate * phase.share_of_rate(iteration / phase.iterations)
        optimizer.zero_grad()
        parts = calls.parts(batch)
        for number, part in enumerate(calls.batch(batch, generator), 1):
            loss = calls.loss(part) / parts
            if number == parts:
                loss = loss + phase.regularizer(iteration / phase.iterations)
            if not loss.isfinite():
                raise UserError(
                    f"{what}: the loss is {loss.item()} at iteration {iteration + 1} of {phase.iterations}"
                    f"{calls.fault()}",
                    fix="lower the method's rates: with others it trains anew; what is finished is kept for this one",
                    keeps=True,
                )
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        phase.settle()
        saved.save(iteration + 1, optimizer, generator)


class _Saved:
    """The state of a training: where it is, what is trained, the optimizer's averages and the generator's state."""

    def __init__(self, path: Path, phases: Sequence[Phase]) -> None:
        """Sets the parameters to what `path` holds, if a run before left it."""
        self._path, self._at, self._spent = path, time.monotonic(), 0.0
        self._all = list(dict.fromkeys(p for phase in phases for p in _parameters(phase)))
        self.phase, self.error = 0, float("inf")
        self.before: list[torch.Tensor] | None = None
        fix = f"remove it, and the same command trains {path.parent.name} anew"
        self._state: dict[str, torch.Tensor] = load_tensors(path, fix) if path.exists() else {}
        if self._state:
            self.phase, self.error = int(self._state["phase"]), float(self._state["error"])
            _set(self._all, self._list("parameter"))
            self.before = [tensor.clone() for tensor in self._list("before")]

    def _list(self, name: str) -> list[torch.Tensor]:
        return [self._state[f"{name}.{i}"] for i in range(sum(key.startswith(f"{name}.") for key in self._state))]

    def begin(self, phase: int, parameters: Sequence[torch.Tensor], error: float) -> None:
        self.phase, self.error, self._state = phase, error, {}
        self.before = [parameter.detach().clone() for parameter in parameters]

    def restore(self, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        """Returns the iteration to go on with."""
        if not self._state:
            return 0
        generator.set_state(self._state["generator"])
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for name in ("step", "exp_avg", "exp_avg_sq"):
            for parameter, value in zip(parameters, self._list(name), strict=True):
                # fused Adam goes through memory: an average lies as its parameter does, which may be transposed
                like = torch.empty(()) if name == "step" else parameter
                like = torch.empty_like(like, device=parameter.device).copy_(value)
                optimizer.state[parameter][name] = like
        iteration, self._state = int(self._state["iteration"]), {}  # the file is mapped while anything of it is held
        return iteration

    def save(self, iteration: int, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> None:
        """Writes everything, whole or not at all, if the last time is long enough ago."""
        started = time.monotonic()
        if started - self._at < max(SAVE_SECONDS, self._spent / SAVE_SHARE):
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        state = {f"parameter.{i}": p.detach() for i, p in enumerate(self._all)}
        state |= {f"before.{i}": tensor for i, tensor in enumerate(self.before or [])}
        for name in ("step", "exp_avg", "exp_avg_sq"):
            state |= {f"{name}.{i}": optimizer.state[p][name] for i, p in enumerate(parameters)}
        state |= {"phase": torch.tensor(self.phase), "iteration": torch.tensor(iteration)}
        state |= {"error": torch.tensor(self.error, dtype=torch.float64), "generator": generator.get_state()}
        save_whole(state, self._path)
        self._at = time.monotonic()
        self._spent = self._at - started
