"""Damage: one layer quantized at a time, the worst named first, as a table and as a picture."""

from __future__ import annotations

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from engines.errors import UserError
from exporter import damage, quantized, recipe, run
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.metrics import sqnr_db
from exporter.modules import put
from exporter.quantize import quantize, reference_feeds
from exporter.runners import TorchRunner

INT8 = {"format": "int", "bits": 8}
RECIPE = {
    "rule": [
        {"layers": "*", "scope": "outside_blocks", "keep": "float"},
        {"layers": "*", "weight": INT8, "activation": INT8, "method": {"name": "smoothquant"}},
    ]
}
SPOILED = "transformer_blocks.1.attn1.to_v"


@pytest.fixture(scope="module")
def made(tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    checkpoint = open_checkpoint(str(tiny_folder), steps=3)
    data = calibrate(checkpoint, folder / "calibration", samples=2)
    return checkpoint, quantize(checkpoint, recipe.parse("test", RECIPE), data, folder / "quantized")


@pytest.fixture
def spoiled(monkeypatch):
    """Lets one layer's scales be read half as large again as they are."""
    raw = quantized.StoredTensors.raw
    spoil = {f"{SPOILED}.weight_scale": 1.5}
    monkeypatch.setattr(quantized.StoredTensors, "raw", lambda self, name: raw(self, name) * spoil.get(name, 1))


@pytest.fixture(scope="module")
def found(made):
    return damage.damage(*made)


def test_every_quantized_layer_is_ranked_worst_first(found, made):
    rows = found["layers"]
    assert {row["layer"] for row in rows} == made[1].info["layers"].keys()
    means = [row["mean_sqnr_db"] for row in rows]
    assert means == sorted(means)
    assert found["steps"] == [0, 1, 2]
    assert found["timesteps"] == made[1].info["timesteps"]
    assert all((row["weight"], row["activation"]) == ("int8", "int8") for row in rows)
    assert all(len(row["sqnr_db"]) == 3 for row in rows)


def test_the_mean_is_that_of_the_noise_power(found):
    for row in found["layers"]:
        power = sum(10 ** (-value / 10) for value in row["sqnr_db"]) / 3
        assert row["mean_sqnr_db"] == pytest.approx(-10 * math.log10(power))


def test_a_layer_with_spoiled_scales_ranks_first(made, found, spoiled):
    worst, *rest = damage.damage(*made)["layers"]
    assert worst["layer"] == SPOILED
    assert worst["mean_sqnr_db"] < rest[0]["mean_sqnr_db"] - 3  # half as much noise again, and more
    unspoiled = {row["layer"]: row["mean_sqnr_db"] for row in found["layers"]}
    assert all(row["mean_sqnr_db"] == unspoiled[row["layer"]] for row in rest)  # each alone: the others do not see it


def test_before_a_layer_is_quantized_the_model_computes_what_the_float_one_does(made):
    checkpoint, artifact = made
    reference = load_file(artifact.file(quantized.REFERENCE))
    model = damage.prepared(checkpoint, artifact)
    assert any(layer._forward_pre_hooks for layer in model.modules())  # some channels are balanced by multiplying
    (output,) = TorchRunner("prepared", model, checkpoint.family).run_tensors(reference_feeds(reference, 0)).values()
    assert sqnr_db(reference["0/float"], output) > 90  # fp32's own rounding


def test_a_rows_value_is_that_of_the_model_with_this_layer_alone_quantized(made, found):
    checkpoint, artifact = made
    path = found["layers"][0]["layer"]
    whole, model = quantized.load(artifact), damage.prepared(checkpoint, artifact)
    put(model, path, whole.get_submodule(path))
    reference = load_file(artifact.file(quantized.REFERENCE))
    (output,) = TorchRunner("one", model, checkpoint.family).run_tensors(reference_feeds(reference, 2)).values()
    # the reference has fewer rows than damage takes at most, so both are of the same rows
    assert len(output) <= damage.ROWS
    assert found["layers"][0]["sqnr_db"][2] == pytest.approx(sqnr_db(reference["2/float"], output), abs=1e-6)


def test_all_layers_together_are_worse_than_any_alone(made, found):
    reference = load_file(made[1].file(quantized.REFERENCE))
    together = min(sqnr_db(reference[f"{step}/float"], reference[f"{step}/quantized"]) for step in (0, 1, 2))
    assert together < found["layers"][0]["mean_sqnr_db"]


def test_a_run_that_quantizes_nothing_has_no_layers_to_rank(made, tmp_path, monkeypatch):
    monkeypatch.setattr(run.quantized, "specs", lambda _: {})
    with pytest.raises(UserError, match="its recipe quantizes no layer"):
        run.layers(None, SimpleNamespace(quantized=None), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_ranking_is_written_as_a_table_and_a_picture(found, tmp_path):
    damage.write(found, tmp_path)
    assert json.loads((tmp_path / damage.TABLE).read_text()) == found
    picture = (tmp_path / damage.PICTURE).read_bytes()
    assert picture.startswith(b"\x89PNG")
    damage.draw(found, tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == picture


def test_the_table_shows_the_worst_layers_only(found):
    stream = io.StringIO()
    Console(file=stream, width=160).print(damage.table(found, most=3))
    lines = [line for line in stream.getvalue().splitlines() if "transformer_blocks." in line]
    assert [row["layer"] in line for row, line in zip(found["layers"], lines, strict=False)] == [True] * 3


def test_a_layer_that_changes_nothing_counts_as_the_best(made, monkeypatch):
    monkeypatch.setattr(damage, "sqnr_db", lambda *_: math.inf)
    rows = damage.damage(*made)["layers"]
    assert [row["mean_sqnr_db"] for row in rows] == pytest.approx([damage.BEST_DB] * len(rows))
    json.dumps(rows, allow_nan=False)


def test_random_weights_are_not_read_whole(made):
    """A layer is read by itself: its tensors and no other's."""
    checkpoint, artifact = made
    stored = quantized.StoredTensors(artifact)
    asked = []
    stored.raw = lambda name, raw=stored.raw: (asked.append(name), raw(name))[1]
    source = damage.prepared(checkpoint, artifact).get_submodule(SPOILED)
    layer = quantized.load_layer(stored, SPOILED, quantized.specs(artifact)[SPOILED], source)
    assert asked
    assert all(name.startswith(f"{SPOILED}.") for name in asked)
    whole = quantized.load(artifact).get_submodule(SPOILED)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), whole(x))


def test_the_worst_layers_of_each_graph_are_shown(found, monkeypatch, capsys):
    from exporter.layers import print_layers

    monkeypatch.setenv("COLUMNS", "160")
    worse = {"fp16": 50.0, "fp32": 120.0}  # so that of both together all shown would be of one
    graphs = [
        {"dtype": dtype, "layer": f"{dtype}.{i}", "sqnr_db": value + i, "codes_different": 0.0, "codes": 1}
        for dtype, value in worse.items()
        for i in range(4)
    ]
    graphs = [row | {"not_finite": 0} for row in graphs]
    print_layers(found | {"graphs": graphs}, most=2)
    told = " ".join(capsys.readouterr().out.split())  # a title is as wide as its table
    for dtype in worse:
        assert f"{dtype} graph against PyTorch: the worst 2 of 4" in told
        assert [f"{dtype}.{i} " in told for i in range(4)] == [True, True, False, False]


def test_a_layer_that_gives_nan_is_the_worst_and_not_equal(found, monkeypatch, capsys):
    from exporter.layers import print_layers

    monkeypatch.setenv("COLUMNS", "160")
    rows = [("equal", None, 0), ("near", 80.0, 0), ("broken", None, 3)]
    graphs = [
        {"dtype": "fp16", "layer": name, "sqnr_db": db, "not_finite": bad, "codes_different": None, "codes": 0}
        for name, db, bad in rows
    ]
    print_layers(found | {"graphs": graphs})
    shown = [line.split("│")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in shown[-3:]] == [
        ["broken", "NaN"],
        ["near", "80.0"],
        ["equal", "equal"],
    ]


def test_the_command_writes_and_prints_the_ranking(made, tmp_path, monkeypatch, capsys):
    from exporter import run as runs
    from exporter.layers import print_layers
    from exporter.run_folder import Run

    checkpoint, artifact = made
    monkeypatch.setenv("COLUMNS", "160")
    found = runs.layers(checkpoint, Run(artifact, {}, {}), tmp_path)
    assert found["graphs"] == []  # none was lowered
    assert {path.name for path in tmp_path.iterdir()} == {damage.TABLE, damage.PICTURE}
    print_layers(found)
    assert found["layers"][0]["layer"] in capsys.readouterr().out
