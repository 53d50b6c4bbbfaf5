"""report.html: a run's report as one page that needs nothing beside it, no network and no other file."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChainableUndefined, Environment, FileSystemLoader
from markupsafe import Markup

from engines import artifacts
from engines.artifacts import Json
from engines.errors import UserError
from exporter import charts, damage, page_tables
from exporter.cells import at, dash, mb, short
from exporter.report import activations_line, method_lines
from exporter.reproduce import commands, named, without_path
from exporter.run_folder import REPORT, open_artifacts
from exporter.thumbnails import thumbnails

PAGE = "report.html"
PARTS = {"model": dict, "recipe": dict, "accuracy": dict, "checks": list}  # without which a report is none
FLOOR = ", floor of rounding"
TEMPLATES = Path(__file__).parent / "templates"


def write(folder: Path) -> Path:
    """Writes report.html of the run in `folder`, beside the report.json that it shows."""
    report = read(folder)
    images = at(report, "accuracy.images", {})
    pictures = thumbnails(folder, report.get("shown"), images.get("runner", ""), images.get("in_pixels", True))
    page = render(report, named(folder), pictures, siblings(folder, report), _damage(folder, report))
    with artifacts.replacing(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / PAGE


def read(folder: Path) -> Json:
    """Reads a run's report; a UserError if it is none of ours."""
    report = artifacts.read_json(folder / REPORT, fix="remove it and validate the run again")
    if missing := [key for key in PARTS if key not in report]:
        raise UserError(
            f"{folder / REPORT}: is no report of a run: it lacks {', '.join(missing)}",
            fix="validate the run again: export-engine validate RUN",
        )
    if not all(isinstance(report[key], kind) for key, kind in PARTS.items()):
        raise UserError(f"{folder / REPORT}: malformed", fix="remove it and validate the run again")
    return report


def is_stale(folder: Path) -> bool:
    """Whether the artifacts beside a report are others than it is about; where none lie there, nobody can tell."""
    if not (folder / "quantized").is_dir():
        return False
    return read(folder).get("made_from") != open_artifacts(folder).judged


def runs_in(folder: Path) -> list[Path]:
    """Returns `folder` if it is a run with a report, else the runs with one that lie in it."""
    if (folder / REPORT).is_file():
        return [folder]
    found = sorted(path.parent for path in folder.glob(f"*/{REPORT}"))
    if not found:
        raise UserError(
            f"{folder}: holds no {REPORT}, nor do the folders in it",
            fix="give the --out of an export-engine run, or a folder of such; or validate the run first",
        )
    return found


def siblings(folder: Path, report: Json) -> dict[str, Json]:
    """Returns the reports of the same model in the folders beside a run, by name; the run's own among them."""
    here = folder.resolve()
    found = {}
    for path in sorted(file.parent for file in here.parent.glob(f"*/{REPORT}")):
        try:
            other = report if path == here else read(path)
        except UserError:  # somebody else's file of that name
            continue
        if _model(other) == _model(report):
            found[path.name] = other
    return found or {here.name: report}


def _model(report: Json) -> tuple[Any, ...]:
    return tuple(report["model"].get(key) for key in ("name", "class", "parameters"))


def _damage(folder: Path, report: Json) -> Json | None:
    """Returns what `validate --layers` found, if it is of the model that the report is of."""
    if not (folder / damage.TABLE).is_file():
        return None
    found = artifacts.read_json(folder / damage.TABLE, fix="remove it and use validate --layers again")
    return found if found.get("quantized") == at(report, "made_from.quantized", "") else None


def render(report: Json, name: str, pictures: Json, runs: Mapping[str, Json], damaged: Json | None = None) -> str:
    """Returns the page of a report: the same text for the same input.

    `name` is the run's folder as the reader would give it to a command, `runs` those it is compared with.
    """
    style, script = ((TEMPLATES / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            name=name,
            style=style,
            script=script,
            policy={"style": _hash(style), "script": _hash(script)},
            commands=commands(report, name),
            **_sections(report, pictures, runs, damaged),
        )
    )


@cache
def _environment() -> Environment:
    """Returns what renders the templates: everything is escaped, and what a report lacks is empty."""
    found = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=ChainableUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters |= {"dash": dash, "mb": mb, "short": short, "without_path": without_path, "dotted": _dotted}
    return found


