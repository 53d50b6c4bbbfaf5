"""Low-bit floats: every code and every rounding boundary, against ml_dtypes, the ONNX reference and brute force."""

from __future__ import annotations

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from engines.errors import UserError
from exporter.formats.fp import Format, of_bits

SPLITS = [(e, m) for e in range(1, 7) for m in range(8 - e)]
ML_DTYPES = {
    (4, 3): ml_dtypes.float8_e4m3fn,
    (5, 2): ml_dtypes.float8_e5m2,
    (2, 1): ml_dtypes.float4_e2m1fn,
    (3, 2): ml_dtypes.float6_e3m2fn,
    (2, 3): ml_dtypes.float6_e2m3fn,
    (3, 4): ml_dtypes.float8_e3m4,  # has infinities and NaN where ours has numbers: compared below them only
}
ONNX = {(4, 3): TensorProto.FLOAT8E4M3FN, (5, 2): TensorProto.FLOAT8E5M2}
WITHOUT_NAN = [split for split in SPLITS if split not in ONNX]
OPSET = 21

all_splits = pytest.mark.parametrize("split", SPLITS, ids="e{0[0]}m{0[1]}".format)
with_ml_dtypes = pytest.mark.parametrize("split", ML_DTYPES, ids="e{0[0]}m{0[1]}".format)
with_onnx = pytest.mark.parametrize("split", ONNX, ids="e{0[0]}m{0[1]}".format)
without_nan = pytest.mark.parametrize("split", WITHOUT_NAN, ids="e{0[0]}m{0[1]}".format)


def as_bytes(codes: torch.Tensor) -> np.ndarray:
    return codes.view(torch.uint8).numpy()


def all_codes(fmt: Format) -> torch.Tensor:
    return torch.arange(2**fmt.bits, dtype=torch.uint8)


def magnitudes(fmt: Format) -> np.ndarray:
    """The numbers of the positive codes, ascending, so that an index is a code."""
    values = fmt.values[: 2 ** (fmt.bits - 1)].double().numpy()
    return values[np.isfinite(values)]


def midpoints(fmt: Format) -> np.ndarray:
    """Halfway between neighbouring codes, exactly: one more mantissa bit, which fp32 has."""
    values = magnitudes(fmt)
    return ((values[1:] + values[:-1]) / 2).astype(np.float32)


def both_signs(x: np.ndarray) -> np.ndarray:
    return np.concatenate([x, -x])


def boundaries(fmt: Format) -> np.ndarray:
    """Every number of the format (subnormals and both zeros too), every midpoint, and fp32's neighbours of these."""
    x = np.concatenate([magnitudes(fmt).astype(np.float32), midpoints(fmt)])
    above, below = np.nextafter(x, np.float32(np.inf)), np.nextafter(x[x > 0], np.float32(0))
    return both_signs(np.concatenate([x, above, below]))


def overflows(fmt: Format) -> np.ndarray:
    return both_signs(np.float32([fmt.max_value * f for f in (1.01, 1.04, 1.2, 2, 1e6)] + [np.inf]))


def nearest_codes(fmt: Format, x: np.ndarray) -> np.ndarray:
    """Codes of the nearest numbers by looking at all of them; only for x that is no midpoint."""
    wide = np.minimum(np.abs(x.astype(np.float64)), fmt.max_value)
    nearest = np.abs(wide[:, None] - magnitudes(fmt)[None, :]).argmin(axis=1)
    return (nearest + np.signbit(x) * 2 ** (fmt.bits - 1)).astype(np.uint8)


