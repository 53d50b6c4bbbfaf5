"""Quantized layers: they hold codes and scales, compute in torch, and emit their own ONNX nodes when traced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engines.errors import UserError
from exporter import formats
from exporter.formats import Format
from exporter.formats.codebook import Format as CodebookFormat
from exporter.ops import codebook, qdq
from exporter.tensors import CodebookTensor, Granularity, QuantizedTensor, fake_quantize, times_scale

ZERO_POINTS = ("weight_zero_point", "activation_zero_point")  # always zero
DERIVED = (*ZERO_POINTS, "weight_table", "weight_unit")  # what graphs need and a layer's spec says: files hold none
FloatLayer = nn.Linear | nn.Conv2d
FLOAT_LAYERS = (nn.Linear, nn.Conv2d)  # what a recipe's rules range over


WARRANTED = 4  # sub-vectors to a codeword, at least. Source: methods.md section 3: K ≤ o · i / d / 4


class StepContext:
    """The sampler's position during one call, [batch] int64, for quantizers whose scales depend on it."""

    def __init__(self) -> None:
        self.step: torch.Tensor | None = None

    @contextlib.contextmanager
    def at(self, step: torch.Tensor | None) -> Iterator[None]:
        self.step, before = step, self.step
        try:
            yield
        finally:
            self.step = before


