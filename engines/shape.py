"""The shape of JSON that came from outside: which keys it has, and of which types; checked once, before it is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast


@dataclass(frozen=True)
class Each:
    """A list, or the values of an object, each of one shape."""

    of: Any
    kind: type


@dataclass(frozen=True)
class Maybe:
    """Null, or a shape."""

    of: Any


NUMBER = (int, float)
LARGEST = 1 << 63  # of any number: what an int64 holds, and fp32 by far


def fault(value: Any, shape: Any, where: str) -> str | None:
    """Returns what of a JSON value has not the shape, None if all has; an object may have other keys beside."""
    if isinstance(shape, Maybe):
        return None if value is None else fault(value, shape.of, where)
    if isinstance(shape, Each):
        return _fault_of_each(value, shape, where)
    if isinstance(shape, Mapping):
        if not isinstance(value, dict):
            return f"{where} is no object"
        missing = shape.keys() - value.keys()
        if missing:
            return f"{where} lacks {min(missing)!r}"
        found = (fault(value[key], inner, f"{where}.{key}") for key, inner in shape.items())
        return next(filter(None, found), None)
    kinds = shape if isinstance(shape, tuple) else (shape,)
    if type(value) not in kinds:  # True is no number here
        return f"{where} is a {type(value).__name__}, not {' or '.join(kind.__name__ for kind in kinds)}"
    if isinstance(value, (int, float)) and not abs(value) < LARGEST:
        return f"{where} is {'too large' if math.isfinite(value) else 'infinite'}"
    return None


def _fault_of_each(value: Any, shape: Each, where: str) -> str | None:
    if not isinstance(value, shape.kind):
        return f"{where} is no {'list' if shape.kind is list else 'object'}"
    pairs = value.items() if isinstance(value, dict) else enumerate(cast("list[Any]", value))
    return next(filter(None, (fault(one, shape.of, f"{where}.{key}") for key, one in pairs)), None)