def _dotted(path: object) -> Markup:
    """Returns a module's path that may be broken after its dots."""
    return Markup(".<wbr>").join(str(path).split("."))


def _hash(text: str) -> str:
    """Returns what a content security policy calls a text by, so that no other style or script runs."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def _sections(report: Json, pictures: Json, runs: Mapping[str, Json], damaged: Json | None) -> dict[str, Any]:
    here = next((name for name, other in runs.items() if other is report), "")
    compared = page_tables.compared(runs, here)
    return {
        "passed": bool(report.get("passed")),
        "failed": [check for check in at(report, "checks", []) if not check.get("passed")],
        "head": page_tables.headline(report),
        "methods": _methods(report),
        "pictures": _with_psnr(pictures, report),
        "scores": page_tables.scores(report),
        "runs": compared,
        "run_charts": [chart for chart in _run_charts(compared["points"]) if chart],
        "step_charts": [chart for chart in _step_charts(at(report, "accuracy", {})) if chart],
        "steps": page_tables.steps(at(report, "accuracy", {})),
        "layers": page_tables.heat_of_layers(at(report, "accuracy.layers", [])),
        "damage": damaged and page_tables.heat_of_damage(damaged),
        "histograms": [_histograms(row) for row in at(report, "histograms", [])],
        "engines": [page_tables.engine(row) for row in at(report, "engines", [])],
        "throughput": page_tables.throughput(report),
        "checks": page_tables.checks(report),
        "provenance": page_tables.provenance(report),
    }


def _methods(report: Json) -> list[str]:
    """Returns what quantized weights and activations, in words, as far as the report says."""
    methods, activations = at(report, "recipe.methods", []), at(report, "activations", {})
    found = method_lines(methods, at(report, "training", {})) if methods else []
    if not activations:
        return found
    return [*found, activations_line({"layers": {}, "attention_points": {}} | activations)]


def _with_psnr(pictures: Json, report: Json) -> Json:
    values = at(report, "accuracy.images.psnr_db.per_image", [])
    rows = [row | {"psnr_db": values[i] if i < len(values) else None} for i, row in enumerate(pictures["rows"])]
    return pictures | {"rows": rows}


def _run_charts(points: Sequence[Json]) -> list[Json | None]:
    timed = [point | {"x": point["ms"], "x_span": point["ms_span"]} for point in points if point["ms"] is not None]
    return [
        charts.scatter([p | {"x": p["mb"], "x_span": ()} for p in points], "stored weights, MB", "PSNR, dB"),
        charts.scatter(timed, "one call, ms (p50, line to p95)", "PSNR, dB"),
    ]


def _step_charts(accuracy: Json) -> list[Json | None]:
    def by(rows: Sequence[Json], key: str, value: str = "sqnr_db", suffix: str = "") -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {}
        for row in rows:
            found.setdefault(f"{row[key]}{suffix}", []).append((row["step"], row.get(value)))
        return found

    lowering = at(accuracy, "lowering", [])
    engines = by(lowering, "backend") | by(lowering, "backend", "floor_db", FLOOR)
    titled = {
        "One call at a time, against float": by(at(accuracy, "per_step", []), "runner"),
        "Along the trajectory, against float": by(at(accuracy, "trajectory", []), "runner"),
        "Engine against quantized PyTorch": engines,
    }
    drawn = {title: charts.lines(series, "step", "SQNR, dB") for title, series in titled.items()}
    names = {line["name"] for chart in drawn.values() if chart for line in chart["lines"]}
    runners = sorted((name for name in names if not name.endswith(FLOOR)), key=lambda name: (name != "quantized", name))
    styles = {name: f"s{number % 4}" for number, name in enumerate(runners)}
    for chart in filter(None, drawn.values()):
        for line in chart["lines"]:  # a runner looks the same in every chart,
            line["style"] = styles.get(line["name"], "floor")
        chart["lines"].sort(key=lambda line: line["style"] != "s0")  # and the solid line lies under broken ones
    return [chart and chart | {"title": title} for title, chart in drawn.items()]


def _histograms(row: Json) -> Json:
    weight, activation = row["weight"], row.get("activation")
    inputs = activation and charts.histogram(
        activation["edges"], activation["counts"], [], activation["range"], "input of the float model"
    )
    weights = charts.histogram(weight["edges"], weight["quantized"], weight["float"], [], "weight")
    return {**{key: row.get(key) for key in ("layer", "sqnr_db")}, "weight": weights, "activation": inputs}
