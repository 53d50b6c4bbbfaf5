"""Recipes: TOML that says, layer by layer, which formats and which method; first matching rule wins."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal, cast

import torch

from engines.artifacts import digest_json
from engines.errors import UserError, unknown
from exporter import catalog, formats, methods, observers
from exporter.formats import Format
from exporter.specs import LayerFacts
from exporter.tensors import GRANULARITIES, Granularity

FOLDER = catalog.HERE / "recipes"
MAX_RECIPE_BYTES = 1 << 20
SCOPES = ("all", "blocks", "outside_blocks")
TYPES = ("any", "conv", "linear", "attention")
RULE_KEYS = (
    "layers",
    "scope",
    "optional",
    "type",
    "grouped",
    "narrower_than",
    "fewer_weights_than",
    "split_skips",
    "deployable",
    "allow",
)
ALLOWED = ("float",)
ACTIVATION_GRANULARITIES = ("tensor", "step")
_FORMAT_KEYS = ("bits", "exponent_bits", "mantissa_bits")
_CODEBOOK_KEYS = ("vector_size", "codebook_size")


@dataclass(frozen=True)
class WeightSpec:
    """`candidates`: the formats that a method may choose from, where the recipe gives only their bits.

    `entries`: what the numbers of a codebook are stored in, where a matmul of quantized inputs is to take them.
    """

    format: Format
    granularity: Granularity = "channel"
    block_size: int = 0
    candidates: tuple[Format, ...] = ()
    entries: Format | None = None

    @property
    def choices(self) -> tuple[Format, ...]:
        return self.candidates or (self.format,)


@dataclass(frozen=True)
class ActivationSpec:
    """One static scale per tensor, or with granularity "step" one for every step of the sampler.

    `zero_point`: an integer of its own beside each of those, for what has no middle at zero. `candidates`: the formats
    that the observer chooses from, by their error.
    """

    format: Format
    observer: str = "absmax"
    candidates: tuple[Format, ...] = ()
    granularity: str = "tensor"
    zero_point: bool = False


@dataclass(frozen=True)
class MethodSpec:
    name: str
    options: Any


@dataclass(frozen=True)
class Rule:
    """Which layers, and how they are quantized; without `weight` they are kept. Of type "attention": which attentions,
    and how their products are: by `activation` alone.

    A layer must match all of `layers` (a shell pattern on module paths), `scope` (which part of the model), `type`,
    `grouped` (only convolutions in groups), `narrower_than` (fewer channels in or out, per group) and
    `fewer_weights_than`. Not `deployable`: for study, with formats that no engine multiplies. `allow`: what an engine
    may run instead of what is asked, without failing the audit: "float".
    """

    layers: str
    scope: str = "all"
    optional: bool = False
    type: str = "any"
    grouped: bool = False
    narrower_than: int | None = None
    fewer_weights_than: int | None = None
    split_skips: bool = False
    deployable: bool = True
    allow: str | None = None
    weight: WeightSpec | None = None
    activation: ActivationSpec | None = None
    method: MethodSpec | None = None

    def matches(self, path: str, layer: LayerFacts, in_block: bool) -> bool:
        if self.scope != "all" and in_block != (self.scope == "blocks"):
            return False
        if self.type == "attention" or (self.type != "any" and layer.conv != (self.type == "conv")):
            return False
        if (self.grouped and not layer.grouped) or (self.narrower_than and layer.channels >= self.narrower_than):
            return False
        if self.fewer_weights_than and layer.weights >= self.fewer_weights_than:
            return False
        return fnmatchcase(path, self.layers)

    def matches_attention(self, path: str, in_block: bool) -> bool:
        fits = self.scope == "all" or in_block == (self.scope == "blocks")
        return self.type == "attention" and fits and fnmatchcase(path, self.layers)


@dataclass(frozen=True)
class CalibrationSpec:
    """Trajectories to record, at which steps (None: all), and how many of them ranges are taken from (None: all)."""

    samples: int = 64
    record_steps: tuple[int, ...] | None = None
    range_samples: int | None = None


@dataclass(frozen=True)
class Recipe:
    name: str
    source: Mapping[str, Any]
    rules: tuple[Rule, ...]
    calibration: CalibrationSpec = field(default_factory=CalibrationSpec)

    @property
    def digest(self) -> str:
        """sha256 of what the recipe says, whatever its file's name, order of keys or comments."""
        return digest_json(self.source)

    def attention_rules(self, attentions: Collection[str], blocks: Collection[str]) -> dict[str, Rule]:
        """Returns the first rule that matches each attention; of one that none matches products stay float."""
        found = {
            path: next((r for r in self.rules if r.matches_attention(path, _within(path, blocks))), None)
            for path in attentions
        }
        return {path: rule for path, rule in found.items() if rule is not None}

    def assign(
        self, layers: Mapping[str, LayerFacts], blocks: Collection[str], attentions: Collection[str] = ()
    ) -> dict[str, Rule]:
        """Returns each layer's first matching rule; a layer or a rule without a match is an error."""
        if not layers:
            raise UserError("the model has no Linear or Conv2d layer", fix="there is nothing to quantize in it")
        assigned = {
            path: next((r for r in self.rules if r.matches(path, layer, _within(path, blocks))), None)
            for path, layer in layers.items()
        }
        if unmatched := [path for path, rule in assigned.items() if rule is None]:
            raise UserError(
                f"recipe {self.name!r}: no rule matches layer {unmatched[0]!r}" + _more(unmatched),
                fix='end the recipe with a rule for the rest: layers = "*"',
            )
        for number, rule in enumerate(self.rules, 1):
            if rule.optional or any(rule.matches(p, layer, _within(p, blocks)) for p, layer in layers.items()):
                continue
            if any(rule.matches_attention(path, _within(path, blocks)) for path in attentions):
                continue
            known = list(attentions) if rule.type == "attention" and attentions else list(layers)
            raise _matches_nothing(f"recipe {self.name!r}, rule {number}", rule, known)
        return cast(dict[str, Rule], assigned)


