"""From float layers to quantized ones, in place: one at a time, or, where a method trains, a scope at a time.

A scope is one block, or all blocks that are trained jointly; what its training found is saved when it is done, and
found again by a run after a kill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib_data.store import CalibrationSet
from calib_data.tensors import load_tensors, save_whole
from engines.artifacts import Json
from engines.errors import UserError
from exporter import devices, progress, reconstruct
from exporter.attention import quantize_points
from exporter.models import Family
from exporter.modules import SteppedLayer, float_layer, put, quantized_layer
from exporter.plan import Plan
from exporter.samples import CHUNK, Samples
from exporter.specs import FloatLayer, LayerSpec, channel_axis, oriented
from exporter.tensors import CodebookTensor, QuantizedTensor

CHOICE = "weight_choice"  # beside a layer's buffers: which of the formats to choose from
DONE, START = "done.safetensors", "start.safetensors"  # in a scope's folder: what training came to, and began with

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Start:
    """What quantization starts from: weights that were chosen by their inputs, and what quantizers of inputs hold."""

    weights: dict[str, QuantizedTensor | CodebookTensor]
    activations: Mapping[str, State]

    def weight(self, model: nn.Module, path: str, plan: Plan) -> QuantizedTensor | CodebookTensor:
        return self.weights[path] if path in self.weights else quantize_weight(model, path, plan)

    def state(self, path: str, tensor: QuantizedTensor | CodebookTensor) -> State:
        """Returns the buffers of the quantized layer."""
        own = {name: value.clone() for name, value in self.activations.get(path, {}).items()}  # readers share them
        return tensor.buffers() | own


@dataclass(frozen=True)
class Scope:
    """Blocks whose layers train together, by one method, and the paths of all their layers."""

    name: str
    blocks: Sequence[str]
    paths: Sequence[str]
    method: Any
    options: Any
    points: Sequence[str] = ()  # of the attentions in it, where the method trains them


def quantize_weight(
    model: nn.Module, path: str, plan: Plan, second_moments: torch.Tensor | None = None
) -> QuantizedTensor | CodebookTensor:
    """Returns one layer's weight as its method quantizes it; `second_moments` [in, in] are its inputs'."""
    source, spec = float_layer(model, path), plan.specs[path]
    method, options = plan.method(path)
    weight, axis = oriented(source, spec), channel_axis(source, spec)
    try:
        found: QuantizedTensor | CodebookTensor = method.quantize_weight(
            weight, plan.rules[path].weight, axis, options, second_moments
        )
    except UserError as error:
        raise UserError(f"layer {path!r}: {error.what}", fix=error.fix) from error
    return found


@dataclass(frozen=True)
class Training:
    """What is trained, on which rows (None where nothing is), and the folder of targets and of what is done."""

    scopes: Sequence[Scope]
    samples: Samples | None
    folder: Path

    def record(self) -> dict[str, Json]:
        """Returns what training came to, by scope and phase."""
        found = {scope.name: reconstruct.record_of(self.folder / scope.name) for scope in self.scopes}
        return {name: record for name, record in found.items() if record is not None}


def prepare(model: nn.Module, family: Family, plan: Plan, data: CalibrationSet, folder: Path) -> Training:
    """Records the float model's outputs for all that is trained: first, since disk and rules may fall short there."""
    found = list(scopes(model, family, plan))
    _check_recorded(found, plan, data)
    return Training(found, _record(model, family, plan, found, data, folder) if found else None, folder)


def swap_layers(model: nn.Module, family: Family, plan: Plan, start: Start, training: Training) -> Plan:
    """Swaps float layers for quantized ones, those that train last; returns the plan with the chosen formats."""
    work = training.folder
    inside = {path for scope in training.scopes for path in (*scope.paths, *scope.points)}
    for path in plan.points:
        if path not in inside:
            _put_point(model, path, plan, start.activations[path])
    specs = {}
    rest = [path for path in plan.specs if path not in inside]
    for path in progress.track(rest, len(rest), "quantizing (layers)"):  # float weights go as the codes come
        tensor = start.weight(model, path, plan)
        specs[path] = replace(plan.specs[path], weight=tensor.format)
        _put_quantized(model, path, specs[path], start.state(path, tensor))
    for scope in training.scopes:
        folder = work / scope.name
        if not (folder / DONE).exists():  # a kill left it, whole
            save_whole(_trained(model, family, scope, plan, start, training), folder / DONE)
            reconstruct.forget_state(folder)
            (folder / START).unlink(missing_ok=True)
        state = load_tensors(folder / DONE, f"remove it, and the same command trains {scope.name} anew")
        state = {name: tensor.to(devices.of(model)) for name, tensor in state.items()}
        for path in scope.paths:
            leaves = {name.removeprefix(f"{path}."): t for name, t in state.items() if name.startswith(f"{path}.")}
            specs[path] = replace(plan.specs[path], weight=plan.choices(path)[int(leaves.pop(CHOICE))])
            _put_quantized(model, path, specs[path], leaves)
        for path in scope.points:
            _put_point(model, path, plan, {"activation_scale": state[f"{path}.activation_scale"]})
        for block in scope.blocks:
            reconstruct.forget(block, work)
    return replace(plan, specs={path: specs[path] for path in plan.specs})


