"""Attention whose products are quantized: queries and keys, probabilities and values.

The four are points of a module `products` inside the attention: in a float model a point shows what passes, in a
quantized one it rounds it. With a scale for every step each is multiplied before and undone after its product, as in
`exporter.modules.SteppedLayer`; what undoes queries and keys is one factor with the softmax's scale.
Source: methods.md section 2, "Attention products are undone with 1/(r_q r_k) at the softmax scale".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from exporter import formats, steps
from exporter.formats import Format
from exporter.modules import clipped, put, step_unit
from exporter.ops import qdq
from exporter.specs import format_json
from exporter.straight_through import straight_through

POINTS = ("query", "key", "probabilities", "value")
NAME = "products"


@dataclass(frozen=True)
class PointSpec:
    """How one point is quantized: with one scale, or `steps` of them."""

    format: Format
    steps: int = 0

    def to_json(self) -> dict[str, Any]:
        return {"activation": format_json(self.format), "steps": self.steps}

    @property
    def engine_type(self) -> str:
        """The type that an engine multiplies: integers of fewer bits are INT8 that stay within their ends."""
        return "int8" if self.format.carrier == torch.int8 else self.format.kind

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> PointSpec:
        name = value["activation"]["format"]
        options = {k: v for k, v in value["activation"].items() if k != "format"}
        return cls(formats.load(name, options, where), value["steps"])


class Point(nn.Module):
    """What passes through, as it is."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        return x, 1.0


class QuantizedPoint(nn.Module):
    """Quantizes what passes; returns it in units of `unit`, and what a product of it is multiplied by, [rows, 1, 1, 1].

    activation_scale [] or [steps].
    """

    activation_scale: torch.Tensor
    activation_zero_point: torch.Tensor
    activation_unit: torch.Tensor
    activation_wide_unit: torch.Tensor
    columns: tuple[int, ...] = ()  # of the graph's table, while it is traced

    def __init__(self, spec: PointSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("activation_scale", torch.empty(spec.steps) if spec.steps else torch.empty(()))
        self.register_buffer("activation_zero_point", torch.zeros((), dtype=spec.format.carrier), persistent=False)
        if spec.steps:
            self.register_buffer("activation_unit", torch.empty(()), persistent=False)
            self.register_buffer("activation_wide_unit", torch.empty((), dtype=torch.float32), persistent=False)

    def scale(self) -> torch.Tensor:
        return self.activation_scale

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        if torch.compiler.is_exporting():
            return self._traced(x)
        wide, unit, undo = self._in_units(x)
        found = straight_through(wide, unit, self.spec.format).to(x.dtype)
        return found, undo.to(x.dtype) if isinstance(undo, torch.Tensor) else undo

    def input_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes that what passes is multiplied as."""
        wide, unit, _ = self._in_units(x)
        return self.spec.format.encode(wide / unit)

    def _in_units(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | float]:
        """Returns what is rounded, in fp32 or wider, its scale, and what undoes the step's factor in it."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = self.scale().to(wide.dtype)
        if not self.spec.steps:
            return wide, scale, 1.0
        unit = step_unit(scale).to(wide.dtype)
        undo = (scale / unit)[steps.now().step].reshape(-1, *[1] * (x.ndim - 1))
        return wide * (1 / undo), unit, undo

    def _traced(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | float]:
        if not self.spec.steps:
            x = self._clipped(x, self.activation_scale)
            return qdq.quantize_dequantize(x, self.activation_scale, self.activation_zero_point), 1.0
        undo = steps.now().columns[self.columns[0]].reshape(-1, *[1] * (x.ndim - 1))
        wide = self._clipped(x.float() * (1 / undo), self.activation_wide_unit)
        codes = qdq.quantize_dequantize(
            wide, self.activation_unit, self.activation_zero_point, self.activation_wide_unit
        )
        return codes, undo.to(x.dtype)

    def _clipped(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        fmt = self.spec.format
        narrow = fmt.carrier == torch.int8 and fmt.bits < 8
        return clipped(x, scale, fmt) if narrow else x

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedPoint:
        zero = self.activation_zero_point  # float8 counts as a floating-point type, and is none here
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.activation_zero_point = zero.to(self.activation_zero_point.device)
        return self


class Products(nn.Module):
    """The points of one attention."""

    query: nn.Module
    key: nn.Module
    probabilities: nn.Module
    value: nn.Module

    def __init__(self) -> None:
        super().__init__()
        for name in POINTS:
            self.add_module(name, Point())

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> torch.Tensor:
        """Computes softmax(scale · query keyᵀ + mask) value, [batch, heads, tokens, size]."""
        query, undo_query = self.query(query)
        # Turned before it is quantized: nothing may lie between a quantizer and its product.
        key, undo_key = self.key(key.transpose(-1, -2))
        scores = _product(query, key) * (scale * undo_query * undo_key)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        probabilities, undo_probabilities = self.probabilities(scores.softmax(dim=-1))
        value, undo_value = self.value(value)
        undo = undo_probabilities * undo_value
        found = _product(probabilities, value)
        return found * undo if isinstance(undo, torch.Tensor) else found


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Returns a b; of fp16 numbers sums are in fp32, as in `exporter.runners.WideSums`."""
    if a.dtype == torch.float16 and not torch.compiler.is_exporting():
        return (a.float() @ b.float()).half()
    return a @ b


class _Sdpa(TorchFunctionMode):
    """Has the points of one attention see what its products are of."""

    def __init__(self, products: Products) -> None:
        super().__init__()
        self._products = products

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        return self._attend(*args, **(kwargs or {}))

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        assert not dropout_p and not is_causal and not enable_gqa, "no denoiser's attention has these"
        found: torch.Tensor = self._products(query, key, value, attn_mask, scale or 1 / math.sqrt(query.shape[-1]))
        return found


def attentions(model: nn.Module) -> list[str]:
    """Returns the paths of the attentions in a model."""
    return [path for path, module in model.named_modules() if hasattr(module, "processor") and hasattr(module, "to_q")]


def add_points(model: nn.Module, paths: Sequence[str]) -> None:
    """Gives attentions their points, which change nothing yet but the order of what is computed."""
    for path in paths:
        attention = model.get_submodule(path)
        products = Products()
        attention.add_module(NAME, products)
        attention.forward = _with_products(attention.forward, products)


def _with_products(forward: Any, products: Products) -> Any:
    def attend(*args: Any, **kwargs: Any) -> Any:
        with _Sdpa(products):
            return forward(*args, **kwargs)

    return attend


def points_of(path: str) -> list[str]:
    """Returns the paths of one attention's points."""
    return [f"{path}.{NAME}.{name}" for name in POINTS]


def attention_of(point: str) -> str:
    return point.rpartition(f".{NAME}.")[0]


def quantize_points(model: nn.Module, specs: Mapping[str, PointSpec]) -> None:
    """Makes points quantize, in place; their scales are set or loaded after."""
    for path, spec in specs.items():
        put(model, path, QuantizedPoint(spec))


def quantized_products(model: nn.Module) -> dict[str, Products]:
    """Returns the products of attentions whose points are quantized, by path."""
    found = {path: module for path, module in model.named_modules() if isinstance(module, Products)}
    return {path: one for path, one in found.items() if all(isinstance(p, QuantizedPoint) for p in one.children())}


def quantized_points(model: nn.Module) -> dict[str, QuantizedPoint]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedPoint)}
