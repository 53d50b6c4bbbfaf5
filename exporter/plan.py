"""Plans: what a recipe means for one model, layer by layer, before anything is calibrated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from engines.errors import UserError
from exporter import methods
from exporter.attention import PointSpec, add_points, attentions, points_of
from exporter.checkpoint import Checkpoint
from exporter.formats import Format
from exporter.models import Family
from exporter.modules import float_layers, split_inputs
from exporter.recipe import ActivationSpec, Recipe, Rule
from exporter.specs import LayerSpec, facts, fitting


@dataclass(frozen=True)
class Plan:
    """Every layer's rule, how those that are not kept are quantized, and which convolutions were split at a skip."""

    rules: Mapping[str, Rule]
    specs: Mapping[str, LayerSpec]
    splits: Mapping[str, int]
    attentions: Mapping[str, Rule] = field(default_factory=dict)
    products: Mapping[str, ActivationSpec] = field(default_factory=dict)  # of every point of an attention
    points: Mapping[str, PointSpec] = field(default_factory=dict)  # what came of it

    @property
    def deployable(self) -> bool:
        return all(spec.deployable for spec in self.specs.values())

    def allowed(self) -> dict[str, str]:
        """Returns what an engine may run layers and attentions in instead of what is asked, where a rule says so."""
        rules = {path: self.rules[path] for path in self.specs} | dict(self.attentions)
        return {path: rule.allow for path, rule in rules.items() if rule.allow}

    def choices(self, path: str) -> tuple[Format, ...]:
        """Returns the weight formats that the layer's method chooses from."""
        weight = self.rules[path].weight
        assert weight is not None
        return weight.choices if weight.candidates else (self.specs[path].weight,)

    def method(self, path: str) -> tuple[Any, Any]:
        """Returns the method of the layer's weight, and its options."""
        spec = self.rules[path].method
        assert spec is not None
        return methods.load(spec.name), spec.options

    def multiplying(self, paths: Sequence[str]) -> Plan:
        """Returns the plan with layers that multiply their own input."""
        return replace(self, specs=dict(self.specs) | {p: replace(self.specs[p], multiplied=True) for p in paths})


def plan_of(checkpoint: Checkpoint, recipe: Recipe) -> Plan:
    """Returns how a recipe would quantize a model, from its shapes alone."""
    return plan_layers(checkpoint.skeleton(), checkpoint.family, recipe)


def plan_layers(model: nn.Module, family: Family, recipe: Recipe) -> Plan:
    """Assigns rules to layers, and splits the convolutions that they say to split, in place."""
    layers = float_layers(model)
    blocks, found = family.blocks(model), attentions(model)
    assigned = recipe.assign({path: facts(layer) for path, layer in layers.items()}, blocks, found)
    of_attentions = recipe.attention_rules(found, blocks)
    asked = {path: rule.activation for path, rule in of_attentions.items() if rule.activation is not None}
    add_points(model, list(asked))
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
        try:
            choices = fitting(path, layers[path], spec, rule.weight.choices)
        except UserError as error:
            where = f"recipe {recipe.name!r}, rule {recipe.rules.index(rule) + 1}"
            raise UserError(f"{where}: {error.what}", fix=error.fix) from error
        specs[path] = replace(spec, weight=choices[0])
        if rule.weight.candidates:
            rules[path] = replace(rule, weight=replace(rule.weight, format=choices[0], candidates=choices))
    products = {point: rule for path, rule in asked.items() for point in points_of(path)}
    return Plan(rules, specs, splits, of_attentions, products)
