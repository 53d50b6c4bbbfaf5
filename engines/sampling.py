"""The sampling loop of a bundle, without torch and diffusers: DDIM, Euler and flow matching as steps of six numbers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.artifacts import Json
from engines.contract import BATCH, STEP, as_numpy, check_mapping
from engines.errors import UserError
from engines.runner import Runner

Latents = NDArray[np.float32]
Rows = Mapping[str, NDArray[Any]]


Watch = Callable[[int, Latents], None]


def sample(
    runner: Any,
    sampler: Json,
    noise: Any,
    wanted: Mapping[str, Any],
    unwanted: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> Latents:
    """Returns finished latents [n, …] of as much noise; `wanted` and, under guidance, `unwanted` are n rows each.

    More rows than a call of the engine takes, under guidance half as many, are sampled in parts, one after the other.
    `watch` is shown every step's number and latents, of each part. The steps are those of docs/bundle.md.
    """
    noise, wanted = _noise(noise), _rows("wanted", wanted)
    unwanted = None if unwanted is None else _rows("unwanted", unwanted)
    _check(sampler, noise, wanted, unwanted)
    most = max(1, runner.axes[BATCH]["max"] // (2 if sampler["guided"] else 1))
    if len(noise) <= most:
        return _sampled(runner, sampler, noise, wanted, unwanted, watch)
    parts = [slice(first, first + most) for first in range(0, len(noise), most)]
    found = [
        _sampled(runner, sampler, noise[part], _part(wanted, part), unwanted and _part(unwanted, part), watch)
        for part in parts
    ]
    return np.concatenate(found)


def _noise(noise: Any) -> Latents:
    array = as_numpy(noise)
    if array.dtype.kind not in "iuf":
        raise UserError(f"noise is of type {array.dtype}", fix="draw standard normal numbers, float32")
    array = array.astype(np.float32)
    for name, found in (("NaN", np.isnan(array)), ("infinity", np.isinf(array))):
        if found.any():
            raise UserError(f"noise holds {name}", fix="draw standard normal numbers, float32")
    return array


def _rows(what: str, rows: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    check_mapping(f"{what} rows", rows)
    return {name: as_numpy(value) for name, value in rows.items()}


def _part(rows: Rows, part: slice) -> dict[str, NDArray[Any]]:
    return {name: value[part] for name, value in rows.items()}


def _sampled(
    runner: Runner, sampler: Json, noise: Latents, wanted: Rows, unwanted: Rows | None, watch: Watch | None
) -> Latents:
    """Returns finished latents of rows that one call of the engine takes."""
    latent_spec, portable = sampler["latent"], sampler["portable"]
    channels, scale = latent_spec["shape"][0], np.float32(sampler["guidance_scale"])
    rows = dict(wanted)
    if sampler["guided"] and unwanted is not None:
        rows = {name: np.concatenate([value, unwanted[name]]) for name, value in wanted.items()}
    latent = noise * np.float32(latent_spec["init_noise_sigma"])
    for step, (timestep, numbers) in enumerate(zip(sampler["timesteps"], portable["steps"], strict=True)):
        n = {name: np.float32(value) for name, value in numbers.items()}
        given = n["scale_input"] * latent
        if sampler["guided"]:
            given = np.concatenate([given, given])
        feeds = {latent_spec["input"]: given, **rows, **_times(runner, timestep, step, len(given))}
        (output,) = runner.run(feeds).values()
        prediction = output[:, :channels]
        if prediction.shape != given.shape:
            raise UserError(
                f"the engine gives {list(output.shape)} for latents {list(given.shape)}",
                fix="do not use this bundle: it was damaged or tampered with; get it, or make it, again",
            )
        if sampler["guided"]:
            with_caption, without = np.split(prediction, 2)
            prediction = without + scale * (with_caption - without)
        start = n["x0_latent"] * latent + n["x0_prediction"] * prediction
        if portable["clip"] is not None:
            start = start.clip(-portable["clip"], portable["clip"])
        latent = n["next_x0"] * start + n["next_latent"] * latent + n["next_prediction"] * prediction
        if watch is not None:
            watch(step, latent)
    return latent


def _times(runner: Any, timestep: float, step: int, rows: int) -> dict[str, NDArray[Any]]:
    whole = any(entry["name"] == "timestep" and entry["dtype"] == "int64" for entry in runner.inputs)
    kind = np.int64 if whole else np.float32
    return {"timestep": np.full(rows, timestep, kind), "step": np.full(rows, step, np.int64)}


def _check(sampler: Json, noise: Latents, wanted: Rows, unwanted: Rows | None) -> None:
    if sampler["portable"] is None:
        raise UserError(
            f"this bundle's sampler runs in diffusers alone: {sampler['why_not_portable']}",
            fix="use engines.diffusers.denoiser in a pipeline, or your own loop around run()",
        )
    own = {sampler["latent"]["input"], "timestep", STEP}
    if taken := sorted(own & {*wanted, *(unwanted or {})}):
        raise UserError(
            f"the rows hold {', '.join(taken)}, which the sampler feeds",
            fix="leave it out; for timesteps of your own, write a loop around run()",
        )
    shape = tuple(sampler["latent"]["shape"])
    if noise.ndim == 0 or noise.shape[1:] != shape:
        raise UserError(
            f"noise has shape {list(noise.shape)}",
            fix=f"draw [n, {', '.join(map(str, shape))}] standard normal numbers",
        )
    if sampler["guided"] and unwanted is None:
        raise UserError(
            f"this model is sampled with guidance {sampler['guidance_scale']:g}, and no unwanted rows came",
            fix="give `unwanted`: the rows of no class, or of the empty caption",
        )
    if not sampler["guided"] and unwanted is not None:
        raise UserError(
            "this model is sampled without guidance, and unwanted rows came", fix="leave `unwanted` out: none is read"
        )
    both = (wanted, wanted if unwanted is None else unwanted)
    shapes = [{name: np.shape(value) for name, value in rows.items()} for rows in both]
    if shapes[0] != shapes[1] or any(shape[:1] != noise.shape[:1] for shape in shapes[0].values()):
        others, more = "", ""
        if unwanted is not None:
            others, more = f", unwanted ones {shapes[1]}", ", and as many unwanted ones"
        raise UserError(
            f"wanted rows have shapes {shapes[0]}{others}, and there are {len(noise)} samples",
            fix=f"give one row of every input for each sample{more}",
        )
