"""What every format must hold: checked over each file of exporter/formats, with every option that it accepts."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
import math

import onnx
import pytest
import torch

from engines.errors import UserError
from exporter import formats


def accepted(name: str) -> list[formats.Format]:
    """Every instance that options from 0 to 8 can make."""
    keys = [f.name for f in dataclasses.fields(importlib.import_module(f"exporter.formats.{name}").Format)]
    found = []
    for values in itertools.product(range(9), repeat=len(keys)):
        try:
            found.append(formats.load(name, dict(zip(keys, values, strict=True)), "test"))
        except UserError:
            continue
    return found


GRIDS = [name for name in formats.names() if name != "codebook"]  # whose values are each tensor's own
EVERY = [(name, fmt) for name in GRIDS for fmt in accepted(name)]
every_format = pytest.mark.parametrize("fmt", [fmt for _, fmt in EVERY], ids=[f"{name}-{fmt}" for name, fmt in EVERY])


def test_every_file_makes_formats():
    assert {"fp", "int"} <= set(formats.names())
    assert {name for name, _ in EVERY} == set(GRIDS)


@every_format
def test_attributes_of_the_protocol_are_there(fmt):
    assert isinstance(fmt.bits, int)
    assert 2 <= fmt.bits <= 8
    assert isinstance(fmt.max_value, float)
    assert 0 < fmt.max_value < math.inf
    assert isinstance(fmt.carrier, torch.dtype)
    assert fmt.carrier.itemsize == 1
    assert hasattr(onnx.TensorProto, fmt.onnx_type)
    assert isinstance(fmt.native, bool)
    assert fmt.learned is False
    assert isinstance(fmt.kind, str)
    assert fmt.kind


@every_format
def test_code_zero_is_zero(fmt):
    zero = torch.zeros(1, dtype=torch.uint8).view(fmt.carrier)
    assert fmt.decode(zero).tolist() == [0.0]
    assert fmt.encode(torch.zeros(1)).view(torch.uint8).tolist() == [0]


@every_format
def test_codes_lie_in_the_carrier_and_decode_to_fp32(fmt):
    codes = fmt.encode(torch.linspace(-2, 2, 64) * fmt.max_value)
    assert codes.dtype == fmt.carrier
    assert fmt.decode(codes).dtype == torch.float32
    assert len(set(codes.view(torch.uint8).tolist())) <= 2**fmt.bits


@every_format
def test_values_are_those_of_the_codes(fmt):
    assert fmt.values.shape == (2**fmt.bits,)
    assert fmt.values.dtype == torch.float32
    codes = fmt.encode(fmt.values[fmt.values.isfinite()])
    assert torch.equal(fmt.decode(codes), fmt.values[fmt.values.isfinite()])
    # in the order of the codes' bits: what a graph that looks codes up relies on
    bits = codes.view(torch.uint8).long() & (2**fmt.bits - 1)
    assert torch.equal(fmt.values[bits], fmt.values[fmt.values.isfinite()])


@every_format
def test_the_largest_number_is_kept_on_both_sides(fmt):
    ends = torch.tensor([fmt.max_value, -fmt.max_value])
    assert fmt.decode(fmt.encode(ends)).tolist() == ends.tolist()


@every_format
def test_round_is_odd_monotone_and_decode_of_encode(fmt):
    x = torch.linspace(0, 1, 501) * fmt.max_value
    rounded = fmt.round(x)
    assert torch.equal(rounded, fmt.decode(fmt.encode(x)))
    assert torch.equal(fmt.round(-x), -rounded)
    assert (rounded.diff() >= 0).all()


@every_format
def test_round_leaves_its_input_as_it_was(fmt):
    x = torch.tensor([0.3, -1.7, 1e6])
    fmt.round(x)
    fmt.encode(x)
    assert torch.equal(x, torch.tensor([0.3, -1.7, 1e6]))


@every_format
def test_formats_are_frozen_values(fmt):
    options = {f.name: getattr(fmt, f.name) for f in dataclasses.fields(fmt)}
    assert type(fmt)(**options) == fmt
    assert hash(type(fmt)(**options)) == hash(fmt)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(fmt, next(iter(options)), 3)


@pytest.mark.parametrize(
    ("name", "options", "named", "fix"),
    [
        ("itn", {"bits": 8}, "'itn'", "did you mean 'int'"),
        ("", {}, "''", "known: auto, codebook, fp, int"),
        ("_fp", {}, "'_fp'", "known: auto, codebook, fp, int"),
        ("int", {"bit": 8}, "'bit'", "did you mean 'bits'"),
        ("int", {}, "bits", "bits = NUMBER"),
        ("fp", {"exponent_bits": 4}, "mantissa_bits", "mantissa_bits = NUMBER"),
        ("fp", {"bits": 8}, "'bits'", "exponent_bits, mantissa_bits"),
    ],
)
def test_what_cannot_be_loaded_is_named_with_a_fix(name, options, named, fix):
    with pytest.raises(UserError) as caught:
        formats.load(name, options, "the weight of rule 3")
    assert caught.value.what.startswith("the weight of rule 3: ")
    assert named in caught.value.what
    assert fix in caught.value.fix
