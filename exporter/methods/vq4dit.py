"""VQ4DiT: every sub-vector chooses among its nearest codewords, and codewords and biases train with the choice.

Source: Deng et al., arXiv 2408.17131 (methods.md section 3, which tells the paper from its released code). Start and
importance are those of `kmeans`. No data: what is trained on are the float model's own trajectories.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from engines.errors import UserError
from exporter import clustering
from exporter.formats import Format
from exporter.formats.codebook import BITS
from exporter.methods import Moments, check_rates, check_whole, kmeans
from exporter.modules import CodebookLayer
from exporter.recipe import WeightSpec
from exporter.reconstruct import Phase
from exporter.specs import FloatLayer, LayerSpec, oriented
from exporter.straight_through import straight_through
from exporter.tensors import CodebookTensor

NEEDS_CHANNEL_ABSMAX = False
TRAINS = True
STEPS = False
POINTS = False
INTEGERS_ONLY = False
CODEBOOKS = True
CHOOSES_FORMAT = False
factors = kmeans.factors
FEWEST_ENTRIES = min(BITS)  # that a codebook may have
FROZEN = 0.99  # a ratio beyond which the choice is made. Source: methods.md section 3, the released code
APART = 1e4  # between the logits of a choice that is made: softmax gives 1 and 0, and no gradient


@dataclass(frozen=True)
class Options:
    """How k-means starts (see there), then how choices among `candidates` codewords are trained, and what after.

    `iterations` of the choices at `rate`, `together` with codebooks and biases or alone; then `codebook_iterations` of
    these with the choices made. `codebook_rate` is in units of a codebook's root mean square, `bias_rate` of a bias's.
    Ratios are `equal` at first, or inverse to squared distances, k-means' own choice the likeliest. `regularizer`
    weighs 1 − |2r − 1|, or r(1 − r) where `smooth`, its mean over ratios, after the share `warmup`. `joint`: all blocks
    at once, their targets on disk; else block by block, and of a block's inputs and targets `hold_mb` are in memory.
    """

    importance: bool = True
    start_iterations: int = 100
    candidates: int = 2
    iterations: int = 1000
    codebook_iterations: int = 200
    batch: int = 64
    rows: int = 12288
    rate: float = 0.05
    codebook_rate: float = 0.01
    bias_rate: float = 0.01
    equal: bool = False
    together: bool = True
    smooth: bool = True
    regularizer: float = 0.1
    warmup: float = 0.2
    joint: bool = True
    hold_mb: int = 1024

    @property
    def trains(self) -> bool:
        return self.iterations + self.codebook_iterations > 0

    def __post_init__(self) -> None:
        check_whole("vq4dit", self, start_iterations=1, candidates=1, iterations=0, codebook_iterations=0)
        check_whole("vq4dit", self, batch=1, rows=1, hold_mb=0)
        if self.candidates > FEWEST_ENTRIES:
            raise UserError(f"vq4dit: candidates = {self.candidates}", fix=f"use at most {FEWEST_ENTRIES}")
        check_rates("vq4dit", self, "codebook_rate", "bias_rate")
        for name in ("rate", "regularizer"):
            if not getattr(self, name) >= 0:
                raise UserError(f"vq4dit: {name} = {getattr(self, name)}", fix="write 0 or more")
        if not 0 <= self.warmup < 1:
            raise UserError(f"vq4dit: warmup = {self.warmup}", fix="write a share of the iterations, 0 … below 1")


def needs_moments(options: Options) -> Moments:
    return "diagonal" if options.importance else "none"


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> CodebookTensor:
    start = kmeans.Options(options.importance, options.start_iterations)
    return kmeans.quantize_weight(weight, spec, axis, start, moments)


class _Mixture(torch.autograd.Function):
    """Σ_m r_m · codebook[candidates_m], r = softmax of the logits [m, n] over m; nothing of [m, n, d] is kept.

    Candidates lie along the first axis because torch's softmax is far faster there than along a short last one.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, codebook: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        ratios = logits.softmax(dim=0)
        ctx.save_for_backward(ratios, codebook, candidates)
        mixed = codebook.new_zeros(len(logits[0]), codebook.shape[1])
        for share, codes in zip(ratios, candidates, strict=True):
            mixed.addcmul_(share[:, None], F.embedding(codes.int(), codebook))
        return mixed

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ratios, codebook, candidates = ctx.saved_tensors
        (gradient,) = gradients
        to_ratios = torch.stack([(gradient * F.embedding(codes.int(), codebook)).sum(dim=1) for codes in candidates])
        to_logits = ratios * (to_ratios - (ratios * to_ratios).sum(dim=0))
        to_codebook = None
        if ctx.needs_input_grad[1]:
            to_codebook = torch.zeros_like(codebook)
            for share, codes in zip(ratios, candidates, strict=True):
                to_codebook += _sums(codes, share[:, None] * gradient, len(codebook))
        return to_logits if ctx.needs_input_grad[0] else None, to_codebook, None


def _sums(codes: torch.Tensor, values: torch.Tensor, count: int) -> torch.Tensor:
    """Returns the sum of `values` [n, d] over every code, [count, d]."""
    return torch.stack([codes.int().bincount(column, minlength=count) for column in values.T], dim=1)