def run_onnx(nodes: list[onnx.NodeProto], x: np.ndarray, x_type: int, y_type: int, **constants: tuple) -> np.ndarray:
    """Runs nodes from x to y in the ONNX reference; constants are name=(type, values, shape)."""
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", x_type, [None])],
        [helper.make_tensor_value_info("y", y_type, [None])],
        [helper.make_tensor(name, *value) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(model).run(None, {"x": x})[0]


def assert_same_codes(ours: torch.Tensor, theirs: np.ndarray, x: np.ndarray) -> None:
    nan = np.isnan(x)  # the sign and payload of a NaN are nobody's promise
    theirs = theirs.view(np.uint8)
    different = (as_bytes(ours) != theirs) & ~nan
    assert not different.any(), list(zip(x[different], as_bytes(ours)[different], theirs[different], strict=True))[:5]


@all_splits
def test_every_code_is_worth_what_its_bits_say(split):
    fmt = Format(*split)
    exponent_bits, mantissa_bits = split
    bias = 2 ** (exponent_bits - 1) - 1 if exponent_bits < 6 else 2**exponent_bits - 16
    assert exponent_bits < 6 or fmt.max_value < 2**16
    for code, value in enumerate(fmt.values.tolist()):
        exponent = code >> mantissa_bits & 2**exponent_bits - 1
        fraction = Fraction(code & 2**mantissa_bits - 1, 2**mantissa_bits) + (exponent > 0)
        expected = fraction * Fraction(2) ** (max(exponent, 1) - bias)
        if split in ONNX and not math.isfinite(value):
            continue
        assert Fraction(abs(value)) == expected
        assert math.copysign(1, value) == (-1 if code >> fmt.bits - 1 else 1)


@with_ml_dtypes
def test_every_code_decodes_as_in_ml_dtypes(split):
    fmt = Format(*split)
    codes = all_codes(fmt)
    theirs = codes.numpy().view(ML_DTYPES[split]).astype(np.float32)
    ours = fmt.decode(codes.view(fmt.carrier)).numpy()
    compared = np.isfinite(theirs) if split == (3, 4) else np.full(len(theirs), True)
    assert compared.sum() >= 2**fmt.bits - 32
    np.testing.assert_array_equal(ours[compared], theirs[compared])
    np.testing.assert_array_equal(np.signbit(ours[compared]), np.signbit(theirs[compared]))


@with_ml_dtypes
def test_every_boundary_rounds_as_in_ml_dtypes(split):
    fmt = Format(*split)
    x = boundaries(fmt)
    largest = float(ml_dtypes.finfo(ML_DTYPES[split]).max)
    x = x[np.abs(x) <= largest]  # beyond it ml_dtypes overflows, ours saturates
    assert_same_codes(fmt.encode(torch.from_numpy(x)), x.astype(ML_DTYPES[split]), x)


@with_onnx
def test_cast_in_the_onnx_reference_gives_the_same_codes(split):
    fmt = Format(*split)
    x = np.concatenate([boundaries(fmt), overflows(fmt), np.float32([np.nan, -np.nan])])
    cast = helper.make_node("Cast", ["x"], ["y"], to=ONNX[split], saturate=1)
    theirs = run_onnx([cast], x, TensorProto.FLOAT, ONNX[split])
    ours = fmt.encode(torch.from_numpy(x))
    assert_same_codes(ours, theirs, x)
    np.testing.assert_array_equal(np.isnan(theirs.astype(np.float32)), ours.float().isnan().numpy())


@with_onnx
@pytest.mark.parametrize("scale", [1.0, 0.0371])
def test_quantize_linear_in_the_onnx_reference_gives_the_same_codes(split, scale):
    fmt = Format(*split)
    x = np.concatenate([boundaries(fmt) * np.float32(scale), overflows(fmt), np.float32([np.nan])])
    quantize = helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["y"], saturate=1)
    theirs = run_onnx(
        [quantize],
        x,
        TensorProto.FLOAT,
        ONNX[split],
        scale=(TensorProto.FLOAT, [], [scale]),
        zero=(ONNX[split], [], [0.0]),
    )
    assert_same_codes(fmt.encode(torch.from_numpy(x) / torch.tensor(scale)), theirs, x)


@with_onnx
def test_dequantize_linear_in_the_onnx_reference_gives_the_same_values(split):
    fmt = Format(*split)
    codes = all_codes(fmt).numpy().view(ML_DTYPES[split])
    dequantize = helper.make_node("DequantizeLinear", ["x", "scale"], ["y"])
    theirs = run_onnx([dequantize], codes, ONNX[split], TensorProto.FLOAT, scale=(TensorProto.FLOAT, [], [0.0371]))
    ours = fmt.decode(all_codes(fmt).view(fmt.carrier)) * torch.tensor(0.0371)
    np.testing.assert_array_equal(ours.numpy(), theirs)


@all_splits
def test_ties_go_to_the_even_code(split):
    fmt = Format(*split)
    lower = np.arange(len(midpoints(fmt)))
    even = (lower + lower % 2).astype(np.uint8)
    np.testing.assert_array_equal(as_bytes(fmt.encode(torch.from_numpy(midpoints(fmt)))), even)
    negative = as_bytes(fmt.encode(torch.from_numpy(-midpoints(fmt))))
    np.testing.assert_array_equal(negative, even + 2 ** (fmt.bits - 1))


@all_splits
def test_between_ties_the_nearest_number_is_chosen(split):
    fmt = Format(*split)
    x = np.concatenate([boundaries(fmt), overflows(fmt)])
    x = x[~np.isin(np.abs(x), midpoints(fmt))]
    np.testing.assert_array_equal(as_bytes(fmt.encode(torch.from_numpy(x))), nearest_codes(fmt, x))


@all_splits
def test_every_number_keeps_its_code_and_the_sign_of_zero(split):
    fmt = Format(*split)
    numbers = fmt.values.isfinite()
    codes = all_codes(fmt)[numbers]
    encoded = fmt.encode(fmt.decode(codes.view(fmt.carrier)))
    assert encoded.dtype == fmt.carrier
    np.testing.assert_array_equal(as_bytes(encoded), codes.numpy())
    decoded = fmt.decode(encoded)
    np.testing.assert_array_equal(decoded.numpy(), fmt.values[numbers].numpy())
    assert decoded.signbit().tolist() == (codes >= 2 ** (fmt.bits - 1)).tolist()