def scopes(model: nn.Module, family: Family, plan: Plan) -> Iterator[Scope]:
    """Yields what is trained together, in the order in which blocks run; what is trained jointly comes first."""
    blocks: dict[str, list[str]] = {}
    trained = {}
    for block in family.blocks(model):
        paths = [path for path in plan.specs if path.startswith(f"{block}.")]
        rules = {plan.rules[path].method: path for path in paths if _trains(plan, path)}
        if len(rules) > 1:
            raise UserError(f"block {block!r}: two rules train its layers, each with options of its own", fix="use one")
        if rules:
            blocks[block] = paths
            trained[block] = plan.method(rules.popitem()[1])
    inside = {path for paths in blocks.values() for path in paths}
    outside = [path for path in plan.specs if _trains(plan, path) and path not in inside]
    if outside:
        progress.note(
            f"note: {len(outside)} layers lie in no block and keep what training starts from: {outside[0]!r} …"
        )
    joint = [block for block, (_, options) in trained.items() if options.joint]
    if len({trained[block] for block in joint}) > 1:
        raise UserError("two rules train blocks jointly, each with options of its own", fix="use one")

    def scope(name: str, members: Sequence[str]) -> Scope:
        method, options = trained[members[0]]
        points = [path for path in plan.products if any(path.startswith(f"{block}.") for block in members)]
        paths = [path for block in members for path in blocks[block]]
        return Scope(name, members, paths, method, options, points if method.POINTS else [])

    if joint:
        yield scope("jointly", joint)
    yield from (scope(block, [block]) for block in blocks if block not in joint)


def _check_recorded(scopes: Sequence[Scope], plan: Plan, data: CalibrationSet) -> None:
    """Raises a UserError if scales of steps are to be trained that calibration left out."""
    for scope in scopes:
        rules = {path: plan.rules[path].activation for path in scope.paths if _trains(plan, path)}
        rules |= {path: plan.products[path] for path in scope.points}
        stepped = [path for path, rule in rules.items() if rule and rule.granularity == "step"]
        count = len(data.artifact.info["timesteps"])
        if stepped and len(data.steps) < count:
            raise UserError(
                f"{data.artifact.path}: recorded {len(data.steps)} of {count} sampling steps, and the scales of all "
                f"are to be trained, those of {stepped[0]!r} first",
                fix="calibrate without record_steps",
            )


def _trains(plan: Plan, path: str) -> bool:
    """Whether a layer's method trains, and is given iterations to do so."""
    method, options = plan.method(path)
    return bool(method.TRAINS and options.trains)


def _record(
    model: nn.Module, family: Family, plan: Plan, scopes: Sequence[Scope], data: CalibrationSet, work: Path
) -> Samples:
    """Draws the rows that all scopes are trained on, and records the float model's outputs for them."""
    asked = {plan.method(path)[1].rows for path in plan.specs if _trains(plan, path)}
    if len(asked) > 1:
        raise UserError(
            f"rules train on {' and '.join(map(str, sorted(asked)))} rows, and all blocks are trained on the same",
            fix="give every rule's method the same `rows`",
        )
    samples = Samples(data, int(asked.pop()), family.rows(CHUNK))
    recorded = [block for scope in scopes for block in scope.blocks]
    if any(scope.options.joint for scope in scopes):
        recorded.append(reconstruct.OUTPUT)
    reconstruct.record_targets(model, family, recorded, samples, work)
    return samples


@dataclass(frozen=True)
class Learners:
    """A scope's layers and points while they train, by path, and what is known of its layers that do not.

    `sources`: the float layers they stand for, without their weights; `weights`: what they start from; `chosen`: each
    layer's format, by number.
    """

    sources: Mapping[str, FloatLayer]
    weights: dict[str, QuantizedTensor | CodebookTensor] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    points: dict[str, Any] = field(default_factory=dict)
    state: dict[str, State] = field(default_factory=dict)
    chosen: dict[str, torch.Tensor] = field(default_factory=dict)


