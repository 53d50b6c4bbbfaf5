"""The tables of report.html as plain data: columns, and rows of cells."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from engines.artifacts import Json
from exporter.cells import EQUAL, MOST_ROWS, Cell, at, dash, db, number, short, span, table, text, times

NODES = 3  # named in a row of a plan
LEVELS = 10  # shades of a heat map


def _speeds(report: Json) -> tuple[int | None, dict[str, Json]]:
    """Returns the first batch that was timed, and its rows by runner."""
    rows = at(report, "throughput", [])
    batch = rows[0]["batch"] if rows else None
    return batch, {row["runner"]: row for row in rows if row["batch"] == batch}


def headline(report: Json) -> Json:
    """Returns what the page says first: sizes, the images' PSNR, the task's score, the judged runner's speed."""
    images, runner = at(report, "accuracy.images", {}), at(report, "accuracy.images.runner", "")
    batch, speeds = _speeds(report)
    row = speeds.get(runner)
    base = comparable(speeds.get("float"), row)
    size, whole = at(report, "weights.bytes", math.nan), at(report, "model.float_weight_bytes", math.nan)
    return {
        "runner": runner,
        "images": images.get("n"),
        "bytes": at(report, "weights.bytes", math.nan),
        "share": size / whole if whole else None,
        "bits": at(report, "weights.bits_per_weight", math.nan),
        "psnr": at(images, "psnr_db", {}),
        "psnr_span": span(at(images, "psnr_db.ci95", [])),
        "task": at(images, "task_score", {}),
        "task_span": span(at(images, "task_score.ci95", []), 1, 100),
        "batch": batch,
        "speed": base["ms_p50"] / row["ms_p50"] if base and row else None,
        "speed_span": span(_speed_span(base, row), 2) if base and row else "",
    }


def comparable(base: Json | None, row: Json | None) -> Json | None:
    """Returns the float model's times, None where they are not of the device of the other's."""
    return base if base and row and base.get("device") == row.get("device") else None


def _speed_span(base: Json, row: Json) -> tuple[float, float]:
    """Returns the ratio where the one is at its p95 and the other at its median, both ways."""
    return base["ms_p50"] / row["ms_p95"], base["ms_p95"] / row["ms_p50"]


def scores(report: Json) -> Json:
    """Returns every score over images with its interval and its noise floor."""
    images = at(report, "accuracy.images", {})
    kinds = [("PSNR, dB", "psnr_db", 1, 1), ("SSIM", "ssim", 4, 1), ("cosine", "cosine", 4, 1)]
    found = [(name, at(images, key, {}), digits, scale) for name, key, digits, scale in kinds]
    found += [
        (name.replace("_", " ").replace("frechet", "Fréchet"), entry, 3, 1)
        for name, entry in at(images, "sets", {}).items()
    ]
    if task := at(images, "task_score", {}):
        found.append((f"{task.get('name')} lost, points", at(task, "lost", {}), 2, 100))
    rows = [
        [
            text(name),
            number(times(entry.get("mean", entry.get("value")), scale), digits),
            text(span(entry.get("ci95"), digits, scale), number=True),
            number(times(entry.get("noise_floor"), scale), digits),
        ]
        for name, entry, digits, scale in found
        if entry
    ]
    return table("Scores of the images against the float model's", ("score", "value", "95 %", "two float runs"), rows)


def compared(runs: Mapping[str, Json], here: str) -> Json:
    """Returns the runs of a folder as a table, smallest first, and as points of a chart."""
    ordered = sorted(runs.items(), key=lambda item: (at(item[1], "weights.bytes", math.inf), item[0]))
    rows, points = [], []
    for count, (name, report) in enumerate(ordered, 1):
        head, images = headline(report), at(report, "accuracy.images", {})
        ms = _speeds(report)[1].get(head["runner"], {})
        psnr = at(images, "psnr_db", {})
        task = head["task"]
        rows.append([
            number(count, 0),
            text(name, "this run" if name == here else "", href=None if name == here else f"../{name}/report.html"),
            text(at(report, "recipe.name", "")),
            number(head["bytes"] / 1e6, 2),
            number(head["share"], 2),
            number(head["bits"], 2),
            number(psnr.get("mean"), 1, note=span(psnr.get("ci95"))),
            number(times(task.get("quantized"), 100), 1, note=span(task.get("ci95"), 1, 100) if task else ""),
            number(ms.get("ms_p50"), 1, note=f"p95 {dash(ms['ms_p95'])}" if "ms_p95" in ms else ""),
            number(head["speed"], 2, note=head["speed_span"]),
            text("passed" if report.get("passed") else "failed", status="good" if report.get("passed") else "bad"),
        ])  # fmt: skip
        if isinstance(psnr.get("mean"), float) and not math.isnan(head["bytes"]):
            points.append({
                "name": name, "number": count, "here": name == here, "mb": head["bytes"] / 1e6,
                "y": psnr["mean"], "y_span": psnr.get("ci95", ()), "ms": ms.get("ms_p50"),
                "ms_span": (ms["ms_p50"], ms["ms_p95"]) if ms else (),
            })  # fmt: skip
    columns = ("#", "run", "recipe", "MB", "× fp16", "bits / weight", "PSNR, dB", "task, %", "ms", "speed", "verdict")
    return {"table": table("Runs of the same model in this folder", columns, rows), "points": points}


