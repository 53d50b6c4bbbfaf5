"""Quantized layers: they hold codes and scales, compute in torch, and emit their own ONNX nodes when traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from exporter import steps
from exporter.formats import Format
from exporter.ops import codebook, qdq
from exporter.specs import FLOAT_LAYERS, FloatLayer, LayerSpec, channel_axis, oriented_shape
from exporter.tensors import CodebookTensor, QuantizedTensor, fake_quantize, times_scale

ZERO_POINTS = ("weight_zero_point", "channel_zero_point", "activation_zero_point")  # always zero
UNITS = ("activation_unit", "activation_wide_unit")
# What graphs need and the rest of a layer says: files hold none.
DERIVED = (*ZERO_POINTS, *UNITS, "weight_table", "weight_unit")


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
        # TensorRT-RTX has no convolution of INT4 weights beside INT8 inputs: there they are looked up, as INT8.
        integers = spec.weight.native and spec.weight.onnx_type == "INT4"
        short = self.conv is not None and spec.activation is not None and integers
        self.looked_up = short or not spec.weight.native
        self._register_weight(oriented_shape(source, spec))
        if spec.activation and self.looked_up:
            # what was looked up is quantized to the activation's type: exact, see `check_fits`
            self.register_buffer("weight_unit", torch.empty(()), persistent=False)
            zero = torch.zeros((), dtype=spec.activation.carrier)
            self.register_buffer("weight_zero_point", zero, persistent=False)
            if short and spec.granularity == "channel":
                # without one of its own ONNX Runtime gives the weight that of the unit, which is a scalar
                zeros = torch.zeros(self.weight_shape[0], dtype=torch.int8)
                self.register_buffer("channel_zero_point", zeros, persistent=False)
        if spec.multiplied:
            self.register_buffer("input_multiplier", torch.empty(multiplier_shape(source)))
        if spec.activation:
            self._register_activation(spec.activation)

    def _register_activation(self, fmt: Format) -> None:
        self.register_buffer("activation_scale", torch.empty(()))
        self.register_buffer("activation_zero_point", torch.zeros((), dtype=fmt.carrier), persistent=False)

    def _register_weight(self, shape: tuple[int, ...]) -> None:
        fmt = self.spec.weight
        self.register_buffer("weight_codes", torch.empty(shape, dtype=fmt.carrier))
        self.register_buffer("weight_scale", torch.empty(self._scale_shape(shape)))
        if self.looked_up:
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
        return self._product(x, weight, self.bias)

    def _product(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, **conv: Any) -> torch.Tensor:
        if self.conv:
            return F.conv2d(x, weight.reshape(self.weight_shape), bias, **{**self.conv, **conv})
        if torch.compiler.is_exporting():
            y = x @ weight
            return y if bias is None else y + bias
        return F.linear(x, weight.T, bias)

    def input_codes(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the codes that an input is multiplied as."""
        fmt = self.spec.activation
        assert fmt is not None
        if self.spec.multiplied:
            x = x * self.input_multiplier
        return fmt.encode(x / self.activation_scale)

    def decode_once(self) -> None:
        """Keeps the decoded weight in memory from now on, fp32: sampling is faster, the codes stay what they are."""
        self._decoded = self.weight_tensor.dequantize()

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        if dtype == torch.float32 and self._decoded is not None:
            return self._decoded
        return self.weight_tensor.dequantize(dtype)

    def _quantized_input(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        if not torch.compiler.is_exporting():
            return fake_quantize(x, self.activation_scale, fmt)
        if self.spec.narrow:
            x = clipped(x, self.activation_scale, fmt)
        return qdq.quantize_dequantize(x, self.activation_scale, self.activation_zero_point)

    def _traced_weight(self) -> torch.Tensor:
        spec, scale = self.spec, self.weight_scale
        if not self.looked_up:
            zero_point = self._buffers.get("weight_zero_point")
            return qdq.dequantize(self.weight_codes, scale, zero_point, self.axis, spec.block_size)
        values = codebook.dequantize(self.weight_codes, self.weight_table)
        if not spec.activation:
            return times_scale(values, scale, spec.granularity, self.axis, spec.block_size)
        codes = qdq.quantize(values, self.weight_unit, self.weight_zero_point)
        return qdq.dequantize(codes, scale, self._buffers.get("channel_zero_point"), self.axis, spec.block_size)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLayer:
        # .half() and .double() convert every floating-point buffer, and float8 counts as one: codes are not numbers.
        codes = {n: self.get_buffer(n) for n in ("weight_codes", *ZERO_POINTS) if n in self._buffers}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._buffers |= {name: value.to(self.get_buffer(name).device) for name, value in codes.items()}
        return self

    def extra_repr(self) -> str:
        return f"{self.weight_shape}, {self.spec.kinds}"


def clipped(x: torch.Tensor, scale: torch.Tensor, fmt: Format) -> torch.Tensor:
    """Emits what keeps x within the ends of integers that have fewer bits than those that carry their codes."""
    return qdq.clip(x, scale * -(fmt.max_value + 1), scale * fmt.max_value)


class SteppedLayer(QuantizedLayer):
    """A layer whose activation has a scale for every sampling step, in a graph whose scales are constants.

    What comes in is multiplied by unit / D(step) in fp32, quantized by `unit`, multiplied with the weight, and
    multiplied by D(step) / unit, before the bias. `shifted`, the codes are those of x / D + z less 2^(b−1), so that
    TensorRT, which knows no zero points, multiplies them; what the shift adds to an output channel is taken off.
    activation_scale D [steps], activation_shift z − 2^(b−1) [steps], shift_sum unit · Σ weight [out].
    Source: methods.md section 2, "Lowering a per-step scale exactly".
    """

    activation_shift: torch.Tensor
    shift_sum: torch.Tensor
    activation_unit: torch.Tensor
    activation_wide_unit: torch.Tensor
    columns: tuple[int, ...] = ()  # of the graph's table, while it is traced: those of D / unit and of the shift

    def _register_activation(self, fmt: Format) -> None:
        self.register_buffer("activation_scale", torch.empty(self.spec.steps))
        self.register_buffer("activation_zero_point", torch.zeros((), dtype=fmt.carrier), persistent=False)
        self.register_buffer("activation_unit", torch.empty(()), persistent=False)
        self.register_buffer("activation_wide_unit", torch.empty((), dtype=torch.float32), persistent=False)
        if self.spec.shifted:
            self.register_buffer("activation_shift", torch.empty(self.spec.steps))
            self.register_buffer("shift_sum", torch.empty(self.weight_shape[0], dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        fmt, traced = self.spec.activation, torch.compiler.is_exporting()
        assert fmt is not None
        weight = self._traced_weight() if traced else self._weight(x.dtype)
        undo, shift = self._position(x)
        wide, unit = self._in_units(x, undo, shift)
        if traced:
            if self.spec.narrow:
                wide = clipped(wide, unit, fmt)
            codes = qdq.quantize_dequantize(wide, self.activation_unit, self.activation_zero_point, unit)
        else:
            codes = (fmt.round(wide / unit) * unit).to(x.dtype)
        padded = {"padding": 0} if self.spec.shifted else {}
        y = self._product(codes, weight, None, **padded) * undo.to(x.dtype)
        if self.spec.shifted:
            y = y - (shift * undo).to(x.dtype) * self._along_outputs(self.shift_sum.to(x.dtype))
        return y if self.bias is None else y + self._along_outputs(self.bias)

    def input_codes(self, x: torch.Tensor) -> torch.Tensor:
        assert self.spec.activation is not None
        wide, unit = self._in_units(x, *self._position(x))
        return self.spec.activation.encode(wide / unit)

    def _in_units(self, x: torch.Tensor, undo: torch.Tensor, shift: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what the quantizer sees, in fp32 or wider, and its scale."""
        if self.spec.shifted and self.conv:
            x = F.pad(x, self._padding())  # zeros, which must come before the shift
        factor = 1 / undo
        if self.spec.multiplied:
            factor = self.input_multiplier.to(factor.dtype) * factor
        wide = (x if x.dtype == torch.float64 else x.float()) * factor
        traced = torch.compiler.is_exporting()
        unit = self.activation_wide_unit if traced else step_unit(self.activation_scale).to(wide.dtype)
        return wide + shift * unit if self.spec.shifted else wide, unit

    def sum_shift(self) -> None:
        """Sets what a shift of 1 adds to every output, once weight and scales are set."""
        if self.spec.shifted:
            weight = self.weight_tensor.dequantize()
            sums = weight.sum(dim=[d for d in range(weight.ndim) if d != self._outputs()])
            self.shift_sum = step_unit(self.activation_scale) * sums

    def _outputs(self) -> int:
        """Returns the axis of the codes that outputs lie along."""
        return 0 if self.conv else 1

    def _position(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns D / unit and the shift of every row of x, in fp32 or wider, so that they broadcast over it."""
        now = steps.now()
        if torch.compiler.is_exporting():
            found = [now.columns[i] for i in self.columns]
        else:
            wide = torch.float64 if x.dtype == torch.float64 else torch.float32
            scale = self.activation_scale.to(wide)
            found = [(scale / step_unit(scale))[now.step]]
            if self.spec.shifted:
                found.append(self.activation_shift.to(wide)[now.step])
        shape = (-1, *[1] * (x.ndim - 1))
        undo, *shift = (one.reshape(shape) for one in found)
        return undo, shift[0] if shift else undo

    def _along_outputs(self, values: torch.Tensor) -> torch.Tensor:
        return values.reshape(-1, 1, 1) if self.conv else values

    def _padding(self) -> list[int]:
        """Returns a convolution's zero padding as F.pad takes it."""
        assert self.conv is not None
        height, width = self.conv["padding"]
        return [width, width, height, height]


def step_unit(scales: torch.Tensor) -> torch.Tensor:
    """Returns the largest power of two that is at most every scale, []. Source: methods.md section 2."""
    mantissa, exponent = torch.frexp(scales.detach().float().amin())  # in [0.5, 1)
    return torch.ldexp(torch.ones_like(mantissa), exponent - 1)


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
    if spec.weight.learned:
        return CodebookLayer(source, spec)
    return SteppedLayer(source, spec) if spec.steps else QuantizedLayer(source, spec)


def _conv_arguments(conv: nn.Conv2d) -> dict[str, Any]:
    return {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation, "groups": conv.groups}


def multiplier_shape(layer: FloatLayer) -> tuple[int, ...]:
    """Returns the shape in which a factor per input channel multiplies what the layer reads."""
    return (layer.in_channels, 1, 1) if isinstance(layer, nn.Conv2d) else (layer.in_features,)


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
