"""Scales, granularities, fake quantization and INT4's bytes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.tensors import (
    QuantizedTensor,
    absmax,
    fake_quantize,
    pack_int4,
    quantize,
    scale_for,
    spread,
    unpack_int4,
)

FORMATS = [Int(4), Int(8), Fp(4, 3), Fp(5, 2), Fp(2, 1)]
ONNX_CODES = {
    Int(4): (TensorProto.INT4, ml_dtypes.int4),
    Int(8): (TensorProto.INT8, np.int8),
    Fp(4, 3): (TensorProto.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
}
LARGEST_HALF = 65504.0
SHAPE = (4, 6, 8)
BLOCK = 2

every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: f"{fmt.kind}-{fmt.bits}")


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parts(shape: tuple[int, ...], granularity: str, axis: int):
    """Yields (index of a scale, slices of what shares it), one by one."""
    if granularity == "tensor":
        yield (), (...,)
    elif granularity == "channel":
        for i in range(shape[axis]):
            index = [slice(None)] * len(shape)
            index[axis] = i
            yield (i,), tuple(index)
    else:
        counts = list(shape)
        counts[axis] //= BLOCK
        for at in np.ndindex(*counts):
            index = list(at)
            index[axis] = slice(at[axis] * BLOCK, (at[axis] + 1) * BLOCK)
            yield at, tuple(index)


LAYOUTS = [("tensor", 0), *[(g, axis) for g in ("channel", "block") for axis in (0, 1, 2, -1, -2, -3)]]
every_layout = pytest.mark.parametrize(("granularity", "axis"), LAYOUTS)


@every_layout
def test_absmax_is_the_largest_magnitude_of_each_part(granularity, axis):
    x = random(SHAPE)
    found = absmax(x, granularity, axis, BLOCK)
    indices = list(parts(SHAPE, granularity, axis))
    assert found.numel() == len(indices)
    for at, index in indices:
        assert found[at] == x[index].abs().max()


@every_layout
def test_spread_gives_every_element_the_scale_of_its_part(granularity, axis):
    scale = absmax(random(SHAPE), granularity, axis, BLOCK)
    wide = spread(scale, torch.Size(SHAPE), granularity, axis, BLOCK).expand(SHAPE)
    for at, index in parts(SHAPE, granularity, axis):
        assert (wide[index] == scale[at]).all()


@every_format
@every_layout
def test_each_part_is_quantized_as_if_it_were_alone(fmt, granularity, axis):
    x = random(SHAPE)
    scale = scale_for(absmax(x, granularity, axis, BLOCK), fmt)
    tensor = quantize(x, scale, fmt, granularity, axis, BLOCK)
    assert isinstance(tensor, QuantizedTensor)
    assert tensor.codes.shape == x.shape
    assert tensor.codes.dtype == fmt.carrier
    codes, values = tensor.codes.view(torch.uint8), tensor.dequantize()
    for at, index in parts(SHAPE, granularity, axis):
        alone = fmt.encode(x[index] / scale[at])
        assert torch.equal(codes[index], alone.view(torch.uint8))
        assert torch.equal(values[index], fmt.decode(alone) * scale[at])


@pytest.mark.parametrize("bits", [2, 4, 8])
@every_layout
def test_an_integer_is_off_by_half_a_step_at_most(bits, granularity, axis):
    fmt, x = Int(bits), random(SHAPE)
    scale = scale_for(absmax(x, granularity, axis, BLOCK), fmt)
    tensor = quantize(x, scale, fmt, granularity, axis, BLOCK)
    step = spread(scale, x.shape, granularity, axis, BLOCK)
    # fp32's division and product add relative 2^-23 each, of at most 128 steps: below 1e-4 of a step
    assert ((tensor.dequantize() - x).abs() <= step * (0.5 + 1e-4)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_dequantize_multiplies_in_the_type_asked_for(dtype):
    tensor = quantize(random((5, 7)), torch.tensor(0.0371).half().float(), Int(8), "tensor")
    values = tensor.dequantize(dtype)
    assert values.dtype == dtype
    assert torch.equal(values, tensor.codes.to(dtype) * tensor.scale.to(dtype))


@pytest.mark.parametrize("fmt", ONNX_CODES, ids=lambda fmt: fmt.kind)
@pytest.mark.parametrize(("granularity", "axis"), [("tensor", 0), ("channel", 0), ("channel", 1), ("block", 0)])
def test_dequantize_linear_in_the_onnx_reference_gives_the_same_values(fmt, granularity, axis):
    x, size = random((8, 6)), 4
    scale = scale_for(absmax(x, granularity, axis, size), fmt)
    tensor = quantize(x, scale, fmt, granularity, axis, size)
    code_type, carrier = ONNX_CODES[fmt]
    codes = tensor.codes.view(torch.uint8).numpy()
    codes = codes.view(carrier) if code_type == TensorProto.FLOAT8E4M3FN else codes.view(np.int8).astype(carrier)
    attributes = {"axis": axis} | ({"block_size": size} if granularity == "block" else {})
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["x", "scale"], ["y"], **attributes)],
        "test",
        [
            helper.make_tensor_value_info("x", code_type, None),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, None),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    theirs = ReferenceEvaluator(model).run(None, {"x": codes, "scale": scale.numpy()})[0]
    np.testing.assert_array_equal(tensor.dequantize().numpy(), theirs)


@every_format
def test_scales_are_the_smallest_fp16_numbers_that_hold_the_range(fmt):
    wanted = torch.exp2(torch.linspace(-23.9, 15.9, 997, dtype=torch.float64))  # from fp16's smallest to its largest
    ranges = torch.cat([wanted, torch.exp2(torch.arange(-23, 16, dtype=torch.float64))]) * fmt.max_value
    scale = scale_for(ranges, fmt)
    assert scale.dtype == torch.float32
    assert torch.equal(scale, scale.half().float())
    needed = ranges / fmt.max_value
    assert (scale.double() >= needed).all()
    below = torch.nextafter(scale.half(), torch.zeros(1, dtype=torch.float16))
    assert (below.double() < needed).all()


@every_format
def test_scales_of_fp32_ranges_hold_them_too(fmt):
    ranges = random((2000,)).abs() * 10
    scale = scale_for(ranges, fmt)
    assert torch.equal(scale, scale.half().float())
    assert (scale.double() * fmt.max_value >= ranges.double()).all()


@every_format
def test_a_range_of_zero_has_scale_one(fmt):
    assert scale_for(torch.tensor(0.0), fmt).item() == 1.0
    assert scale_for(torch.tensor([0.0, fmt.max_value, 0.0]), fmt).tolist() == [1.0, 1.0, 1.0]


@every_format
def test_scales_stay_positive_and_finite_at_the_ends(fmt):
    scale = scale_for(torch.tensor([1e-45, 1e-30, 3e38, math.inf]), fmt)
    assert scale.tolist() == [2.0**-24, 2.0**-24, LARGEST_HALF, LARGEST_HALF]


@every_format
def test_an_all_zero_tensor_stays_zero(fmt):
    x = torch.zeros(4, 4)
    tensor = quantize(x, scale_for(absmax(x, "channel", 0, 0), fmt), fmt, "channel", 0)
    assert torch.equal(tensor.dequantize(), x)


@every_format
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fake_quantize_of_half_precision_divides_and_rounds_in_fp32(fmt, dtype):
    x = (random((4096,)) * 3).to(dtype)
    scale = scale_for(x.float().abs().max(), fmt)
    y = fake_quantize(x, scale, fmt)
    assert y.dtype == dtype
    assert torch.equal(y, (fmt.round(x.float() / scale) * scale).to(dtype))


def test_dividing_in_half_precision_would_give_other_values():
    """What the test above is worth: the same computation in fp16 differs."""
    x = (random((4096,)) * 3).half()
    scale = torch.tensor(0.0371).half().float()
    narrow = (x / scale.half()).round().clamp(-128, 127) * scale.half()
    assert not torch.equal(fake_quantize(x, scale, Int(8)), narrow)


@every_format
def test_fake_quantize_computes_in_fp64_what_comes_in_fp64(fmt):
    x = random((512,), torch.float64)
    scale = scale_for(x.abs().max(), fmt)
    y = fake_quantize(x, scale, fmt)
    assert y.dtype == torch.float64
    assert torch.equal(y, fmt.round(x / scale.double()) * scale.double())


@every_format
def test_fake_quantize_is_quantize_and_dequantize(fmt):
    x = random((512,))
    scale = scale_for(x.abs().max(), fmt)
    assert torch.equal(fake_quantize(x, scale, fmt), quantize(x, scale, fmt, "tensor").dequantize())


INT4_SHAPES = [(0,), (1,), (2,), (7,), (3, 5), (4, 4), (2, 3, 5), ()]


def int4_codes(shape: tuple[int, ...]) -> torch.Tensor:
    count = math.prod(shape)
    return ((torch.arange(count) * 7 + 3) % 16 - 8).to(torch.int8).reshape(shape)


@pytest.mark.parametrize("shape", INT4_SHAPES)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_packed_4_bit_codes_unpack_to_the_same_codes(shape, signed):
    codes = int4_codes(shape) if signed else (int4_codes(shape) + 8).to(torch.uint8)
    packed = pack_int4(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (math.ceil(codes.numel() / 2),)
    unpacked = unpack_int4(packed, torch.empty_like(codes))
    assert unpacked.dtype == codes.dtype
    assert torch.equal(unpacked, codes)


def test_every_pair_of_int4_codes_survives_packing():
    codes = torch.cartesian_prod(torch.arange(-8, 8), torch.arange(-8, 8)).to(torch.int8)
    assert torch.equal(unpack_int4(pack_int4(codes), codes), codes)


@pytest.mark.parametrize("shape", INT4_SHAPES)
def test_packed_int4_has_the_bytes_that_onnx_makes(shape):
    codes = int4_codes(shape)
    narrow = codes.numpy().astype(ml_dtypes.int4)
    packed = pack_int4(codes).numpy().tobytes()
    assert packed == numpy_helper.from_array(narrow).raw_data
    assert packed == ir.Tensor(narrow, dtype=ir.DataType.INT4).tobytes()
    by_helper = helper.make_tensor("x", TensorProto.INT4, shape, codes.flatten().tolist())
    assert packed == bytes(value & 0xFF for value in by_helper.int32_data)


def test_codes_that_do_not_lie_in_order_are_packed_in_the_order_of_their_indices():
    codes = int4_codes((4, 6)).T
    assert not codes.is_contiguous()
    assert torch.equal(pack_int4(codes), pack_int4(codes.contiguous()))
