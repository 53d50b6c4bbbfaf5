"""Baselines: what of a run is kept to hold later runs against; a small JSON file that its users commit."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import cpu_count
from pathlib import Path
from typing import Any

from engines import artifacts
from engines import gpu as gpus
from engines.artifacts import Artifact, Json
from engines.errors import UserError
from exporter.run_folder import REPORT, Run

SCHEMA_VERSION = 1
MAX_BYTES = 1 << 20  # 256 images take 13 KB
DIGITS = 6  # of a stored score: SSIM's last one is a thousandth of any limit that makes sense
FIX = "restore it from version control, or remove it and use --update"
SCORES, TASK = ("psnr_db", "ssim", "cosine"), "task_score"


@dataclass(frozen=True)
class Speed:
    """A time over the float model's, of one run, and how far the float model's and its own scatter: p95 over p50."""

    ratio: float
    p95_over_p50: tuple[float, float]


@dataclass(frozen=True)
class Measured:
    """What a gate needs of a run. `digests`: of model, recipe, and every artifact; scores are by image.

    `runner`: whose images they are; `captions`: a digest of what was asked for; `speeds` by runner and batch.
    """

    model: str
    recipe: str
    digests: Mapping[str, str]
    versions: Mapping[str, str]
    machine: str
    runner: str
    seed: int
    captions: str
    scores: Mapping[str, Sequence[float]]
    speeds: Mapping[str, Speed]
    weights: Mapping[str, int]

    @property
    def images(self) -> int:
        return min((len(values) for values in self.scores.values()), default=0)


def measured(folder: Path, run: Run, report: Json) -> Measured:
    """Returns what a report says, after making sure that it is about the artifacts that lie beside it."""
    path, images = folder / REPORT, report.get("accuracy", {}).get("images", {})
    if report.get("schema_version") != 1 or "per_image" not in images.get("psnr_db", {}):
        raise UserError(
            f"{path}: is of another version of this program: it has no scores image by image",
            fix=f"validate again: export-engine validate {folder}",
        )
    if stale := _changed(report["made_from"], run.judged):
        raise UserError(
            f"{path}: is about other artifacts than {folder} holds: {'; '.join(stale)}",
            fix=f"validate again: export-engine validate {folder} --seed {report['settings']['seed']}",
        )
    info = run.quantized.info
    return Measured(
        model=report["model"]["name"],
        recipe=report["recipe"]["name"],
        digests=_digests(run),
        versions=_versions(run),
        machine=machine(),
        runner=images["runner"],
        seed=report["settings"]["seed"],
        captions=artifacts.digest_json(info["sampler"].get("validation_prompts") or info["entries"]),
        scores=scores_of(images),
        speeds=_speeds(report.get("throughput", []), {engine["backend"] for engine in report["engines"]}),
        weights={"the model": report["weights"]["bytes"]}
        | {engine["backend"]: engine["weight_bytes"] for engine in report["engines"]},
    )


def _digests(run: Run) -> dict[str, str]:
    made_from = run.quantized.manifest["made_from"]
    graphs = {f"graph {dtype}": graph.digest for dtype, graph in sorted(run.graphs.items())}
    return {"model": made_from["model"], "recipe": made_from["recipe"]} | run.judged | graphs


def _versions(run: Run) -> dict[str, str]:
    """Returns the versions that made the run: a library's stands once, the program's by stage where they differ."""
    found: dict[str, str] = {}
    stages: dict[str, Artifact] = {"quantized": run.quantized}
    stages |= {f"graph {name}": graph for name, graph in sorted(run.graphs.items())}
    stages |= {f"engine {name}": engine for name, engine in sorted(run.engines.items())}
    for stage, artifact in stages.items():
        for name, version in artifact.manifest["versions"].items():
            found[name if found.get(name, version) == version else f"{name} of {stage}"] = version
    return found


def scores_of(images: Json) -> dict[str, list[float]]:
    """Returns what a gate compares of a report's images, image by image."""
    found = {name: images[name]["per_image"] for name in SCORES}
    if images[TASK]:
        found[TASK] = images[TASK]["lost"]["per_image"]
    return {name: [float(f"{value:.{DIGITS}g}") for value in values] for name, values in found.items()}