def steps(accuracy: Json) -> list[Json]:
    """Returns the numbers behind the charts over steps."""
    per_step = [
        [
            text(row["runner"]),
            number(row["step"], 0),
            number(row.get("timestep"), 0),
            db(row.get("sqnr_db"), row.get("not_finite", 0)),
        ]
        for row in at(accuracy, "per_step", [])
    ]
    trajectory = [
        [text(row["runner"]), number(row["step"], 0), db(row.get("sqnr_db"), row.get("not_finite", 0))]
        for row in at(accuracy, "trajectory", [])
    ]
    lowering = [
        [
            text(f"{row['backend']} {row.get('dtype', '')}"), number(row["step"], 0), db(row.get("sqnr_db")),
            db(row.get("floor_db")), number(row.get("max_abs"), 6), number(row.get("not_finite"), 0),
        ]
        for row in at(accuracy, "lowering", [])
    ]  # fmt: skip
    made = [
        table("One call at a time, against float", ("runner", "step", "timestep", "SQNR, dB"), per_step),
        table("Along the trajectory, against float", ("runner", "step", "SQNR, dB"), trajectory),
        table(
            "Engine against quantized PyTorch",
            ("engine", "step", "SQNR, dB", "floor, dB", "largest difference", "not finite"),
            lowering,
        ),
    ]
    return [one for one in made if one["rows"]]


def heat_of_layers(rows: Sequence[Json]) -> Json | None:
    """Returns layers, in order of execution, by runners and steps; None if there are none."""
    places = sorted({(str(row["runner"]), row["step"]) for row in rows})
    found: dict[str, dict[tuple[str, int], Json]] = {}
    for row in rows:
        found.setdefault(row["layer"], {})[(str(row["runner"]), row["step"])] = row
    runners = Counter(runner for runner, _ in places)
    several = len(runners) > 1
    columns = _steps([step for _, step in places], [f"{runner}, " if several else "" for runner, _ in places])
    heat = _heat(columns, {layer: [cells.get(place) for place in places] for layer, cells in found.items()})
    groups = [{"text": runner, "span": count} for runner, count in runners.items()] if several else []
    return heat and heat | {"groups": groups}


def heat_of_damage(found: Json) -> Json | None:
    """Returns what each layer alone does to the output at every step, worst first."""
    rows = {row["layer"]: [{"sqnr_db": value} for value in row["sqnr_db"]] for row in found.get("layers", [])}
    steps = found.get("steps", [])
    return _heat(_steps(steps, [""] * len(steps)), rows)


def _steps(steps: Sequence[int], of: Sequence[str]) -> list[Json]:
    """Returns the heads of columns of steps; the first says that they are steps."""
    return [
        {"text": str(step) if count else f"step {step}", "of": f"{whose}step {step}"}
        for count, (step, whose) in enumerate(zip(steps, of, strict=True))
    ]


def _heat(columns: Sequence[Json], rows: Mapping[str, Sequence[Json | None]]) -> Json | None:
    """Returns cells with a shade from 0, the highest SQNR, to LEVELS, the lowest; what is not finite counts as that."""
    known = [c["sqnr_db"] for cells in rows.values() for c in cells if c and c.get("sqnr_db") is not None]
    if not rows:
        return None
    low, high = min(known, default=0.0), max(known, default=0.0)

    def shaded(cell: Json | None) -> Cell:
        if cell is None:
            return {"text": "", "shade": 0}
        if cell.get("not_finite"):
            return {"text": "not finite", "shade": LEVELS}
        if (value := cell.get("sqnr_db")) is None:
            return EQUAL | {"shade": 0}
        return {"text": dash(value), "shade": round(LEVELS * (high - value) / ((high - low) or 1.0))}

    listed = [{"layer": layer, "cells": [shaded(cell) for cell in cells]} for layer, cells in rows.items()]
    left_out = max(0, len(listed) - MOST_ROWS)
    shades = {"low": low, "high": high, "levels": LEVELS}
    return {"columns": columns, "rows": listed[:MOST_ROWS], "left_out": left_out, **shades}