def put_learners(model: nn.Module, scope: Scope, plan: Plan, start: Start) -> Learners:
    """Puts what trains, and a scope's other quantized layers, where float ones were, whose weights go."""
    found = Learners({path: float_layer(model, path) for path in scope.paths})
    for path in scope.points:
        found.points[path] = scope.method.point(plan.points[path], start.activations[path])
        put(model, path, found.points[path])
    for path, source in progress.track(found.sources.items(), len(scope.paths), "choosing codes (layers)"):
        tensor = found.weights[path] = start.weight(model, path, plan)
        spec = replace(plan.specs[path], weight=tensor.format)
        found.chosen[path] = torch.tensor(plan.choices(path).index(tensor.format))
        method, options = plan.method(path)
        if _trains(plan, path):
            found.layers[path] = method.layer(source, spec, tensor, start.activations.get(path, {}), options)
            put(model, path, found.layers[path])
        else:
            found.state[path] = start.state(path, tensor)
            _put_quantized(model, path, spec, found.state[path])
        source.weight = nn.Parameter(source.weight.to("meta"), requires_grad=False)
    return found


def _trained(model: nn.Module, family: Family, scope: Scope, plan: Plan, start: Start, training: Training) -> State:
    """Trains a scope and returns the buffers of its quantized layers; layers without a weight are left in the model."""
    samples, work = training.samples, training.folder
    assert samples is not None  # there is a scope
    kept = work / scope.name / START
    if kept.exists():  # another search, on another device or with sums in another order, may start elsewhere
        start = _read_start(kept, model, scope, plan, start)
    learners = put_learners(model, scope, plan, start)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        save_whole(_start_of(learners, start), kept)
    learners.weights.clear()
    calls: reconstruct.Calls
    if scope.options.joint:
        calls = reconstruct.ModelCalls(model, family, scope.blocks, samples, work)
    else:
        hold = scope.options.hold_mb << 20
        calls = reconstruct.BlockCalls(model, family, scope.blocks[0], samples, work, hold=hold)
    phases = scope.method.phases([*learners.layers.values(), *learners.points.values()], scope.options)
    reconstruct.train(calls, phases, scope.options.batch, f"training {scope.name}", work / scope.name)
    state = learners.state | {path: one.state() for path, one in (learners.layers | learners.points).items()}
    for path, source in learners.sources.items():
        put(model, path, source)
    found = {f"{path}.{leaf}": tensor for path, leaves in state.items() for leaf, tensor in leaves.items()}
    return found | {f"{path}.{CHOICE}": number for path, number in learners.chosen.items()}


def _start_of(learners: Learners, start: Start) -> State:
    """Returns what a scope's training begins with: codes and scales, each format by number, and ranges of inputs."""
    found = {f"{path}.{leaf}": t for path, one in learners.weights.items() for leaf, t in one.buffers().items()}
    found |= {f"{path}.{CHOICE}": number for path, number in learners.chosen.items()}
    ranges = {
        path: start.activations[path] for path in (*learners.weights, *learners.points) if path in start.activations
    }
    return found | {f"{path}.{leaf}": tensor for path, state in ranges.items() for leaf, tensor in state.items()}


def _read_start(file: Path, model: nn.Module, scope: Scope, plan: Plan, found: Start) -> Start:
    """Returns what a run before began with, in the place of what this one has `found`."""
    state = load_tensors(file, f"remove {file.parent}, and the same command trains {scope.name} anew")
    state = {name: tensor.to(devices.of(model)) for name, tensor in state.items()}
    weights: dict[str, QuantizedTensor | CodebookTensor] = {}
    for path in scope.paths:
        spec, fmt = plan.specs[path], plan.choices(path)[int(state[f"{path}.{CHOICE}"])]
        codes, scale = state[f"{path}.weight_codes"], state.get(f"{path}.weight_scale")
        if fmt.learned:
            weights[path] = CodebookTensor(codes, state[f"{path}.weight_codebook"], scale, fmt)
        else:
            assert scale is not None, path
            axis = channel_axis(float_layer(model, path), spec)
            weights[path] = QuantizedTensor(codes, scale, fmt, spec.granularity, axis, spec.block_size)
    same: dict[int, State] = {}  # readers of one tensor are given the very same
    for path in [path for path in (*scope.paths, *scope.points) if path in found.activations]:
        own = found.activations[path]
        same.setdefault(id(own), {leaf: state[f"{path}.{leaf}"] for leaf in own})
    activations = {path: same.get(id(own), own) for path, own in found.activations.items()}
    return Start(weights, activations)


def _put_point(model: nn.Module, path: str, plan: Plan, state: State) -> None:
    quantize_points(model, {path: plan.points[path]})
    model.get_submodule(path).activation_scale = state["activation_scale"].clone()  # readers share it


def _put_quantized(model: nn.Module, path: str, spec: LayerSpec, state: State) -> None:
    source = float_layer(model, path)
    layer = quantized_layer(source, spec)
    if "bias" in state:
        layer.bias = nn.Parameter(state.pop("bias"), requires_grad=False)
    layer._buffers |= state
    if isinstance(layer, SteppedLayer):
        layer.sum_shift()
    if spec.multiplied:
        layer.input_multiplier = source.get_buffer("input_multiplier")
    put(model, path, layer)
