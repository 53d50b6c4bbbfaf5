"""Which engines a recipe asks for, whether their GPUs can run it, and which shipped recipe can where one cannot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from engines import backends
from engines.artifacts import Json
from engines.backends import Layers
from engines.build import points_as_layers
from engines.errors import UserError
from engines.options import Options
from exporter import catalog, progress
from exporter import recipe as recipes
from exporter.attention import PointSpec
from exporter.checkpoint import Checkpoint
from exporter.lower import check_deployable
from exporter.modules import float_layers
from exporter.plan import Plan, plan_layers
from exporter.recipe import Recipe
from exporter.specs import LayerSpec, facts

FLOAT_BITS = 16  # of a weight, or an activation, that is not quantized
SCALE_BITS = 16  # of what a block of weights shares
NARROW = 16  # channels: TensorRT has no FP8 convolution of fewer, nor do they fill a row of an INT8 kernel


@dataclass(frozen=True)
class Target:
    """One engine to build."""

    backend: str
    gpu: str | None
    dtype: str
    options: Options

    def to_json(self) -> Json:
        return {"backend": self.backend, "gpu": self.gpu, "dtype": self.dtype, **self.options.settings()}


def target_of(name: str, gpu: str | None, dtype: str | None, options: Options) -> Target:
    """Returns the engine that a backend is asked for, what was not said filled in."""
    module = backends.load(name)
    resolved = module.resolve_gpu(gpu)
    if gpu is not None and resolved is None:
        progress.note(f"note: --gpu {gpu} says nothing to {name}, which runs wherever it is opened")
    lacking = backends.lacking(name, options)
    for written in lacking.values():
        progress.note(f"note: {written} says nothing to {name}, which has no such choice")
    asked = replace(options, **{option: getattr(Options(), option) for option in lacking})
    return Target(name, resolved, dtype or module.DTYPE, backends.resolve(name, asked))


def targets_of(names: Sequence[str], gpu: str | None, dtype: str | None, options: Options) -> list[Target]:
    """Returns the engines that backends are asked for; an option that none of them has is refused."""
    backends.check_taken(names, options)
    return [target_of(name, gpu, dtype, options) for name in dict.fromkeys(names)]


@dataclass(frozen=True)
class Kind:
    """Layers that engines run by the same kind of kernel, for all they differ in size."""

    what: str  # linear, convolution, grouped convolution, narrow convolution, attention products
    spec: LayerSpec | PointSpec

    @property
    def types(self) -> dict[str, str | None]:
        """The types that an engine holds the weight in and multiplies."""
        return self.spec.engine_types if isinstance(self.spec, LayerSpec) else _point_types(self.spec)

    @property
    def weight(self) -> str:
        """The weight's format, and what carries it where no engine has that."""
        if not isinstance(self.spec, LayerSpec):
            return "–"
        asked, held = self.spec.kinds["weight"], self.types["weight"]
        looked_up = f" in {held} codes" if asked != held else ""
        return f"{asked}{looked_up}, by {self.spec.granularity}"

    @property
    def activation(self) -> str:
        fmt = self.spec.format if isinstance(self.spec, PointSpec) else self.spec.activation
        if fmt is None:
            return "float"
        held = f" in {self.types['activation']}" if fmt.kind != self.types["activation"] else ""
        return f"{fmt.kind}{held}" + (", by step" if self.spec.steps else "")

    def __str__(self) -> str:
        weights = "" if isinstance(self.spec, PointSpec) else f"{self.weight}, beside "
        return f"{self.what}: {weights}{self.activation} activations"


def _point_types(spec: PointSpec) -> dict[str, str | None]:
    return points_as_layers({"": spec.engine_type})[""]


def kinds_of(model: nn.Module, plan: Plan) -> dict[Kind, list[str]]:
    """Returns the kinds of quantized layers and attention products that a plan has, each with their paths."""
    layers, found = float_layers(model), dict[Kind, list[str]]()
    for path, spec in plan.specs.items():
        about = facts(layers[path])
        what = "linear"
        if about.conv:
            what = "grouped " * about.grouped + "narrow " * (about.channels < NARROW) + "convolution"
        kind = Kind(what, replace(spec, multiplied=False))  # a product before it changes no kernel
        found.setdefault(kind, []).append(path)
    for path, point in plan.points.items():
        found.setdefault(Kind("attention products", point), []).append(path)
    return found


def engine_layers(plan: Plan) -> Layers:
    """Returns what a backend's `check` is asked about."""
    points = {path: PointSpec(rule.format).engine_type for path, rule in plan.products.items()}
    return {path: spec.engine_types for path, spec in plan.specs.items()} | points_as_layers(points)


