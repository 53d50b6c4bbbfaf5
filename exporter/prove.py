"""Proof that a builder takes what a recipe asks for: a small layer of each kind, lowered and built as models are.

The layers stand side by side in one small model; should it be refused, each is built by itself, and those at fault are
named.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from engines import artifacts
from engines.artifacts import Artifact, Json, Request
from engines.audit import OTHER, AuditRow, audit
from engines.build import build
from engines.errors import UserError
from exporter import lower, quantized
from exporter.attention import PointSpec, add_points, points_of, quantize_points
from exporter.audits import types
from exporter.lower.check import check_graph
from exporter.lower.trace import inputs_of, trace_model
from exporter.models import Axis, Family, Tensors, TensorSpec
from exporter.modules import quantized_layer
from exporter.quantized import stored_tensors
from exporter.specs import FloatLayer, LayerSpec
from exporter.step_table import table_of
from exporter.support import NARROW, Kind

WIDTH = 256  # of a layer: weights that a builder expanded stand out against what it adds of its own
SIDE = 8  # of what a convolution sees; its square is how many tokens a linear does
STEPS = 2
SCALE = 2.0**-6  # of everything: a proof has no numbers to get right
INT4_CODES = 8


@dataclass(frozen=True)
class Proof:
    """What came of one kind: why it was refused, or what it would run as, and the engine's kernels and their types."""

    kind: Kind
    refused: str | None
    kernels: tuple[str, ...] = ()


def prove(kinds: Sequence[Kind], backend: str, gpu: str | None, dtype: str) -> list[Proof]:
    """Builds one layer of each kind for a GPU."""
    if not kinds:
        return []
    with tempfile.TemporaryDirectory() as folder:
        try:
            return _proved(kinds, backend, gpu, dtype, Path(folder))
        except UserError as error:
            if len(kinds) == 1:
                return [Proof(kinds[0], error.what)]
    return [proof for kind in kinds for proof in prove([kind], backend, gpu, dtype)]


def _proved(kinds: Sequence[Kind], backend: str, gpu: str | None, dtype: str, folder: Path) -> list[Proof]:
    probe = Probe(kinds)
    graph = _graph(probe, dtype, folder / "graph")
    rows = {
        row.layer: row for row in audit(build(graph, backend, folder / "engine", gpu=gpu)) if row.layer in probe.kinds
    }
    return [_proof(kind, rows[name]) for name, kind in zip(probe.kinds, kinds, strict=True)]


def _proof(kind: Kind, row: AuditRow) -> Proof:
    kernels = tuple(f"{name} of {types(row.got)}" for name in dict.fromkeys(row.kinds))
    other = f"it is built, and runs as {types(row.got)}: {row.reason or 'not as asked'}"
    return Proof(kind, other if row.status == OTHER else None, kernels)


class Probe(Family):
    """A family of one small model: a layer of each kind, side by side, each with an input of its own."""

    CLASS = "Probe"

    def __init__(self, kinds: Sequence[Kind]) -> None:
        self.kinds = {f"kind{number}": _small(kind) for number, kind in enumerate(kinds)}

    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"x_{name}", "float", ("batch", *_input(kind))) for name, kind in self.kinds.items())

    def output(self) -> TensorSpec:
        return TensorSpec("y", "float", ("batch", len(self.kinds)))

    def axes(self) -> dict[str, Axis]:
        return {"batch": Axis(1, 2, 4)}

    def blocks(self, model: nn.Module) -> list[str]:
        return []

    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors:
        raise AssertionError("a probe is built, and never sampled")

    def call(self, model: nn.Module, feeds: Mapping[str, Any]) -> torch.Tensor:
        found = [model.get_submodule(name)(x) for name, x in zip(self.kinds, feeds.values(), strict=True)]
        return torch.cat([y.flatten(1).mean(dim=1, keepdim=True) for y in found], dim=1)

    def build(self) -> nn.Module:
        model = nn.Module()
        for name, kind in self.kinds.items():
            model.add_module(name, _attention() if isinstance(kind.spec, PointSpec) else _layer(kind))
        paths = [name for name, kind in self.kinds.items() if isinstance(kind.spec, PointSpec)]
        add_points(model, paths)
        quantize_points(model, self.points())
        return model.eval().requires_grad_(False)

    def specs(self) -> dict[str, LayerSpec]:
        return {name: kind.spec for name, kind in self.kinds.items() if isinstance(kind.spec, LayerSpec)}

    def points(self) -> dict[str, PointSpec]:
        attentions = {name: kind.spec for name, kind in self.kinds.items() if isinstance(kind.spec, PointSpec)}
        return {path: spec for name, spec in attentions.items() for path in points_of(name)}