class ChoosingLayer(CodebookLayer):
    """A layer whose sub-vectors are mixtures of candidates while it trains; `hard`, each is the likeliest of them."""

    def __init__(
        self,
        source: FloatLayer,
        spec: LayerSpec,
        tensor: CodebookTensor,
        activation: dict[str, torch.Tensor],
        options: Options,
    ) -> None:
        super().__init__(source, spec)
        self.hard = True
        self._buffers |= tensor.buffers()
        del self._buffers["weight_codebook"]
        self.words = nn.Parameter(tensor.codebook.clone())
        rows = oriented(source, spec)
        if tensor.scale is not None:
            rows = rows / tensor.scale.reshape(-1, 1)
        vectors = rows.reshape(-1, tensor.codebook.shape[1])
        codes, distances = clustering.nearest(vectors, tensor.codebook, tensor.codes.flatten(), options.candidates)
        self.candidates = codes.T.contiguous()
        odds = torch.ones_like(distances.T) if options.equal else 1 / distances.T.clamp(min=1e-12)
        self.logits = nn.Parameter((odds / odds.sum(dim=0)).log().contiguous())  # the first is the largest: k-means'
        if self.bias is not None:
            self.bias = nn.Parameter(self.bias.detach().clone())
        self._buffers |= activation
        if spec.multiplied:
            self.input_multiplier = source.get_buffer("input_multiplier")

    def ratios(self) -> torch.Tensor:
        """Returns the share of every candidate, [candidates, sub-vectors]."""
        return self.logits.softmax(dim=0)

    def settle(self) -> None:
        """Makes for good the choices that are all but made."""
        with torch.no_grad():
            largest, choice = self.ratios().max(dim=0)
            made = (largest > FROZEN).nonzero().flatten()
            self.logits[:, made] = APART * F.one_hot(choice[made], len(self.logits)).T.to(self.logits.dtype)

    def choice(self) -> torch.Tensor:
        """Returns every sub-vector's code, [sub-vectors] uint8."""
        return self.candidates.gather(0, self.logits.argmax(dim=0, keepdim=True)).squeeze(0)

    def codewords(self) -> torch.Tensor:
        """Returns the codewords as they ship, with the gradient of what they are rounded from; [entries, d]."""
        if self.spec.activation:
            return straight_through(self.words, self.words.new_ones(()), self.spec.activation)
        return self.words + (self.words.half().float() - self.words).detach()

    def _weight(self, dtype: torch.dtype) -> torch.Tensor:
        words = self.codewords()
        if self.hard:
            vectors = F.embedding(self.choice().int(), words)
        else:
            vectors = _Mixture.apply(self.logits, words, self.candidates)  # type: ignore[no-untyped-call]
        rows = vectors.reshape(self.weight_shape[0], -1)
        scale = self._buffers.get("weight_scale")
        return self._turned(rows if scale is None else rows * scale.reshape(-1, 1))

    def _quantized_input(self, x: torch.Tensor, fmt: Format) -> torch.Tensor:
        return straight_through(x, self.activation_scale, fmt)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns what a codebook layer holds of it, and the bias, as fp16 holds it."""
        with torch.no_grad():
            codes = self.choice().reshape(self.weight_codes.shape)
            found = {"weight_codes": codes, "weight_codebook": self.codewords().contiguous()}
            found |= {n: t for n, t in self.named_buffers() if n in ("weight_scale", "activation_scale")}
            if self.bias is not None:
                found["bias"] = self.bias.half().float()
        return found


def layer(
    source: FloatLayer, spec: LayerSpec, tensor: CodebookTensor, activation: dict[str, torch.Tensor], options: Options
) -> ChoosingLayer:
    return ChoosingLayer(source, spec, tensor, activation, options)


def phases(layers: Sequence[ChoosingLayer], options: Options) -> list[Phase]:
    """The choices, then codewords and biases with the choices made."""
    words = _words_and_biases(layers, options)
    return [_Choices(layers, options, words if options.together else []), _Codewords(options, words)]


Groups = list[tuple[list[nn.Parameter], float]]


class _Choices(Phase):
    """Trains the ratios; what pushes them to 0 and 1 comes in after the warm-up."""

    name = "choices"

    def __init__(self, layers: Sequence[ChoosingLayer], options: Options, beside: Groups) -> None:
        self._layers, self._options, self.iterations = layers, options, options.iterations
        self._groups = [([layer.logits for layer in layers], options.rate), *beside]

    def groups(self) -> Groups:
        return self._groups

    def regularizer(self, done: float) -> torch.Tensor | float:
        """Returns λ · mean(1 − |2r − 1|), or λ · mean(r (1 − r)). Source: the paper's, and the released code's."""
        if done < self._options.warmup:
            return 0.0
        means = []
        for layer in self._layers:
            ratios = layer.ratios()
            means.append((ratios * (1 - ratios) if self._options.smooth else 1 - (2 * ratios - 1).abs()).mean())
        return self._options.regularizer * torch.stack(means).mean()

    def settle(self) -> None:
        for layer in self._layers:
            layer.settle()

    def train(self, training: bool) -> None:
        for layer in self._layers:
            layer.hard = not training


class _Codewords(Phase):
    """Trains codewords and biases; every sub-vector keeps its choice."""

    name = "codewords"

    def __init__(self, options: Options, words: Groups) -> None:
        self.iterations, self._groups = options.codebook_iterations, words

    def groups(self) -> Groups:
        return self._groups


def _words_and_biases(layers: Sequence[ChoosingLayer], options: Options) -> Groups:
    """Returns every codebook and bias with its rate, in units of the root mean square that it starts with."""
    found: Groups = []
    for layer in layers:
        found.append(([layer.words], options.codebook_rate * _rms(layer.words)))
        if isinstance(layer.bias, nn.Parameter):
            found.append(([layer.bias], options.bias_rate * _rms(layer.bias)))
    return found


def _rms(x: torch.Tensor) -> float:
    return float(x.detach().square().mean().sqrt())
