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
FLOATS = "floating-point numbers (float32, or float16 or float64, which are converted)"
WORDS = {"int64": "whole numbers", "fp32": FLOATS, "float": FLOATS}
BATCH = "batch"  # the axis of rows, which may be split
STEP = "step"  # always accepted: callers need not know which engines have a use for it


@dataclass(frozen=True)
class Contract:
    """An engine's inputs and the sizes of its axes, as in a bundle's manifest."""

    name: str
    inputs: Sequence[Json]
    axes: Mapping[str, Json]

    def checked(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
        """Returns the feeds as host arrays, int64 or fp32; another name, type, rank, size or value is an error."""
        self.check_names(feeds)
        arrays = {entry["name"]: self._typed(entry, feeds[entry["name"]]) for entry in self.inputs}
        self.check_shapes({name: array.shape for name, array in arrays.items()})
        for entry in self.inputs:
            if "largest" in entry:
                self._check_values(entry, arrays[entry["name"]])
        if STEP in feeds and STEP not in arrays:
            arrays[STEP] = as_numpy(feeds[STEP])
        return arrays

    @functools.cached_property
    def _names(self) -> tuple[set[str], set[str]]:
        """The names that a whole call has, without `step` and with it."""
        names = {entry["name"] for entry in self.inputs}
        return names, names | {STEP}

    def check_names(self, feeds: Mapping[str, Any]) -> None:
        check_mapping(f"{self.name}: the feeds", feeds)
        if feeds.keys() in self._names:
            return
        names = [entry["name"] for entry in self.inputs]
        for name in feeds.keys() - {STEP, *names}:
            raise unknown("input", str(name), names, self.name)
        for entry in self.inputs:
            if entry["name"] not in feeds:
                raise UserError(
                    f"{self.name}: input {entry['name']!r} is missing",
                    fix=f"feed {entry['name']}, {entry['dtype']} {_listed(entry['shape'])}: {entry['means']}",
                )

    def check_shapes(self, shapes: Mapping[str, Sequence[int]]) -> None:
        """Raises a UserError for a shape that the engine does not take, with the sizes that it does."""
        sizes: dict[str, tuple[int, str]] = {}
        for entry in self.inputs:
            name, shape = entry["name"], shapes[entry["name"]]
            if len(shape) != len(entry["shape"]):
                raise self._refusal(entry, shape, f"feed {len(entry['shape'])} dimensions, {_listed(entry['shape'])}")
            for number, (wanted, size) in enumerate(zip(entry["shape"], shape, strict=True)):
                if wanted == size:
                    continue
                if isinstance(wanted, int):
                    fix = f"feed {_listed(entry['shape'])}: dimension {number} is {size}, and must be {wanted}"
                    raise self._refusal(entry, shape, fix)
                if not _fits(size, self.axes[wanted]):
                    raise self._refusal(entry, shape, self._range(wanted, size))
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

    def _check_values(self, entry: Json, array: NDArray[Any]) -> None:
        """Refuses whole numbers beyond those that the model looks up: a GPU would read whatever lies there."""
        least, most = int(array.min(initial=0)), int(array.max(initial=0))
        if least < 0 or most > entry["largest"]:
            raise UserError(
                f"{self.name}: input {entry['name']!r} holds {least if least < 0 else most}",
                fix=f"feed 0 … {entry['largest']}: {entry['means']}",
            )

    def _refusal(self, entry: Json, shape: Sequence[int], fix: str) -> UserError:
        wanted = _listed(entry["shape"])
        return UserError(
            f"{self.name}: input {entry['name']!r} has shape {list(shape)}, and {wanted} is wanted", fix=fix
        )

    def _range(self, axis: str, size: int) -> str:
        """Returns how to mend an axis of another size than those that the engine takes."""
        sizes = self.axes[axis]
        multiple = f" in multiples of {sizes['multiple']}" if sizes["multiple"] > 1 else ""
        split = " at once: split them" if axis == BATCH and size > sizes["max"] else ""
        return f"feed {axis} {sizes['min']} … {sizes['max']}{multiple}{split}"


def _fits(size: int, axis: Json) -> bool:
    return bool(axis["min"] <= size <= axis["max"] and size % axis["multiple"] == 0)


def _listed(shape: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def check_mapping(what: str, value: Any) -> None:
    if not isinstance(value, Mapping):
        raise UserError(f"{what} are a {type(value).__name__}", fix="give a dictionary of arrays by input's name")


def as_numpy(value: Any) -> NDArray[Any]:
    """Returns an array of whatever numpy or DLPack can read, without a copy where none is needed."""
    if isinstance(value, np.ndarray):
        return value
    if hasattr(value, "__dlpack__"):
        try:
            return np.from_dlpack(value)
        except (BufferError, RuntimeError, TypeError) as error:  # another device, a gradient, a type numpy lacks
            raise _unreadable(value, error) from error
    try:
        return np.asarray(value)
    except (ValueError, TypeError) as error:  # rows of different lengths among others
        raise UserError(f"numpy makes no array of what was fed ({error})", fix="feed an array") from error


def _unreadable(value: Any, error: Exception) -> UserError:
    kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
    if kind.startswith(("bfloat16", "float8")):
        return UserError(f"a tensor of {kind} was fed, and numpy has no {kind}", fix="convert it to float32")
    return UserError(
        f"a tensor that numpy cannot read was fed ({error})",
        fix="feed one that holds numbers, from the CPU and detached: tensor.detach().cpu(); run_dlpack takes "
        "one on the GPU where it lies",
    )
