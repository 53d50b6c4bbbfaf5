"""What every method must hold: checked over each file of exporter/methods."""

from __future__ import annotations

import dataclasses
import importlib
import inspect

import pytest
import torch

from engines.errors import UserError
from exporter import methods
from exporter.formats.codebook import Format as Codebook
from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.recipe import WeightSpec
from exporter.tensors import absmax, quantize, scale_for

SPECS = [
    WeightSpec(Int(8), "channel"),
    WeightSpec(Int(8), "tensor"),
    WeightSpec(Int(4), "channel"),
    WeightSpec(Int(4), "block", 16),
    WeightSpec(Int(2), "channel"),
    WeightSpec(Fp(4, 3), "channel"),
    WeightSpec(Fp(5, 2), "tensor"),
    WeightSpec(Fp(2, 1), "block", 16),
]

GRID_METHODS = [name for name in methods.names() if not methods.load(name).CODEBOOKS]
CODEBOOK_METHODS = [name for name in methods.names() if methods.load(name).CODEBOOKS]
every_method = pytest.mark.parametrize("name", GRID_METHODS)
every_spec = pytest.mark.parametrize(
    "spec", SPECS, ids=[f"{s.format.kind}-{s.format.bits}-{s.granularity}" for s in SPECS]
)


def options(name: str):
    return methods.options(name, {}, "test")


def weight(*, heavy: bool = False) -> torch.Tensor:
    draws = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)) / 8
    return draws**3 if heavy else draws


def squared_error(tensor, x: torch.Tensor) -> float:
    return (tensor.dequantize(torch.float64) - x.double()).square().sum().item()


def test_every_file_is_a_method():
    assert {"rtn", "smoothquant"} <= set(methods.names())
    for name in methods.names():
        assert callable(methods.load(name).factors)
        assert callable(methods.load(name).quantize_weight)


@every_method
def test_options_are_a_frozen_dataclass_with_defaults(name):
    cls = importlib.import_module(f"exporter.methods.{name}").Options
    assert dataclasses.is_dataclass(cls)
    made = cls()
    assert made == options(name)
    assert hash(made) == hash(cls())
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.anything = 1


@every_method
def test_signatures_are_those_of_the_protocol(name):
    method = methods.load(name)
    for function in ("factors", "quantize_weight"):
        expected = list(inspect.signature(getattr(methods.Method, function)).parameters)[1:]  # without self
        assert list(inspect.signature(getattr(method, function)).parameters) == expected
    assert isinstance(method.NEEDS_CHANNEL_ABSMAX, bool)


