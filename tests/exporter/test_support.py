"""What a GPU cannot run is refused by layer, with the nearest recipe that it can."""

from __future__ import annotations

import re

import pytest

from engines.backends import _tensorrt
from engines.errors import UserError
from engines.options import Options
from exporter import recipe, support
from exporter.checkpoint import open_checkpoint
from exporter.plan import plan_layers
from exporter.support import Profile, Target


def refuse(model, name, gpu):
    checkpoint, asked = open_checkpoint(model), recipe.load(name)
    shapes = checkpoint.skeleton()
    plan = plan_layers(shapes, checkpoint.family, asked)
    support.refuse(checkpoint, asked, shapes, plan, [Target("trt-rtx", gpu, "fp16", Options())])


@pytest.mark.parametrize(
    ("name", "gpu", "nearest"),
    [
        ("fp8", "sm86", "int8"),
        ("fp8-learned", "sm80", "dilate-w8a8"),
        ("fp4-fp8", "sm86", "dilate-w4a8"),
        ("vq-2bit-fp8", "sm80", "vq-2bit"),
    ],
)
def test_the_nearest_recipe_has_its_bits_then_its_activations_then_its_training(name, gpu, nearest):
    with pytest.raises(
        UserError, match=rf"layer 'transformer_blocks\.0\..*' is fp8, with no hardware for it in {gpu}"
    ) as raised:
        refuse("digits-dit", name, gpu)
    assert f"the nearest shipped recipe that {gpu} runs is {nearest} (" in raised.value.fix


def test_where_the_nearest_recipe_has_fewer_bits_one_with_as_many_is_named_too():
    with pytest.raises(UserError, match=r"stores its weight in int4, with no hardware for it in sm75") as raised:
        refuse("digits-dit", "dilate-w4a8", "sm75")
    assert re.search(r"sm75 runs is vq-2bit \(.*\) and, of no fewer bits, dilate-w8a8 \(8 bits", raised.value.fix)


@pytest.mark.parametrize("name", ["fp8", "fp4-fp8", "vq-2bit-fp8"])
def test_a_gpu_with_fp8_takes_fp4_too_since_it_is_only_stored(name):
    assert refuse("digits-dit", name, "sm89") is None


def test_fp4_that_is_multiplied_is_refused_where_there_is_no_hardware():
    layers = {"proj": {"weight": "fp4", "activation": "fp4"}}
    with pytest.raises(UserError, match="'proj' is fp4, with no hardware for it in sm89"):
        _tensorrt.check_support(layers, "sm89", ("sm89", "sm120"))


def test_an_option_that_one_of_the_backends_lacks_is_noted_and_one_that_all_lack_is_refused(capsys):
    asked = Options(decode="load", weight_streaming=7)
    ort, rtx = support.targets_of(("ort", "trt-rtx"), None, None, asked)
    assert (ort.options, rtx.options) == (Options(decode="load"), Options(weight_streaming=7))
    assert rtx.to_json() == {
        "backend": "trt-rtx", "gpu": rtx.gpu, "dtype": "fp16", "decode": None, "refit": False, "weight_streaming": 7,
    }  # fmt: skip
    told = capsys.readouterr().err
    assert "--decode load says nothing to trt-rtx" in told
    assert "--weight-streaming 7 says nothing to ort" in told
    with pytest.raises(UserError, match="--refit: ort has no such option") as raised:
        support.targets_of(("ort", "trt-rtx"), None, None, Options(refit=True, decode="load"))
    assert "build for trt" in raised.value.fix


def test_whole_bits_of_weights_come_before_activations_and_these_before_training():
    asked = Profile(4.25, 8, trains=False)
    order = [Profile(4.0, 8, False), Profile(4.25, 8, True), Profile(4.25, 16, False), Profile(8, 8, False)]
    assert sorted([order[2], order[0], order[3], order[1]], key=asked.distance) == order


def test_layers_that_differ_in_size_alone_are_of_one_kind():
    checkpoint = open_checkpoint("shapes-unet")
    model = checkpoint.skeleton()
    plan = plan_layers(model, checkpoint.family, recipe.load("fp4-fp8"))
    kinds = support.kinds_of(model, plan)
    assert {kind.what for kind in kinds} == {"linear", "convolution"}
    assert sum(map(len, kinds.values())) == len(plan.specs)
    assert all("fp4 in int4 codes" in kind.weight for kind in kinds)
