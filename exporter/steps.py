"""Where in the sampler's schedule a call stands: what quantizers that have a scale for every step ask."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass

import torch

from engines.errors import UserError


@dataclass(frozen=True)
class Position:
    """One call's rows: their `step` [batch] int64.

    While a graph is traced, `step` is the rows of its table [batch, n], and `columns` are these, [batch, 1] each.
    """

    step: torch.Tensor
    columns: Sequence[torch.Tensor] = ()


_NOW: ContextVar[Position | None] = ContextVar("position", default=None)


@contextlib.contextmanager
def at(position: Position | None) -> Iterator[None]:
    token = _NOW.set(position)
    try:
        yield
    finally:
        _NOW.reset(token)


def now() -> Position:
    """Returns the position of the call that is under way."""
    found = _NOW.get()
    if found is None:
        raise UserError(
            "a model whose activations have a scale for every step was called without one", fix="feed `step`"
        )
    return found
