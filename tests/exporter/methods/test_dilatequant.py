"""DilateQuant: what trains is what ships, readers of one tensor share a quantizer, and scales stay what graphs hold."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from common import TINY
from killing import killed_after
from torch import nn

from calib_data.store import CalibrationSet
from engines.errors import UserError
from exporter import methods, quantized, recipe, reconstruct, scaling, steps
from exporter.activations import LEAST_SCALE
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.dilation import dilation
from exporter.formats.int import Format as Int
from exporter.methods import dilatequant
from exporter.modules import multiply_input, quantized_layer
from exporter.quantize import quantize
from exporter.recipe import WeightSpec
from exporter.report import method_lines
from exporter.runners import TorchRunner
from exporter.specs import LayerSpec, oriented


def layer_of(*, conv=False, count=3, shifted=False, multiplied=False, bits=4, **options):
    """Returns a float layer and the one that trains in its place, with a scale for each of `count` steps."""
    torch.manual_seed(0)
    source = nn.Conv2d(6, 8, 3, padding=1) if conv else nn.Linear(16, 8)
    source.requires_grad_(False)
    if multiplied:
        multiply_input(source, torch.linspace(0.25, 2.0, 6 if conv else 16))
    spec = LayerSpec(Int(bits), "channel", 0, Int(bits), steps=count, shifted=shifted, multiplied=multiplied)
    start = methods.load("rtn").quantize_weight(oriented(source, spec), WeightSpec(Int(bits)), 0 if conv else 1, None)
    activation = {"activation_scale": torch.linspace(0.2, 0.4, count or 1).reshape(count or ()).half().float()}
    if shifted:
        activation["activation_shift"] = torch.arange(count) - 4.0
    return source, dilatequant.layer(source, spec, start, activation, dilatequant.Options(**options))


@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize(("count", "shifted"), [(0, False), (3, False), (3, True)], ids=["one", "steps", "shifted"])
@pytest.mark.parametrize("multiplied", [False, True], ids=["as it comes", "multiplied"])
def test_what_trains_is_what_ships(conv, count, shifted, multiplied):
    source, layer = layer_of(conv=conv, count=count, shifted=shifted, multiplied=multiplied)
    with torch.no_grad():  # as if it had been trained
        for parameter in (layer.weight, layer.log_weight_scale, layer.log_scale):
            parameter += 0.03 * torch.randn(parameter.shape)
    shipped = quantized_layer(source, layer.spec)
    shipped._buffers |= layer.state()
    if multiplied:
        shipped.input_multiplier = source.get_buffer("input_multiplier")
    if count:
        shipped.sum_shift()
    x = torch.randn(5, 6, 7, 7) if conv else torch.randn(5, 4, 16)
    with steps.at(steps.Position(torch.tensor([0, 2, 1, 1, 0]))), torch.no_grad():
        assert torch.allclose(layer(x), shipped(x), atol=1e-4, rtol=1e-4)  # fp32 sums in another order


def test_every_steps_scale_has_the_gradient_of_its_own_rows():
    _, layer = layer_of()
    with steps.at(steps.Position(torch.tensor([0, 0, 2]))):
        layer(torch.randn(3, 4, 16)).square().mean().backward()
    gradient = layer.log_scale.grad
    assert gradient[0] != 0
    assert gradient[1] == 0  # no row is of step 1
    assert gradient[2] != 0
    assert (layer.weight.grad != 0).any()
    assert (layer.log_weight_scale.grad != 0).any()


def test_zero_points_learn_where_values_are_clipped():
    _, layer = layer_of(shifted=True)
    with steps.at(steps.Position(torch.tensor([0, 1, 2]))):
        (layer(torch.full((3, 4, 16), 50.0)) - 100).square().mean().backward()
    assert (layer.shift.grad != 0).all()


def test_scales_stay_at_their_least_and_zero_points_among_the_codes(capsys):
    _, layer = layer_of(shifted=True)
    (phase,) = dilatequant.phases([layer], layer_options())
    with torch.no_grad():
        layer.log_scale.fill_(-50.0)
        layer.shift.copy_(torch.tensor([-90.0, 0.4, 90.0]))
    phase.settle()
    state = layer.state()
    assert state["activation_scale"].tolist() == [LEAST_SCALE] * 3
    assert state["activation_shift"].tolist() == [-8.0, 0.0, 7.0]
    assert phase.facts() == {"scales_at_the_least": 3}
    assert "3 scales of activations ended at the least there is" in capsys.readouterr().err


def layer_options(**options):
    return dilatequant.Options(**options)


def test_the_rates_fall_by_a_cosine():
    (phase,) = dilatequant.phases([layer_of()[1]], layer_options())
    assert [round(phase.share_of_rate(done), 3) for done in (0.0, 0.5, 1.0)] == [1.0, 0.5, 0.0]


@pytest.mark.parametrize(
    "options", [{"iterations": -1}, {"batch": 0}, {"weight_rate": -0.1}, {"scale_rate": 5000}, {"rows": 1.5}]
)
def test_bad_options_are_named(options):
    with pytest.raises(UserError, match=next(iter(options))):
        dilatequant.Options(**options)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    checkpoint = open_checkpoint(f"random:{folder}", steps=3)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=16)


STEPPED = {"format": "int", "bits": 4, "observer": "mse", "granularity": "step"}


PRODUCTS = {"layers": "*", "type": "attention", "activation": STEPPED}


def asked(*others, zero_point=False, **options):
    method = {"name": "dilatequant", "iterations": 30, "batch": 8, "rows": 32, **options}
    activation = STEPPED | ({"zero_point": True} if zero_point else {})
    rule = {"layers": "*", "weight": {"format": "int", "bits": 4}, "activation": activation, "method": method}
    return recipe.parse("test", {"rule": [{"layers": "*", "scope": "outside_blocks", "keep": "float"}, *others, rule]})


@pytest.mark.parametrize(
    ("others", "zero_point"), [((), True), ((PRODUCTS | {"scope": "blocks"},), False)], ids=["zero points", "products"]
)
def test_what_was_judged_while_training_is_what_ships(others, zero_point, tiny, tmp_path, monkeypatch):
    """The error on trajectories kept apart is that of the model as it is loaded, attention's products and all."""
    checkpoint, calibration = tiny
    judged, original = [], reconstruct.Calls.error

    def error(self):
        rows = [self.read(i) for i in range(self._training, self._chunks)]
        judged.append((self, rows, original(self)))
        return judged[-1][-1]

    monkeypatch.setattr(reconstruct.Calls, "error", error)
    ask = asked(*others, zero_point=zero_point, iterations=60, shift_rate=0.1)
    source = quantize(checkpoint, ask, calibration, tmp_path / "out")
    start = quantize(checkpoint, asked(*others, zero_point=zero_point, iterations=0), calibration, tmp_path / "start")
    (_, _, before), (calls, rows, after) = judged
    assert rows
    assert after < 0.9 * before
    model = quantized.load(source)
    shipped = reconstruct.ModelCalls(model, checkpoint.family, calls._blocks, calls._samples, tmp_path)
    with torch.no_grad():
        errors = [float(shipped.loss(chunk)) for chunk in rows]
    assert sum(errors) / len(errors) == pytest.approx(after, rel=1e-3)  # fp32 sums in another order flip a code or two
    leaf = "activation_shift" if zero_point else "activation_scale"
    names = [name for name, _ in model.named_buffers() if name.endswith(leaf) and (zero_point or "products" in name)]
    untrained = quantized.load(start)
    assert names
    moved = [not torch.equal(model.get_buffer(name), untrained.get_buffer(name)) for name in names]
    assert any(moved) if zero_point else all(moved)  # zero points are whole numbers: some end where they began


