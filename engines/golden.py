"""What a bundle has recorded of its model, and whether an engine still gives it."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.artifacts import Json
from engines.bundle import Bundle
from engines.bundle_shape import GOLDEN
from engines.contract import Contract
from engines.errors import UserError

if TYPE_CHECKING:
    from engines.loading import Engine

ANY_ROWS = {"min": 1, "opt": 1, "max": sys.maxsize, "multiple": 1}  # recorded at once, run a batch at a time
TAMPERED = "do not use this bundle: it was damaged or tampered with; get it, or make it, again"


class Recorded(dict[str, NDArray[Any]]):
    """Arrays by name; to ask for one that is not there is an error with a fix."""

    def __missing__(self, name: str) -> NDArray[Any]:
        raise UserError(f"the bundle has recorded no {name!r}", fix=TAMPERED)


def read(bundle: Bundle, prefix: str) -> Recorded:
    """Returns the recorded arrays under `prefix`, by what follows it."""
    return Recorded(read_tensors(bundle.file(GOLDEN), prefix))


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
    feeds = {entry["name"]: entry | {"name": f"feeds/{entry['name']}"} for entry in engine.inputs}
    output = engine.output | {"name": "expected"}
    recorded = _checked(engine, bundle, read(bundle, f"{step}/"), [*feeds.values(), output])
    expected, chunk, error = recorded["expected"], engine.axes["batch"]["opt"], 0.0
    for first in range(0, len(expected), chunk):
        rows = slice(first, first + chunk)
        given = engine.run({name: recorded[entry["name"]][rows] for name, entry in feeds.items()})
        error += _squared_error(expected[rows], given[engine.output["name"]])
    return row(f"step {step}", _ratio_db(float(np.square(expected, dtype=np.float64).sum()), error), limit_db)


def _picture_row(engine: Engine, bundle: Bundle, picture: Json) -> Json:
    found = read(bundle, "picture/")
    wanted, unwanted = (
        {n.removeprefix(p): v for n, v in found.items() if n.startswith(p)} for p in ("wanted/", "unwanted/")
    )
    one = {"dtype": "fp32", "shape": ["batch", *engine.sampler["latent"]["shape"]]}
    recorded = _checked(engine, bundle, found, [one | {"name": name} for name in ("noise", "latent")])
    error = _squared_error(recorded["latent"], engine.sample(recorded["noise"], wanted, unwanted or None))
    value_db = _ratio_db(picture["peak"] * picture["peak"] * recorded["latent"].size, error)
    return row(f"{picture['count']} samples", value_db, picture["limits_db"][engine.dtype])


def _checked(engine: Engine, bundle: Bundle, recorded: Recorded, entries: Sequence[Json]) -> dict[str, NDArray[Any]]:
    """Returns the recorded arrays that `entries` name, all of one number of rows; one that differs is an error."""
    axes = {**engine.axes, "batch": ANY_ROWS}
    contract = Contract(str(bundle.file(GOLDEN)), [entry | {"means": "it"} for entry in entries], axes)
    try:
        return contract.checked({entry["name"]: recorded[entry["name"]] for entry in entries})
    except UserError as error:
        raise UserError(error.what, fix=TAMPERED) from error


def decibels(expected: NDArray[Any], output: NDArray[Any]) -> float:
    """Returns the signal-to-noise ratio of `output`, in dB: infinite where the two are equal."""
    return _ratio_db(float(np.square(expected, dtype=np.float64).sum()), _squared_error(expected, output))


def _squared_error(expected: NDArray[Any], output: NDArray[Any]) -> float:
    if output.shape != expected.shape:
        raise UserError(
            f"an output has shape {list(output.shape)}, and {list(expected.shape)} was recorded", fix=TAMPERED
        )
    return float(np.square(expected.astype(np.float64) - output).sum())


def _ratio_db(signal: float, noise: float) -> float:
    """Returns 10 log₁₀(signal / noise): infinite without noise, −∞ without a signal, or where either is not finite."""
    if noise == 0:
        return math.inf
    whole = 0 < signal < math.inf and 0 < noise < math.inf  # false of NaN
    return 10 * (math.log10(signal) - math.log10(noise)) if whole else -math.inf


def row(what: str, value_db: float, limit_db: float) -> Json:
    return {"what": what, "value_db": value_db, "limit_db": limit_db, "passed": bool(value_db >= limit_db)}


def line(row: Json) -> str:
    return f"{row['what']}: {row['value_db']:.1f} dB, at least {row['limit_db']:.1f} are wanted"