def _speeds(rows: Sequence[Json], engines: set[str]) -> dict[str, Speed]:
    """Returns the speeds of engines and of the quantized PyTorch model, against the float one's at the same batch.

    What ran on another device than the float model is left out: it says nothing of the engine.
    """
    base = {row["batch"]: row for row in rows if row["runner"] == "float"}
    return {
        f"{row['runner']} batch {row['batch']}": Speed(
            row["ms_p50"] / base[row["batch"]]["ms_p50"],
            (_spread(base[row["batch"]]), _spread(row)),
        )
        for row in rows
        if row["runner"] in engines | {"quantized"}
        and row["batch"] in base
        and row.get("device") == base[row["batch"]].get("device")
    }


def _spread(row: Json) -> float:
    return float(row["ms_p95"] / row["ms_p50"])


def machine() -> str:
    """Returns what this machine computes with: ratios of times hold on one kind only."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    found = f"{(names or [platform.processor() or platform.machine()])[0]}, {cpu_count()} cores"
    return f"{found}, {gpu}" if (gpu := gpus.detect()) else found


def changes(old: Measured, new: Measured) -> list[str]:
    """Returns which digests and versions differ, and how."""
    return _changed(old.digests, new.digests) + _changed(old.versions, new.versions)


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [f"{name} {_short(old.get(name))} → {_short(new.get(name))}" for name in names]


def _short(value: str | None) -> str:
    """Returns a version, or as much of a digest as tells it from others."""
    return "none" if value is None else value[:12] if len(value) == 64 else value


def write(found: Measured, path: Path) -> None:
    """Writes a baseline whole or not at all."""
    content = {"schema_version": SCHEMA_VERSION, "kind": "baseline", **asdict(found)}
    with artifacts.writing_errors(path):
        artifacts.refuse_no_folder(path)
    artifacts.write_json(path, content)


def read(path: Path) -> Measured:
    """Reads a baseline; one that is missing, too large, malformed or newer than this program is the user's error."""
    if not path.exists():
        raise UserError(
            f"{path}: no such baseline",
            fix=f"make it of a run that is good: export-engine check RUN --baseline {path} --update",
        )
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(
            f"{path}: {path.stat().st_size} bytes, more than {MAX_BYTES}", fix="this is no baseline of ours"
        )
    content = artifacts.read_json(path, fix=FIX)
    version = content.pop("schema_version", None)
    if content.pop("kind", None) != "baseline" or not isinstance(version, int):
        raise UserError(f"{path}: is no baseline", fix="give the file that check --update wrote")
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{path}: schema version {version}, this program reads {SCHEMA_VERSION}",
            fix="install the version of export-engine that wrote it, or a later one",
        )
    return _parse(content, path)


def _parse(content: Json, path: Path) -> Measured:
    malformed = UserError(f"{path}: malformed", fix=FIX)
    if content.keys() != Measured.__dataclass_fields__.keys():
        raise malformed
    kinds: Mapping[str, type] = {
        "model": str,
        "recipe": str,
        "machine": str,
        "runner": str,
        "captions": str,
        "seed": int,
    }
    tables = {"digests": str, "versions": str, "weights": int, "scores": list, "speeds": dict}
    well = all(isinstance(content[key], kind) for key, kind in kinds.items())
    well = well and all(_is_table(content[key], kind) for key, kind in tables.items())
    if not well or not {"model", "recipe"} <= content["digests"].keys() or not _are_scores(content["scores"]):
        raise malformed
    if not all(count > 0 for count in content["weights"].values()):
        raise malformed
    try:
        speeds = {name: _speed(**value) for name, value in content["speeds"].items()}
    except (TypeError, ValueError) as error:
        raise malformed from error
    return Measured(**content | {"speeds": speeds})


def _is_table(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(isinstance(one, kind) for one in value.values())


def _are_scores(found: Mapping[str, list[Any]]) -> bool:
    """Whether scores are known ones, of as many images each, and numbers."""
    if not found.keys() <= {*SCORES, TASK}:
        return False
    counts = {len(values) for values in found.values()}
    return len(counts) == 1 and 0 not in counts and all(_is_number(v) for values in found.values() for v in values)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def _speed(ratio: float, p95_over_p50: Sequence[float]) -> Speed:
    base, own = p95_over_p50
    if not all(_is_number(value) and value > 0 for value in (ratio, base, own)):
        raise ValueError("no number")
    return Speed(ratio, (base, own))