@dataclass(frozen=True)
class LayerSpec:
    """How one layer is quantized; what the manifest holds of it. `multiplied`: it multiplies its input per channel.

    Not `deployable`: its formats are simulated, for study; no graph holds them.
    """

    weight: Format
    granularity: Granularity
    block_size: int
    activation: Format | None
    multiplied: bool = False
    deployable: bool = True

    def to_json(self) -> dict[str, Any]:
        return {
            "weight": _format_json(self.weight),
            "granularity": self.granularity,
            "block_size": self.block_size,
            "activation": _format_json(self.activation) if self.activation else None,
            "multiplied": self.multiplied,
            "deployable": self.deployable,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> LayerSpec:
        activation = _format(value["activation"], where) if value["activation"] else None
        weight = _format(value["weight"], where)
        flags = value["multiplied"], value["deployable"]
        return cls(weight, value["granularity"], value["block_size"], activation, *flags)

    @property
    def kinds(self) -> dict[str, str | None]:
        """The types as reports and plans spell them."""
        return {"weight": self.weight.kind, "activation": self.activation.kind if self.activation else None}

    @property
    def engine_types(self) -> dict[str, str | None]:
        """The types an engine holds the weight in and multiplies: codes that are looked up lie there as integers."""
        return self.kinds if self.weight.native else self.kinds | {"weight": self.weight.onnx_type.lower()}


def _format_json(fmt: Format) -> dict[str, Any]:
    return {"format": type(fmt).__module__.rpartition(".")[2], **vars_of(fmt)}


def _format(value: Mapping[str, Any], where: str) -> Format:
    return formats.load(value["format"], {k: v for k, v in value.items() if k != "format"}, where)


def vars_of(fmt: Format) -> dict[str, Any]:
    return {name: getattr(fmt, name) for name in type(fmt).__dataclass_fields__}  # type: ignore[attr-defined]


class QuantizedLayer(nn.Module):
    """A Linear or Conv2d whose weight is codes and scales.

    Linear: codes [in, out], so that MatMul takes them as they lie; channels along 1, blocks along 0.
    Conv2d: codes [out, in, kh, kw], channels along 0; with blocks [out, in·kh·kw], blocks along 1.
    """

    weight_codes: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    weight_table: torch.Tensor
    weight_unit: torch.Tensor
    activation_scale: torch.Tensor
    activation_zero_point: torch.Tensor
    input_multiplier: torch.Tensor

    def __init__(self, source: FloatLayer, spec: LayerSpec) -> None:
        """Takes geometry and bias from the float layer, not its weight: codes and scales are set or loaded after."""
        super().__init__()
        self.spec = spec
        self.conv = _conv_arguments(source) if isinstance(source, nn.Conv2d) else None
        self.weight_shape = tuple(source.weight.shape)
        self.bias = source.bias
        self._decoded: torch.Tensor | None = None
        self.axis = channel_axis(source, spec)
        self._register_weight(oriented_shape(source, spec))
        if spec.activation and not spec.weight.native:
            # what was looked up is quantized to the activation's type: exact, see `check_fits`
            self.register_buffer("weight_unit", torch.empty(()), persistent=False)
            zero = torch.zeros((), dtype=spec.activation.carrier)
            self.register_buffer("weight_zero_point", zero, persistent=False)
        if spec.multiplied:
            self.register_buffer("input_multiplier", torch.empty(multiplier_shape(source)))
        if spec.activation:
            self.register_buffer("activation_scale", torch.empty(()))
            zero = torch.zeros((), dtype=spec.activation.carrier)
            self.register_buffer("activation_zero_point", zero, persistent=False)

    def _register_weight(self, shape: tuple[int, ...]) -> None:
        fmt = self.spec.weight
        self.register_buffer("weight_codes", torch.empty(shape, dtype=fmt.carrier))
        self.register_buffer("weight_scale", torch.empty(self._scale_shape(shape)))
        if not fmt.native:
            self.register_buffer("weight_table", torch.empty(codebook.ENTRIES[fmt.onnx_type]), persistent=False)
        elif fmt.onnx_type == "INT8":
            # ONNX Runtime's AVX2 path turns int8 weights into uint8 and fails where their zero point is left out.
            zeros = torch.zeros(self._scale_shape(shape), dtype=torch.int8)
            self.register_buffer("weight_zero_point", zeros, persistent=False)

    def _scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        if self.spec.granularity == "tensor":
            return ()
        if self.spec.granularity == "channel":
            return (shape[self.axis],)
        return tuple(n // self.spec.block_size if d == self.axis else n for d, n in enumerate(shape))

    @property
    def weight_tensor(self) -> QuantizedTensor | CodebookTensor:
        spec = self.spec
        return QuantizedTensor(
            self.weight_codes, self.weight_scale, spec.weight, spec.granularity, self.axis, spec.block_size
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self._traced_weight() if torch.compiler.is_exporting() else self._weight(x.dtype)
        if self.spec.multiplied:
            x = x * self.input_multiplier
        if self.spec.activation:
            x = self._quantized_input(x, self.spec.activation)
        if self.conv:
            return F.conv2d(x, weight.reshape(self.weight_shape), self.bias, **self.conv)
        if torch.compiler.is_exporting():
            y = x @ weight
            return y if self.bias is None else y + self.bias
        return F.linear(x, weight.T, self.bias)

    def decode_once(self) -> None:
        """Keeps the decoded weight in memory from now on, fp32: sampling is faster, the codes stay what they are."""
        self._decoded = self.weight_tensor.dequantize()

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.float32 and self._decoded is not None:
            return self._decoded
        return self.weight_tensor.dequantize(dtype)

    def _quantized_input(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        if torch.compiler.is_exporting():
            return qdq.quantize_dequantize(x, self.activation_scale, self.activation_zero_point)
        return fake_quantize(x, self.activation_scale, fmt)

    def _traced_weight(self) -> torch.Tensor:
        spec, scale = self.spec, self.weight_scale
        if spec.weight.native:
            zero_point = self._buffers.get("weight_zero_point")
            return qdq.dequantize(self.weight_codes, scale, zero_point, self.axis, spec.block_size)
        values = codebook.dequantize(self.weight_codes, self.weight_table)
        if not spec.activation:
            return times_scale(values, scale, spec.granularity, self.axis, spec.block_size)
        codes = qdq.quantize(values, self.weight_unit, self.weight_zero_point)
        return qdq.dequantize(codes, scale, None, self.axis, spec.block_size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLayer:
        # .half() and .double() convert every floating-point buffer, and float8 counts as one: codes are not numbers.
        codes = {n: self._buffers[n] for n in ("weight_codes", *ZERO_POINTS) if n in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers |= codes
        return self

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, {self.spec.kinds}"


class CodebookLayer(QuantizedLayer):
    """A Linear or Conv2d whose weight is codes and a codebook of the layer's own.

    codes [out, n / vector_size] of the weight's rows [out, n], codebook [codebook_size, vector_size]; scale [out] with
    granularity "channel", [] beside quantized activations, else none: the codebook has it.
    """

    weight_codebook: torch.Tensor

    def _register_weight(self, shape: tuple[int, ...]) -> None:
        fmt: Any = self.spec.weight
        self.register_buffer("weight_codes", torch.empty(shape, dtype=fmt.carrier))
        self.register_buffer("weight_codebook", torch.empty(fmt.codebook_size, fmt.vector_size))
        if self.spec.granularity == "channel" or self.spec.activation:
            self.register_buffer("weight_scale", torch.empty(self._scale_shape(shape)))

    @property
    def weight_tensor(self) -> CodebookTensor:
        scale = self._buffers.get("weight_scale")
        return CodebookTensor(self.weight_codes, self.weight_codebook, scale, self.spec.weight)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        return self._turned(super()._weight(dtype))

    def _turned(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the weight as a MatMul or a convolution takes it, of its rows [out, n]."""
        return rows if self.conv else rows.T

    def _traced_weight(self) -> torch.Tensor:
        rows = codebook.dequantize(self.weight_codes, self.weight_codebook)
        if self.spec.activation:
            codes = qdq.quantize(rows, self.weight_unit, self.weight_zero_point)
            rows = qdq.dequantize(codes, self.weight_scale, None, 0, 0)
        elif self.spec.granularity == "channel":
            rows = times_scale(rows, self.weight_scale, "channel", 0, 0)
        return self._turned(rows)


def quantized_layer(source: FloatLayer, spec: LayerSpec) -> QuantizedLayer:
    """Returns the layer that holds what `spec` says in place of the float weight."""
    return CodebookLayer(source, spec) if spec.weight.learned else QuantizedLayer(source, spec)


def _conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def channel_axis(layer: FloatLayer, spec: LayerSpec) -> int:
    """Returns the axis of the codes that channels, or blocks, lie along."""
    if spec.weight.learned:
        return 0
    return int(isinstance(layer, nn.Conv2d) == (spec.granularity == "block"))


def oriented_shape(layer: FloatLayer, spec: LayerSpec) -> tuple[int, ...]:
    """Returns the shape the codes lie in."""
    shape = tuple(layer.weight.shape)
    if isinstance(spec.weight, CodebookFormat):
        return shape[0], math.prod(shape[1:]) // spec.weight.vector_size
    if isinstance(layer, nn.Conv2d):
        return (shape[0], shape[1] * shape[2] * shape[3]) if spec.granularity == "block" else shape
    return shape[::-1]


def oriented(layer: FloatLayer, spec: LayerSpec) -> torch.Tensor:
    """Returns the float weight in the orientation of the codes; those of a codebook stand for its rows [out, n]."""
    weight: torch.Tensor = layer.weight.detach()
    if spec.weight.learned:
        return weight.flatten(1)
    if isinstance(layer, nn.Conv2d):
        return weight.flatten(1) if spec.granularity == "block" else weight
    return weight.T


def check_fits(path: str, layer: FloatLayer, spec: LayerSpec) -> None:
    """Raises a UserError if the layer's width is no multiple of the block size, or its formats do not go together."""
    if isinstance(spec.weight, CodebookFormat):
        _check_codebook(path, layer, spec.weight)
    elif not spec.weight.native and spec.deployable:
        _check_looked_up(path, spec)
    if spec.granularity != "block":
        return
    shape = oriented_shape(layer, spec)
    width = shape[1] if isinstance(layer, nn.Conv2d) else shape[0]
    if width % spec.block_size:
        divisors = [d for d in (16, 32, 64, 128, 256) if width % d == 0]
        raise UserError(
            f"layer {path!r}: its {width} inputs are no multiple of block_size {spec.block_size}",
            fix=f"use block_size {' or '.join(map(str, divisors))}" if divisors else 'use granularity "channel" for it',
        )


def fitting(path: str, layer: FloatLayer, spec: LayerSpec, choices: Sequence[Format]) -> tuple[Format, ...]:
    """Returns the weight formats that the layer can have and an engine multiply; if there is none, raises why.

    A format that stands alone was asked for by name: it may meet any activation.
    """
    found, faults = [], []
    for fmt in choices:
        try:
            check_fits(path, layer, replace(spec, weight=fmt))
        except UserError as error:
            faults.append(error)
        else:
            free = len(choices) == 1 or not spec.activation or not spec.deployable
            if free or fmt.kind.startswith(spec.activation.kind[:2]):  # type: ignore[union-attr]
                found.append(fmt)
    if not found and faults:
        raise faults[0]
    if not found:
        raise UserError(f"layer {path!r}: none of the formats goes with its activations", fix="name one")
    return tuple(found)


def _check_looked_up(path: str, spec: LayerSpec) -> None:
    """Raises a UserError if no graph can hold the table, or no matmul takes what is looked up in it.

    A looked-up weight meets a quantized activation in the activation's type: each of its values must be in that.
    """
    values, activation = spec.weight.values, spec.activation
    if not torch.equal(values.half().float(), values):
        raise UserError(
            f"layer {path!r}: not all values of {spec.weight} exist in fp16, which graphs compute in",
            fix="use at most 4 exponent bits, or E5M2; or study it with deployable = false in the rule",
        )
    if activation is None:
        return
    what = f"layer {path!r}: {spec.weight.kind} weights ({spec.weight}) with {activation.kind} activations"
    if activation.kind != "fp8" or not torch.equal(activation.round(values), values):
        raise UserError(
            f"{what}: not all values of the one exist in the other, so no engine multiplies them",
            fix="use fp8 activations (E4M3) and at most 3 mantissa bits in weights, or float activations",
        )


def _check_codebook(path: str, layer: FloatLayer, fmt: CodebookFormat) -> None:
    """Raises a UserError if sub-vectors do not fill the rows, or codewords are too many for so few of them."""
    rows, width = layer.weight.shape[0], layer.weight[0].numel()
    what = f"layer {path!r}: a codebook of {fmt.codebook_size} × {fmt.vector_size}"
    unit = fmt.vector_size * (2 if fmt.bits == 6 else 1)
    if width % unit:
        why = "codes of 6 bits are stored in pairs" if fmt.bits == 6 else "each code stands for so many"
        raise UserError(
            f"{what}: its rows of {width} weights are no multiple of {unit} ({why})",
            fix="use another vector_size for it, or keep it",
        )
    vectors = rows * width // fmt.vector_size
    if fmt.codebook_size * WARRANTED > vectors:
        raise UserError(
            f"{what} for {vectors} sub-vectors: at least {fmt.codebook_size * WARRANTED} warrant one",
            fix="use a smaller codebook_size, or keep such layers (fewer_weights_than in a rule before this one)",
        )


def multiplier_shape(layer: FloatLayer) -> tuple[int, ...]:
    """Returns the shape in which a factor per input channel multiplies what the layer reads."""
    channels = layer.weight.shape[1]
    return (channels, 1, 1) if isinstance(layer, nn.Conv2d) else (channels,)


def multiply_input(layer: FloatLayer, multiplier: torch.Tensor) -> None:
    """Makes a float layer multiply what it reads by `multiplier` [in]."""
    factor = multiplier.reshape(multiplier_shape(layer))
    layer.register_buffer("input_multiplier", factor)
    layer.register_forward_pre_hook(lambda _layer, args: (args[0] * factor, *args[1:]))


class SplitConv2d(nn.Module):
    """A convolution of a concatenation as the sum of two, so that each half has quantizers of its own.

    Source: Q-Diffusion, Li et al., arXiv 2302.04304, section 4.2, "shortcut-splitting quantization".
    """

    def __init__(self, conv: nn.Conv2d, first: int) -> None:
        super().__init__()
        self.first = first
        self.hidden = _slice_of(conv, slice(0, first), conv.bias)
        self.skip = _slice_of(conv, slice(first, conv.in_channels), None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.hidden(x[:, : self.first]) + self.skip(x[:, self.first :])  # type: ignore[no-any-return]


def _slice_of(conv: nn.Conv2d, channels: slice, bias: Any) -> nn.Conv2d:
    arguments = _conv_arguments(conv)
    with torch.device("meta"):  # its weight is a view of the other's
        part = nn.Conv2d(channels.stop - channels.start, conv.out_channels, conv.kernel_size, bias=False, **arguments)  # type: ignore[arg-type]
    part.weight = nn.Parameter(conv.weight[:, channels], requires_grad=False)
    part.register_parameter("bias", bias)
    return part


def split_inputs(model: nn.Module, splits: Mapping[str, int]) -> None:
    """Splits convolutions of concatenations, path → channels of the first part, in place."""
    for path, first in splits.items():
        conv = float_layer(model, path)
        assert isinstance(conv, nn.Conv2d), path
        put(model, path, SplitConv2d(conv, first))


@dataclass(frozen=True)
class LayerFacts:
    """What a recipe's rules may ask about a layer; `channels` is the fewer of in and out, per group."""

    conv: bool
    channels: int
    grouped: bool
    weights: int


def facts(layer: FloatLayer) -> LayerFacts:
    """Returns what rules may ask about a layer."""
    groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
    narrow = min(layer.weight.shape[0] // groups, layer.weight.shape[1])
    return LayerFacts(isinstance(layer, nn.Conv2d), narrow, groups > 1, layer.weight.numel())


def float_layer(model: nn.Module, path: str) -> FloatLayer:
    """Returns the layer at `path`, which must be one that recipes range over."""
    layer = model.get_submodule(path)
    assert isinstance(layer, FLOAT_LAYERS), path
    return layer


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Puts `module` at `path`; through _modules, since a name like to_out.0 lies in a ModuleList."""
    owner, _, leaf = path.rpartition(".")
    model.get_submodule(owner)._modules[leaf] = module


def float_layers(model: nn.Module) -> dict[str, FloatLayer]:
    """Returns the layers a recipe may quantize, by path, in the model's own order."""
    return {path: module for path, module in model.named_modules() if isinstance(module, FLOAT_LAYERS)}