@pytest.mark.parametrize("joint", [True, False], ids=["jointly", "by blocks"])
def test_training_brings_the_outputs_nearer(joint, tiny, tmp_path, monkeypatch):
    checkpoint, calibration = tiny
    errors = []
    original = reconstruct.Calls.error
    monkeypatch.setattr(reconstruct.Calls, "error", lambda self: errors.append(original(self)) or errors[-1])
    source = quantize(checkpoint, asked(joint=joint, iterations=100), calibration, tmp_path / "out")
    assert len(errors) == 2 * (1 if joint else 2)
    for before, after in zip(errors[::2], errors[1::2], strict=True):
        assert after < before, errors
    told = [record["weights and scales"] for record in source.info["training"].values()]
    assert [(one["error_before"], one["error_after"]) for one in told] == list(
        zip(errors[::2], errors[1::2], strict=True)
    )
    assert all(one["kept"] and one["iterations"] == 100 and one["scales_at_the_least"] == 0 for one in told)
    assert [one["name"] for one in source.info["recipe"]["methods"]] == ["dilatequant"]
    assert source.info["recipe"]["methods"][0]["options"]["rows"] == 32
    layers = quantized.quantized_layers(quantized.load(source))
    scales = [layers[f"transformer_blocks.0.attn1.to_{n}"].activation_scale for n in "qkv"]
    assert scales[0].shape == (3,)
    assert torch.equal(scales[0], scales[1])  # they read one tensor
    assert torch.equal(scales[0], scales[2])
    assert len({float(s) for s in scales[0]}) == 3