def _small(kind: Kind) -> Kind:
    return replace(kind, spec=replace(kind.spec, steps=STEPS)) if kind.spec.steps else kind


def _input(kind: Kind) -> tuple[int, ...]:
    if "convolution" in kind.what:
        return (_channels(kind), SIDE, SIDE)
    return (SIDE * SIDE, WIDTH)


def _channels(kind: Kind) -> int:
    return NARROW // 2 if kind.what.startswith("narrow") else WIDTH


def _layer(kind: Kind) -> nn.Module:
    assert isinstance(kind.spec, LayerSpec)
    source: FloatLayer = nn.Linear(WIDTH, WIDTH)
    if "convolution" in kind.what:
        width = _channels(kind)
        groups = WIDTH // NARROW if "grouped" in kind.what else 1
        source = nn.Conv2d(width, WIDTH, kernel_size=3, padding=1, groups=groups)
    return quantized_layer(source, kind.spec)


def _attention() -> nn.Module:
    from diffusers.models.attention_processor import Attention

    return cast(nn.Module, Attention(WIDTH, heads=WIDTH // 64, dim_head=64))


class _Numbers:
    """What a probe stores, drawn: codes of every value, scales of one size."""

    def __init__(self, model: nn.Module) -> None:
        generator = torch.Generator().manual_seed(0)
        for name, tensor in model.named_buffers():
            _draw(name.rpartition(".")[2], tensor, generator)
        self._tensors = dict(stored_tensors(model))

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def raw(self, name: str) -> torch.Tensor:
        return self._tensors[name]


def _draw(leaf: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """Fills what a layer holds; integers of 4 bits are within those of any more."""
    if leaf == "weight_codes" and not tensor.dtype.is_floating_point:
        low, high = (0, 2 * INT4_CODES) if tensor.dtype == torch.uint8 else (1 - INT4_CODES, INT4_CODES)
        tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator))
    elif leaf in ("weight_codes", "weight_codebook"):
        tensor.copy_(torch.randn(tensor.shape, generator=generator).to(torch.float8_e4m3fn).float())
    else:
        tensor.copy_(torch.full(tensor.shape, SCALE))


def _graph(probe: Probe, dtype: str, folder: Path) -> Artifact:
    """Lowers the probe into a Graph artifact, as `exporter.lower` does a model."""
    model = probe.build()
    stored, specs = _Numbers(model), probe.specs()
    table = table_of(stored, {**specs, **probe.points()})
    inputs = inputs_of(probe, table, "index")
    traced = trace_model(probe.build, probe, dtype, table, "index")
    graph = lower.run_passes(traced, probe, stored, specs, inputs, table)
    shapes = {path: layer.weight_shape for path, layer in quantized.quantized_layers(model).items()}
    with artifacts.drafting(folder, Request("graph", {}, {}, {})) as draft:
        lower.write(graph, draft.path / "model.onnx")
        draft.info = _info(probe, inputs, dtype) | check_graph(draft.path / "model.onnx", specs, shapes)
    return artifacts.open_artifact(folder, "graph")


def _info(probe: Probe, inputs: Sequence[TensorSpec], dtype: str) -> Json:
    return {
        "dtype": dtype,
        "inputs": lower.input_entries(inputs, dtype),
        "axes": {name: axis.to_json() for name, axis in probe.axes().items()},
        "layers": {path: spec.engine_types for path, spec in probe.specs().items()},
        "points": {path: spec.engine_type for path, spec in probe.points().items()},
        "allowed": {},
        "stored_bytes": {},
    }
