"""Block-wise reconstruction: the one loop in which methods train, whatever they train.

Blocks go in the model's order. A block's inputs come from the model whose earlier blocks are quantized already, its
targets from the float model; samples are rows of the calibration set, spread over all its steps. Targets lie on disk,
and one block's are read at a time. A finished block is saved: a run that was killed goes on with the next.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils import _pytree as pytree

from calib_data.tensors import save_tensors
from engines.errors import UserError
from exporter import progress
from exporter.models import Family
from exporter.runners import TorchRunner
from exporter.samples import Samples


class Phase(Protocol):
    """What a method trains in a block at a time, by Adam; the rate falls to zero on a line.

    Without that 8-bit rounding came out worse than it went in, by 0.6 dB of images on digits-dit: what differs little
    flips to and fro with the batches until the end.
    """

    @property
    def iterations(self) -> int: ...

    @property
    def rate(self) -> float: ...

    def parameters(self) -> Sequence[nn.Parameter]: ...

    def regularizer(self, done: float) -> torch.Tensor | float:
        """Returns what is added to the relative error when the share `done` of the iterations is over."""

    def train(self, training: bool) -> None:
        """Told True before the iterations, False after: what ships is in force then."""


class _Reached(Exception):
    """The block that was waited for was called."""


def record_targets(model: nn.Module, family: Family, blocks: Sequence[str], samples: Samples, folder: Path) -> None:
    """Writes every block's float outputs as `<block>/target-<chunk>.safetensors`, unless a run before has."""
    now, finished = 0, folder / "targets"
    if finished.exists():
        return

    def hook(block: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
            tensors = {str(i): t.contiguous() for i, t in enumerate(_tensors(output))}
            _write(tensors, folder / block / f"target-{now:05d}.safetensors", len(blocks) * len(chunks))

        return keep

    chunks = samples.chunks
    handles = [model.get_submodule(block).register_forward_hook(hook(block)) for block in blocks]
    runner = TorchRunner("float", model, family)
    try:
        for now, feeds in enumerate(progress.track(chunks, len(chunks), "float outputs of blocks")):  # noqa: B007
            runner.run_tensors(feeds)
    finally:
        for handle in handles:
            handle.remove()
    finished.touch()


def forget(block: str, folder: Path) -> None:
    """Removes the calls and targets of a block that is done."""
    for pattern in ("target-*", "call-*"):
        for file in (folder / block).glob(pattern):
            file.unlink()


def _write(tensors: dict[str, torch.Tensor], path: Path, files: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = files * sum(tensor.nbytes for tensor in tensors.values())
    if path.name.endswith("-00000.safetensors") and needed > shutil.disk_usage(path.parent).free:
        raise UserError(
            f"{path.parent}: the blocks' outputs would take about {needed / 1e9:.1f} GB of disk, more than is free",
            fix="train on fewer rows (the method's option `rows`), or free some",
        )
    save_tensors(tensors, path)


class Calls:
    """One block's calls, inputs and targets, by chunks: `hold` bytes in memory, the rest read from disk batchwise."""

    def __init__(
        self, model: nn.Module, family: Family, block: str, samples: Samples, folder: Path, *, hold: int
    ) -> None:
        self._training, self._rows = samples.training, len(samples.chunks[0]["step"])
        self._chunks: list[dict[str, torch.Tensor] | Path] = []
        self._leaves: list[Any] = []  # of the last call: what is not batched is the same in all
        self._batched: set[str] | None = None
        self._spec: Any = None
        held = 0
        for number, call in enumerate(_captured(model, family, block, samples)):
            self._leaves, self._spec = pytree.tree_flatten(call)
            rows = len(samples.chunks[number]["step"])
            tensors = {f"in{i}": leaf.contiguous() for i, leaf in enumerate(self._leaves) if _is_batched(leaf, rows)}
            self._batched = tensors.keys() & (tensors.keys() if self._batched is None else self._batched)
            targets = load_file(folder / block / f"target-{number:05d}.safetensors")
            tensors |= {f"out{name}": target for name, target in targets.items()}
            held += sum(tensor.nbytes for tensor in tensors.values())
            if held > hold:
                path = folder / block / f"call-{number:05d}.safetensors"
                save_tensors(tensors, path)
                self._chunks.append(path)
            else:
                self._chunks.append(tensors)

    def batch(self, size: int, generator: torch.Generator) -> Iterator[Call]:
        """Yields `size` rows, drawn: of one chunk, or where chunks are smaller of as few as it takes, chunk by chunk.

        So no more rows are in a block at once than the model is run on.
        """
        count = min(-(-size // self._rows), self._training)
        for number in torch.randint(self._training, (count,), generator=generator).tolist():
            chunk = self._read(number)
            index = torch.randperm(len(next(iter(chunk.values()))), generator=generator)[: size // count]
            yield self._call({name: tensor[index] for name, tensor in chunk.items()})

    def error(self, block: nn.Module) -> float:
        """Returns the relative error over the rows kept apart; over all, where there are too few to keep any."""
        judges = range(self._training, len(self._chunks)) or range(self._training)
        with torch.no_grad():
            errors = [float(relative_error(block, self._call(self._read(i)))) for i in judges]
        return sum(errors) / len(errors)

    def _read(self, number: int) -> dict[str, torch.Tensor]:
        chunk = self._chunks[number]
        tensors = load_file(chunk) if isinstance(chunk, Path) else chunk
        return {name: t for name, t in tensors.items() if name.startswith("out") or name in (self._batched or ())}

    def _call(self, tensors: Mapping[str, torch.Tensor]) -> Call:
        leaves = [tensors.get(f"in{i}", leaf) for i, leaf in enumerate(self._leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        outputs = sum(name.startswith("out") for name in tensors)
        return Call(args, kwargs, [tensors[f"out{i}"] for i in range(outputs)])


@dataclass(frozen=True)
class Call:
    """What a block is called with, and what it should give."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    targets: Sequence[torch.Tensor]


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


def relative_error(block: nn.Module, call: Call) -> torch.Tensor:
    """Returns the squared error of the block's outputs over their targets' square, summed over the outputs."""
    outputs = _tensors(block(*call.args, **call.kwargs))
    pairs = zip(outputs, call.targets, strict=True)
    return torch.stack([(y - t).square().mean() / t.square().mean().clamp(min=1e-12) for y, t in pairs]).sum()


def train_block(block: nn.Module, calls: Calls, phases: Sequence[Phase], batch: int, what: str) -> None:
    """Trains phase by phase; one that leaves the block's outputs farther from the float ones is taken back.

    That is judged on trajectories that were not trained on.
    """
    for phase in phases:
        parameters = phase.parameters()
        if not parameters or not phase.iterations:
            continue
        before, error = [parameter.detach().clone() for parameter in parameters], calls.error(block)
        phase.train(True)
        _iterate(block, calls, phase, batch, what)
        phase.train(False)
        if not calls.error(block) <= error:  # NaN is no gain
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)


def _iterate(block: nn.Module, calls: Calls, phase: Phase, batch: int, what: str) -> None:
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(phase.parameters(), lr=phase.rate, fused=True)
    for iteration in progress.track(range(phase.iterations), phase.iterations, what):
        optimizer.param_groups[0]["lr"] = phase.rate * (1 - iteration / phase.iterations)
        optimizer.zero_grad()
        parts = list(calls.batch(batch, generator))
        for number, part in enumerate(parts, 1):
            loss = relative_error(block, part) / len(parts)
            if number == len(parts):
                loss = loss + phase.regularizer(iteration / phase.iterations)
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
