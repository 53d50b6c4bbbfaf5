"""Charts as plain data, in the pixels of an SVG: what is drawn where. How it looks is the template's and the CSS's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from engines.artifacts import Json

# Text keeps its size in the drawing's own pixels: small enough that 12 of them are still read on a phone 360 wide.
WIDTH, HEIGHT = 380, 250
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 42
TICKS = 5
SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")

Point = tuple[float, float]


@dataclass(frozen=True)
class Axis:
    """Where values lie along one side of a drawing, and its round ticks."""

    ticks: Sequence[float]
    start: float
    end: float

    def at(self, value: float) -> float:
        """Returns the pixel of a value; one beyond the ends lies at the end."""
        low, high = self.ticks[0], self.ticks[-1]
        share = (min(max(value, low), high) - low) / (high - low)
        return round(self.start + share * (self.end - self.start), 1)

    def marks(self) -> list[tuple[float, str]]:
        return [(self.at(tick), f"{tick:.6g}".replace("-", "−")) for tick in self.ticks]


def axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Returns an axis whose round ticks enclose the values."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        low, high = low - 0.5, high + 0.5
    return Axis([float(t) for t in MaxNLocator(TICKS, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)], start, end)


def _axes(xs: Sequence[float], ys: Sequence[float]) -> tuple[Axis, Axis]:
    return axis(xs, LEFT, WIDTH - RIGHT), axis(ys, HEIGHT - BOTTOM, TOP)


def _frame(x: Axis, y: Axis, x_label: str, y_label: str) -> Json:
    return {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "top": TOP,
            "bottom": HEIGHT - BOTTOM, "x_marks": x.marks(), "y_marks": y.marks(),
            "x_label": x_label, "y_label": y_label}  # fmt: skip


def lines(series: Mapping[str, Sequence[tuple[float, float | None]]], x_label: str, y_label: str) -> Json | None:
    """Returns a line per series of points; a gap where y is None; None if there is nothing to draw."""
    drawn = {name: [(a, b) for a, b in points if b is not None] for name, points in series.items()}
    everything = [point for points in drawn.values() for point in points]
    if not everything:
        return None
    x, y = _axes([a for a, _ in everything], [b for _, b in everything])
    found = [
        {
            "name": name,
            "path": _path([(x.at(a), y.at(b)) for a, b in points]),
            "dots": [(x.at(a), y.at(b), f"{name}, {x_label} {a:.6g}: {b:.1f}") for a, b in points],
        }
        for name, points in drawn.items()
    ]
    return _frame(x, y, x_label, y_label) | {"lines": found}


def scatter(points: Sequence[Json], x_label: str, y_label: str) -> Json | None:
    """Returns a mark per point of {"name", "number", "here", "x", "x_span", "y", "y_span"}, with its intervals."""
    if not points:
        return None
    across = [v for p in points for v in (0.0, p["x"], *p["x_span"])]
    x, y = _axes(across, [v for p in points for v in (p["y"], *p["y_span"])])
    found = [
        {
            "name": point["name"], "number": point["number"], "here": point["here"],
            "x": x.at(point["x"]), "y": y.at(point["y"]),
            "across": [x.at(v) for v in point["x_span"]], "along": [y.at(v) for v in point["y_span"]],
        }
        for point in points
    ]  # fmt: skip
    return _frame(x, y, x_label, y_label) | {"points": found}


def histogram(
    edges: Sequence[float], filled: Sequence[float], outlined: Sequence[float], ends: Sequence[float], x_label: str
) -> Json:
    """Returns two counts over the same bins, on a logarithmic scale, and the least and largest `ends` of a range."""
    x = axis([edges[0], edges[-1]], LEFT, WIDTH - RIGHT)
    most = max([*filled, *outlined, 1.0])
    decades = math.ceil(math.log10(most)) or 1
    y = Axis([0.0, decades + 0.3], HEIGHT - BOTTOM, TOP)  # from a third of a decade under 1, so that one is seen
    found = _frame(x, y, x_label, "values in a bin")
    found["y_marks"] = [(y.at(d + 0.3), _power(d)) for d in range(decades + 1)]
    heights = [[y.at(math.log10(c) + 0.3) if c else y.at(0) for c in counts] for counts in (filled, outlined)]
    found["filled"], found["outlined"] = (_steps([x.at(e) for e in edges], h, y.at(0)) if h else "" for h in heights)
    if ends:
        found["range"] = [(x.at(sign * min(ends)), x.at(sign * max(ends))) for sign in (-1, 1)]
    return found


def _power(exponent: int) -> str:
    """Spells a power of ten."""
    return f"{10**exponent:,}" if exponent < 4 else "10" + str(exponent).translate(SUPERSCRIPTS)


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in points) if points else ""


def _steps(edges: Sequence[float], heights: Sequence[float], ground: float) -> str:
    """Returns the outline of bars that stand on `ground`."""
    if not heights:
        return ""
    walk = "".join(f"V{h:g}H{right:g}" for h, right in zip(heights, edges[1:], strict=True))
    return f"M{edges[0]:g} {ground:g}{walk}V{ground:g}"
