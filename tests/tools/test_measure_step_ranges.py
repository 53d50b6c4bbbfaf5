"""Ranges by step: errors of planted drift are told apart, and the document says what its measurements say."""

from __future__ import annotations

import measure_step_ranges as tool
import pytest
import torch
from common import ROOT
from compare_report import put_between
from torch import nn

from engines.artifacts import read_json
from exporter.formats.int import Format as Int
from exporter.plan import Plan
from exporter.specs import LayerSpec

DOCUMENT = ROOT / "docs" / "steps.md"


class Records:
    """A calibration set of 16 trajectories, as much of it as errors are told of."""

    steps = (0, 1)
    shards = ("one",)

    def __init__(self, rows):
        self.artifact = type("Artifact", (), {"info": {"samples": 16}})
        self._rows = rows

    def read(self, shard, steps):
        yield steps[0], {"step": torch.full((self._rows,), steps[0])}


@pytest.mark.parametrize("rows", [16, 32], ids=["", "guided"])
def test_where_ranges_drift_a_scale_for_each_step_is_seen_to_pay(rows):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 4)).requires_grad_(False)
    plan = Plan({}, {"0": LayerSpec(Int(8), "channel", 0, Int(4), steps=2)}, {})
    scales = {"one": {"0": torch.tensor(1.0)}, "each": {"0": torch.tensor([1.0, 0.1])}}
    errors = tool.Errors(net, plan, scales, Records(rows))
    for step in (0, 1):
        x = torch.randn(rows, 5, 8) * (3.0 if step == 0 else 0.3)
        errors.see("0", x, torch.full((rows,), step))
        errors.after(step)
    row = errors.row("0")
    assert row["each"]["ci95"][1] < row["one"]["ci95"][0]
    assert tool.gain(row) > 3
    text = "\n".join(tool.section("m", [{"layer": "0", "varies": 10.0, "int4": row, "int8": row}]))
    assert "1 of 1 layers vary more than 2 times." in text
    assert "intervals apart, in 1 of 1 of them, raises it in 0; in 0 intervals overlap." in text


def test_layers_that_do_not_vary_are_counted_alone():
    lines = tool.section("m", [{"layer": "a", "varies": 1.5}])
    assert lines[2] == "0 of 1 layers vary more than 2 times."
    assert not any("`a`" in line for line in lines)


def test_the_document_says_what_the_committed_measurements_say(tmp_path):
    copy = tmp_path / "steps.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    found = {path.stem: read_json(path)["layers"] for path in sorted((ROOT / "docs" / "steps").glob("*.json"))}
    assert found
    put_between(copy, tool.BEGIN, tool.END, tool.sections(found))
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")
