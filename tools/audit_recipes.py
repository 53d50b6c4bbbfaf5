"""Audits engines of all shipped recipes: which types every matmul, convolution and attention runs in, as asked or not.

    python tools/audit_recipes.py digits-dit shapes-unet --out out/audit

What engines run depends on formats and shapes, not on what was learned: methods that train take one iteration, on few
trajectories. What was found goes into --results as JSON and, in short, between the marks of --document. Exit code
3 where something is neither as asked nor explained.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from engines import audit, backends
from engines.artifacts import Artifact, Json, read_json, write_json
from engines.build import build
from exporter import methods, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.progress import note
from exporter.quantize import quantize
from exporter.recipe import Recipe

SAMPLES = 8  # trajectories: one of them judges what is learned
ITERATIONS = ("iterations", "start_iterations", "activation_iterations", "codebook_iterations")  # of all that trains
BACKENDS = {"ort": None, "trt-rtx": "sm89"}
START, END = "<!-- audit: begin -->\n", "<!-- audit: end -->\n"


def untrained(name: str) -> Recipe:
    """Returns a shipped recipe whose methods train for one iteration each time, on few trajectories."""
    source = recipe.load(name).source
    rules = [rule | {"method": _short(rule["method"])} if "method" in rule else rule for rule in source["rule"]]
    return recipe.parse(name, {"calibration": {"samples": SAMPLES}, "rule": rules})


def _short(method: dict[str, Any]) -> dict[str, Any]:
    known = methods.load(method["name"]).Options.__dataclass_fields__
    return method | {key: 1 for key in ITERATIONS if key in known}


def audited(model: str, name: str, out: Path) -> list[Json]:
    """Builds a recipe's engines and returns their audits."""
    checkpoint = open_checkpoint(model)
    calibration = calibrate(checkpoint, out / model / "calibration", samples=SAMPLES)
    folder = out / model / name
    source = quantize(checkpoint, untrained(name), calibration, folder / "quantized")
    return [_audited(source, backend, folder) | {"model": model, "recipe": name} for backend in BACKENDS]


def _audited(source: Artifact, backend: str, folder: Path) -> Json:
    dtype, gpu = backends.load(backend).DTYPE, BACKENDS[backend]
    graph = lower(source, folder / "graph" / dtype, dtype=dtype)
    rows = audit.audit(build(graph, backend, folder / "engines" / backend, gpu=gpu))
    sizes = {stage: sum(row.bytes[stage] for row in rows) for stage in ("quantized", "graph", "engine")}
    return {"backend": backend, "dtype": dtype, "gpu": gpu, "bytes": sizes, "groups": groups(rows)}


def groups(rows: Sequence[audit.AuditRow]) -> list[Json]:
    """Returns rows that are alike but for their layers as one each, with their number and, of others, their names."""
    alike: dict[str, Json] = {}
    for row in rows:
        what = {
            "op": row.op,
            "asked": dict(row.asked),
            "got": dict(row.got),
            "status": row.status,
            "reason": row.reason,
        }
        group = alike.setdefault(json.dumps(what), what | {"rows": 0, "layers": []})
        group["rows"] += 1
        group["layers"] += [row.layer] if row.status == audit.OTHER else []
    return list(alike.values())


def document(found: list[Json]) -> str:
    """Returns the table: how many rows run as asked, in which types, and why the others do not."""
    lines = ["| model | recipe | engine | rows | as asked | explained | other | not as asked |", "|---" * 8 + "|"]
    for one in found:
        count: Counter[str] = Counter()
        for group in one["groups"]:
            count[group["status"]] += group["rows"]
        numbers = [count.total(), *(count[key] for key in (audit.AS_ASKED, audit.EXPLAINED, audit.OTHER))]
        why: Counter[str] = Counter()
        for group in one["groups"]:
            if group["status"] != audit.AS_ASKED:
                why[group["reason"] or f"other: {', '.join(group['layers'])}"] += group["rows"]
        told = "; ".join(f"{number} × {reason}" for reason, number in why.items())
        engine = " ".join(filter(None, (one["backend"], one["dtype"], one["gpu"])))
        lines.append(f"| {one['model']} | `{one['recipe']}` | {engine} | {' | '.join(map(str, numbers))} | {told} |")
    return "\n".join(lines) + "\n"


def put(text: str, path: Path) -> None:
    """Puts a table between the document's marks."""
    whole = path.read_text(encoding="utf-8")
    first, last = whole.index(START) + len(START), whole.index(END)
    path.write_text(whole[:first] + text + whole[last:], encoding="utf-8")


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--recipes", default=",".join(recipe.names()), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("out/audit"), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("docs/audit"), show_default=True)
@click.option("--document", "table", type=click.Path(path_type=Path), default=Path("docs/audit.md"), show_default=True)
def main(models: tuple[str, ...], recipes: str, out: Path, results: Path, table: Path) -> None:
    """Audits, writes the tables; exits with 3 where something runs otherwise than asked and nothing says why."""
    results.mkdir(parents=True, exist_ok=True)
    for model in models:
        for name in recipes.split(","):
            for one in audited(model, name, out):
                write_json(results / f"{model}.{name}.{one['backend']}.json", one)
                note(document([one]).splitlines()[-1])
    found = [read_json(path) for path in sorted(results.glob("*.json"))]
    put(document(found), table)
    if any(group["status"] == audit.OTHER for one in found for group in one["groups"]):
        sys.exit(3)


if __name__ == "__main__":
    main()