def refuse(checkpoint: Checkpoint, recipe: Recipe, model: nn.Module, plan: Plan, targets: Sequence[Target]) -> None:
    """Raises now, as a UserError, what a later stage would refuse after minutes or hours; names a recipe that fits.

    `model` is the one that was planned.
    """
    check_deployable({path: spec.to_json() for path, spec in plan.specs.items()}, f"recipe {recipe.name!r}")
    layers = engine_layers(plan)
    for target in targets:
        try:
            backends.load(target.backend).check(layers, target.gpu)
        except UserError as error:
            found = nearest(checkpoint, profile(model, plan), target)
            hint = f"; the nearest shipped recipe that {target.gpu} runs is {' and, of no fewer bits, '.join(found)}"
            raise UserError(f"{target.backend}: {error.what}", fix=f"{error.fix}{hint if found else ''}") from error


def why_not(kind: Kind, path: str, backend: str, gpu: str) -> str | None:
    """Returns why a GPU cannot run a kind of layer, of which `path` is the first, or None."""
    return _refusal(backend, {path: kind.types}, gpu)


def _refusal(backend: str, layers: Layers, gpu: str | None) -> str | None:
    try:
        backends.load(backend).check(layers, gpu)
    except UserError as error:
        return error.what
    return None


@dataclass(frozen=True)
class Profile:
    """What recipes are compared by: means over the weights that they quantize, and whether a method trains."""

    weight_bits: float
    activation_bits: float
    trains: bool

    @property
    def whole_bits(self) -> int:
        """Bits of a weight, without its share of a scale."""
        return round(self.weight_bits)

    def distance(self, other: Profile) -> tuple[Any, ...]:
        """Whole bits of weights count first, then those of activations, then training, then what is left of bits."""
        weights = abs(self.weight_bits - other.weight_bits)
        activations = abs(self.activation_bits - other.activation_bits)
        return round(weights), round(activations), self.trains != other.trains, weights


def profile(model: nn.Module, plan: Plan) -> Profile:
    layers = float_layers(model)
    counts = {path: layers[path].weight.numel() for path in plan.specs}
    total = sum(counts.values())
    if not total:
        return Profile(FLOAT_BITS, FLOAT_BITS, trains=False)
    weights = sum(stored_bits(spec) * counts[path] for path, spec in plan.specs.items())
    activations = sum(_activation_bits(spec) * counts[path] for path, spec in plan.specs.items())
    return Profile(weights / total, activations / total, any(_trains(plan, path) for path in plan.specs))


def stored_bits(spec: LayerSpec) -> float:
    """Returns the bits that a weight takes, with its share of its block's scale."""
    fmt: Any = spec.weight
    if fmt.learned:
        return float(fmt.bits / fmt.vector_size)
    codes = 4 if fmt.onnx_type == "INT4" else 8
    return codes + (SCALE_BITS / spec.block_size if spec.block_size else 0)


def _activation_bits(spec: LayerSpec) -> int:
    return spec.activation.bits if spec.activation else FLOAT_BITS


def _trains(plan: Plan, path: str) -> bool:
    method, options = plan.method(path)
    return bool(method.TRAINS and options.trains)


def nearest(checkpoint: Checkpoint, asked: Profile, target: Target) -> list[str]:
    """Returns the shipped recipe nearest to what was asked among those that a target runs, and what it comes to.

    Where its weights have fewer bits, a second one follows: the nearest of those whose weights have as many, or more.
    """
    found = []
    fitting = dict(_shipped(checkpoint, target))
    while fitting:
        name = min(fitting, key=lambda one: (asked.distance(fitting[one]), one))
        own = fitting[name]
        found.append(f"{name} ({own.weight_bits:.3g} bits to a weight, activations of {own.activation_bits:.3g})")
        if own.whole_bits >= asked.whole_bits:
            break
        fitting = {name: one for name, one in fitting.items() if one.whole_bits >= asked.whole_bits}
    return found


def _shipped(checkpoint: Checkpoint, target: Target) -> Iterator[tuple[str, Profile]]:
    """Yields the shipped recipes that suit the model and that a target runs."""
    for name in catalog.recipes():
        model = checkpoint.skeleton()
        try:
            plan = plan_layers(model, checkpoint.family, recipes.load(name))
        except UserError:
            continue  # it is not for this model
        if _refusal(target.backend, engine_layers(plan), target.gpu) is None:
            yield name, profile(model, plan)