@pytest.mark.parametrize(
    ("split", "x", "expected"),
    [
        ((4, 3), 448.0, 448.0),
        ((4, 3), 465.0, 448.0),
        ((4, 3), 1e30, 448.0),
        ((5, 2), 61440.0, 57344.0),
        ((5, 2), 3e38, 57344.0),
        ((2, 1), 7.0, 6.0),
        ((3, 2), 100.0, 28.0),
        ((2, 3), 8.0, 7.5),
        ((3, 4), 32.0, 31.0),
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_overflow_saturates(split, x, expected, sign):
    fmt = Format(*split)
    assert fmt.decode(fmt.encode(torch.tensor(sign * x))).item() == sign * expected
    assert fmt.max_value == expected


@all_splits
@pytest.mark.parametrize("sign", [1, -1])
def test_infinity_saturates(split, sign):
    fmt = Format(*split)
    infinity = torch.tensor(sign * math.inf)
    assert fmt.decode(fmt.encode(infinity)).item() == sign * fmt.max_value
    assert fmt.round(infinity).item() == sign * fmt.max_value


@without_nan
def test_nan_is_an_error_where_no_code_is_nan(split):
    fmt = Format(*split)
    with pytest.raises(ValueError, match=f"E{split[0]}M{split[1]}.*NaN"):
        fmt.encode(torch.tensor([1.0, math.nan]))
    assert fmt.values.isfinite().all()


@with_onnx
def test_nan_has_a_code_of_its_own_sign_where_the_format_has_one(split):
    fmt = Format(*split)
    codes = fmt.encode(torch.tensor([1.0, math.nan, -math.nan]))
    assert as_bytes(codes)[1:].tolist() == [0x7F, 0xFF]
    assert fmt.decode(codes).isnan().tolist() == [False, True, True]


@all_splits
def test_round_keeps_nan_and_the_sign_of_zero(split):
    rounded = Format(*split).round(torch.tensor([math.nan, 0.0, -0.0]))
    assert rounded.isnan().tolist() == [True, False, False]
    assert rounded[1:].tolist() == [0.0, 0.0]
    assert rounded[1:].signbit().tolist() == [False, True]


@all_splits
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_is_decode_of_encode_on_random_data(split, dtype):
    fmt = Format(*split)
    generator = torch.Generator().manual_seed(0)
    spread = torch.exp2(torch.empty(4096, dtype=dtype).uniform_(-36, 36, generator=generator))
    x = torch.randn(4096, dtype=dtype, generator=generator) * spread
    rounded = fmt.round(x)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fmt.decode(fmt.encode(x)).to(dtype))


@all_splits
def test_round_is_decode_of_encode_beside_midpoints_of_fp64(split):
    """Nearer to a midpoint than fp32 can tell: going through fp32 first would make it a tie."""
    fmt = Format(*split)
    middle = midpoints(fmt).astype(np.float64)
    x = torch.from_numpy(np.concatenate([np.nextafter(middle, np.inf), np.nextafter(middle, 0)]))
    expected = torch.from_numpy(np.concatenate([magnitudes(fmt)[1:], magnitudes(fmt)[:-1]]))
    assert torch.equal(fmt.round(x), expected)
    assert torch.equal(fmt.decode(fmt.encode(x)).double(), expected)


@all_splits
def test_rounding_twice_changes_nothing(split):
    fmt = Format(*split)
    once = fmt.round(torch.from_numpy(boundaries(fmt)))
    assert torch.equal(fmt.round(once), once)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)])
@pytest.mark.parametrize("split", [(4, 3), (2, 1)])
def test_shape_is_kept(split, shape):
    fmt = Format(*split)
    codes = fmt.encode(torch.ones(shape))
    assert codes.shape == fmt.decode(codes).shape == fmt.round(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("split", [(0, 3), (-1, 4), (2, -1), (1, -1), (4, 4), (5, 3), (1, 7), (8, 0), (40, 40)])
def test_bad_bit_widths_are_the_users_error(split):
    with pytest.raises(UserError, match=str(split[0])) as caught:
        Format(*split)
    assert "exponent_bits" in caught.value.fix


@pytest.mark.parametrize(
    ("split", "kind", "carrier", "onnx_type"),
    [
        ((4, 3), "fp8", torch.float8_e4m3fn, "FLOAT8E4M3FN"),
        ((5, 2), "fp8_e5m2", torch.float8_e5m2, "FLOAT8E5M2"),
        ((3, 4), "fp8_e3m4", torch.uint8, "INT8"),
        ((3, 2), "fp6", torch.uint8, "INT8"),
        ((2, 1), "fp4", torch.uint8, "INT4"),
    ],
)
def test_formats_say_how_they_are_stored(split, kind, carrier, onnx_type):
    fmt = Format(*split)
    assert (fmt.kind, fmt.carrier, fmt.onnx_type) == (kind, carrier, onnx_type)


def test_more_bits_than_memory_has_room_for_are_refused_at_once():
    with pytest.raises(UserError, match="exponent and"):
        of_bits(1 << 62)
