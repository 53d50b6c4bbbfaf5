"""Stage `quantize`: model, recipe, calibration → codes, scales, and the reference that every runner is held against."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib_data.store import CalibrationSet
from calib_data.tensors import save_tensors
from engines import artifacts
from engines.artifacts import Artifact, Json, Request
from engines.errors import UserError
from engines.memory import peak_rss_bytes
from exporter import devices, methods, moments, progress, quantized, scaling
from exporter.activations import observe
from exporter.attention import quantized_points
from exporter.checkpoint import Checkpoint
from exporter.models import Family
from exporter.modules import SteppedLayer
from exporter.plan import Plan, plan_layers
from exporter.ranges import FILE as RANGES
from exporter.recipe import Recipe
from exporter.runners import TorchRunner, in_chunks
from exporter.sampling import timesteps
from exporter.swap import Start, prepare, quantize_weight, swap_layers
from exporter.tensors import CodebookTensor, QuantizedTensor
from exporter.versions import versions
from exporter.watch import watch_inputs

RECIPE = "recipe.json"
BLOCKS = ".blocks"  # in a draft: what trained methods keep until all blocks are done
HALF = "quantized_fp16"
REFERENCE_STEPS = 5  # first and last included
# Rows of a reference feed. A rounding floor is made of few flipped codes, so few rows make it noisy: the FP8 engine of
# digits-dit lay up to 2.9 dB under it at a step with 8 rows, up to 2.4 dB with 32.
REFERENCE_ROWS = 32

Reference = dict[str, torch.Tensor]


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Artifact,
    out: Path,
    *,
    device: torch.device = devices.CPU,
) -> Artifact:
    """Quantizes the model as the recipe says and writes codes, scales and reference feeds and outputs.

    Ranges are searched, and what trains is trained, on `device`.
    """
    made_from = {"model": checkpoint.digest, "recipe": recipe.digest, "calibration": calibration.digest}
    request = Request("quantized", made_from, {"recipe": recipe.name}, versions("torch", "diffusers"))
    if (made := artifacts.current(out, request)) is not None:
        return made
    trains = any(rule.method and methods.load(rule.method.name).TRAINS for rule in recipe.rules)
    _check_recorded_for(checkpoint, calibration)
    with artifacts.drafting(out, request, resumable=trains) as draft, devices.memory():
        data, family = CalibrationSet(calibration), checkpoint.family
        model = checkpoint.load()
        reference = _feeds(data)
        _add_finite_outputs(reference, "float", TorchRunner("float", model, family))
        devices.place(model, device)
        plan = plan_layers(model, family, recipe)
        among = recipe.calibration.range_samples
        factors = _factors(model, family, plan, data, among)
        plan = plan.multiplying(scaling.apply(model, family.folds(model), factors))
        training = prepare(model, family, plan, data, draft.path / BLOCKS)
        plan, activations, seen = observe(model, family, plan, data, trajectories=among)
        start = Start(_weights_by_inputs(model, family, plan, data), activations)
        plan = swap_layers(model, family, plan, start, training)
        devices.place(model, devices.CPU)
        quantized.save(model, draft.path)
        scaling.save(factors, draft.path)
        artifacts.write_json(draft.path / RANGES, seen.to_json(_ends(model)))
        artifacts.write_json(draft.path / RECIPE, dict(recipe.source))
        draft.info = _info(checkpoint, recipe, calibration, model, plan, factors) | {"training": training.record()}
        # last: it leaves the model in fp16
        overflow = _add_quantized_outputs(reference, model, family, floors=plan.deployable)
        draft.info["fp16_overflow"] = overflow
        save_tensors(reference, draft.path / quantized.REFERENCE)
        shutil.rmtree(draft.path / BLOCKS, ignore_errors=True)  # a kill until now would have found what was trained
        draft.timings |= {"peak_rss_bytes": peak_rss_bytes(), "device": devices.name(device)}
    return artifacts.open_artifact(out, "quantized")


def _check_recorded_for(checkpoint: Checkpoint, calibration: Artifact) -> None:
    """Raises a UserError if a calibration set is of another schedule or another model."""
    ours, theirs = timesteps(checkpoint), calibration.info["timesteps"]
    if len(ours) != len(theirs):
        raise UserError(
            f"{calibration.path}: was recorded over {len(theirs)} sampling steps, and {checkpoint.name} is to take "
            f"{len(ours)}",
            fix=f"use --steps {len(theirs)}, or calibrate with --steps {len(ours)}",
        )
    if calibration.manifest["made_from"]["model"] != checkpoint.digest:
        raise UserError(
            f"{calibration.path}: was recorded for another model, or another sampler, than {checkpoint.name}",
            fix="calibrate this one",
        )


def _factors(
    model: nn.Module, family: Family, plan: Plan, data: CalibrationSet, trajectories: int | None
) -> dict[str, torch.Tensor]:
    """Asks each method for the factors that it wants to move between activations and weights."""
    groups: dict[Any, list[str]] = {}
    for path in plan.specs:
        groups.setdefault(plan.rules[path].method, []).append(path)
    found: dict[str, torch.Tensor] = {}
    for spec, paths in groups.items():
        method = methods.load(spec.name)
        wanted = method.NEEDS_CHANNEL_ABSMAX
        channel_absmax = _channel_absmax(model, family, paths, data, trajectories) if wanted else {}
        found |= method.factors(model, paths, family.folds(model), channel_absmax, spec.options)
    return found


def _channel_absmax(
    model: nn.Module, family: Family, paths: Sequence[str], data: CalibrationSet, trajectories: int | None
) -> dict[str, torch.Tensor]:
    """Returns the largest magnitude of every input channel of the layers among `paths`, over all steps."""
    largest: dict[str, torch.Tensor] = {}
    convs = {path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d)}

    def see(path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        channels_last = x.movedim(1, -1) if path in convs else x
        seen = channels_last.abs().flatten(0, -2).amax(dim=0)
        largest[path] = torch.maximum(largest[path], seen) if path in largest else seen

    watch_inputs(model, family, paths, data, see, "input channels", trajectories=trajectories)
    return largest


def _ends(model: nn.Module) -> dict[str, list[float]]:
    """Returns the largest magnitude that each layer's activation format takes, by path: of all steps, or one each."""
    found = {}
    for path, layer in quantized.quantized_layers(model).items():
        fmt = layer.spec.activation
        if fmt is None:
            continue
        ends = torch.tensor(fmt.max_value)
        if isinstance(layer, SteppedLayer) and layer.spec.shifted:  # x = (code − shift) · scale
            low, high = float(fmt.values.min()) - layer.activation_shift, fmt.max_value - layer.activation_shift
            ends = torch.maximum(low.abs(), high.abs())
        found[path] = (layer.activation_scale * ends).reshape(-1).tolist()
    for path, point in quantized_points(model).items():
        found[path] = (point.activation_scale * point.spec.format.max_value).reshape(-1).tolist()
    return found


