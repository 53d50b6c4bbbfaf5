"""GPTVQ: the sweep pays errors forward, refinement minimises the layer's output error."""

from __future__ import annotations

import pytest
import torch

from engines.errors import UserError
from exporter import clustering, methods
from exporter.formats.codebook import Format
from exporter.formats.fp import Format as Fp
from exporter.methods import gptvq, kmeans
from exporter.recipe import WeightSpec

FORMATS = [Format(4, 256), Format(2, 64), Format(1, 16)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=[f"{f.codebook_size}x{f.vector_size}" for f in FORMATS])


def problem():
    """Returns a weight [96, 64] and second moments of inputs that go together."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(96, 64, generator=generator) * torch.logspace(-1, 0, 96)[:, None]
    x = torch.randn(2048, 16, generator=generator) @ torch.randn(16, 64, generator=generator)
    x += 0.3 * torch.randn(2048, 64, generator=generator)
    return weight, x.T @ x / len(x)


def cost(weight, tensor, moments):
    error = weight - tensor.dequantize()
    return float(((error @ moments) * error).sum())


@every_format
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_the_output_is_nearer_than_with_k_means(fmt, granularity):
    weight, moments = problem()
    spec = WeightSpec(fmt, granularity)
    ours = gptvq.quantize_weight(weight, spec, 0, gptvq.Options(), moments)
    theirs = kmeans.quantize_weight(weight, spec, 0, kmeans.Options(), moments)
    assert cost(weight, ours, moments) < 0.6 * cost(weight, theirs, moments)
    assert ours.codes.shape == theirs.codes.shape
    for held in (ours.codebook, *([] if ours.scale is None else [ours.scale])):
        assert torch.equal(held, held.half().float())


def test_codewords_beside_fp8_activations_are_exact_there():
    weight, moments = problem()
    spec = WeightSpec(Format(4, 256), "tensor", entries=Fp(4, 3))
    tensor = gptvq.quantize_weight(weight, spec, 0, gptvq.Options(), moments)
    assert torch.equal(Fp(4, 3).round(tensor.codebook), tensor.codebook)
    assert cost(weight, tensor, moments) < 0.6 * cost(
        weight, kmeans.quantize_weight(weight, spec, 0, kmeans.Options(), moments), moments
    )


def test_where_inputs_are_independent_the_sweep_is_the_nearest_codeword():
    weight, _ = problem()
    codebook = torch.randn(64, 2, generator=torch.Generator().manual_seed(1))
    factor = torch.diag(torch.linspace(0.5, 2, 64))
    importance = factor.diagonal().square().reciprocal().expand(weight.shape).reshape(-1, 2)
    nearest = clustering.assign(weight.reshape(-1, 2), codebook, importance).reshape(96, -1)
    assert torch.equal(gptvq.sweep(weight, codebook, factor), nearest)


def test_one_number_at_a_time_the_sweep_is_gptq():
    """Source: GPTQ, equations 2 and 3, written out with the inverse Hessian of the columns that are left."""
    weight, moments = problem()
    hessian = moments + 0.01 * moments.diagonal().mean() * torch.eye(64)
    codebook = torch.linspace(-2, 2, 16)[:, None]
    left, inverse = weight.double().clone(), torch.linalg.inv(hessian.double())
    expected = []
    for column in range(64):
        chosen = (left[:, column, None] - codebook[:, 0]).abs().argmin(dim=1)
        expected.append(chosen)
        missed = (left[:, column] - codebook[chosen, 0]) / inverse[column, column]
        left -= missed[:, None] * inverse[column]
        inverse -= inverse[:, column, None] * inverse[column] / inverse[column, column]
    factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    agree = gptvq.sweep(weight, codebook, factor) == torch.stack(expected, dim=1)
    # fp32 against fp64: what lies between two codewords may go either way, and all that follows in its row with it
    assert float(agree.double().mean()) > 0.99


def test_refinement_reaches_the_least_error_that_the_codes_allow():
    weight, moments = problem()
    generator = torch.Generator().manual_seed(2)
    codes = torch.randint(16, (96, 32), generator=generator)
    start, outputs = torch.randn(16, 2, generator=generator), torch.ones(96, 1)
    found = gptvq.refined(weight, codes, start, moments, outputs, 200)
    design = torch.zeros(96, 64, 32, dtype=torch.float64)  # rows = design @ the codewords' numbers
    for place in range(64):
        design[torch.arange(96), place, codes[:, place // 2] * 2 + place % 2] = 1
    root = torch.linalg.cholesky(moments.double() + 1e-9 * torch.eye(64)).T
    exact = torch.linalg.lstsq((root @ design).reshape(-1, 32), (weight.double() @ root.T).reshape(-1, 1)).solution
    assert torch.allclose(found.double(), exact.reshape(16, 2), atol=2e-3)  # fp32 conjugate gradients


def test_without_moments_it_is_k_means_refined():
    weight, _ = problem()
    spec = WeightSpec(Format(4, 256))
    ours = gptvq.quantize_weight(weight, spec, 0, gptvq.Options())
    theirs = kmeans.quantize_weight(weight, spec, 0, kmeans.Options())
    assert cost(weight, ours, torch.eye(64)) <= cost(weight, theirs, torch.eye(64)) * 1.01


def test_inputs_that_are_always_zero_break_nothing():
    weight, moments = problem()
    moments[:8], moments[:, :8] = 0, 0
    for seen in (moments, torch.zeros(64, 64)):
        tensor = gptvq.quantize_weight(weight, WeightSpec(Format(2, 64)), 0, gptvq.Options(), seen)
        assert tensor.codebook.isfinite().all()


@pytest.mark.parametrize(("key", "value"), [("iterations", 0), ("rounds", 0), ("refinements", -1), ("damp", 0.0)])
def test_options_without_sense_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        methods.options("gptvq", {key: value}, "test")


def test_moments_without_an_inverse_are_refused_with_the_way_out():
    weight, _ = problem()
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    with pytest.raises(UserError, match="damped by 1e-12, have no inverse") as raised:
        gptvq.quantize_weight(weight, WeightSpec(Format(2, 64)), 0, gptvq.Options(damp=1e-12), x.T @ x)
    assert "raise damp" in raised.value.fix
