"""Evenly spaced values as a codebook: the nearest integers, side by side in a code."""

from __future__ import annotations

import pytest
import torch

from engines.errors import UserError
from exporter.formats.codebook import Format
from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.methods import uniform
from exporter.recipe import WeightSpec

GRIDS = {(4, 256): 4, (2, 64): 8, (2, 16): 4, (1, 16): 16, (3, 64): 4, (2, 256): 16, (1, 256): 256}


def weight():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(96, 48, generator=generator) * torch.logspace(-1, 0, 96)[:, None]


@pytest.mark.parametrize(("shape", "count"), GRIDS.items(), ids=[f"{k}x{d}" for d, k in GRIDS])
def test_every_combination_of_evenly_spaced_values_is_a_codeword(shape, count):
    tensor = uniform.quantize_weight(weight(), WeightSpec(Format(*shape), "channel"), 0, uniform.Options())
    values = torch.arange(count) - (count - 1) / 2
    assert len(tensor.codebook.unique(dim=0)) == shape[1]
    assert torch.equal(tensor.codebook.unique(), values)


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_each_number_goes_to_the_nearest_value(granularity):
    rows = weight()
    tensor = uniform.quantize_weight(rows, WeightSpec(Format(2, 64), granularity), 0, uniform.Options())
    step = tensor.scale[:, None] if granularity == "channel" else tensor.codebook.unique().diff().mean()
    nearest = ((rows / step - 0.5).round() + 0.5).clamp(-3.5, 3.5) * step
    # beside a tie, rounding and the distances' fp32 may differ; and steps of fp16 codewords are even to 1e-3
    assert float((tensor.dequantize() - nearest).abs().max()) < 1.01 * float(step.max())
    assert float(((tensor.dequantize() - nearest).abs() > 2e-3 * step).double().mean()) < 1e-3


def test_the_searched_range_errs_less_than_the_widest():
    rows = weight()
    tensor = uniform.quantize_weight(rows, WeightSpec(Format(4, 256), "channel"), 0, uniform.Options())
    step = rows.abs().amax(dim=1, keepdim=True) / 2
    widest = ((rows / step - 0.5).round() + 0.5).clamp(-1.5, 1.5) * step
    assert float((tensor.dequantize() - rows).square().sum()) < 0.8 * float((widest - rows).square().sum())


@pytest.mark.parametrize("entries", [Int(8), Fp(4, 3)], ids=["int8", "fp8"])
def test_beside_quantized_activations_the_values_stay_evenly_spaced(entries):
    tensor = uniform.quantize_weight(
        weight(), WeightSpec(Format(4, 256), "tensor", entries=entries), 0, uniform.Options()
    )
    assert tensor.codebook.unique().tolist() == [-3, -1, 1, 3]
    assert torch.equal(entries.round(tensor.codebook), tensor.codebook)
    assert tensor.scale.shape == ()


def test_levels_that_a_matmul_cannot_hold_are_refused():
    with pytest.raises(UserError, match="256 evenly spaced values are not all exact in fp8"):
        uniform.quantize_weight(weight(), WeightSpec(Format(1, 256), "tensor", entries=Fp(4, 3)), 0, uniform.Options())


def test_rows_of_zeros_have_a_scale():
    rows = weight()
    rows[3] = 0
    tensor = uniform.quantize_weight(rows, WeightSpec(Format(1, 256), "channel"), 0, uniform.Options())
    assert bool((tensor.scale > 0).all())
    assert tensor.dequantize().isfinite().all()


def test_a_codebook_that_is_no_grid_is_refused():
    with pytest.raises(UserError, match="256 codewords of 3 numbers"):
        uniform.quantize_weight(weight(), WeightSpec(Format(3, 256)), 0, uniform.Options())