def _weights_by_inputs(
    model: nn.Module, family: Family, plan: Plan, data: CalibrationSet
) -> dict[str, QuantizedTensor | CodebookTensor]:
    """Quantizes the weights of the layers whose method looks at their inputs, while all are still float."""
    wanted: dict[str, list[str]] = {"diagonal": [], "full": [], "none": []}
    for path in plan.specs:
        method, options = plan.method(path)
        wanted[method.needs_moments(options) if moments.width(model, path) else "none"].append(path)
    found = {}
    for kind in ("diagonal", "full"):
        for group in moments.groups(model, wanted[kind], diagonal=kind == "diagonal"):
            seen = moments.Moments(model, group, diagonal=kind == "diagonal")
            what = "inputs' second moments"
            watch_inputs(model, family, group, data, seen.see, what, trajectories=moments.TRAJECTORIES)
            for path in progress.track(group, len(group), "searching (layers)"):
                found[path] = quantize_weight(model, path, plan, seen.mean(path))
    return found


def _feeds(data: CalibrationSet) -> Reference:
    """Returns `<step>/feeds/<input>` for REFERENCE_STEPS steps spread evenly, from the first shards."""
    count = len(data.steps)
    positions = sorted({round(i * (count - 1) / (REFERENCE_STEPS - 1)) for i in range(REFERENCE_STEPS)})
    feeds: Reference = {}
    for shard in data.shards:
        for step, record in data.read(shard, [data.steps[p] for p in positions]):
            for name, value in record.items():
                key = f"{step}/feeds/{name}"
                feeds[key] = torch.cat([feeds[key], value]) if key in feeds else value
        if all(len(value) >= REFERENCE_ROWS for value in feeds.values()):
            break
    return {key: value[:REFERENCE_ROWS].clone() for key, value in feeds.items()}