def engine(row: Json) -> Json:
    """Returns an engine with its audit, asked against got, and its plan."""
    audit = row.get("audit")
    return {
        "name": " ".join(str(row[key]) for key in ("backend", "dtype", "gpu") if row.get(key)),
        "ran": row.get("ran"),
        "bytes": row.get("bytes"),
        "weight_bytes": row.get("weight_bytes"),
        "resident": row.get("resident_weight_bytes"),
        "audit": None if audit is None else _audit(audit),
        "plan": _plan(at(row, "layers", [])),
    }


STATUS = {"as asked": "good", "explained": "fair", "allowed": "fair", "other": "bad"}


def _audit(rows: Sequence[Json]) -> Json:
    columns = ("layer", "op", "asked", "got", "status", "kernel", "quantized, B", "graph, B", "engine, B")
    found = [
        [
            text(row.get("layer"), code=True),
            text(row.get("op")),
            text(_types(row.get("asked"))),
            text(_types(row.get("got"))),
            text(row.get("status"), row.get("reason") or "", status=STATUS.get(str(row.get("status")), "")),
            text(_few(at(row, "kernels", [])), _remarks(row), code=True),
            *(number(at(row, "bytes", {}).get(key), 0) for key in ("quantized", "graph", "engine")),
        ]
        for row in rows
    ]
    return table("What was asked of every layer, and what the engine runs", columns, found)


def _types(types: object) -> str:
    if not isinstance(types, dict):
        return ""
    return "\u00a0×\u00a0".join(str(kind) for kind in types.values() if kind)


def _remarks(row: Json) -> str:
    keys = {"decoded by": "decoders", "merged with": "merged_with", "not fused": "unfused", "casts": "casts"}
    parts = [f"{what} {_few(names)}" for what, key in keys.items() if (names := at(row, key, []))]
    return "; ".join([*dict.fromkeys(map(str, at(row, "kinds", []))), *parts])


def _plan(rows: Sequence[Json]) -> Json:
    columns = ("layer", "kind", "inputs", "constants", "outputs", "constants, B", "ONNX nodes")
    found = [
        [
            text(row.get("name"), code=True),
            text(row.get("kind")),
            *(text(_distinct(row.get(f"{key}_types", ()))) for key in ("input", "constant", "output")),
            number(row.get("constant_bytes"), 0),
            text(_few(row.get("onnx_nodes", ())), code=True),
        ]
        for row in rows
    ]
    return table("What the engine runs, layer by layer", columns, found)


def _distinct(types: Sequence[str]) -> str:
    return " ".join(dict.fromkeys(types))


def _few(names: Sequence[Any]) -> str:
    more = f" and {len(names) - NODES} more" if len(names) > NODES else ""
    return ", ".join(map(str, names[:NODES])) + more


def throughput(report: Json) -> Json:
    """Returns every runner's times at every batch, beside the float model's."""
    rows = at(report, "throughput", [])
    base = {row["batch"]: row for row in rows if row["runner"] == "float"}
    found = []
    for row in rows:
        other = comparable(base.get(row["batch"]), row)
        found.append([
            text(row["runner"]),
            number(row["batch"], 0),
            number(row["ms_p50"], 2),
            number(row["ms_p95"], 2),
            number(other["ms_p50"] / row["ms_p50"] if other else None, 2, "×"),
            text(span(_speed_span(other, row), 2) if other else "", number=True),
            number(row.get("runs"), 0),
            number(times(row.get("peak_rss_bytes"), 1e-6), 0),
        ])  # fmt: skip
    columns = ("runner", "batch", "ms, p50", "ms, p95", "speed", "p50 to p95", "runs", "peak MB")
    return table("One call of the network, this machine", columns, found)


def checks(report: Json) -> Json:
    columns = ("check", "value", "limit", "unit", "verdict")
    found = [
        [
            text(check["name"], check.get("detail") or ""),
            number(check.get("value")) | {"text": short(check.get("value"))},
            number(check.get("limit")) | {"text": short(check.get("limit"))},
            text(check.get("unit")),
            text("passed" if check.get("passed") else "failed", status="good" if check.get("passed") else "bad"),
        ]
        for check in at(report, "checks", [])
    ]
    return table("What decides between passed and failed: a value may be at most its limit", columns, found)


def provenance(report: Json) -> Json:
    """Returns digests, versions and settings."""
    found = [("recipe", at(report, "recipe.digest", ""))]
    found += at(report, "made_from", {}).items()
    pictures = {"samples.png": "samples", "samples.safetensors": "shown"}
    found += [(what, at(report, key, "")) for what, key in pictures.items()]
    found += [(key.replace("_", " "), value) for key, value in at(report, "settings", {}).items()]
    rows = [[text(what), text(value, code=True)] for what, value in found if value != ""]
    return table("sha256 of what this report was made of, versions and settings", ("what", "value"), rows)
