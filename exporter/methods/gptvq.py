"""GPTVQ: codewords are chosen a few columns at a time, and what each choice gets wrong goes to the columns after.

Source: van Baalen et al., arXiv 2402.15319: GPTQ's sweep (Frantar et al., arXiv 2210.17323, equations 2 and 3) by
columns of the vectors' length, codebooks by weighted expectation maximisation, then codebooks refined for the layer's
output. Deviations: one codebook per layer as `kmeans` has, refined by conjugate gradients, which need no rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engines.errors import UserError
from exporter import clustering
from exporter.formats.codebook import Format as CodebookFormat
from exporter.methods import Moments, check_whole, kmeans
from exporter.recipe import WeightSpec
from exporter.tensors import CodebookTensor

NEEDS_CHANNEL_ABSMAX = False
TRAINS = False
CHOOSES_FORMAT = False
CODEBOOKS = True
STEPS = False
POINTS = False
INTEGERS_ONLY = False
factors = kmeans.factors


@dataclass(frozen=True)
class Options:
    """Lloyd's `iterations` of the start, `rounds` of sweep and refinement, each of `refinements` conjugate gradients.

    `damp`: the share of the mean that is added to the diagonal of E[x xᵀ]. Source: GPTQ, section 3.3, "1 %".
    """

    iterations: int = 100
    rounds: int = 2
    refinements: int = 30
    damp: float = 0.01

    def __post_init__(self) -> None:
        check_whole("gptvq", self, iterations=1, rounds=1, refinements=0)
        if not self.damp > 0:
            raise UserError(f"gptvq: damp = {self.damp}", fix="write a number above 0, e.g. 0.01")


def needs_moments(options: Options) -> Moments:
    return "full"


def quantize_weight(
    weight: torch.Tensor, spec: WeightSpec, axis: int, options: Options, moments: torch.Tensor | None = None
) -> CodebookTensor:
    """Without moments, as convolutions in groups have none, every input counts alike and the sweep is k-means."""
    fmt = spec.format
    assert isinstance(fmt, CodebookFormat)
    hessian = torch.eye(weight.shape[1], device=weight.device) if moments is None else moments.clone()
    mean = hessian.diagonal().mean()
    hessian.diagonal().add_(options.damp * mean if mean > 0 else 1.0)
    vectors, importance, scale = kmeans.sub_vectors(weight, spec, moments)
    rows = vectors.reshape(weight.shape)
    outputs = (
        rows.new_ones(len(rows), 1) if scale is None else scale[:, None]
    )  # an error is as large as its row's scale
    codebook, _ = clustering.kmeans(vectors, fmt.codebook_size, importance, options.iterations)
    factor = inverse_factor(hessian, options.damp)
    for _ in range(options.rounds):
        codes = sweep(rows, codebook, factor)
        codebook = refined(rows, codes, codebook, hessian, outputs, options.refinements)
    return kmeans.stored(codebook, scale, spec, len(rows), lambda words: sweep(rows, words, factor))


def inverse_factor(hessian: torch.Tensor, damp: float) -> torch.Tensor:
    """Returns the upper factor of the inverse, factorᵀ · factor = hessian⁻¹, [n, n]."""
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
        factor: torch.Tensor = torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise UserError(
            f"gptvq: the inputs' second moments, damped by {damp:g}, have no inverse",
            fix="raise damp, e.g. to 0.01, or calibrate on more samples",
        ) from error
    return factor


def sweep(rows: torch.Tensor, codebook: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Returns codes [out, n / d] of rows [out, n]; `factor` [n, n], upper, has factorᵀ · factor = E[x xᵀ]⁻¹.

    An error weighs by the inverse squares of the factor's diagonal, as in GPTQ, equation 2.
    """
    left, d = rows.clone(), codebook.shape[1]
    codes = torch.empty(len(rows), rows.shape[1] // d, dtype=torch.long, device=rows.device)
    for first in range(0, rows.shape[1], d):
        here, after = slice(first, first + d), slice(first + d, None)
        importance = factor.diagonal()[here].square().reciprocal()
        chosen = clustering.assign(left[:, here], codebook, importance.expand(len(rows), d))
        codes[:, first // d] = chosen
        missed = left[:, here] - codebook[chosen]
        spread = torch.linalg.solve_triangular(factor[here, here], missed, upper=True, left=False)
        left[:, after] -= spread @ factor[here, after]
    return codes


def refined(
    rows: torch.Tensor,
    codes: torch.Tensor,
    codebook: torch.Tensor,
    hessian: torch.Tensor,
    outputs: torch.Tensor,
    iterations: int,
) -> torch.Tensor:
    """Returns the codewords nearer to the least of Σ_o s_o² e_oᵀ E[x xᵀ] e_o, e = rows − codebook[codes], codes fixed.

    By conjugate gradients: what they solve is quadratic in the codewords. Source: Hestenes and Stiefel 1952.
    """
    weights = outputs.square() / outputs.square().mean()
    flat = codes.flatten()

    def gathered(cost: torch.Tensor) -> torch.Tensor:
        """Returns the sum over every codeword's places of what an error costs there."""
        found = torch.zeros_like(codebook)
        return found.index_add_(0, flat, ((cost * weights) @ hessian).reshape(-1, codebook.shape[1]))

    codewords = codebook.clone()
    residual = gathered(rows - codewords[flat].reshape(rows.shape))
    direction, norm = residual.clone(), residual.square().sum()
    for _ in range(iterations):
        if float(norm) <= 0:
            break
        curved = gathered(direction[flat].reshape(rows.shape))
        length = norm / (direction * curved).sum().clamp(min=1e-30)
        codewords += length * direction
        residual -= length * curved
        before, norm = norm, residual.square().sum()
        direction = residual + norm / before * direction
    return codewords
