"""Stage `quantize`: model, recipe, calibration → codes, scales, and the reference that every runner is held against."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from calib_data.store import CalibrationSet
from calib_data.tensors import save_tensors, save_whole
from engines import artifacts
from engines.artifacts import Artifact, Json, Request
from engines.errors import UserError
from exporter import methods, moments, observers, progress, quantized, reconstruct, scaling
from exporter.checkpoint import Checkpoint
from exporter.formats import Format
from exporter.memory import peak_rss_bytes
from exporter.models import Family
from exporter.modules import (
    LayerSpec,
    StepContext,
    channel_axis,
    facts,
    fitting,
    float_layer,
    float_layers,
    oriented,
    put,
    quantized_layer,
    split_inputs,
)
from exporter.ranges import FILE as RANGES
from exporter.ranges import Ranges
from exporter.recipe import Recipe, Rule
from exporter.runners import TorchRunner, in_chunks
from exporter.samples import CHUNK, Samples
from exporter.tensors import QuantizedTensor, scale_for
from exporter.versions import versions

CHOICE = "weight_choice"  # beside a finished block's buffers: which of the formats to choose from
BLOCKS = ".blocks"  # in a draft: what trained methods keep until all blocks are done
REFERENCE_STEPS = 5  # first and last included
# Rows of a reference feed. A rounding floor is made of few flipped codes, so few rows make it noisy: the FP8 engine of
# digits-dit lay up to 2.9 dB under it at a step with 8 rows, up to 2.4 dB with 32.
REFERENCE_ROWS = 32

OBSERVED_ROWS = 64  # at once, at most

Reference = dict[str, torch.Tensor]


def quantize(checkpoint: Checkpoint, recipe: Recipe, calibration: Artifact, out: Path) -> Artifact:
    """Quantizes the model as the recipe says and writes codes, scales and reference feeds and outputs."""
    made_from = {"model": checkpoint.digest, "recipe": recipe.digest, "calibration": calibration.digest}
    request = Request("quantized", made_from, {"recipe": recipe.name}, versions("torch", "diffusers"))
    if (made := artifacts.current(out, request)) is not None:
        return made
    trains = any(rule.method and methods.load(rule.method.name).TRAINS for rule in recipe.rules)
    with artifacts.drafting(out, request, resumable=trains) as draft:
        data, family = CalibrationSet(calibration), checkpoint.family
        model = checkpoint.load()
        reference = _feeds(data)
        _add_outputs(reference, "float", TorchRunner("float", model, family))
        plan = plan_layers(model, family, recipe)
        factors = _factors(model, family, plan, data)
        plan = plan.multiplying(scaling.apply(model, family.folds(model), factors))
        plan, scales, seen = _activations(model, family, plan, data)
        start = Start(_weights_by_inputs(model, family, plan, data), scales)
        plan = _quantize_layers(model, family, plan, start, data, draft.path / BLOCKS)
        quantized.save(model, draft.path)
        scaling.save(factors, draft.path)
        artifacts.write_json(draft.path / RANGES, seen.to_json(_ends(model)))
        draft.info = _info(checkpoint, recipe, calibration, model, plan, factors)
        _add_quantized_outputs(reference, model, family, floors=plan.deployable)  # last: it leaves the model in fp16
        save_tensors(reference, draft.path / quantized.REFERENCE)
        draft.timings["peak_rss_bytes"] = peak_rss_bytes()
    return artifacts.open_artifact(out, "quantized")


@dataclass(frozen=True)
class Plan:
    """Every layer's rule, how those that are not kept are quantized, and which convolutions were split at a skip."""

    rules: Mapping[str, Rule]
    specs: Mapping[str, LayerSpec]
    splits: Mapping[str, int]

    @property
    def deployable(self) -> bool:
        return all(spec.deployable for spec in self.specs.values())

    def choices(self, path: str) -> tuple[Format, ...]:
        """Returns the weight formats that the layer's method chooses from."""
        weight = self.rules[path].weight
        assert weight is not None
        return weight.choices if weight.candidates else (self.specs[path].weight,)

    def multiplying(self, paths: Sequence[str]) -> Plan:
        """Returns the plan with layers that multiply their own input."""
        return replace(self, specs=dict(self.specs) | {p: replace(self.specs[p], multiplied=True) for p in paths})


def layer_specs(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, LayerSpec]:
    """Returns how a recipe would quantize a model, from its shapes alone."""
    return dict(plan_layers(checkpoint.skeleton(), checkpoint.family, recipe).specs)


