"""Cells of tables: what they say, and the number they are sorted by.

What a report of an earlier version lacks is left empty, never made up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeGuard

from engines.artifacts import Json

MOST_ROWS = 1200  # of a table: what a page of 5 MB holds of layer names; report.json has the rest
Cell = dict[str, Any]
EQUAL: Cell = {"text": "equal", "value": "Infinity"}  # as JavaScript spells it


def at(report: Any, path: str, default: Any) -> Any:
    """Returns what lies at a dotted path; the default if that is missing, null or of another type."""
    for key in path.split("."):
        report = report.get(key) if isinstance(report, dict) else None
    same = isinstance(report, type(default)) or (isinstance(default, float) and isinstance(report, int))
    return report if same else default


def is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def dash(value: object, digits: int = 1, unit: str = "") -> str:
    """Spells a number, with its own minus; a dash for what is none."""
    return f"{value:,.{digits}f}".replace("-", "−") + unit if is_number(value) else "–"


def short(value: object) -> str:
    """Spells a number of any size by its four leading digits."""
    return f"{value:.4g}".replace("-", "−") if is_number(value) else "–"


def mb(count: object) -> str:
    return dash(times(count, 1e-6), 2, "\u00a0MB")


def number(value: object, digits: int = 1, unit: str = "", note: str = "") -> Cell:
    """Returns a cell that sorts by its number."""
    cell = {"text": dash(value, digits, unit), "note": note, "number": True}
    return cell | ({"value": value} if is_number(value) else {})


def text(value: object, note: str = "", **more: Any) -> Cell:
    return {"text": "–" if value in (None, "") else str(value), "note": note, **more}


def db(value: object, not_finite: object = 0) -> Cell:
    """Returns a cell of an SQNR, where null is that of two equal tensors, or of one with NaN or infinite values."""
    if value is None and not_finite:
        return text("NaN") | {"number": True}
    return number(value, 1) if value is not None else EQUAL | {"number": True}


def span(interval: object, digits: int = 1, scale: float = 1.0) -> str:
    """Spells an interval."""
    if not isinstance(interval, list | tuple) or len(interval) != 2:
        return "–"
    return " … ".join(dash(scale * end, digits) for end in interval)


def table(caption: str, columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> Json:
    """Returns a table; one column is of numbers if its first cell is."""
    numbers = [bool(cell.get("number")) for cell in rows[0]] if rows else [False] * len(columns)
    heads = [{"text": name, "number": is_number} for name, is_number in zip(columns, numbers, strict=True)]
    return {"caption": caption, "columns": heads, "rows": rows[:MOST_ROWS], "left_out": max(0, len(rows) - MOST_ROWS)}


def times(value: object, scale: float) -> float | None:
    """Returns a number times `scale`; none of what is no number."""
    return scale * value if is_number(value) else None