def _matches_nothing(where: str, rule: Rule, layers: Sequence[str]) -> UserError:
    error = unknown("layer pattern", rule.layers, layers, where)
    hint = error.fix.split("known:")[0]
    asked = [f"scope {rule.scope!r}"]
    asked += [f"type {rule.type!r}"] * (rule.type != "any") + ["grouped"] * rule.grouped
    asked += [f"narrower_than {rule.narrower_than}"] * bool(rule.narrower_than)
    asked += [f"fewer_weights_than {rule.fewer_weights_than}"] * bool(rule.fewer_weights_than)
    return UserError(
        f"{where}: layers = {rule.layers!r} ({', '.join(asked)}) matches none of the model's {len(layers)} layers",
        fix=f"{hint}layers are named like {layers[0]!r}; mend the pattern, or write optional = true",
    )


def _within(path: str, blocks: Collection[str]) -> bool:
    return any(path == block or path.startswith(block + ".") for block in blocks)


def _more(items: Sequence[object]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def names() -> list[str]:
    return catalog.recipes()


def load(name: str) -> Recipe:
    """Loads a shipped recipe by name or one from a .toml file."""
    path = Path(name)
    if path.suffix != ".toml":
        if name not in names():
            raise unknown("recipe", name, names())
        path = FOLDER / f"{name}.toml"
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise UserError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes", fix="a recipe is a short text file")
        source = tomllib.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"recipe {path}: byte {error.start} is not UTF-8", fix="a recipe is text: save it as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"recipe {path}: cannot be read ({error})", fix="check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"recipe {path}: not valid TOML ({error})", fix="mend the line it names") from error
    return parse(path.stem, source, name)


def parse(name: str, source: Mapping[str, Any], given_as: str | None = None) -> Recipe:
    """Builds a recipe from its parsed TOML; messages call it what the user called it."""
    where = f"recipe {given_as or name!r}"
    _known(source, ("calibration", "rule"), where)
    rules = source.get("rule", [])
    if not isinstance(rules, list) or not rules:
        raise UserError(f"{where}: has no rules", fix="write at least one [[rule]]")
    made = tuple(_rule(rule, f"{where}, rule {number}") for number, rule in enumerate(rules, 1))
    calibration = _calibration(source.get("calibration", {}), f"{where}, [calibration]")
    if calibration.record_steps is not None and _trains_by_step(made):
        raise UserError(
            f"{where}: record_steps leaves out steps whose scales are to be trained",
            fix="leave record_steps out: every step is recorded then",
        )
    return Recipe(name, source, made, calibration)


