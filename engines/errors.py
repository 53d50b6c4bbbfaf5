"""The one exception for faults of the user's input or environment."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

FARTHER = 0.15  # a name that is less like what was written than the closest, by this share of letters, is no guess


class UserError(Exception):
    """A fault the user can mend: says what and where, and always how to fix it. The command exits with 2.

    `keeps`: what a resumable stage has finished before is worth keeping.
    """

    def __init__(self, what: str, *, fix: str, keeps: bool = False) -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix
        self.keeps = keeps

    def __str__(self) -> str:
        return f"{self.what}\n  fix: {self.fix}"


def unknown(
    kind: str, value: str, known: Iterable[str], where: str = "", also: Mapping[str, str] | None = None
) -> UserError:
    """Returns the error for a name that is not among `known`, with the closest first; `also`: what else they go by."""
    names, others = sorted(known), also or {}
    found = [value] if value in others else _close(value, [*names, *others])
    prefix = f"{where}: " if where else ""
    hint = _hint(others.get(name, name) for name in found)
    return UserError(f"{prefix}unknown {kind} {value!r}", fix=f"{hint}known: {', '.join(names) or 'none'}")


def did_you_mean(value: str, known: Iterable[str]) -> str:
    """Returns a question that names those of `known` that are spelled like `value`, the closest first, or nothing."""
    return _hint(_close(value, list(known)))


def _close(value: str, known: Sequence[str]) -> list[str]:
    found = difflib.get_close_matches(value, known, n=3, cutoff=0.5)
    near = [difflib.SequenceMatcher(None, name, value).ratio() for name in found]
    return [name for name, ratio in zip(found, near, strict=True) if ratio > near[0] - FARTHER]


def _hint(close: Iterable[str]) -> str:
    names = dict.fromkeys(close)
    return f"did you mean {' or '.join(map(repr, names))}? " if names else ""