def test_dilation_moves_no_output_and_is_logged(tiny, tmp_path):
    checkpoint, calibration = tiny
    source = quantize(checkpoint, asked(iterations=0), calibration, tmp_path / "out")
    factors = quantized.factors(source)
    model = checkpoint.load()
    key = "transformer_blocks.0.ff.net.2"  # four times as many inputs as outputs: many have room
    assert torch.equal(factors[key], dilation(model.get_submodule(key).weight))
    log = source.info["factors"][key]
    assert log["changed"] == pytest.approx(float((factors[key] > 1).float().mean()))
    assert log["median"] == pytest.approx(float(factors[key].median()))
    feeds = next(CalibrationSet(calibration).batches(CalibrationSet(calibration).shards))
    plain_model, dilated = checkpoint.load(), checkpoint.load()
    explicit = scaling.apply(dilated, checkpoint.family.folds(dilated), factors)
    for paths in factors:  # no output's range grows, of any layer that reads the tensor; multipliers are in fp16
        for path in paths.split("+"):
            own, was = (m.get_submodule(path).weight.abs().amax(dim=1) for m in (dilated, plain_model))
            assert (own <= 1.001 * was).all(), path  # values' rows shrink by what their readers are widened by
    assert any("+" in paths for paths in factors)
    assert explicit  # folds and multipliers, both
    assert len(explicit) < len(factors)
    outputs = [TorchRunner("m", m, checkpoint.family).run_tensors(feeds)["sample"] for m in (plain_model, dilated)]
    assert torch.allclose(*outputs, rtol=1e-4, atol=1e-5)  # fp32 products of other factors, multipliers in fp16
    plain = quantize(checkpoint, asked(iterations=0, dilate=False), calibration, tmp_path / "plain")
    assert quantized.factors(plain) == {}


def test_a_grouped_convolution_is_dilated_by_its_own_parts():
    torch.manual_seed(0)
    conv = nn.Conv2d(12, 6, 3, groups=3)
    model = nn.ModuleDict({"conv": conv})
    found = dilatequant.factors(model, ["conv"], [], {}, dilatequant.Options())
    assert torch.equal(found["conv"], dilation(conv.weight, groups=3))
    before = conv.weight.detach().abs().amax(dim=(1, 2, 3))
    assert scaling.apply(model, [], found) == ["conv"]
    assert torch.allclose(conv.weight.detach().abs().amax(dim=(1, 2, 3)), before, rtol=1e-3)


def test_a_loss_that_is_no_number_stops_with_the_blocks_name_and_keeps_what_was_done(tiny, tmp_path, monkeypatch):
    checkpoint, calibration = tiny
    original, calls = reconstruct.BlockCalls.loss, []

    def loss(self, rows):
        calls.append(self)
        last = len({id(one) for one in calls}) == 2  # the second block's
        return original(self, rows) * (float("nan") if last else 1.0)

    monkeypatch.setattr(reconstruct.BlockCalls, "loss", loss)
    with pytest.raises(UserError, match=r"transformer_blocks\.1.*loss is nan at iteration 1"):
        quantize(checkpoint, asked(joint=False), calibration, tmp_path / "out")
    kept = list(tmp_path.rglob("done.safetensors"))
    assert [path.parent.name for path in kept] == ["transformer_blocks.0"]


def test_a_joint_loss_that_is_no_number_names_the_block_where_it_began(tiny, tmp_path, monkeypatch):
    checkpoint, calibration = tiny
    original = reconstruct.relative_error

    def error(output, targets):
        found = original(output, targets)
        return found * float("nan") if next(counted) % 3 == 1 else found  # two blocks and the output: the second block

    counted = itertools.count()
    monkeypatch.setattr(reconstruct, "relative_error", error)
    with pytest.raises(UserError, match=r"training jointly.*loss is nan.*first in block 'transformer_blocks\.1'"):
        quantize(checkpoint, asked(), calibration, tmp_path / "out")


def test_readers_of_one_tensor_are_counted_once(capsys):
    layers = [layer_of()[1] for _ in range(3)]
    for one in layers[1:]:
        one.given = layers[0].given
    (phase,) = dilatequant.phases(layers, layer_options())
    with torch.no_grad():
        layers[0].log_scale[1] = -50.0
    phase.settle()
    assert phase.facts() == {"scales_at_the_least": 1}


def test_small_weights_and_dead_channels_keep_their_scale_and_rate():
    source, layer = layer_of()
    with torch.no_grad():
        source.weight.mul_(1e-4)
        source.weight[3] = 0
    start = methods.load("rtn").quantize_weight(oriented(source, layer.spec), WeightSpec(Int(4)), 1, None)
    small = dilatequant.layer(source, layer.spec, start, layer.given, dilatequant.Options())
    assert small.unit < 1e-5  # not the 1 of the dead channel
    assert torch.equal(small.state()["weight_codes"], start.codes)
    assert torch.allclose(small.state()["weight_scale"], start.scale)


