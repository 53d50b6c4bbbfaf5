"""Rules with deployable = false: any split is studied in PyTorch, and no graph is made of it."""

from __future__ import annotations

import json

import pytest
from common import TINY
from safetensors.torch import load_file

from engines.errors import UserError
from exporter import quantized, ranges
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize
from exporter.run import run

KEPT = {"layers": "*", "scope": "outside_blocks", "keep": "float"}


def open_split(bits):
    return {"format": "fp", "bits": bits}


def study(weight, activation, method="fp_search", **rule):
    activation = {**activation, "observer": "mse"}
    found = {"layers": "*", "weight": weight, "activation": activation, "method": {"name": method}, **rule}
    return {"rule": [KEPT, {"deployable": False} | found]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY))
    checkpoint = open_checkpoint(f"random:{folder}", steps=3)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=4)


@pytest.fixture(scope="module")
def simulated(tiny, tmp_path_factory):
    checkpoint, calibration = tiny
    folder = tmp_path_factory.mktemp("simulated") / "quantized"
    return quantize(checkpoint, recipes.parse("study", study(open_split(8), open_split(6))), calibration, folder)


def test_every_split_of_the_bits_is_a_candidate_for_study():
    rule = recipes.parse("study", study(open_split(8), open_split(6))).rules[-1]
    splits = {(f.exponent_bits, f.mantissa_bits) for f in rule.weight.candidates}
    assert splits == {(e, 7 - e) for e in range(1, 8)}
    assert {(f.exponent_bits, f.mantissa_bits) for f in rule.activation.candidates} == {(e, 5 - e) for e in range(1, 6)}


def test_each_layer_has_the_split_of_least_error(tiny, simulated, tmp_path):
    checkpoint, calibration = tiny
    layers = simulated.info["layers"]
    path = max(layers, key=lambda p: layers[p]["activation"]["exponent_bits"])
    chosen = layers[path]["activation"]
    assert {
        layer["activation"]["exponent_bits"] + layer["activation"]["mantissa_bits"] for layer in layers.values()
    } == {5}
    # any other split, named, has a range of its own and leaves a larger error at that layer's input
    from exporter.formats.fp import Format
    from exporter.observers import Mse

    model, seen = checkpoint.load(), Mse()
    model.get_submodule(path).register_forward_pre_hook(lambda _layer, args: seen.update(args[0]))
    from calib_data.store import CalibrationSet
    from exporter.runners import TorchRunner

    data = CalibrationSet(calibration)
    for feeds in data.batches(data.shards):
        TorchRunner("float", model, checkpoint.family).run_tensors(feeds)
    errors = {(e, 5 - e): seen.fit(Format(e, 5 - e))[1] for e in range(1, 6)}
    assert min(errors, key=errors.get) == (chosen["exponent_bits"], chosen["mantissa_bits"])


def test_the_artifact_says_what_is_simulated_and_holds_no_floors(simulated):
    assert not any(layer["deployable"] for layer in simulated.info["layers"].values())
    reference = load_file(simulated.file(quantized.REFERENCE))
    assert "0/quantized" in reference
    assert not [name for name in reference if name.endswith(("fp64", "fp16"))]
    table = ranges.table(ranges.read(simulated), simulated.info["layers"])
    assert all("(simulated)" in cell for cell in table.columns[1].cells)


def test_it_is_read_back_bit_for_bit(tiny, simulated):
    from exporter.quantize import reference_feeds
    from exporter.runners import TorchRunner

    reference = load_file(simulated.file(quantized.REFERENCE))
    runner = TorchRunner("again", quantized.load(simulated), tiny[0].family)
    (output,) = runner.run_tensors(reference_feeds(reference, 1)).values()
    assert (output == reference["1/quantized"]).all()


def test_lower_refuses_it(simulated, tmp_path):
    with pytest.raises(UserError, match=r"simulated \(deployable = false\)") as raised:
        lower(simulated, tmp_path / "graph")
    assert "deployable = false" in raised.value.fix
    assert not list(tmp_path.iterdir())


def test_run_refuses_it_before_anything_is_calibrated(tiny, tmp_path):
    made = recipes.parse("study", study(open_split(4), open_split(4)))
    with pytest.raises(UserError, match=r"recipe 'study'.*simulated"):
        run(tiny[0], made, tmp_path / "out", backend_names=["ort"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("source", "named", "fix"),
    [
        (study(open_split(8), open_split(8), deployable=True), "leaves the format open", "deployable = false"),
        (
            study(open_split(6), {"format": "fp", "exponent_bits": 3, "mantissa_bits": 2}, deployable=True),
            "no engine quantizes",
            "deployable = false",
        ),
        (study(open_split(6), open_split(6), deployable="no"), "deployable = 'no'", "true or false"),
    ],
    ids=["open activations", "6-bit activations", "not a truth value"],
)
def test_what_only_a_study_may_do_is_refused_elsewhere(source, named, fix):
    with pytest.raises(UserError, match=named) as raised:
        recipes.parse("test", source)
    assert fix in raised.value.fix


def test_an_observer_that_compares_no_formats_cannot_leave_them_open():
    source = study(open_split(6), open_split(6))
    source["rule"][-1]["activation"]["observer"] = "absmax"
    with pytest.raises(UserError, match="observer 'absmax' compares none") as raised:
        recipes.parse("test", source)
    assert "mse" in raised.value.fix


@pytest.mark.parametrize(
    ("activation", "named", "fix"),
    [
        (open_split(6), "beside activations of an open format", "name the"),
        ({"format": "codebook"}, "are for weights", "int"),
    ],
    ids=["open", "codebook"],
)
def test_codebooks_beside_activations_without_a_grid_are_refused(activation, named, fix):
    weight = {"format": "codebook", "vector_size": 4, "codebook_size": 256}
    with pytest.raises(UserError, match=named) as raised:
        recipes.parse("test", study(weight, activation, "kmeans"))
    assert fix in raised.value.fix


def test_formats_that_no_matmul_takes_together_may_be_studied(tiny, tmp_path):
    checkpoint, calibration = tiny
    source = study({"format": "int", "bits": 4, "granularity": "block", "block_size": 16}, open_split(4), "rtn")
    made = quantize(checkpoint, recipes.parse("mixed", source), calibration, tmp_path / "quantized")
    assert made.info["weights"]["by_format"].keys() == {"int4"}
