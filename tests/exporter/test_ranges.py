"""Ranges: the largest magnitude of every layer's input at every step, beside what its quantizer was given."""

from __future__ import annotations

import io
import json
import re

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from calib_data.store import CalibrationSet
from engines.artifacts import open_artifact
from exporter import cli as command_line
from exporter import quantized, ranges, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.quantize import quantize
from exporter.ranges import Ranges
from exporter.runners import TorchRunner


def test_each_steps_largest_magnitude_is_kept_over_all_batches():
    seen = Ranges([0, 1, 2])
    seen.update("a", torch.tensor([[1.0, -3.0], [2.0, 0.0], [0.5, 0.5]]), torch.tensor([0, 1, 0]))
    seen.update("a", torch.tensor([[4.0, 0.0], [-1.0, 0.0], [0.0, 0.0]]), torch.tensor([1, 1, 2]))
    table = seen.to_json({"a": [3.5]})
    assert table == {"steps": [0, 1, 2], "layers": {"a": {"range": [3.5] * 3, "absmax": [3.0, 4.0, 0.0]}}}


def test_several_rows_may_belong_to_one_sample():
    seen = Ranges([0, 1])
    seen.update("a", torch.tensor([[1.0], [-9.0], [2.0], [3.0]]), torch.tensor([1, 0]))
    assert seen.to_json({"a": [1.0]})["layers"]["a"]["absmax"] == [3.0, 9.0]


def test_convolutions_and_sequences_count_every_position():
    seen = Ranges([0, 1])
    x = torch.zeros(2, 3, 4, 4)
    x[0, 2, 3, 1], x[1, 0, 0, 0] = -5.0, 7.0
    seen.update("a", x, torch.tensor([0, 1]))
    assert seen.to_json({"a": [1.0]})["layers"]["a"]["absmax"] == [5.0, 7.0]


def test_only_recorded_steps_are_listed_whatever_their_numbers():
    seen = Ranges([3, 7])
    seen.update("a", torch.tensor([[1.0], [2.0]]), torch.tensor([7, 3]))
    assert seen.to_json({"a": [1.0]}) == {"steps": [3, 7], "layers": {"a": {"range": [1.0, 1.0], "absmax": [2.0, 1.0]}}}


def test_rows_that_no_step_can_be_told_of_are_left_out():
    seen = Ranges([0, 1])
    seen.update("a", torch.ones(3, 2), torch.tensor([0, 1]))
    assert seen.to_json({"a": [1.0]})["layers"] == {}


def test_the_table_shows_which_steps_were_clipped():
    found = {
        "steps": [0, 1, 2, 3, 7],
        "layers": {
            "first": {"range": [2.0] * 5, "absmax": [3.0, 2.5, 2.1, 1.0, 9.0]},
            "second": {"range": [2.0] * 5, "absmax": [2.0, 1.0, 0.5, 1.0, 1.0]},
        },
    }
    fp4 = {"format": "fp", "exponent_bits": 2, "mantissa_bits": 1}
    int8 = {"format": "int", "bits": 8}
    int4 = {"format": "int", "bits": 4}
    rest = {"granularity": "channel", "block_size": 0, "deployable": True, "steps": 0, "shifted": False}
    layers = {
        "first": rest | {"weight": fp4, "activation": int8, "deployable": False},
        "second": rest
        | {"weight": int8, "granularity": "block", "block_size": 64, "activation": int4, "steps": 8, "shifted": True},
        "third": rest | {"weight": int8, "activation": None},
    }
    stream = io.StringIO()
    Console(file=stream, width=150).print(ranges.table(found, layers))
    first, second, third = (line for line in stream.getvalue().splitlines() if re.search("first|second|third", line))
    assert "0…2 7" in first
    assert "9" in first
    assert "fp4 E2M1 per channel" in first
    assert "fp4 E2M1 per channel (simulated)" in first
    assert "simulated" not in second
    assert "–" in second
    assert "int8 per block of 64" in second
    assert "int4 in INT8 by step, zero points" in second
    assert "9.0×" in first
    assert "4.0×" in second
    assert "float" in third


RECIPE = {
    "rule": [
        {"layers": "*", "scope": "outside_blocks", "keep": "float"},
        {"layers": "*.norm1.*", "weight": {"format": "int", "bits": 8}},
        {
            "layers": "*",
            "weight": {"format": "int", "bits": 8},
            "activation": {"format": "int", "bits": 8, "observer": "percentile"},
        },
    ]
}


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranges")
    checkpoint = open_checkpoint(str(tiny_folder), steps=3)
    data = calibrate(checkpoint, folder / "calibration", samples=2)
    return checkpoint, data, quantize(checkpoint, recipe.parse("test", RECIPE), data, folder / "quantized")


def test_an_artifacts_ranges_are_those_of_its_calibration(made):
    checkpoint, data, artifact = made
    table = ranges.read(artifact)
    model, seen, path = checkpoint.load(), {}, "transformer_blocks.1.ff.net.2"
    runner = TorchRunner("float", model, checkpoint.family)
    now = 0
    model.get_submodule(path).register_forward_pre_hook(
        lambda _layer, args: seen.update({now: max(seen.get(now, 0.0), float(args[0].abs().max()))})
    )
    calibration = CalibrationSet(data)
    for now, feeds in calibration.read(calibration.shards[0]):  # noqa: B007  the hook reads it
        runner.run_tensors(feeds)
    assert table["steps"] == [0, 1, 2]
    # the table was taken from batches that mix steps: their matmuls sum in other orders
    assert table["layers"][path]["absmax"] == pytest.approx([seen[step] for step in (0, 1, 2)], rel=1e-5)


def test_a_range_is_what_the_quantizer_reaches(made):
    _, _, artifact = made
    layers = quantized.quantized_layers(quantized.load(artifact))
    table = ranges.read(artifact)["layers"]
    assert table.keys() == {path for path, layer in layers.items() if layer.spec.activation}
    assert len(table) < len(layers)  # weight-only layers have none
    for path, row in table.items():
        assert row["range"] == pytest.approx([float(layers[path].activation_scale) * 127] * 3, rel=1e-6), path


def test_inspect_prints_the_ranges_and_gives_them_as_json(made):
    _, _, artifact = made
    shown = CliRunner().invoke(command_line.main, ["inspect", str(artifact.path)], env={"COLUMNS": "200"})
    assert shown.exit_code == 0, shown.output
    assert "transformer_blocks.1.ff.net.2" in shown.stdout
    assert "steps clipped" in shown.stdout
    document = CliRunner().invoke(command_line.main, ["inspect", str(artifact.path), "--json"])
    assert json.loads(document.stdout)["ranges"] == ranges.read(artifact)


def test_a_damaged_table_is_not_shown(made, tmp_path):
    import shutil

    from engines.errors import UserError

    _, _, artifact = made
    copy = shutil.copytree(artifact.path, tmp_path / "copy")
    (copy / ranges.FILE).write_text("{}")
    with pytest.raises(UserError, match=r"ranges\.json"):
        ranges.read(open_artifact(copy, "quantized"))