@pytest.mark.parametrize(
    "weight",
    [{"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}, {"format": "int", "bits": 4, "granularity": "block"}],
)
def test_weights_that_dilation_says_nothing_of_are_refused(weight):
    weight = weight | {"block_size": 16} if weight.get("granularity") else weight
    with pytest.raises(UserError, match="method 'dilatequant' beside weights in"):
        recipe.parse("mine", {"rule": [{"layers": "*", "weight": weight, "method": {"name": "dilatequant"}}]})


@pytest.mark.parametrize("activation", [STEPPED, None], ids=["layers", "attention's products"])
def test_steps_that_are_not_recorded_cannot_be_trained(activation):
    *rules, rule = asked().source["rule"]
    rule = {key: value for key, value in rule.items() if key != "activation"}
    if activation:
        rule["activation"] = activation
    source = {"calibration": {"record_steps": [0, 2]}, "rule": [*rules, PRODUCTS, rule]}
    with pytest.raises(UserError, match="record_steps leaves out steps"):
        recipe.parse("mine", source)


def test_steps_that_are_not_recorded_may_have_the_nearest_ones_scale_where_nothing_trains():
    source = dict(asked(iterations=0).source) | {"calibration": {"record_steps": [0, 2]}}
    assert recipe.parse("mine", source).calibration.record_steps == (0, 2)


def test_a_calibration_of_another_recipe_that_left_steps_out_is_refused(tiny, tmp_path):
    checkpoint, _ = tiny
    few = calibrate(checkpoint, tmp_path / "calibration", samples=4, record_steps=(0, 2))
    with pytest.raises(UserError, match=r"recorded 2 of 3 sampling steps.*'transformer_blocks\.0") as caught:
        quantize(checkpoint, asked(), few, tmp_path / "out")
    assert "record_steps" in caught.value.fix
    assert quantize(checkpoint, asked(iterations=0), few, tmp_path / "out").info["training"] == {}


@pytest.mark.parametrize("key", ["narrower_than", "fewer_weights_than"])
@pytest.mark.parametrize("rest", [{"keep": "float"}, {"activation": STEPPED}], ids=["kept", "quantized"])
def test_attentions_are_not_chosen_by_what_layers_are(key, rest):
    with pytest.raises(UserError, match=f"is of attentions and says {key}"):
        recipe.parse("mine", {"rule": [{"layers": "*", "type": "attention", key: 16, **rest}]})


def test_an_option_beyond_all_bounds_is_named():
    with pytest.raises(UserError, match="rows is beyond"):
        asked(rows=10**400)


def test_a_layer_of_zeros_stays_one():
    source, layer = layer_of()
    source.weight.zero_()
    start = methods.load("rtn").quantize_weight(oriented(source, layer.spec), WeightSpec(Int(4)), 1, None)
    zeros = dilatequant.layer(source, layer.spec, start, layer.given, dilatequant.Options())
    (phase,) = dilatequant.phases([zeros], layer_options())
    assert {rate for group, rate in phase.groups() if group and group[0] is zeros.weight} == {0.0}


@pytest.mark.parametrize("at", [3, 17])
def test_a_killed_run_ends_where_it_would_have(at, tiny, tmp_path, monkeypatch):
    checkpoint, calibration = tiny
    ask = asked(PRODUCTS | {"scope": "blocks"})
    whole = quantize(checkpoint, ask, calibration, tmp_path / "whole")
    with killed_after(at, monkeypatch):
        quantize(checkpoint, ask, calibration, tmp_path / "killed")
    assert quantize(checkpoint, ask, calibration, tmp_path / "killed").digest == whole.digest


def test_training_that_ends_in_no_number_is_taken_back_and_told(tiny, tmp_path, monkeypatch):
    """The loss before the one iteration is a number; what it does to the scales is not."""
    checkpoint, calibration = tiny
    monkeypatch.setattr(methods, "MOST_RATE", 1e3)
    source = quantize(checkpoint, asked(iterations=1, scale_rate=1e3), calibration, tmp_path / "out")
    (told,) = (record["weights and scales"] for record in source.info["training"].values())
    assert told["error_before"] > 0
    assert told["error_after"] is None
    assert not told["kept"]
    (_, line) = method_lines(source.info["recipe"]["methods"], source.info["training"])
    assert "→ not finite on trajectories kept apart, kept in 0 of 1" in line
    for one in quantized.quantized_layers(quantized.load(source)).values():
        assert one.weight_scale.isfinite().all()


def test_without_iterations_nothing_is_recorded_for_training(tiny, tmp_path, monkeypatch):
    checkpoint, calibration = tiny
    monkeypatch.setattr(reconstruct, "record_targets", lambda *_: pytest.fail("recorded"))
    source = quantize(checkpoint, asked(iterations=0), calibration, tmp_path / "out")
    assert source.info["training"] == {}
    scales = quantized.quantized_layers(quantized.load(source))["transformer_blocks.0.attn1.to_q"].activation_scale
    assert scales.shape == (3,)
