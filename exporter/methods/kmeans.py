"""k-means: the sub-vectors of a weight go to the nearest of a codebook of their own means.

Source: VQ4DiT's starting point (methods.md section 3): k-means++ seeding and Lloyd's iterations; sub-vectors weigh by
the second moments of the inputs they multiply, as in GPTVQ (van Baalen et al., arXiv 2402.15319, "Hessian-weighted").
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from exporter import clustering
from exporter.formats.codebook import Format as CodebookFormat
from exporter.methods import Moments, check_whole, rtn
from exporter.recipe import WeightSpec
from exporter.tensors import CodebookTensor, scale_for

NEEDS_CHANNEL_ABSMAX = False
TRAINS = False
CHOOSES_FORMAT = False
CODEBOOKS = True
STEPS = False
POINTS = False
INTEGERS_ONLY = False
factors = rtn.factors


@dataclass(frozen=True)
class Options:
    """`importance`: sub-vectors weigh by E[x²] of their inputs; else alike. `iterations` of Lloyd's, at most."""

    importance: bool = True
    iterations: int = 100

    def __post_init__(self) -> None:
        check_whole("kmeans", self, iterations=1)


def needs_moments(options: Options) -> Moments:
    return "diagonal" if options.importance else "none"


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> CodebookTensor:
    fmt = spec.format
    assert isinstance(fmt, CodebookFormat)
    vectors, importance, scale = sub_vectors(weight, spec, moments)
    codebook, _ = clustering.kmeans(vectors, fmt.codebook_size, importance, options.iterations)
    return stored(codebook, scale, spec, len(weight), lambda words: clustering.assign(vectors, words, importance))


def sub_vectors(
    weight: torch.Tensor, spec: WeightSpec, moments: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Returns the sub-vectors of a weight [out, n], their importance, both [sub-vectors, d], and the rows' scale."""
    fmt = spec.format
    assert isinstance(fmt, CodebookFormat)
    scale = row_scale(weight) if spec.granularity == "channel" else None
    rows = weight if scale is None else weight / scale[:, None]
    importance = importance_of(weight, scale, moments)
    return rows.reshape(-1, fmt.vector_size), importance.reshape(-1, fmt.vector_size), scale


def stored(
    codebook: torch.Tensor,
    scale: torch.Tensor | None,
    spec: WeightSpec,
    rows: int,
    assign: Callable[[torch.Tensor], torch.Tensor],
) -> CodebookTensor:
    """Returns the weight with its codewords as they are stored; `assign` chooses among what these stand for.

    A matmul in FP8 or INT8 takes codewords that are exact there, and one scale after it.
    """
    if spec.entries:
        scale = scale_for(codebook.abs().amax(), spec.entries)
        codebook = spec.entries.round(codebook / scale)
        words = codebook * scale
    else:
        codebook = words = codebook.half().float()
    return CodebookTensor(assign(words).to(spec.format.carrier).reshape(rows, -1), codebook, scale, spec.format)


def row_scale(weight: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of every row, [out], as fp16 holds it; 1 for rows of zeros."""
    rms = weight.square().mean(dim=1).sqrt().half().float()
    return torch.where(rms > 0, rms, torch.ones_like(rms))


def importance_of(weight: torch.Tensor, scale: torch.Tensor | None, moments: torch.Tensor | None) -> torch.Tensor:
    """Returns what an error of each number of the (scaled) weight costs, [out, n], on average 1."""
    inputs = weight.new_ones(weight.shape[1]) if moments is None else moments.clamp(min=0)
    inputs = inputs.diagonal() if inputs.ndim == 2 else inputs
    inputs = inputs / inputs.mean() if float(inputs.sum()) > 0 else torch.ones_like(inputs)
    outputs = weight.new_ones(len(weight)) if scale is None else scale.square() / scale.square().mean()
    return (outputs[:, None] * inputs).clamp(min=1e-6)