def _trains_by_step(rules: Sequence[Rule]) -> bool:
    """Whether scales of steps are trained: of what a rule's method trains, and of attentions where one trains those."""

    def stepped(rule: Rule) -> bool:
        return rule.activation is not None and rule.activation.granularity == "step"

    named = [(rule, rule.method, methods.load(rule.method.name)) for rule in rules if rule.method]
    training = [(rule, method) for rule, spec, method in named if method.TRAINS and spec.options.trains]
    products = [rule for rule in rules if rule.type == "attention" and any(method.POINTS for _, method in training)]
    return any(map(stepped, [*products, *(rule for rule, _ in training)]))


def _calibration(table: Mapping[str, Any], where: str) -> CalibrationSpec:
    _known(table, ("samples", "record_steps", "range_samples"), where)
    samples = _integer(table, "samples", where, default=64, least=1)
    ranges = _integer(table, "range_samples", where, default=samples, least=1) if "range_samples" in table else None
    if ranges is not None and ranges > samples:
        raise UserError(
            f"{where}: range_samples = {ranges}, and {samples} samples are recorded",
            fix="write at most as many, or leave it out",
        )
    steps = table.get("record_steps")
    if steps is None:
        return CalibrationSpec(samples, None, ranges)
    if not isinstance(steps, list) or not steps or not all(type(s) is int and s >= 0 for s in steps):
        raise UserError(f"{where}: record_steps = {steps!r}", fix="write a list of steps, e.g. [0, 5]")
    return CalibrationSpec(samples, tuple(sorted(set(steps))), ranges)


def _rule(table: Any, where: str) -> Rule:
    _known(table, (*RULE_KEYS, "keep", "weight", "activation", "method"), where)
    if not isinstance(table.get("layers"), str):
        found = f"layers = {table['layers']!r} is no pattern" if "layers" in table else "lacks layers"
        raise UserError(f"{where}: {found}", fix='write layers = "PATTERN", e.g. "*"; a rule has one')
    for key, words in (("scope", SCOPES), ("type", TYPES)):
        if table.get(key, words[0]) not in words:
            raise unknown(key, str(table[key]), words, where)
    for key in ("optional", "grouped", "split_skips", "deployable"):
        if not isinstance(table.get(key, False), bool):
            raise UserError(f"{where}: {key} = {table[key]!r}", fix=f"write {key} = true or false, or leave it out")
    for key in ("narrower_than", "fewer_weights_than"):
        if key in table:
            _integer(table, key, where, default=0, least=2)
    if "allow" in table and table["allow"] not in ALLOWED:
        raise unknown("allow", str(table["allow"]), ALLOWED, where)
    rule = Rule(**{key: table[key] for key in RULE_KEYS if key in table})
    selectors = {"grouped", "narrower_than", "fewer_weights_than"} & table.keys()
    if rule.type == "attention" and selectors:
        raise UserError(
            f"{where}: is of attentions and says {min(selectors)}, which is asked of layers",
            fix="choose attentions by `layers` and `scope`",
        )
    if "keep" in table:
        return _keep(rule, table, where)
    if rule.type == "attention":
        return _products(rule, table, where)
    if "weight" not in table:
        raise UserError(f"{where}: says neither weight nor keep", fix='write weight = { … } or keep = "float"')
    weight = _weight(table["weight"], f"{where}, weight", rule.deployable)
    method = _method(table.get("method", {"name": "rtn"}), f"{where}, method")
    if weight.format.learned != methods.load(method.name).CODEBOOKS:
        raise UserError(
            f"{where}: method {method.name!r} makes {'no codebooks' if weight.format.learned else 'codebooks only'}",
            fix=f"use {' or '.join(n for n in methods.names() if weight.format.learned == methods.load(n).CODEBOOKS)}",
        )
    if weight.candidates and not methods.load(method.name).CHOOSES_FORMAT:
        raise UserError(
            f"{where}: leaves the format open, and method {method.name!r} chooses none",
            fix="write exponent_bits and mantissa_bits, or use a method that chooses: fp_search",
        )
    activation = None
    if "activation" in table:
        activation = _activation(table["activation"], f"{where}, activation", rule.deployable)
    if activation and activation.granularity == "step":
        _check_stepped(method, where)
    if methods.load(method.name).INTEGERS_ONLY and (weight.format.kind[:3] != "int" or weight.granularity == "block"):
        found = "in blocks" if weight.granularity == "block" else f"in {weight.format.kind}"
        raise UserError(
            f"{where}: method {method.name!r} beside weights {found}",
            fix='it is for integers with granularity "channel" or "tensor"; fp_rounding learns on any grid',
        )
    if activation and weight.format.learned:
        if weight.granularity == "channel":
            raise UserError(
                f"{where}: a codebook scaled per channel beside quantized activations, on which TensorRT-RTX crashes",
                fix='use granularity "tensor"',
            )
        if activation.candidates:
            raise UserError(
                f"{where}: a codebook beside activations of an open format: its numbers are stored in that format",
                fix="name the activations' format",
            )
        weight = replace(weight, entries=activation.format)
    elif activation and rule.deployable:
        _check_pair(weight, activation, where)
    return replace(rule, weight=weight, activation=activation, method=method)