def plan_layers(model: nn.Module, family: Family, recipe: Recipe) -> Plan:
    """Assigns rules to layers, and splits the convolutions that they say to split, in place."""
    layers = float_layers(model)
    assigned = recipe.assign({path: facts(layer) for path, layer in layers.items()}, family.blocks(model))
    splits = {
        path: first
        for path, first in family.skips(model).items()
        if assigned[path].split_skips and assigned[path].activation
    }
    split_inputs(model, splits)
    layers = float_layers(model)
    rules = {path: assigned[path if path in assigned else path.rpartition(".")[0]] for path in layers}
    specs = {}
    for path, rule in rules.items():
        if rule.weight is None:
            continue
        activation = rule.activation.format if rule.activation else None
        weight = rule.weight
        spec = LayerSpec(weight.format, weight.granularity, weight.block_size, activation, deployable=rule.deployable)
        choices = fitting(path, layers[path], spec, rule.weight.choices)
        specs[path] = replace(spec, weight=choices[0])
        if rule.weight.candidates:
            rules[path] = replace(rule, weight=replace(rule.weight, format=choices[0], candidates=choices))
    return Plan(rules, specs, splits)


def _factors(model: nn.Module, family: Family, plan: Plan, data: CalibrationSet) -> dict[str, torch.Tensor]:
    """Asks each method for the factors that it wants to move between activations and weights."""
    groups: dict[Any, list[str]] = {}
    for path in plan.specs:
        groups.setdefault(plan.rules[path].method, []).append(path)
    found: dict[str, torch.Tensor] = {}
    for spec, paths in groups.items():
        method = methods.load(spec.name)
        channel_absmax = _channel_absmax(model, family, paths, data) if method.NEEDS_CHANNEL_ABSMAX else {}
        found |= method.factors(model, paths, family.folds(model), channel_absmax, spec.options)
    return found


