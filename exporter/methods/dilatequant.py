"""DilateQuant: dilated weights, then weights, their scales and those of every step's activations distilled together.

Source: DilateQuant, arXiv 2409.14307 (methods.md section 2). No data: what is trained on are the float model's own
trajectories, all steps mixed in every batch. Start and ranges of weights are those of `fp_search`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from engines.artifacts import Json
from exporter import progress, scaling, steps
from exporter.activations import LEAST_SCALE
from exporter.attention import PointSpec, QuantizedPoint
from exporter.dilation import dilation
from exporter.methods import Moments, check_rates, check_whole, fp_search
from exporter.models import Fold
from exporter.modules import QuantizedLayer, float_layer
from exporter.recipe import WeightSpec
from exporter.reconstruct import Phase
from exporter.specs import FloatLayer, LayerSpec, oriented
from exporter.straight_through import straight_through
from exporter.tensors import QuantizedTensor, quantize, spread

NEEDS_CHANNEL_ABSMAX = False
TRAINS = True
STEPS = True
POINTS = True
INTEGERS_ONLY = True
CODEBOOKS = False
CHOOSES_FORMAT = False


@dataclass(frozen=True)
class Options:
    """Whether weights are dilated, then how all is trained on `rows` of the calibration set.

    `dilate`: where a factor folds exactly, and with `multiply` also where the layer multiplies its own input by it; no
    output channel's range grows, also where a weight has one range as a whole.
    `output`: weights start from the ranges with the least error of the layer's output, not of the weight. Then
    `iterations` on batches of `batch` rows, at rates that fall by a cosine: `weight_rate` in units of the mean step
    between a weight's codes, `scale_rate` and `activation_rate` of logarithms of scales, `shift_rate` of zero points in
    steps. `joint`: all blocks at once, their targets on disk; else block by block, and of a block's inputs and targets
    `hold_mb` are in memory.
    """

    dilate: bool = True
    multiply: bool = True
    output: bool = True
    iterations: int = 800
    batch: int = 64
    rows: int = 12288
    weight_rate: float = 0.005
    scale_rate: float = 1e-3
    activation_rate: float = 1e-3
    shift_rate: float = 0.02
    joint: bool = True
    hold_mb: int = 1024

    @property
    def trains(self) -> bool:
        return self.iterations > 0

    def __post_init__(self) -> None:
        check_whole("dilatequant", self, iterations=0, batch=1, rows=1, hold_mb=0)
        check_rates("dilatequant", self, "weight_rate", "scale_rate", "activation_rate", "shift_rate")


def needs_moments(options: Options) -> Moments:
    return "full" if options.output else "none"


def factors(
    model: nn.Module,
    paths: Sequence[str],
    folds: Sequence[Fold],
    channel_absmax: Mapping[str, torch.Tensor],
    options: Options,
) -> dict[str, torch.Tensor]:
    if not options.dilate:
        return {}
    found = {}
    for group in scaling.groups(paths, folds, multiply=options.multiply):
        layers = [float_layer(model, path) for path in group]
        factor = torch.stack([dilation(layer.weight, getattr(layer, "groups", 1)) for layer in layers]).amin(dim=0)
        if bool((factor > 1).any()):
            found[scaling.key(group)] = factor
    return found


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> QuantizedTensor:
    return fp_search.quantize_weight(weight, spec, axis, fp_search.Options(options.output), moments)


LEAST_WEIGHT_SCALE = 2.0**-24  # fp16's least number: scales of weights are only multiplied by


def as_shipped(log_scale: torch.Tensor, least: float = LEAST_SCALE) -> torch.Tensor:
    """Returns scales as fp16 holds them, with the gradient of what they are rounded from."""
    scale = log_scale.exp()
    return scale + (scale.half().float().clamp(min=least) - scale).detach()


class DistilledLayer(QuantizedLayer):
    """A layer whose weight, scales and ranges train; what is computed is what ships."""

    def __init__(
        self,
        source: FloatLayer,
        spec: LayerSpec,
        tensor: QuantizedTensor,
        activation: dict[str, torch.Tensor],
        options: Options,
    ) -> None:
        super().__init__(source, spec)
        self.weight = nn.Parameter(oriented(source, spec).clone())
        self.log_weight_scale = nn.Parameter(tensor.scale.log())
        live = self.weight.detach().abs().amax(dim=[d for d in range(self.weight.ndim) if d != self.axis]) > 0
        scales = tensor.scale[live] if tensor.scale.ndim else tensor.scale
        # between two codes, of the mean channel that is not all zeros: in a layer of zeros nothing moves
        self.unit = float(scales.mean()) if live.any() else 0.0
        self.given = activation
        if spec.activation:
            self.log_scale = nn.Parameter(activation["activation_scale"].log())
            if spec.shifted:
                self.shift = nn.Parameter(activation["activation_shift"].clone())
        if spec.multiplied:
            self.input_multiplier = source.get_buffer("input_multiplier")

    def _register_activation(self, fmt: object) -> None:
        """What it holds of its activation are parameters."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = {}
        if self.spec.multiplied:
            x = x * self.input_multiplier
        if self.spec.activation:
            if self.spec.shifted and self.conv:
                height, width = self.conv["padding"]
                x, padded = F.pad(x, [width, width, height, height]), {"padding": 0}
            x = self._rounded_input(x)
        spec = self.spec
        scale = as_shipped(self.log_weight_scale, LEAST_WEIGHT_SCALE)
        spread_out = spread(scale, self.weight.shape, spec.granularity, self.axis, spec.block_size)
        return self._product(x, straight_through(self.weight, spread_out, spec.weight), self.bias, **padded)

    def _rounded_input(self, x: torch.Tensor) -> torch.Tensor:
        fmt, scale = self.spec.activation, as_shipped(self.log_scale)
        assert fmt is not None
        if not self.spec.steps:
            return straight_through(x, scale, fmt)
        rows, shape = steps.now().step, (-1, *[1] * (x.ndim - 1))
        shift = None
        if self.spec.shifted:
            shift = (self.shift + (self.shift.round() - self.shift).detach())[rows].reshape(shape)
        return straight_through(x, scale[rows].reshape(shape), fmt, shift)

    def clamp(self) -> None:
        """Keeps scales at their least or above, and zero points among the codes."""
        with torch.no_grad():
            self.log_weight_scale.clamp_(min=math.log(LEAST_WEIGHT_SCALE))
            if self.spec.activation:
                self.log_scale.clamp_(min=math.log(LEAST_SCALE))
            if self.spec.shifted:
                half = 2 ** (self.spec.activation.bits - 1)  # type: ignore[union-attr]
                self.shift.clamp_(-half, half - 1)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns codes and scales, as a quantized layer holds them."""
        spec = self.spec
        with torch.no_grad():
            scale = as_shipped(self.log_weight_scale, LEAST_WEIGHT_SCALE)
            codes = quantize(self.weight, scale, spec.weight, spec.granularity, self.axis, spec.block_size)
            found = codes.buffers()
            if spec.activation:
                found["activation_scale"] = as_shipped(self.log_scale)
            if spec.shifted:
                found["activation_shift"] = self.shift.round()
        return found


def layer(
    source: FloatLayer,
    spec: LayerSpec,
    tensor: QuantizedTensor,
    activation: dict[str, torch.Tensor],
    options: Options,
) -> DistilledLayer:
    return DistilledLayer(source, spec, tensor, activation, options)


class DistilledPoint(QuantizedPoint):
    """A point of an attention whose scales train."""

    def __init__(self, spec: PointSpec, activation: dict[str, torch.Tensor]) -> None:
        super().__init__(spec)
        self.log_scale = nn.Parameter(activation["activation_scale"].log())

    def scale(self) -> torch.Tensor:
        return as_shipped(self.log_scale)

    def clamp(self) -> None:
        """Keeps scales at their least or above."""
        with torch.no_grad():
            self.log_scale.clamp_(min=math.log(LEAST_SCALE))

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a quantized point holds."""
        return {"activation_scale": as_shipped(self.log_scale).detach()}