def _products(rule: Rule, table: Mapping[str, Any], where: str) -> Rule:
    extra = {"weight", "method", "split_skips", "deployable"} & table.keys()
    if extra or "activation" not in table:
        found = f"says {min(extra)}" if extra else "says no activation"
        raise UserError(f"{where}: is of attentions and {found}", fix="products have activations alone: write that")
    activation = _activation(table["activation"], f"{where}, activation", rule.deployable)
    if activation.zero_point or activation.candidates:
        raise UserError(
            f"{where}: products of two activations with zero points or open formats", fix="name a symmetric format"
        )
    return replace(rule, activation=activation)


def _check_stepped(method: MethodSpec, where: str) -> None:
    """Raises a UserError if a rule's method does not go with a scale for every step."""
    if not methods.load(method.name).STEPS:
        raise UserError(
            f"{where}: method {method.name!r} knows one scale of an activation, and the rule asks for one by step",
            fix='use granularity "tensor" for the activation, or the method dilatequant',
        )


def _check_pair(weight: WeightSpec, activation: ActivationSpec, where: str) -> None:
    """Raises a UserError if no matmul takes both; of formats that a method chooses from, those that fit are left."""
    if weight.granularity == "block":
        raise UserError(
            f"{where}: weights scaled in blocks beside quantized activations",
            fix='use granularity "channel" (a quantized matmul has one scale for each output), or float activations',
        )
    kinds = weight.format.kind, activation.format.kind
    if not weight.candidates and kinds[0][:2] != kinds[1][:2]:
        raise UserError(
            f"{where}: {kinds[0]} weights beside {kinds[1]} activations, which no matmul takes together",
            fix="use integers for both, floating point for both, or float activations",
        )


def _keep(rule: Rule, table: Mapping[str, Any], where: str) -> Rule:
    if table["keep"] != "float":
        raise unknown("keep", str(table["keep"]), ("float",), where)
    if extra := {"weight", "activation", "method", "split_skips", "deployable", "allow"} & table.keys():
        raise UserError(f"{where}: keeps its layers but also says {', '.join(sorted(extra))}", fix="drop one of them")
    return rule


def _weight(table: Any, where: str, deployable: bool) -> WeightSpec:
    _known(table, ("format", "granularity", "block_size", *_FORMAT_KEYS, *_CODEBOOK_KEYS), where)
    learned = table.get("format") == "codebook"
    granularity = table.get("granularity", "tensor" if learned else "channel")
    if learned and granularity == "block":
        raise UserError(f"{where}: a codebook scaled in blocks", fix='use granularity "tensor", or "channel"')
    if granularity not in GRANULARITIES:
        raise unknown("granularity", str(granularity), GRANULARITIES, where)
    if granularity == "block" and "block_size" not in table:
        raise UserError(f"{where}: granularity block without block_size", fix="write block_size = 64, or 16, 32, 128")
    if granularity != "block" and "block_size" in table:
        raise UserError(f"{where}: block_size without granularity block", fix='write granularity = "block", or drop it')
    block_size = _integer(table, "block_size", where, default=0, least=1 if granularity == "block" else 0)
    candidates = _candidates(table, where, deployable)
    fmt = candidates[0] if candidates else _format(table, where)
    return WeightSpec(fmt, cast(Literal["tensor", "channel", "block"], granularity), block_size, candidates)


