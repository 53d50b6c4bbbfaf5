"""Learned rounding: each weight goes to the grid value below or above it, whichever serves its block's output better.

The idea is Chen, Giannoula and Moshovos's, arXiv 2408.06995, whose equations could not be read anywhere; the parts are
AdaRound's (Nagel et al., arXiv 2004.10568, equations 21 to 24) on any format's grid, with FP4DiT's scale-aware form
(methods.md section 1). Formats and ranges are those that `fp_search` finds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from engines.errors import UserError
from exporter.activations import LEAST_SCALE
from exporter.formats import Format
from exporter.methods import Moments, check_rates, check_whole, fp_search
from exporter.modules import QuantizedLayer
from exporter.recipe import WeightSpec
from exporter.reconstruct import Phase
from exporter.specs import FloatLayer, LayerSpec, oriented
from exporter.straight_through import straight_through
from exporter.tensors import QuantizedTensor, spread

NEEDS_CHANNEL_ABSMAX = False
TRAINS = True
STEPS = False
POINTS = False
INTEGERS_ONLY = False
CODEBOOKS = False
CHOOSES_FORMAT = True
factors = fp_search.factors
MOST_SCALE = 65504.0  # of an activation: fp16's largest number
STRETCH, SHIFT = 1.2, 0.1  # Source: AdaRound, equation 23 and below: ζ − γ with ζ = 1.1, γ = −0.1
BETA = (20.0, 2.0)  # the regulariser's exponent, annealed. Source: methods.md section 1, after Q-Diffusion


@dataclass(frozen=True)
class Options:
    """How formats are searched (see `fp_search`), then how every block is trained on `rows` of the calibration set.

    `iterations` of the rounding at `rate`, then `activation_iterations` of the activations' scales, of whose logarithm
    `activation_rate` is. `regularizer` is λ, none in the first share `warmup`; it weighs a mean over weights beside a
    relative error, so it is not the papers' 0.01. `scale_aware`: logits in units of each weight's own step, so that
    they move alike in every binade. Of a block's inputs and targets `hold_mb` are in memory, the rest on disk.
    """

    output: bool = True
    vote: bool = False
    iterations: int = 300
    activation_iterations: int = 100
    batch: int = 32
    rows: int = 1024
    rate: float = 0.2
    activation_rate: float = 1e-3
    regularizer: float = 0.1
    warmup: float = 0.2
    scale_aware: bool = True
    hold_mb: int = 1024
    joint: ClassVar[bool] = False
    trains: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_whole("fp_rounding", self, iterations=1, batch=1, rows=1, activation_iterations=0, hold_mb=0)
        check_rates("fp_rounding", self, "activation_rate")
        for name in ("rate", "activation_rate"):
            if getattr(self, name) <= 0:
                raise UserError(f"fp_rounding: {name} = {getattr(self, name)}", fix="write a number above 0")
        if self.regularizer < 0:
            raise UserError(f"fp_rounding: regularizer = {self.regularizer}", fix="write 0 or more")
        if not 0 <= self.warmup < 1:
            raise UserError(f"fp_rounding: warmup = {self.warmup}", fix="write a share of the iterations, 0 … below 1")


def needs_moments(options: Options) -> Moments:
    return "full" if options.output else "none"


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> QuantizedTensor:
    search = fp_search.Options(options.output, options.vote)
    return fp_search.quantize_weight(weight, spec, axis, search, moments)


def neighbours(fmt: Format, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the values of the format at or below x, and at or above; both are the end where x lies beyond it."""
    values = fmt.values[fmt.values.isfinite()].unique(sorted=True).to(x.device)  # type: ignore[no-untyped-call]
    below = torch.searchsorted(values, x.contiguous(), right=True).sub_(1).clamp_(min=0)
    low = values[below]
    high = torch.where(low < x, values[(below + 1).clamp(max=len(values) - 1)], low)
    return low, high


