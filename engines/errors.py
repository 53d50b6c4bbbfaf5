"""The one exception for faults of the user's input or environment."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


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
    found = [value] if value in others else difflib.get_close_matches(value, [*names, *others], n=3, cutoff=0.5)
    close = dict.fromkeys(others.get(name, name) for name in found)
    prefix = f"{where}: " if where else ""
    hint = f"did you mean {' or '.join(repr(c) for c in close)}? " if close else ""
    return UserError(f"{prefix}unknown {kind} {value!r}", fix=f"{hint}known: {', '.join(names) or 'none'}")
