"""Symmetric integers: every step and every tie, against plain arithmetic and the ONNX reference."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from engines.errors import UserError
from exporter.formats.int import Format
from exporter.tensors import scale_for

BITS = range(2, 9)
ONNX = {8: (TensorProto.INT8, np.int8), 4: (TensorProto.INT4, ml_dtypes.int4)}
OPSET = 21


def boundaries() -> np.ndarray:
    """Every half step over more than the range of 8 bits, and fp32's neighbours of each."""
    x = np.arange(-300, 301, dtype=np.float32) / 2
    return np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])


def run_onnx(op: str, x: np.ndarray, x_type: int, y_type: int, scale: float, zero_type: int) -> np.ndarray:
    """Runs one Q or DQ node with a per-tensor scale in the ONNX reference."""
    graph = helper.make_graph(
        [helper.make_node(op, ["x", "scale", "zero"], ["y"])],
        "test",
        [helper.make_tensor_value_info("x", x_type, [None])],
        [helper.make_tensor_value_info("y", y_type, [None])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero", zero_type, [], [0]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


@pytest.mark.parametrize("bits", BITS)
def test_ties_go_to_the_even_code_and_the_rest_to_the_nearest(bits):
    x = boundaries()
    lowest, highest = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = [min(max(round(float(v)), lowest), highest) for v in x]  # Python's round: ties to even
    codes = Format(bits).encode(torch.from_numpy(x))
    assert codes.dtype == torch.int8
    assert codes.tolist() == expected


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("x", [1000.0, 3e38, math.inf])
def test_codes_saturate_at_the_ends_of_the_type(bits, x):
    codes = Format(bits).encode(torch.tensor([x, -x]))
    assert codes.tolist() == [2 ** (bits - 1) - 1, -(2 ** (bits - 1))]


@pytest.mark.parametrize("bits", BITS)
def test_every_code_keeps_its_number(bits):
    fmt = Format(bits)
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.int8)
    values = fmt.decode(codes)
    assert values.dtype == torch.float32
    assert values.tolist() == codes.tolist()
    assert torch.equal(fmt.encode(values), codes)


@pytest.mark.parametrize("bits", ONNX)
@pytest.mark.parametrize("scale", [1.0, 0.0371])
def test_quantize_linear_in_the_onnx_reference_gives_the_same_codes(bits, scale):
    code_type, _ = ONNX[bits]
    x = boundaries() * np.float32(scale)
    theirs = run_onnx("QuantizeLinear", x, TensorProto.FLOAT, code_type, scale, code_type)
    ours = Format(bits).encode(torch.from_numpy(x) / torch.tensor(scale))
    np.testing.assert_array_equal(ours.numpy(), theirs.astype(np.int8))


@pytest.mark.parametrize("bits", ONNX)
def test_dequantize_linear_in_the_onnx_reference_gives_the_same_values(bits):
    code_type, carrier = ONNX[bits]
    codes = np.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).astype(np.int8)
    theirs = run_onnx("DequantizeLinear", codes.astype(carrier), code_type, TensorProto.FLOAT, 0.0371, code_type)
    ours = Format(bits).decode(torch.from_numpy(codes)) * torch.tensor(0.0371)
    np.testing.assert_array_equal(ours.numpy(), theirs)


@pytest.mark.parametrize("bits", BITS)
def test_a_range_is_scaled_to_the_largest_positive_code(bits):
    fmt = Format(bits)
    assert fmt.max_value == 2 ** (bits - 1) - 1
    range_ = torch.tensor(2.5)
    scale = scale_for(range_, fmt)
    steps = 2 ** (bits - 1) - 1
    # fp16 has 11 significant bits and the scale is rounded up to it: at most 2^-10 above
    assert 2.5 / steps <= scale.item() <= 2.5 / steps * (1 + 2**-10)
    assert fmt.encode(torch.stack([range_, -range_]) / scale).tolist() == [steps, -steps]


@pytest.mark.parametrize("bits", BITS)
def test_nan_is_an_error(bits):
    with pytest.raises(ValueError, match="no code for NaN"):
        Format(bits).encode(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize("bits", BITS)
def test_round_keeps_nan(bits):
    assert Format(bits).round(torch.tensor([math.nan, 1.2])).isnan().tolist() == [True, False]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_is_decode_of_encode_on_random_data(bits, dtype):
    fmt = Format(bits)
    x = torch.randn(4096, dtype=dtype, generator=torch.Generator().manual_seed(0)) * fmt.max_value
    rounded = fmt.round(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fmt.decode(fmt.encode(x)).to(dtype))


@pytest.mark.parametrize(("bits", "stored"), [(b, "INT4" if b <= 4 else "INT8") for b in BITS])
def test_formats_say_how_they_are_stored(bits, stored):
    fmt = Format(bits)
    assert (fmt.onnx_type, fmt.kind, fmt.carrier) == (stored, stored.lower(), torch.int8)


@pytest.mark.parametrize("bits", [-8, 0, 1, 9, 16, 10**9])
def test_bad_bit_widths_are_the_users_error(bits):
    with pytest.raises(UserError, match=str(bits)) as caught:
        Format(bits)
    assert "2 … 8" in caught.value.fix
