"""What an engine takes and gives: names, types and shapes, checked before it is called."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.artifacts import Json
from engines.errors import UserError, unknown

KINDS = {"int64": "iu", "fp32": "f", "float": "f"}  # of numpy's types, by those of a bundle's inputs
WORDS = {"int64": "whole numbers", "fp32": "floating-point numbers", "float": "floating-point numbers"}
STEP = "step"  # always accepted: callers need not know which engines have a use for it


@dataclass(frozen=True)
class Contract:
    """An engine's inputs and the sizes of its axes, as in a bundle's manifest."""

    name: str
    inputs: Sequence[Json]
    axes: Mapping[str, Json]

    def checked(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns the feeds as host arrays, int64 or fp32; another name, type, rank or size is an error."""
        self.check_names(feeds)
        arrays = {entry["name"]: self._typed(entry, feeds[entry["name"]]) for entry in self.inputs}
        self.check_shapes({name: array.shape for name, array in arrays.items()})
        if STEP in feeds and STEP not in arrays:
            arrays[STEP] = np.asarray(feeds[STEP])
        return arrays

    @functools.cached_property
    def _names(self) -> tuple[set[str], set[str]]:
        """The names that a whole call has, without `step` and with it."""
        names = {entry["name"] for entry in self.inputs}
        return names, names | {STEP}

    def check_names(self, feeds: Mapping[str, Any]) -> None:
        if feeds.keys() in self._names:
            return
        names = [entry["name"] for entry in self.inputs]
        for name in feeds.keys() - {STEP, *names}:
            raise unknown("input", name, names, self.name)
        for entry in self.inputs:
            if entry["name"] not in feeds:
                raise UserError(f"{self.name}: input {entry['name']!r} is missing", fix=f"feed {entry['means']}")

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises a UserError for a shape that the engine does not take, with the sizes that it does."""
        sizes: dict[str, tuple[int, str]] = {}
        for entry in self.inputs:
            name, shape = entry["name"], shapes[entry["name"]]
            if len(shape) != len(entry["shape"]):
                raise self._refusal(entry, shape)
            for wanted, size in zip(entry["shape"], shape, strict=True):
                if wanted == size:
                    continue
                if isinstance(wanted, int) or not _fits(size, self.axes[wanted]):
                    raise self._refusal(entry, shape)
                first, other = sizes.setdefault(wanted, (size, name))
                if first != size:
                    raise UserError(
                        f"{self.name}: axis {wanted!r} is {first} in {other!r} and {size} in {name!r}",
                        fix="feed as many rows of every input",
                    )

    def _typed(self, entry: Json, value: Any) -> NDArray[Any]:
        array = as_numpy(value)
        if array.dtype.kind not in KINDS[entry["dtype"]]:
            raise UserError(
                f"{self.name}: input {entry['name']!r} is of type {array.dtype}",
                fix=f"feed {WORDS[entry['dtype']]}: {entry['means']}",
            )
        return array.astype(np.int64 if entry["dtype"] == "int64" else np.float32, copy=False)

    def _refusal(self, entry: Json, shape: Sequence[int]) -> UserError:
        axes = [self._range(axis) for axis in entry["shape"] if isinstance(axis, str)]
        wanted = ", ".join(map(str, entry["shape"]))
        return UserError(
            f"{self.name}: input {entry['name']!r} has shape {list(shape)}, and [{wanted}] is wanted",
            fix=f"feed {', '.join(axes)}" if axes else "feed that shape",
        )

    def _range(self, axis: str) -> str:
        sizes = self.axes[axis]
        multiple = f" in multiples of {sizes['multiple']}" if sizes["multiple"] > 1 else ""
        return f"{axis} {sizes['min']} … {sizes['max']}{multiple}"


def _fits(size: int, axis: Json) -> bool:
    return bool(axis["min"] <= size <= axis["max"] and size % axis["multiple"] == 0)


def as_numpy(value: Any) -> NDArray[Any]:
    """Returns an array of whatever numpy or DLPack can read, without a copy where none is needed."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:  # another device, a gradient, a type numpy lacks
            raise UserError(
                f"a tensor that numpy cannot read was fed ({error})",
                fix="feed it from the CPU, detached; or run_dlpack takes it where it lies",
            ) from error
    return np.asarray(value)
