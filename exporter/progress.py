"""Progress on stderr: bars with the time left for long work, one line for each stage."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # rich is imported late: --help must stay fast
    from rich.console import Console

T = TypeVar("T")
PIPED_COLUMNS = 160


def note(text: str) -> None:
    """Prints one line on stderr."""
    _console().print(text, highlight=False, markup=False)


def track(items: Iterable[T], total: int, what: str, *, done: int = 0) -> Iterator[T]:
    """Yields the items under a progress bar with the time left; without a terminal, one line at the end.

    `done` of the `total` were done before.
    """
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:>28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=_console()) as progress:
        yield from progress.track(items, total=total, completed=done, description=what)


def stdout() -> Console:
    """Returns the console for results; where nobody watches, lines are wide enough for tables of layer names."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=PIPED_COLUMNS if wide else None)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)