def _activation(table: Any, where: str, deployable: bool) -> ActivationSpec:
    if isinstance(table, Mapping) and table.get("format") == "codebook":
        raise UserError(f"{where}: codebooks are for weights", fix="use int or fp")
    _known(table, ("format", "observer", "granularity", "zero_point", *_FORMAT_KEYS), where)
    observer = table.get("observer", "absmax")
    if not isinstance(observer, str) or observer not in observers.OBSERVERS:
        raise unknown("observer", str(observer), observers.OBSERVERS, where)
    candidates = _candidates(table, where, deployable)
    if candidates and deployable:
        raise UserError(
            f"{where}: leaves the format open",
            fix="name it: int with 8 bits, or fp with 4 exponent and 3 mantissa bits; or write deployable = false in "
            "the rule, to study what no engine multiplies",
        )
    if candidates and observer not in observers.FITTING:
        raise UserError(
            f"{where}: leaves the format open, and observer {observer!r} compares none", fix='write observer = "mse"'
        )
    fmt = candidates[0] if candidates else _format(table, where)
    integer = fmt.carrier == torch.int8
    if deployable and not integer and fmt.kind != "fp8":
        raise UserError(
            f"{where}: no engine quantizes activations to {fmt.kind} of {fmt.bits} bits",
            fix="use int, or fp with 4 exponent and 3 mantissa bits; or write deployable = false in the rule, to study "
            "it",
        )
    granularity = table.get("granularity", ACTIVATION_GRANULARITIES[0])
    if granularity not in ACTIVATION_GRANULARITIES:
        raise unknown("granularity", str(granularity), ACTIVATION_GRANULARITIES, where)
    zero_point = table.get("zero_point", False)
    if not isinstance(zero_point, bool):
        raise UserError(
            f"{where}: zero_point = {zero_point!r}", fix="write zero_point = true or false, or leave it out"
        )
    stepped = granularity == "step"
    if stepped and (candidates or not integer):
        raise UserError(
            f"{where}: a scale for every step beside {fmt.kind}", fix="use int, whose bits the recipe names"
        )
    if stepped and observer not in observers.FITTING and observer != "absmax":
        raise UserError(
            f"{where}: observer {observer!r} has no ranges by step", fix='write observer = "mse" or "absmax"'
        )
    if zero_point and not stepped:
        raise UserError(f"{where}: a zero point without a scale for every step", fix='write granularity = "step"')
    return ActivationSpec(fmt, observer, candidates, granularity, zero_point)


def _format(table: Mapping[str, Any], where: str) -> Format:
    keys = (*_FORMAT_KEYS, *_CODEBOOK_KEYS)
    options = {key: _integer(table, key, where, default=0, least=0) for key in keys if key in table}
    return formats.load(str(table.get("format", "")), options, where)


def _candidates(table: Mapping[str, Any], where: str, deployable: bool) -> tuple[Format, ...]:
    """Returns the formats to choose from: `auto`, or `fp` without its split, of so many bits; none if one is named."""
    name = str(table.get("format", ""))
    if name != "auto" and (name != "fp" or "bits" not in table):
        return ()
    if extra := {"exponent_bits", "mantissa_bits", *_CODEBOOK_KEYS} & table.keys():
        raise UserError(f"{where}: says bits, which leaves the split open, and {min(extra)}", fix="drop one of them")
    return formats.of_bits(name, _integer(table, "bits", where, default=0, least=2), where, deployable)


def _method(table: Any, where: str) -> MethodSpec:
    _known(table, None, where)
    name = str(table.get("name", ""))
    options = {k: v for k, v in table.items() if k != "name"}
    return MethodSpec(name, methods.options(name, options, where))


def _known(table: Any, keys: Sequence[str] | None, where: str) -> None:
    if not isinstance(table, Mapping):
        raise UserError(f"{where}: {table!r} is not a table", fix="write { key = value, … }")
    for key in table:
        if keys is not None and key not in keys:
            raise unknown("key", key, keys, where)


def _integer(table: Mapping[str, Any], key: str, where: str, *, default: int, least: int) -> int:
    value = table.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{where}: {key} = {value!r}", fix=f"write a whole number, at least {least}")
    return value
