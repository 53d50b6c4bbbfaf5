"""The commands that reproduce what a report shows, with the run's own arguments as far as the report knows them."""

from __future__ import annotations

import shlex
from pathlib import Path

from engines.artifacts import Json
from engines.options import flag
from exporter import catalog
from exporter.cells import at


def named(folder: Path) -> str:
    """Returns a folder as its user gave it, without a machine's own path: from here, or by its name alone."""
    if not folder.is_absolute():
        return folder.as_posix()
    here = Path.cwd()
    return folder.relative_to(here).as_posix() if folder.is_relative_to(here) and folder != here else folder.name


def without_path(model: str) -> str:
    """Returns a model's name; of one that was given by an absolute path, its last part."""
    kind, colon, path = model.rpartition(":")
    return f"{kind}{colon}{Path(path).name}" if Path(path).is_absolute() else model


def commands(report: Json, run: str) -> dict[str, str]:
    """Returns a command per section of the page."""
    from exporter.images import IMAGES  # here: it brings torch

    images = at(report, "settings.images", IMAGES)
    drawn = ["--images", str(images)] if images != IMAGES else []
    seed = at(report, "settings.seed", 0)
    seeded = ["--seed", str(seed)] if seed else []
    engines = [f"{run}/{engine['path']}" for engine in at(report, "engines", []) if "path" in engine]
    lists = {
        "run": _run(report, run) + drawn + seeded,
        "validate": ["validate", run, *drawn, *seeded],
        "layers": ["validate", run, "--layers", *drawn, *seeded],
        "bench": ["bench", run],
        "page": ["report", run],
        "ranges": ["inspect", f"{run}/quantized"],
        **({"plan": ["inspect", engines[0], "--json"]} if engines else {}),
    }
    return {key: shlex.join(["export-engine", *words]) for key, words in lists.items()}


def _run(report: Json, run: str) -> list[str]:
    engines = at(report, "engines", [])
    recipe = at(report, "recipe.name", "RECIPE")
    words = ["run", without_path(at(report, "model.name", "MODEL"))]
    words += ["--recipe", recipe if recipe in catalog.recipes() else f"{recipe}.toml"]
    for engine in engines:
        words += ["--backend", engine["backend"]]
    dtypes = {engine.get("dtype") for engine in engines}
    if len(engines) > 1 and len(dtypes) == 1:  # else each backend's own
        words += ["--dtype", *map(str, dtypes)]
    for key, default in (("gpu", None), ("decode", "run"), ("refit", False), ("weight_streaming", None)):
        given = {engine.get(key) for engine in engines} - {None, default}
        if len(given) == 1:
            words += [flag(key), *(str(value) for value in given if value is not True)]
    taken = {row["step"] for row in at(report, "accuracy.trajectory", [])}
    return [*words, *(["--steps", str(len(taken))] if taken else []), "--out", run]
