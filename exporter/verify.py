"""`verify`: a bundle's files against its manifest, and its engines against what it has recorded."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from engines import golden, loading
from engines.artifacts import Json
from engines.bundle import Bundle, open_bundle

if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


def verify(path: Path, backend: str | None = None) -> Json:
    """Returns what every engine gives for the recorded feeds, or why it cannot run here.

    A bundle that was damaged is a UserError; so is one none of whose engines can run.
    """
    bundle = open_bundle(path)
    loading.choose(bundle, backend)
    names = [name for name, entry in bundle.info["engines"].items() if backend in (None, entry["backend"])]
    engines = [_engine_row(bundle, name) for name in names]
    return {
        "bundle": str(path),
        "digest": bundle.artifact.digest,
        "failed_checks": failed_checks(bundle.info),
        "files": len(bundle.artifact.files()),
        "bytes": bundle.artifact.bytes,
        "engines": engines,
        "passed": all(row["passed"] for engine in engines for row in engine["rows"]),
    }


def _engine_row(bundle: Bundle, name: str) -> Json:
    artifact = bundle.engine(name)
    reason = loading.why_not(artifact)
    rows = [] if reason else golden.rows(loading.Engine(bundle, name, artifact), bundle)
    for row in rows:  # equal to the last bit, or NaN: JSON has neither
        row["value_db"] = row["value_db"] if math.isfinite(row["value_db"]) else None
    return {"name": name, "dtype": artifact.info["dtype"], "why_not": reason, "rows": rows}


def contract_lines(info: Json) -> Iterable[str]:
    """Yields what a bundle's engines take and give, in words."""
    for entry in (*info["inputs"], info["output"]):
        shape = ", ".join(map(str, entry["shape"]))
        yield f"{'input' if 'means' in entry else 'output'}  {entry['name']}: {entry['dtype']} [{shape}]" + (
            f", {entry['means']}" if "means" in entry else ""
        )
    for name, axis in info["axes"].items():
        multiple = f", multiples of {axis['multiple']}" if axis["multiple"] > 1 else ""
        yield f"axis  {name}: {axis['min']} … {axis['max']}{multiple}"
    sampler = info["sampler"]
    guided = f", guidance {sampler['guidance_scale']:g}" if sampler["guided"] else ""
    portable = "" if sampler["portable"] else f"; in diffusers alone: {sampler['why_not_portable']}"
    yield f"sampler  {sampler['scheduler'].get('_class_name', '?')}, {sampler['steps']} steps{guided}{portable}"
    for name, engine in info["engines"].items():
        yield f"engine  {name}: {engine['dtype']}, {engine['weight_bytes']:,} bytes of weights"
    for name in failed_checks(info):
        yield f"failed  {name}"


def tables(found: Json) -> Iterable[Any]:
    """Yields what a person sees."""
    from rich.table import Table

    yield f"{found['bundle']}: {found['files']} files, {found['bytes']:,} bytes, all as its manifest says"
    for name in found["failed_checks"]:
        yield f"it failed a check of its run: {name}"
    table = Table(title="recorded feeds and samples, by engine")
    for column in ("engine", "what", "dB", "at least", ""):
        table.add_column(column, justify="right" if column in ("dB", "at least") else "left")
    for engine in found["engines"]:
        if engine["why_not"]:
            table.add_row(engine["name"], f"not run: {engine['why_not']}")
        for row in engine["rows"]:
            result = "passed" if row["passed"] else "FAILED"
            table.add_row(engine["name"], row["what"], decibels(row), f"{row['limit_db']:.1f}", result)
    yield table


def decibels(row: Json) -> str:
    """Returns a row's value as text: an infinite one is equality, one that is no number is NaN."""
    if row["value_db"] is not None:
        return f"{row['value_db']:.1f}"
    return "equal" if row["passed"] else "NaN"


def failed_checks(info: Json) -> list[str]:
    """Returns the checks of its run that a bundle's model failed."""
    return [check["name"] for check in info["checks"] if not check["passed"]]