def point(spec: PointSpec, activation: dict[str, torch.Tensor]) -> DistilledPoint:
    return DistilledPoint(spec, activation)


def phases(learners: Sequence[DistilledLayer | DistilledPoint], options: Options) -> list[Phase]:
    return [_Distillation(learners, options)]


class _Distillation(Phase):
    """Trains all at once."""

    name = "weights and scales"

    def __init__(self, learners: Sequence[DistilledLayer | DistilledPoint], options: Options) -> None:
        self._learners, self.iterations, self._options = learners, options.iterations, options
        layers = self._layers = [one for one in learners if isinstance(one, DistilledLayer)]
        shared: dict[int, DistilledLayer] = {}  # layers that read one tensor keep one quantizer for it
        for one in layers:
            first = shared.setdefault(id(one.given), one)
            if one.spec.activation and first is not one:
                one.log_scale = first.log_scale
                if one.spec.shifted:
                    one.shift = first.shift

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        options, layers = self._options, self._layers
        quantizers = [one for one in layers if one.spec.activation]
        found = [([one.weight], options.weight_rate * one.unit) for one in layers]
        found.append(([one.log_weight_scale for one in layers], options.scale_rate))
        found.append((self._ranges(), options.activation_rate))
        shifts = [one.shift for one in quantizers if one.spec.shifted]
        return [*found, (list(dict.fromkeys(shifts)), options.shift_rate)]

    def _ranges(self) -> list[nn.Parameter]:
        """Returns the logarithms of activations' scales, what readers share once."""
        found = [one.log_scale for one in self._learners if isinstance(one, DistilledPoint) or one.spec.activation]
        return list(dict.fromkeys(found))

    def share_of_rate(self, done: float) -> float:
        """Returns the cosine's share, which is our choice."""
        return (1 + math.cos(math.pi * done)) / 2

    def settle(self) -> None:
        for one in self._learners:
            one.clamp()

    def facts(self) -> Json:
        """Returns how many scales of activations ended at the least there is; says so where there are any."""
        count = sum(int((scale <= math.log(LEAST_SCALE)).sum()) for scale in self._ranges())
        if count:
            progress.note(f"note: {count} scales of activations ended at the least there is, {LEAST_SCALE:.3g}")
        return {"scales_at_the_least": count}
