"""VQ4DiT's variants: what they are named after is what differs, and the document says what their cells say."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import compare_methods
import compare_vq4dit as tool
import pytest
from common import ROOT
from compare_report import put_between

from engines.artifacts import read_json
from exporter.methods.vq4dit import Options

DOCUMENT, RESULTS = ROOT / "docs" / "methods.md", ROOT / "docs" / "vq4dit"


@pytest.mark.parametrize("name", list(tool.VARIANTS))
def test_a_variant_differs_from_the_base_in_what_it_says(name):
    job = compare_methods.Job(0, 64, 16, 16, {}, Path("unused"), 1)
    made = tool.recipe_of("digits-dit", job, name, (7, 3))
    options = asdict(made.rules[-1].method.options)
    assert options == asdict(Options()) | {"iterations": 7, "codebook_iterations": 3} | tool.BASE | tool.VARIANTS[name]
    others = [tool.recipe_of("digits-dit", job, other, (7, 3)).digest for other in tool.VARIANTS if other != name]
    assert made.digest not in others


def test_the_defaults_of_the_method_are_those_that_were_measured():
    row = read_json(RESULTS / "digits-dit.0.json")
    assert row["asked"]["iterations"] == [Options().iterations, Options().codebook_iterations]
    assert {read_json(path)["asked"]["name"] for path in RESULTS.glob("digits-dit.*.json")} == set(tool.VARIANTS)


def test_the_document_says_what_the_committed_cells_say(tmp_path):
    copy = tmp_path / "methods.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    put_between(copy, tool.BEGIN, tool.END, tool.table(RESULTS))
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")
