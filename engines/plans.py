"""Plans: what an engine really runs, one row per engine layer, in one vocabulary for all backends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.artifacts import Artifact, write_json

PLAN = "plan.json"
# Bits per element of every type a plan may name.
BITS = {
    "fp64": 64, "fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "fp8_e5m2": 8, "fp4": 4,
    "int64": 64, "int32": 32, "int16": 16, "int8": 8, "uint8": 8, "int4": 4, "uint4": 4, "bool": 8,
}  # fmt: skip
FLOATS = ("fp16", "bf16", "fp32", "fp64")
NARROW = ("fp4", "fp8", "int4", "int8")  # of what matmuls and convolutions of quantized inputs multiply


@dataclass(frozen=True)
class PlanRow:
    """One engine layer; `onnx_nodes` are named after module paths, types are spelled as in `BITS`."""

    name: str
    kind: str
    input_types: tuple[str, ...]
    constant_types: tuple[str, ...]
    constant_bytes: int
    output_types: tuple[str, ...]
    onnx_nodes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def read_plan(engine: Artifact) -> list[PlanRow]:
    """Returns what an engine runs, as its backend found at the build."""
    return from_json(json.loads(engine.file(PLAN).read_text(encoding="utf-8")))


def write_plan(rows: Iterable[PlanRow], folder: Path) -> None:
    write_json(folder / PLAN, [row.to_json() for row in rows])


def from_json(rows: Iterable[dict[str, Any]]) -> list[PlanRow]:
    frozen: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows
    ]
    return [PlanRow(**row) for row in frozen]


def tensor_bytes(dimensions: Iterable[int], dtype: str) -> int:
    """Returns the bytes of a dense tensor; types under a byte are packed."""
    return math.ceil(math.prod(dimensions) * BITS[dtype] / 8)


def multiplied_as(row: PlanRow) -> str | None:
    """Returns the type that a row which multiplies does so in: two operands' common narrow one, else its input's."""
    held = [as_signed(kind) for kind in (*row.input_types, *row.constant_types)]
    narrow = (kind for kind in NARROW if held.count(kind) > 1)
    floats = (kind for kind in row.input_types if kind in FLOATS)
    return next(narrow, None) or next(floats, None)


def as_signed(kind: str) -> str:
    """Returns an integer type's name without its sign: a builder may shift codes by half their range."""
    return kind.removeprefix("u")


def constant_bytes(rows: Iterable[PlanRow]) -> int:
    return sum(row.constant_bytes for row in rows)
