"""What a bundle has recorded of its model, and whether an engine still gives it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines.artifacts import Json
from engines.bundle import GOLDEN, Bundle
from engines.errors import UserError

if TYPE_CHECKING:
    from engines.loading import Engine


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
    feeds, expected = read(bundle, f"{step}/feeds/"), read(bundle, f"{step}/")["expected"]
    chunk = engine.axes["batch"]["opt"]
    parts = [
        engine.run({name: value[first : first + chunk] for name, value in feeds.items()})[engine.output["name"]]
        for first in range(0, len(expected), chunk)
    ]
    return row(f"step {step}", decibels(expected, np.concatenate(parts)), limit_db)


def _picture_row(engine: Engine, bundle: Bundle, picture: Json) -> Json:
    recorded = read(bundle, "picture/")
    wanted, unwanted = (
        {n.removeprefix(p): v for n, v in recorded.items() if n.startswith(p)} for p in ("wanted/", "unwanted/")
    )
    drawn = engine.sample(recorded["noise"], wanted, unwanted or None)
    error = float(np.square(recorded["latent"].astype(np.float64) - drawn).mean())
    value = 10 * math.log10(picture["peak"] ** 2 / error) if error > 0 else math.inf
    return row(f"{picture['count']} samples", value, picture["limits_db"][engine.dtype])


def row(what: str, value_db: float, limit_db: float) -> Json:
    return {"what": what, "value_db": value_db, "limit_db": limit_db, "passed": bool(value_db >= limit_db)}  # NaN fails


def line(row: Json) -> str:
    return f"{row['what']}: {row['value_db']:.1f} dB, at least {row['limit_db']:.1f} are wanted"


def decibels(expected: NDArray[Any], output: NDArray[Any]) -> float:
    """Returns the signal-to-noise ratio of `output`, in dB: infinite where the two are equal."""
    noise = float(np.square(expected.astype(np.float64) - output).sum())
    signal = float(np.square(expected, dtype=np.float64).sum())
    return 10 * math.log10(signal / noise) if noise > 0 and signal > 0 else (math.inf if noise == 0 else -math.inf)