def reference_steps(reference: Mapping[str, Any]) -> list[int]:
    return sorted({int(key.partition("/")[0]) for key in reference})


def reference_feeds(reference: Mapping[str, Any], step: int) -> dict[str, Any]:
    prefix = f"{step}/feeds/"
    return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}


def _add_outputs(reference: Reference, what: str, runner: TorchRunner) -> Json | None:
    """Adds a model's outputs; returns where the first NaN or infinity arises: the layer, the step and their count."""
    found = None
    for step in reference_steps(reference):
        feeds = reference_feeds(reference, step)
        output = in_chunks(runner.run_tensors, feeds, runner.family.rows(REFERENCE_ROWS))
        if found is None and (bad := int((~output.isfinite()).sum())):
            found = {"layer": runner.first_not_finite(feeds), "step": step, "values": bad}
        reference[f"{step}/{what}"] = output.float().contiguous()
    return found


def _add_finite_outputs(reference: Reference, what: str, runner: TorchRunner) -> None:
    if found := _add_outputs(reference, what, runner):
        raise UserError(
            f"the {what} model gives {found['values']} NaN or infinite values at step {found['step']}, from layer "
            f"{found['layer']!r} on",
            fix="mend the checkpoint" if what == "float" else "keep that layer in float, or use a wider format",
        )


def _add_quantized_outputs(reference: Reference, model: nn.Module, family: Family, *, floors: bool) -> Json | None:
    """Adds the quantized model's outputs in fp32, and with `floors` in fp64 and fp16, whose distances they are.

    Returns where it overflows in fp16, which is no fault until a graph of that type is asked for.
    """
    outputs = {"quantized": torch.float32} | ({"quantized_fp64": torch.float64} if floors else {})
    for what, dtype in outputs.items():
        nn.Module.to(model, dtype)  # diffusers' own .to() warns that it may keep modules in fp32; none is here
        _add_finite_outputs(reference, what, TorchRunner(what, model, family, dtype=dtype))
    if not floors:
        return None
    nn.Module.to(model, torch.float16)
    return _add_outputs(reference, HALF, TorchRunner(HALF, model, family, dtype=torch.float16))


def _info(
    checkpoint: Checkpoint,
    recipe: Recipe,
    calibration: Artifact,
    model: nn.Module,
    plan: Plan,
    factors: Mapping[str, torch.Tensor],
) -> Json:
    parameters = checkpoint_parameters(checkpoint)
    return {
        "model": {
            "name": checkpoint.name,
            "class": checkpoint.family.CLASS,
            "config": checkpoint.config,
            "weights_seed": checkpoint.weights_seed,
            "parameters": parameters,
            "float_weight_bytes": 2 * parameters,  # the checkpoint as fp16
        },
        "recipe": {"name": recipe.name, "digest": recipe.digest, "methods": _methods(plan)},
        "layers": {path: spec.to_json() for path, spec in plan.specs.items()},
        "allowed": plan.allowed(),
        "splits": dict(plan.splits),
        "points": {path: spec.to_json() for path, spec in plan.points.items()},
        "factors": {paths: scaling.summary(factor) for paths, factor in factors.items()},
        "weights": quantized.storage(model) | {"kept_layers": len(plan.rules) - len(plan.specs)},
        **{key: calibration.info[key] for key in ("timesteps", "entries")},
        "sampler": checkpoint.sampler,
    }


def _methods(plan: Plan) -> list[Json]:
    """Returns the methods used, each with its options and how many layers it quantized."""
    used = Counter(plan.rules[path].method for path in plan.specs)
    return [
        {"name": spec.name, "options": asdict(spec.options), "layers": count}
        for spec, count in used.items()
        if spec is not None
    ]


def checkpoint_parameters(checkpoint: Checkpoint) -> int:
    return sum(p.numel() for p in checkpoint.skeleton().parameters())
