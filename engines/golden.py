"""What a bundle has recorded of its model, and whether an engine still gives it."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.artifacts import Json
from engines.bundle import GOLDEN, Bundle
from engines.contract import Contract
from engines.errors import UserError

if TYPE_CHECKING:
    from engines.loading import Engine

ANY_ROWS = {"min": 1, "opt": 1, "max": sys.maxsize, "multiple": 1}  # recorded at once, run a batch at a time
TAMPERED = "do not use this bundle: it was damaged or tampered with; get it, or make it, again"


def read(bundle: Bundle, prefix: str) -> dict[str, NDArray[Any]]:
    """Returns the recorded arrays under `prefix`, by what follows it."""
    return read_tensors(bundle.file(GOLDEN), prefix)


def read_tensors(path: Path, prefix: str) -> dict[str, NDArray[Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {n.removeprefix(prefix): file.get_tensor(n) for n in file.keys() if n.startswith(prefix)}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: no safetensors file ({error})", fix="get the bundle, or make it, again") from error


def rows(engine: Engine, bundle: Bundle) -> list[Json]:
    """Returns, for each recorded step and for the sampled pictures: `{what, value_db, limit_db, passed}`."""
    found, picture = step_rows(engine, bundle), bundle.info["golden"]["picture"]
    if picture and bundle.info["sampler"]["portable"]:
        found.append(_picture_row(engine, bundle, picture))
    if picture and bundle.info["pipeline"]:
        from engines.pipeline import Pipeline  # which loads engines, as what calls this does

        found += Pipeline(engine).self_test()
    return found


def step_rows(engine: Engine, bundle: Bundle) -> list[Json]:
    golden = bundle.info["golden"]
    limits = golden["limits_db"][engine.dtype]
    return [_step_row(engine, bundle, step, limits[str(step)]) for step in golden["steps"]]


def _step_row(engine: Engine, bundle: Bundle, step: int, limit_db: float) -> Json:
<<<<<<< HEAD
    feeds = {entry["name"]: entry | {"name": f"feeds/{entry['name']}"} for entry in engine.inputs}
    output = engine.output | {"name": "expected"}
    recorded = _checked(engine, bundle, read(bundle, f"{step}/"), [*feeds.values(), output])
    expected, chunk, error = recorded["expected"], engine.axes["batch"]["opt"], 0.0
    for first in range(0, len(expected), chunk):
        rows = slice(first, first + chunk)
        given = engine.run({name: recorded[entry["name"]][rows] for name, entry in feeds.items()})
        error += _squared_error(expected[rows], given[engine.output["name"]])
    return _row(f"step {step}", _ratio_db(float(np.square(expected, dtype=np.float64).sum()), error), limit_db)
=======
    feeds, expected = read(bundle, f"{step}/feeds/"), read(bundle, f"{step}/")["expected"]
    chunk = engine.axes["batch"]["opt"]
    parts = [
        engine.run({name: value[first : first + chunk] for name, value in feeds.items()})[engine.output["name"]]
        for first in range(0, len(expected), chunk)
    ]
    return row(f"step {step}", decibels(expected, np.concatenate(parts)), limit_db)
>>>>>>> 4592fd83c54627e85abc1aa84dc45bdada435689


def _picture_row(engine: Engine, bundle: Bundle, picture: Json) -> Json:
    found = read(bundle, "picture/")
    wanted, unwanted = (
        {n.removeprefix(p): v for n, v in found.items() if n.startswith(p)} for p in ("wanted/", "unwanted/")
    )
<<<<<<< HEAD
    one = {"dtype": "fp32", "shape": ["batch", *engine.sampler["latent"]["shape"]]}
    recorded = _checked(engine, bundle, found, [one | {"name": name} for name in ("noise", "latent")])
    error = _squared_error(recorded["latent"], engine.sample(recorded["noise"], wanted, unwanted or None))
    value_db = _ratio_db(picture["peak"] * picture["peak"] * recorded["latent"].size, error)
    return _row(f"{picture['count']} samples", value_db, picture["limits_db"][engine.dtype])


def _checked(
    engine: Engine, bundle: Bundle, recorded: Mapping[str, NDArray[Any]], entries: Sequence[Json]
) -> dict[str, NDArray[Any]]:
    """Returns the recorded arrays that `entries` name, all of one number of rows; one that differs is an error."""
    axes = {**engine.axes, "batch": ANY_ROWS}
    contract = Contract(str(bundle.file(GOLDEN)), [entry | {"means": "it"} for entry in entries], axes)
    named = {entry["name"]: recorded[entry["name"]] for entry in entries if entry["name"] in recorded}
    try:
        return contract.checked(named)
    except UserError as error:
        raise UserError(error.what, fix=TAMPERED) from error


def _squared_error(expected: NDArray[Any], output: NDArray[Any]) -> float:
    if output.shape != expected.shape:
        raise UserError(
            f"an output has shape {list(output.shape)}, and {list(expected.shape)} was recorded", fix=TAMPERED
        )
    return float(np.square(expected.astype(np.float64) - output).sum())


def _ratio_db(signal: float, noise: float) -> float:
    """Returns 10 log₁₀(signal / noise): infinite without noise, −∞ where either is NaN."""
    if noise == 0:
        return math.inf
    return 10 * (math.log10(signal) - math.log10(noise)) if signal > 0 and noise > 0 else -math.inf


def _row(what: str, value_db: float, limit_db: float) -> Json:
    return {"what": what, "value_db": value_db, "limit_db": limit_db, "passed": bool(value_db >= limit_db)}
=======
    drawn = engine.sample(recorded["noise"], wanted, unwanted or None)
    error = float(np.square(recorded["latent"].astype(np.float64) - drawn).mean())
    value = 10 * math.log10(picture["peak"] ** 2 / error) if error > 0 else math.inf
    return row(f"{picture['count']} samples", value, picture["limits_db"][engine.dtype])


def row(what: str, value_db: float, limit_db: float) -> Json:
    return {"what": what, "value_db": value_db, "limit_db": limit_db, "passed": bool(value_db >= limit_db)}  # NaN fails
>>>>>>> 4592fd83c54627e85abc1aa84dc45bdada435689


def line(row: Json) -> str:
    return f"{row['what']}: {row['value_db']:.1f} dB, at least {row['limit_db']:.1f} are wanted"