@every_method
@every_spec
@pytest.mark.parametrize("heavy", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_no_weight_is_farther_off_than_plain_rounding_leaves_it(name, spec, heavy, axis):
    x = weight(heavy=heavy)
    before = x.clone()
    tensor = methods.load(name).quantize_weight(x, spec, axis, options(name))
    scale = scale_for(absmax(x, spec.granularity, axis, spec.block_size), spec.format)
    plain = squared_error(quantize(x, scale, spec.format, spec.granularity, axis, spec.block_size), x)
    assert 0 < squared_error(tensor, x) <= plain * (1 + 1e-9)  # sums of fp64, perhaps in another order
    assert torch.equal(x, before)


@every_spec
def test_smoothquant_rounds_weights_as_rtn_does(spec):
    ours = methods.load("smoothquant").quantize_weight(weight(), spec, 0, options("smoothquant"))
    plain = methods.load("rtn").quantize_weight(weight(), spec, 0, options("rtn"))
    assert torch.equal(ours.codes.view(torch.uint8), plain.codes.view(torch.uint8))
    assert torch.equal(ours.scale, plain.scale)


@every_method
@every_spec
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_and_scales_have_the_shapes_and_types_that_layers_store(name, spec, axis):
    x = weight()
    tensor = methods.load(name).quantize_weight(x, spec, axis, options(name))
    blocks = [n // (spec.block_size if d == axis else 1) for d, n in enumerate(x.shape)] if spec.block_size else None
    shape = {"tensor": (), "channel": (x.shape[axis],), "block": tuple(blocks or ())}[spec.granularity]
    assert tensor.codes.shape == x.shape
    assert tensor.codes.dtype == spec.format.carrier
    assert tensor.scale.shape == shape
    assert tensor.scale.dtype == torch.float32
    assert torch.equal(tensor.scale, tensor.scale.half().float())
    assert (tensor.scale > 0).all()


@every_method
def test_a_weight_of_zeros_stays_zero(name):
    tensor = methods.load(name).quantize_weight(torch.zeros(8, 4), WeightSpec(Int(8)), 1, options(name))
    assert torch.equal(tensor.dequantize(), torch.zeros(8, 4))


CODEBOOKS = [
    WeightSpec(Codebook(4, 256)),
    WeightSpec(Codebook(2, 64), "tensor"),
    WeightSpec(Codebook(1, 16)),
    WeightSpec(Codebook(4, 256), "tensor", entries=Fp(4, 3)),
    WeightSpec(Codebook(2, 64), "tensor", entries=Int(8)),
]


@pytest.mark.parametrize("name", CODEBOOK_METHODS)
@pytest.mark.parametrize("spec", CODEBOOKS, ids=["2", "3 of tensor", "4", "2 fp8", "3 int8"])
@pytest.mark.parametrize("moments", [True, False])
def test_codebooks_hold_what_a_graph_and_a_matmul_take_and_come_out_the_same_twice(name, spec, moments):
    x = weight()
    seen = x.T @ x if moments else None
    assert methods.load(name).needs_moments(options(name)) in ("diagonal", "full")
    found, again = (methods.load(name).quantize_weight(x, spec, 0, options(name), seen) for _ in range(2))
    fmt = spec.format
    assert found.codes.shape == (64, 32 // fmt.vector_size)
    assert found.codes.dtype == torch.uint8
    assert int(found.codes.max()) < fmt.codebook_size
    assert found.codebook.shape == (fmt.codebook_size, fmt.vector_size)
    for held in (found.codebook, *([] if found.scale is None else [found.scale])):
        assert torch.equal(held, held.half().float())
    if spec.entries:
        assert torch.equal(spec.entries.round(found.codebook), found.codebook)
        assert found.scale.shape == ()
    assert torch.equal(found.codes, again.codes)
    assert torch.equal(found.codebook, again.codebook)
    assert squared_error(found, x) < 0.5 * float(x.double().square().sum())
    for value in (0.0, 1.0):  # rows that are all alike
        constant = methods.load(name).quantize_weight(torch.full((64, 32), value), spec, 0, options(name), seen)
        assert float((constant.dequantize() - value).abs().max()) <= 0.5
        assert constant.codebook.isfinite().all()


def two_layers() -> torch.nn.Sequential:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3), torch.nn.Linear(6, 3))


STATISTICS = {"0": torch.tensor([0.0, 1.0, 5.0, 100.0]), "1": torch.linspace(0.1, 10, 6)}


@every_method
def test_factors_are_asked_for_without_changing_the_model(name):
    model = two_layers()
    before = [p.clone() for p in model.parameters()]
    methods.load(name).factors(model, ["0", "1"], [], STATISTICS, options(name))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert not model[0]._forward_pre_hooks


@every_method
def test_factors_are_positive_numbers_one_for_each_input_of_layers_asked_for(name):
    model = two_layers()
    found = methods.load(name).factors(model, ["0", "1"], [], STATISTICS, options(name))
    assert found.keys() <= {"0", "1"}
    for path, factor in found.items():
        assert factor.shape == (model.get_submodule(path).weight.shape[1],)
        assert factor.isfinite().all()
        assert (factor > 0).all()


@every_method
def test_no_layers_no_factors(name):
    assert methods.load(name).factors(two_layers(), [], [], {}, options(name)) == {}


@pytest.mark.parametrize(
    ("name", "values", "named", "fix"),
    [
        ("gtpq", {}, "'gtpq'", "did you mean 'gptvq'? known: "),
        ("smoothqaunt", {}, "'smoothqaunt'", "did you mean 'smoothquant'"),
        ("smoothquant", {"alhpa": 0.5}, "'alhpa'", "did you mean 'alpha'"),
        ("smoothquant", {"alpha": "half"}, "alpha = 'half'", "0.5"),
        ("smoothquant", {"alpha": True}, "alpha = true", "0.5"),
        ("smoothquant", {"multiply": 1}, "multiply = 1", "the default is true"),
        ("rtn", {"alpha": 0.5}, "'alpha'", "known: none"),
    ],
)
def test_what_cannot_be_made_is_named_with_a_fix(name, values, named, fix):
    with pytest.raises(UserError) as caught:
        methods.options(name, values, "rule 3, method")
    assert caught.value.what.startswith("rule 3, method: ")
    assert named in caught.value.what
    assert fix in caught.value.fix
