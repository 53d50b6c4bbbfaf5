"""k-means as a method: nearest codewords, exact in what carries them, better where inputs are larger."""

from __future__ import annotations

import pytest
import torch

from engines.errors import UserError
from exporter import methods
from exporter.formats.codebook import Format
from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.methods import kmeans
from exporter.recipe import WeightSpec

FORMATS = [Format(4, 256), Format(2, 64), Format(1, 16)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=[f"{f.codebook_size}x{f.vector_size}" for f in FORMATS])


def weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 64, generator=generator) * torch.logspace(-2, 0, 96)[:, None]


def made(spec, **options):
    moments = options.pop("moments", None)
    return kmeans.quantize_weight(weight(), spec, 0, kmeans.Options(**options), moments)


@every_format
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_sub_vector_has_its_nearest_codeword_and_fp16_holds_all(fmt, granularity):
    tensor = made(WeightSpec(fmt, granularity))
    assert tensor.codes.shape == (96, 64 // fmt.vector_size)
    assert tensor.codebook.shape == (fmt.codebook_size, fmt.vector_size)
    assert (tensor.scale is None) == (granularity == "tensor")
    for held in (tensor.codebook, *([] if tensor.scale is None else [tensor.scale])):
        assert torch.equal(held, held.half().float())
    rows = weight() if tensor.scale is None else weight() / tensor.scale[:, None]
    vectors = rows.reshape(-1, fmt.vector_size)
    ours = (vectors - tensor.codebook[tensor.codes.flatten().int()]).square().sum(dim=1)
    best = torch.cdist(vectors.double(), tensor.codebook.double()).min(dim=1).values.square()
    assert torch.allclose(ours.double(), best, rtol=1e-3, atol=1e-6)


@every_format
@pytest.mark.parametrize("entries", [Fp(4, 3), Int(8)], ids=["fp8", "int8"])
def test_beside_quantized_inputs_codewords_are_exact_in_their_type(fmt, entries):
    tensor = made(WeightSpec(fmt, "tensor", entries=entries))
    assert tensor.scale.shape == ()
    assert torch.equal(entries.round(tensor.codebook), tensor.codebook)
    free = made(WeightSpec(fmt, "tensor"))
    errors = [float((t.dequantize() - weight()).square().mean()) for t in (tensor, free)]
    assert errors[0] < 1.3 * errors[1]  # an 8-bit codebook costs little beside 2 to 4 bits


def test_scales_for_each_output_help_rows_of_different_sizes():
    fmt = Format(4, 256)
    small = slice(0, 48)
    errors = [
        (made(WeightSpec(fmt, g)).dequantize() - weight())[small].square().sum() / weight()[small].square().sum()
        for g in ("tensor", "channel")
    ]
    assert errors[1] < 0.5 * errors[0]


def test_inputs_that_are_larger_weigh_more():
    moments = torch.diag(torch.cat([torch.full((32,), 100.0), torch.full((32,), 0.01)]))
    plain, weighted = (made(WeightSpec(Format(2, 64), "tensor"), moments=m) for m in (None, moments))
    costs = [float(((t.dequantize() - weight()).square() @ moments.diagonal()).sum()) for t in (plain, weighted)]
    assert costs[1] < 0.9 * costs[0]


def test_a_weight_of_zeros_stays_zero():
    tensor = kmeans.quantize_weight(torch.zeros(64, 64), WeightSpec(Format(2, 16), "channel"), 0, kmeans.Options())
    assert torch.equal(tensor.dequantize(), torch.zeros(64, 64))


def test_the_weight_is_left_as_it_was():
    x = weight()
    kmeans.quantize_weight(x, WeightSpec(Format(2, 64), "channel"), 0, kmeans.Options())
    assert torch.equal(x, weight())


def test_no_iterations_are_refused():
    with pytest.raises(UserError, match="iterations = 0"):
        methods.options("kmeans", {"iterations": 0}, "rule 1")
