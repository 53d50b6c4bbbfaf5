"""The Quantized artifact: reads back bit for bit, stores codes and no float weights, counts what it stores."""

from __future__ import annotations

import pytest
import torch
from common import RECIPES
from safetensors.torch import load_file

from exporter import quantized, ranges
from exporter.quantize import reference_feeds, reference_steps
from exporter.runners import TorchRunner


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_reloaded_model_gives_the_very_outputs_that_were_recorded(recipe, quantized_of, checkpoint):
    artifact = quantized_of(recipe)
    reference = load_file(artifact.file(quantized.REFERENCE))
    runner = TorchRunner("quantized", quantized.load(artifact), checkpoint.family)
    for step in reference_steps(reference):
        (output,) = runner.run_tensors(reference_feeds(reference, step)).values()
        assert torch.equal(output, reference[f"{step}/quantized"])


@pytest.mark.parametrize("recipe", RECIPES)
def test_decoding_once_changes_no_output_and_no_code(recipe, quantized_of, checkpoint, monkeypatch):
    artifact = quantized_of(recipe)
    reference, model = load_file(artifact.file(quantized.REFERENCE)), quantized.load(artifact)
    layers = quantized.quantized_layers(model)
    codes = {path: layer.weight_codes.clone() for path, layer in layers.items()}
    for layer in layers.values():
        layer.decode_once()
    monkeypatch.setattr(type(layer), "weight_tensor", None)  # nothing decodes again
    (output,) = TorchRunner("quantized", model, checkpoint.family).run_tensors(reference_feeds(reference, 0)).values()
    assert torch.equal(output, reference["0/quantized"])
    assert all(torch.equal(layer.weight_codes, codes[path]) for path, layer in layers.items())


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_saved_again_is_the_same_bytes(recipe, quantized_of, tmp_path):
    artifact = quantized_of(recipe)
    quantized.save(quantized.load(artifact), tmp_path)
    for name in artifact.files("weights-"):
        assert (tmp_path / name).read_bytes() == artifact.file(name).read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_quantized_layers_hold_no_float_weight(recipe, quantized_of):
    stored = load_file(quantized_of(recipe).file("weights-00000.safetensors"))
    for path in quantized_of(recipe).info["layers"]:
        assert f"{path}.weight" not in stored
        assert stored[f"{path}.weight_codes"].itemsize == 1


@pytest.mark.parametrize(("recipe", "bits"), [("fp8", 8), ("int8", 8), ("int4", 4)])
def test_bits_per_weight_count_codes_and_scales(recipe, bits, quantized_of):
    weights = quantized_of(recipe).info["weights"]
    entry = weights["by_format"][recipe]
    # fp16 scales: one per channel of at least 192 inputs, or one per block of 64 weights
    assert bits < entry["bits_per_weight"] <= bits + 16 / 64 + 0.05
    assert weights["quantized_layers"] == 54
    assert weights["kept_layers"] == 3


def test_reference_feeds_carry_step_and_timestep_of_first_and_last_step(quantized_of):
    artifact = quantized_of("fp8")
    reference = load_file(artifact.file(quantized.REFERENCE))
    steps = reference_steps(reference)
    assert len(steps) >= 5
    assert (steps[0], steps[-1]) == (0, len(artifact.info["timesteps"]) - 1)
    for step in steps:
        feeds = reference_feeds(reference, step)
        assert set(feeds["step"].tolist()) == {step}
        assert set(feeds["timestep"].tolist()) == {artifact.info["timesteps"][step]}


def test_smoothquant_folds_into_adaln_and_values_in_every_block_and_multiplies_elsewhere(quantized_of):
    artifact = quantized_of("int8")
    per_block = ["attn1.to_k", "attn1.to_out.0", "attn1.to_q", "attn1.to_v", "ff.net.0.proj"]
    folded = {f"transformer_blocks.{i}.{name}" for i in range(6) for name in per_block}
    multiplied = {path for path, spec in quantized.specs(artifact).items() if spec.multiplied}
    assert multiplied == quantized.specs(artifact).keys() - folded
    assert {path for key in quantized.factors(artifact) for path in key.split("+")} == folded | multiplied


def test_multipliers_are_stored_as_they_ship_in_fp16(quantized_of):
    artifact = quantized_of("int8")
    stored = load_file(artifact.file("weights-00000.safetensors"))
    multiplied = [path for path, spec in quantized.specs(artifact).items() if spec.multiplied]
    assert multiplied
    for path in multiplied:
        assert stored[f"{path}.input_multiplier"].dtype == torch.float16
        assert (stored[f"{path}.input_multiplier"] > 0).all()


def test_every_quantized_activation_has_its_ranges_at_every_step(quantized_of):
    artifact = quantized_of("int8")
    table = ranges.read(artifact)
    assert table["steps"] == list(range(25))
    assert table["layers"].keys() == artifact.info["layers"].keys()
    for path, row in table["layers"].items():
        assert len(row["absmax"]) == 25
        assert min(row["range"]) > 0, path
        assert min(row["absmax"]) > 0, path
