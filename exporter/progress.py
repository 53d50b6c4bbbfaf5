"""Progress on stderr: bars with the time left for long work, one line for each stage."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:  # rich is imported late: --help must stay fast
    from rich.console import Console
    from rich.table import Table

T = TypeVar("T")
PIPED_COLUMNS = 160
WIDEST = 1000  # columns of a table: more than any has
EVERY_SECONDS = 60.0  # between two lines of progress where nobody watches


def note(text: str) -> None:
    """Prints one line on stderr."""
    _console().print(text, highlight=False, markup=False)


def track(items: Iterable[T], total: int, what: str, *, done: int = 0) -> Iterator[T]:
    """Yields the items under a progress bar with the time left; without a terminal, lines now and then.

    `done` of the `total` were done before.
    """
    if not total:
        yield from items
        return
    console = _console()
    if not console.is_terminal:
        yield from _told(items, total, what, done)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description:>28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        yield from progress.track(items, total=total, completed=done, description=what)


def _told(items: Iterable[T], total: int, what: str, done: int) -> Iterator[T]:
    """Yields the items; a line says how far they are once a minute, and one what they took."""
    started = told = time.monotonic()
    for number, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= EVERY_SECONDS and done + number < total:
            told, left = now, (now - started) / number * (total - done - number)
            note(f"{what}: {done + number} of {total}, about {_spelled(left)} left")
    note(f"{what}: {total} in {_spelled(time.monotonic() - started)}")


def _spelled(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def stdout() -> Console:
    """Returns the console for results; where nobody watches, lines are wide enough for tables of layer names."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(highlight=False, width=PIPED_COLUMNS if wide else None)


def print_whole(table: Table) -> None:
    """Prints a table on stdout with no cell cut: where the terminal is narrower, its lines run on."""
    console = stdout()
    wanted = console.measure(table, options=console.options.update(max_width=WIDEST)).maximum
    console.width = max(console.width, wanted)
    console.print(table)


def _console() -> Console:
    from rich.console import Console

    return Console(stderr=True)