class RoundedLayer(QuantizedLayer):
    """A layer that rounds softly while it trains: (low + (high − low) h) · scale, h = clip(1.2 σ(logits) − 0.1, 0, 1).

    `hard` rounds as the codes will: up where h ≥ ½. Untrained, that is to the nearest. `soft`: h of the last soft call.
    """

    soft: torch.Tensor

    def __init__(
        self,
        source: FloatLayer,
        spec: LayerSpec,
        tensor: QuantizedTensor,
        activation: dict[str, torch.Tensor],
        options: Options,
    ) -> None:
        super().__init__(source, spec)
        weight = oriented(source, spec)
        self.hard = True
        self.weight_scale = tensor.scale
        self._spread = spread(tensor.scale, weight.shape, spec.granularity, self.axis, spec.block_size)
        x = weight / self._spread
        self._low, high = neighbours(spec.weight, x)
        self._step = high - self._low
        self.free = self._step > 0
        share = torch.where(self.free, (x - self._low) / self._step, 0.5).clamp(0, 1)
        steps = self._step * self._spread
        self._unit = steps / steps[self.free].mean() if options.scale_aware else torch.ones_like(steps)
        self._unit = torch.where(self.free, self._unit, 1.0)
        self.logits = nn.Parameter(-(STRETCH / (share + SHIFT) - 1).log() * self._unit)
        if spec.activation:
            self.activation_scale = activation["activation_scale"]
            self.log_scale = nn.Parameter(self.activation_scale.log())
        if spec.multiplied:
            self.input_multiplier = source.get_buffer("input_multiplier")

    def rounding(self) -> torch.Tensor:
        """Returns h of every weight."""
        return (STRETCH * (self.logits / self._unit).sigmoid() - SHIFT).clamp(0, 1)

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        if self.hard:
            return (self._low + self._step * (self.rounding() >= 0.5)) * self._spread
        self.soft = self.rounding()
        return (self._low + self._step * self.soft) * self._spread

    def _quantized_input(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        return straight_through(x, self._activation_scale(), fmt)

    def _activation_scale(self) -> torch.Tensor:
        return self.log_scale.exp().clamp(LEAST_SCALE, MOST_SCALE)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a quantized layer holds of it: codes, and scales that fp16 holds."""
        with torch.no_grad():
            values = self._low + self._step * (self.rounding() >= 0.5)
            found = {"weight_codes": self.spec.weight.encode(values), "weight_scale": self.weight_scale}
            if self.spec.activation:
                found["activation_scale"] = self._activation_scale().half().float()
        return found


def layer(
    source: FloatLayer, spec: LayerSpec, tensor: QuantizedTensor, activation: dict[str, torch.Tensor], options: Options
) -> RoundedLayer:
    return RoundedLayer(source, spec, tensor, activation, options)


def phases(layers: Sequence[RoundedLayer], options: Options) -> list[Phase]:
    """Weights first, then the ranges of the activations that meet them."""
    return [_Roundings(layers, options), _Ranges(layers, options)]


class _Roundings(Phase):
    """Trains h; the regulariser drives it to 0 or 1, and then it is taken as that."""

    name = "rounding"

    def __init__(self, layers: Sequence[RoundedLayer], options: Options) -> None:
        self._layers, self._options, self.iterations = layers, options, options.iterations
        self._count = max(1, sum(int(layer.free.sum()) for layer in layers))

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [([layer.logits for layer in self._layers], self._options.rate)]

    def regularizer(self, done: float) -> torch.Tensor | float:
        """Returns λ · mean(1 − |2h − 1|^β). Source: AdaRound, equation 24."""
        warmup = self._options.warmup
        if done < warmup:
            return 0.0
        beta = BETA[0] + (BETA[1] - BETA[0]) * (done - warmup) / (1 - warmup)
        sums = [((1 - (2 * one.soft - 1).abs().pow(beta)) * one.free).sum() for one in self._layers]
        return self._options.regularizer * torch.stack(sums).sum() / self._count

    def train(self, training: bool) -> None:
        for layer in self._layers:
            layer.hard = not training
            if not training:
                layer.__dict__.pop("soft", None)  # and with it the graph it came from


class _Ranges(Phase):
    """Trains the scales of activations against the weights that ship."""

    name = "activation ranges"

    def __init__(self, layers: Sequence[RoundedLayer], options: Options) -> None:
        self._layers, self.iterations, self._rate = layers, options.activation_iterations, options.activation_rate

    def groups(self) -> list[tuple[list[nn.Parameter], float]]:
        return [([layer.log_scale for layer in self._layers if layer.spec.activation], self._rate)]
