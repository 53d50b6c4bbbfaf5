"""The diffusers drop-in on a network of four nodes: what it takes, gives, says of itself and refuses."""

from __future__ import annotations

import importlib
import inspect

import bundles
import diffusers
import pytest
import torch
from common import FAMILIES, TINY
from families import family

import engines
from engines.diffusers import NESTED, denoiser, output_class
from engines.errors import UserError
from exporter.models import Family, families


@pytest.fixture(scope="module")
def bundle_of(tmp_path_factory):
    return lambda **options: bundles.tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny", **options)


@pytest.fixture(scope="module")
def plain(bundle_of):
    return denoiser(bundle_of())


def arguments(rows=2, step=0):
    fed = {name: torch.from_numpy(value) for name, value in bundles.feeds(rows, step).items()}
    return {name: value for name, value in fed.items() if name != "step"}


def expected(rows=2, step=0, *, stepped=False):
    fed = bundles.feeds(rows, step)
    return torch.from_numpy(bundles.expected(fed if stepped else {n: v for n, v in fed.items() if n != "step"}))


def test_it_gives_the_object_or_the_tuple_that_the_class_gives(plain):
    found = plain(**arguments())
    assert type(found).__name__ == "Transformer2DModelOutput"
    assert torch.equal(found.sample, expected())
    assert torch.equal(plain(**arguments(), return_dict=False)[0], expected())
    assert torch.equal(plain(*arguments().values()).sample, expected())  # in the order of the class's own forward


@pytest.mark.parametrize("timestep", [900, 900.0, torch.tensor(900), torch.tensor([900]), torch.tensor([900.0, 900.0])])
def test_a_timestep_may_be_one_for_all_rows(bundle_of, timestep):
    stepped = denoiser(bundle_of(step_input="index"))
    assert torch.equal(stepped(**arguments() | {"timestep": timestep}).sample, expected(stepped=True))


def test_tensors_go_in_and_out_in_the_type_that_the_pipeline_keeps(bundle_of):
    moved = denoiser(bundle_of()).to(torch.float16)
    assert (moved.dtype, moved.device) == (torch.float16, torch.device("cpu"))
    given = arguments()
    found = moved(**given | {"hidden_states": given["hidden_states"].half().requires_grad_()}).sample
    assert found.dtype == torch.float16
    assert not found.requires_grad
    torch.testing.assert_close(found, expected().half(), rtol=1e-3, atol=1e-3)


def test_its_config_is_the_models_and_the_classs_defaults(bundle_of):
    config = {name: value for name, value in TINY.items() if not name.startswith("_")} | {"unheard_of": 1}
    found = denoiser(bundle_of(edit=lambda info: info["model"].update(config=config))).config
    assert found.sample_size == 8
    assert found.upcast_attention is False
    assert "unheard_of" not in found
    del config["unheard_of"]
    wanted = dict(diffusers.DiTTransformer2DModel(**config).config)
    assert dict(found) == {name: value for name, value in wanted.items() if not name.startswith("_")}


def test_sdxls_pipeline_finds_the_width_it_asks_for(bundle_of):
    model = {"class": "UNet2DConditionModel", "config": {"projection_class_embeddings_input_dim": 2816}}
    found = denoiser(bundle_of(edit=lambda info: info["model"].update(model)))
    assert found.add_embedding.linear_1.in_features == 2816


def test_arguments_that_change_nothing_are_let_pass(plain):
    assert torch.equal(plain(**arguments(), cross_attention_kwargs={}).sample, expected())
    with plain.cache_context("cond"):
        assert torch.equal(plain(**arguments(), cross_attention_kwargs=None).sample, expected())


PIXART, SD3, FLUX = "PixArtTransformer2DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"
REFUSED = [
    (PIXART, "cross_attention_kwargs", {"scale": 0.5}),
    (PIXART, "attention_mask", torch.tensor([[1, 0]])),
    (PIXART, "added_cond_kwargs", {"image_embeds": torch.zeros(2, 4)}),
    (SD3, "skip_layers", [1]),
    (SD3, "joint_attention_kwargs", {"ip_adapter_image_embeds": torch.zeros(2, 4)}),
    (SD3, "block_controlnet_hidden_states", [torch.zeros(1)]),
    (FLUX, "controlnet_block_samples", (torch.zeros(1),)),
]