def _channel_absmax(
    model: nn.Module, family: Family, paths: Sequence[str], data: CalibrationSet
) -> dict[str, torch.Tensor]:
    """Returns the largest magnitude of every input channel of the layers among `paths`, over all steps."""
    largest: dict[str, torch.Tensor] = {}
    convs = {path for path in paths if isinstance(model.get_submodule(path), nn.Conv2d)}

    def see(path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        channels_last = x.movedim(1, -1) if path in convs else x
        seen = channels_last.abs().flatten(0, -2).amax(dim=0)
        largest[path] = torch.maximum(largest[path], seen) if path in largest else seen

    watch_inputs(model, family, paths, data, see, "input channels")
    return largest


def _activations(
    model: nn.Module, family: Family, plan: Plan, data: CalibrationSet
) -> tuple[Plan, dict[str, torch.Tensor], Ranges]:
    """Observes the inputs of every layer with a quantized activation; returns scales, [], and the ranges seen.

    The plan has the formats that were chosen where a rule leaves them open.
    """
    watched = {
        path: observers.OBSERVERS[rule.activation.observer]()
        for path, rule in plan.rules.items()
        if path in plan.specs and rule.activation
    }
    table = Ranges(data.steps)
    if not watched:
        return plan, {}, table

    def see(path: str, x: torch.Tensor, steps: torch.Tensor) -> None:
        watched[path].update(x)
        table.update(path, x, steps)

    watch_inputs(model, family, list(watched), data, see, "activation ranges")
    scales, specs = {}, dict(plan.specs)
    for path, observer in watched.items():
        activation = plan.rules[path].activation
        assert activation is not None
        fmt = activation.format
        if activation.candidates:
            fmt = min(activation.candidates, key=lambda one: observer.fit(one)[1])  # type: ignore[attr-defined]
            specs[path] = replace(specs[path], activation=fmt)
        scales[path] = scale_for(torch.tensor(observer.range(fmt), dtype=torch.float64), fmt)
    return replace(plan, specs=specs), scales, table


def _ends(model: nn.Module) -> dict[str, float]:
    """Returns the largest magnitude that each layer's activation format takes, by path."""
    layers = quantized.quantized_layers(model).items()
    return {p: float(one.activation_scale) * one.spec.activation.max_value for p, one in layers if one.spec.activation}


def watch_inputs(
    model: nn.Module, family: Family, paths: Sequence[str], data: CalibrationSet, see: Any, what: str
) -> None:
    """Runs every calibration record through the model, showing `see(path, x, steps)` the inputs of layers."""
    now = torch.empty(0)

    def hook(path: str) -> Any:
        def look(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            if not args[0].isfinite().all():
                raise UserError(
                    f"layer {path!r}: its input is NaN or infinite in calibration",
                    fix="the float model overflows there: check the checkpoint and its sampler settings",
                )
            see(path, args[0], now)

        return look

    handles = [model.get_submodule(path).register_forward_pre_hook(hook(path)) for path in paths]
    runner = TorchRunner("float", model, family)
    batches = list(data.shards)
    try:
        for shard in progress.track(batches, len(batches), f"observing {what}"):
            for feeds in data.batches(shards=[shard], rows=family.rows(OBSERVED_ROWS)):
                now = feeds["step"]
                runner.run_tensors(feeds)
    finally:
        for handle in handles:
            handle.remove()


def _weights_by_inputs(
    model: nn.Module, family: Family, plan: Plan, data: CalibrationSet
) -> dict[str, QuantizedTensor]:
    """Quantizes the weights of the layers whose method looks at their inputs, while all are still float."""
    paths = []
    for path in plan.specs:
        method = plan.rules[path].method
        if method and methods.load(method.name).needs_moments(method.options) and moments.width(model, path):
            paths.append(path)
    found = {}
    for group in moments.groups(model, paths):
        seen = moments.Moments(model, group)
        watch_inputs(model, family, group, data, seen.see, "inputs' second moments")
        for path in progress.track(group, len(group), "searching (layers)"):
            found[path] = _quantize_weight(model, path, plan, seen.mean(path))
    return found


@dataclass(frozen=True)
class Start:
    """What quantization starts from: weights that were chosen by their inputs, and the scales of activations."""

    weights: dict[str, QuantizedTensor]
    scales: Mapping[str, torch.Tensor]

    def weight(self, model: nn.Module, path: str, plan: Plan) -> QuantizedTensor:
        return self.weights[path] if path in self.weights else _quantize_weight(model, path, plan)

    def state(self, path: str, tensor: QuantizedTensor) -> dict[str, torch.Tensor]:
        """Returns the buffers of the quantized layer."""
        return tensor.buffers() | ({"activation_scale": self.scales[path]} if path in self.scales else {})


def _quantize_weight(
    model: nn.Module, path: str, plan: Plan, second_moments: torch.Tensor | None = None
) -> QuantizedTensor:
    source, spec = float_layer(model, path), plan.specs[path]
    method, options = _method(plan, path)
    weight, axis = oriented(source, spec), channel_axis(source, spec)
    found: QuantizedTensor = method.quantize_weight(weight, plan.rules[path].weight, axis, options, second_moments)
    return found


def _method(plan: Plan, path: str) -> tuple[Any, Any]:
    spec = plan.rules[path].method
    assert spec is not None
    return methods.load(spec.name), spec.options


def _quantize_layers(
    model: nn.Module, family: Family, plan: Plan, start: Start, data: CalibrationSet, work: Path
) -> Plan:
    """Swaps float layers for quantized ones, those of trained blocks last; returns the plan with the chosen formats."""
    blocks = _trained_blocks(model, family, plan)
    inside = {path for paths in blocks.values() for path in paths}
    if blocks:
        samples = Samples(data, _training_rows(plan), family.rows(CHUNK))
        reconstruct.record_targets(model, family, list(blocks), samples, work)
    specs = _replace(model, plan, start, [path for path in plan.specs if path not in inside])
    for block, paths in blocks.items():
        done = work / block / "done.safetensors"
        if not done.exists():  # a kill left it, whole
            hold = next(_method(plan, path)[1].hold_mb for path in paths if _method(plan, path)[0].TRAINS) << 20
            calls = reconstruct.Calls(model, family, block, samples, work, hold=hold)
            save_whole(_trained(model, block, paths, plan, start, calls), done)
        state = load_file(done)
        for path in paths:
            leaves = {name.removeprefix(f"{path}."): t for name, t in state.items() if name.startswith(f"{path}.")}
            specs[path] = replace(plan.specs[path], weight=plan.choices(path)[int(leaves.pop(CHOICE))])
            _put_quantized(model, path, specs[path], leaves)
        reconstruct.forget(block, work)
    shutil.rmtree(work, ignore_errors=True)
    return replace(plan, specs={path: specs[path] for path in plan.specs})


def _training_rows(plan: Plan) -> int:
    """Returns how many calibration rows are trained on; all blocks are trained on the same."""
    asked = {_method(plan, path)[1].rows for path in plan.specs if _method(plan, path)[0].TRAINS}
    if len(asked) > 1:
        raise UserError(
            f"rules train on {' and '.join(map(str, sorted(asked)))} rows, and all blocks are trained on the same",
            fix="give every rule's method the same `rows`",
        )
    return int(asked.pop())


def _trained_blocks(model: nn.Module, family: Family, plan: Plan) -> dict[str, list[str]]:
    """Returns the layers of every block that a method trains layers of, in the order in which blocks run."""
    found = {}
    for block in family.blocks(model):
        paths = [path for path in plan.specs if path.startswith(f"{block}.")]
        trained = {plan.rules[path].method for path in paths if _method(plan, path)[0].TRAINS}
        if len(trained) > 1:
            raise UserError(f"block {block!r}: two rules train its layers, each with options of its own", fix="use one")
        if trained:
            found[block] = paths
    return found


def _replace(model: nn.Module, plan: Plan, start: Start, paths: Sequence[str]) -> dict[str, LayerSpec]:
    """Swaps layers one at a time, so that the float weights go as the codes come; returns how each is quantized."""
    specs = {}
    for path in progress.track(paths, len(paths), "quantizing (layers)"):
        tensor = start.weight(model, path, plan)
        specs[path] = replace(plan.specs[path], weight=tensor.format)
        _put_quantized(model, path, specs[path], start.state(path, tensor))
    return specs


def _put_quantized(model: nn.Module, path: str, spec: LayerSpec, state: Mapping[str, torch.Tensor]) -> None:
    source = float_layer(model, path)
    layer = quantized_layer(source, spec)
    layer._buffers |= dict(state)
    if spec.multiplied:
        layer.input_multiplier = source.get_buffer("input_multiplier")
    put(model, path, layer)


def _trained(
    model: nn.Module, block: str, paths: Sequence[str], plan: Plan, start: Start, calls: reconstruct.Calls
) -> dict[str, torch.Tensor]:
    """Trains a block and returns the buffers of its quantized layers; the model's own layers are float again."""
    sources = {path: float_layer(model, path) for path in paths}
    learners: dict[str, Any] = {}
    state: dict[str, dict[str, torch.Tensor]] = {}
    chosen: dict[str, torch.Tensor] = {}
    for path in paths:
        tensor = start.weight(model, path, plan)
        spec = replace(plan.specs[path], weight=tensor.format)
        chosen[path] = torch.tensor(plan.choices(path).index(tensor.format))
        method, options = _method(plan, path)
        if method.TRAINS:
            trainer, how = method, options
            learners[path] = method.layer(sources[path], spec, tensor, start.scales.get(path), options)
            put(model, path, learners[path])
        else:
            state[path] = start.state(path, tensor)
            _put_quantized(model, path, spec, state[path])
    phases = trainer.phases(list(learners.values()), how)
    reconstruct.train_block(model.get_submodule(block), calls, phases, how.batch, f"training {block}")
    state |= {path: learner.state() for path, learner in learners.items()}
    for path, source in sources.items():
        put(model, path, source)
    found = {f"{path}.{leaf}": tensor for path, leaves in state.items() for leaf, tensor in leaves.items()}
    return found | {f"{path}.{CHOICE}": number for path, number in chosen.items()}


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


def _add_outputs(reference: Reference, what: str, runner: TorchRunner) -> None:
    for step in reference_steps(reference):
        output = in_chunks(runner.run_tensors, reference_feeds(reference, step), runner.family.rows(REFERENCE_ROWS))
        if bad := int((~output.isfinite()).sum()):
            raise UserError(
                f"the {what} model gives {bad} NaN or infinite values at step {step}",
                fix="keep the layers with the largest activations in float, or use a wider format",
            )
        reference[f"{step}/{what}"] = output.float().contiguous()


def _add_quantized_outputs(reference: Reference, model: nn.Module, family: Family, *, floors: bool) -> None:
    """Adds the quantized model's outputs in fp32, and with `floors` in fp64 and fp16, whose distances they are."""
    outputs = {"quantized": torch.float32}
    if floors:
        outputs |= {"quantized_fp64": torch.float64, "quantized_fp16": torch.float16}
    for what, dtype in outputs.items():
        nn.Module.to(model, dtype)  # diffusers' own .to() warns that it may keep modules in fp32; none is here
        _add_outputs(reference, what, TorchRunner(what, model, family, dtype=dtype, steps=StepContext()))


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
        "recipe": {"name": recipe.name, "digest": recipe.digest},
        "layers": {path: spec.to_json() for path, spec in plan.specs.items()},
        "splits": dict(plan.splits),
        "smoothed_layers": sorted(path for paths in factors for path in paths.split("+")),
        "weights": quantized.storage(model) | {"kept_layers": len(plan.rules) - len(plan.specs)},
        **{key: calibration.info[key] for key in ("timesteps", "entries")},
        "sampler": checkpoint.sampler,
    }


def checkpoint_parameters(checkpoint: Checkpoint) -> int:
    return sum(p.numel() for p in checkpoint.skeleton().parameters())
