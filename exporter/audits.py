"""What a person sees of an engine's audit: a table of its matmuls, convolutions and attentions, and what is counted."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from rich.table import Table

from engines.artifacts import Json
from engines.audit import AS_ASKED, OTHER

STAGES = ("quantized", "graph", "engine")
NAME_COLUMNS = 28  # leaves room for ten columns more


def table(rows: Sequence[Json]) -> Table:
    """Returns a row for everything that an engine multiplies: what was asked, what runs, and the bytes on the way."""
    made = Table()
    for header in ("layer", "op", "asked", "runs as", "kernel", "merged with", "casts"):
        made.add_column(header, no_wrap=True)
    for stage in STAGES:
        made.add_column(f"{stage}\nbytes", no_wrap=True, justify="right")
    made.add_column("verdict", no_wrap=True)
    for row in rows:
        colour = {AS_ASKED: "green", OTHER: "red"}.get(row["status"], "yellow")
        merged = "\n".join(_in_lines(_beside(row["layer"], other)) for other in row["merged_with"])
        sizes = (f"{row['bytes'][stage]:,}" for stage in STAGES)
        made.add_row(
            _in_lines(row["layer"]), row["op"], types(row["asked"]), types(row["got"]), _kernel(row), merged,
            str(len(row["casts"]) or ""), *sizes, f"[{colour}]{row['status']}[/]",
        )  # fmt: skip
    return made


def summary(rows: Sequence[Json]) -> list[str]:
    """Returns how many rows run as asked, and of the others how many for which reason."""
    counts = Counter((row["status"], row["reason"]) for row in rows)
    return [
        f"{count} of {len(rows)} {status}" + (f": {reason}" if reason else "")
        for (status, reason), count in counts.most_common()
    ]


def types(kinds: Mapping[str, str | None]) -> str:
    """Returns a weight's type and that of what it is multiplied with; products of attentions have no weight."""
    return " × ".join(kind or "?" for key, kind in kinds.items() if kind or key == "activation")


def _kernel(row: Json) -> str:
    """Returns an engine's kernels, one to a line, and what was done before them."""
    unfused = [f"{len(row['unfused'])} Q/DQ apart"] if row["unfused"] else []
    decoded = ["decoded before"] if row["decoders"] else []
    return "\n".join([*dict.fromkeys(row["kinds"]), *decoded, *unfused])


def _in_lines(name: str) -> str:
    """Returns a layer's name in lines that end at its dots, of NAME_COLUMNS at most where its parts allow."""
    lines = [""]
    for part in re.findall(r"[^.]*\.|[^.]+", name):
        if lines[-1] and len(lines[-1]) + len(part) > NAME_COLUMNS:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def _beside(layer: str, other: str) -> str:
    """Returns a layer's name, without the module's that it shares with another."""
    parent = layer.rpartition(".")[0]
    return other.removeprefix(f"{parent}.") if parent else other