@pytest.mark.parametrize(("class_name", "name", "value"), REFUSED)
def test_what_would_change_the_picture_and_has_no_input_is_refused_by_name(bundle_of, class_name, name, value):
    found = denoiser(bundle_of(edit=lambda info: info["model"].update({"class": class_name})))
    said = next(iter(value)) if name == NESTED else name
    with pytest.raises(UserError, match=f"gives '{said}'.* it takes hidden_states, timestep, class_labels"):
        found(torch.zeros(2, 1, 2, 4), timestep=torch.tensor(900), **{name: value})


def test_a_pipeline_of_another_kind_is_told_so(plain):
    with pytest.raises(UserError, match=r"is a DiTTransformer2DModel, .* 'guidance'") as caught:
        plain(**arguments(), guidance=1.0)
    assert "of its own kind" in caught.value.fix


def test_a_fraction_where_timesteps_are_whole_is_refused(plain):
    with pytest.raises(UserError, match=r"timestep 899\.5 is no whole number"):
        plain(**arguments() | {"timestep": torch.tensor(899.5)})


def test_more_rows_than_the_engine_takes_are_refused_with_its_range(plain):
    with pytest.raises(UserError, match=r"\[9, 1, 2, 4\]") as caught:
        plain(**arguments(rows=9))
    assert "batch 1 … 8" in caught.value.fix


@pytest.mark.parametrize("step_input", ["index", "row"])
@pytest.mark.parametrize("step", [0, 1, 2])
def test_the_step_is_that_of_the_timestep(bundle_of, step_input, step):
    stepped = denoiser(bundle_of(step_input=step_input))
    assert torch.equal(stepped(**arguments(step=step)).sample, expected(step=step, stepped=True))


def test_a_timestep_of_another_schedule_is_refused_with_the_number_of_steps(bundle_of):
    stepped = denoiser(bundle_of(step_input="index"))
    with pytest.raises(UserError, match=r"timestep 700 .* 3 steps, timesteps 900 … 100") as caught:
        stepped(**arguments() | {"timestep": torch.tensor(700)})
    assert "num_inference_steps=3" in caught.value.fix
    assert "nearest=True" in caught.value.fix


def test_the_nearest_step_is_taken_where_that_is_asked_for(bundle_of):
    stepped = denoiser(bundle_of(step_input="index"), nearest=True)
    found = stepped(**arguments(step=1) | {"timestep": torch.tensor(690)}).sample
    assert torch.equal(found, expected(step=1, stepped=True))


def test_a_timestep_that_a_pipeline_rounded_to_its_type_is_still_that_step(bundle_of):
    stepped = denoiser(bundle_of(step_input="index"))
    rounded = torch.tensor(500.0).bfloat16() + 2  # bfloat16 holds every second number there
    found = stepped(**arguments(step=1) | {"timestep": rounded}).sample
    assert torch.equal(found, expected(step=1, stepped=True))
    with pytest.raises(UserError, match="timestep 502"):
        stepped(**arguments(step=1) | {"timestep": rounded.float()})


def test_tensors_by_dlpack_give_the_same(bundle_of):
    for step_input in (None, "index", "row"):
        found = denoiser(bundle_of(step_input=step_input))
        feeds = found._feeds(arguments(step=1), 2)
        output = found._run_dlpack(feeds, torch.device("cpu"))
        assert torch.equal(output, expected(step=1, stepped=step_input is not None))


def test_an_engine_is_not_saved_as_a_checkpoint(plain, tmp_path):
    with pytest.raises(UserError, match="not saved as a checkpoint"):
        plain.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_a_class_that_diffusers_lacks_is_named(bundle_of):
    with pytest.raises(UserError, match="'NoSuchModel', which diffusers"):
        denoiser(bundle_of(edit=lambda info: info["model"].update({"class": "NoSuchModel"})))


def test_it_is_there_without_an_import_of_its_own(bundle_of):
    assert engines.diffusers.denoiser is denoiser
    assert engines.diffusers.denoiser(bundle_of(), self_test=True).engine.backend == "ort"


SERVED = sorted(
    {
        value.CLASS
        for name in families()
        for value in vars(importlib.import_module(f"exporter.models.{name}")).values()
        if isinstance(value, type) and issubclass(value, Family) and "CLASS" in vars(value)
    }
)


@pytest.mark.parametrize("name", SERVED)
def test_every_served_class_says_what_it_returns(name):
    assert output_class(getattr(diffusers, name)).__name__.endswith("Output")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_input_of_a_family_is_an_argument_of_its_class(name):
    found = family(name)
    known = inspect.signature(getattr(diffusers, found.CLASS).forward).parameters
    nested = {"text_embeds", "time_ids", "resolution", "aspect_ratio"} if NESTED in known else set()
    assert {spec.name for spec in found.inputs()} <= known.keys() | nested
