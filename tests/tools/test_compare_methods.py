"""The comparison of methods: cells that resume, intervals that hold, and a document that says what its cells say."""

from __future__ import annotations

import json

import click
import compare_methods
import compare_report
import pytest
import torch
from click.testing import CliRunner
from common import ROOT

from exporter.formats.fp import Format as Fp

DOCUMENT = ROOT / "docs" / "methods.md"
SMALL = ("--images", "16", "--samples", "2", "--settings", "e2m1-fp8", "--granularities", "channel")


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """Runs the command in this process; returns what it computed, by file name."""
    folder = tmp_path_factory.mktemp("compared")
    computed = []

    def run(*arguments, monkeypatch):
        computed.clear()

        def here(todo, jobs):
            for path, function, given in todo:
                computed.append(path.stem)
                path.parent.mkdir(parents=True, exist_ok=True)
                if function is not compare_methods.grids:  # which alone takes a minute
                    path.write_text(json.dumps(function(*given)))

        monkeypatch.setattr(compare_methods, "run", here)
        places = {"work": folder / "work", "results": folder / "results", "document": folder / "methods.md"}
        options = [word for name, path in places.items() for word in (f"--{name}", str(path))]
        result = CliRunner().invoke(compare_methods.main, ["digits-dit", *SMALL, *options, *arguments])
        assert result.exit_code == 0, result.output
        return list(computed), folder

    return run


def test_a_cell_is_computed_once_and_again_when_what_it_depends_on_changes(compared, monkeypatch):
    first, folder = compared("--methods", "rtn", monkeypatch=monkeypatch)
    assert {"float", "grids", "e2m1-fp8.channel.rtn"} == set(first)
    again, _ = compared("--methods", "rtn", monkeypatch=monkeypatch)
    assert set(again) == {"grids"}
    cell = json.loads((folder / "results" / "digits-dit" / "e2m1-fp8.channel.rtn.json").read_text())
    low, high = cell["psnr_db"]["ci95"]
    assert 20 < low <= cell["psnr_db"]["value"] <= high < 60
    assert cell["images"] == 16
    assert cell["weight_formats"] == {"E2M1": 42}
    assert cell["activation_formats"] == {"E4M3": 42}
    assert cell["minutes"] > 0
    assert cell["peak_rss_bytes"] > 1e8
    assert "| FP4 (E2M1) / FP8 | channel | rtn |" in (folder / "methods.md").read_text()
    other, _ = compared("--methods", "rtn", "--seed", "1", monkeypatch=monkeypatch)
    assert {"float", "e2m1-fp8.channel.rtn"} <= set(other)


def test_cells_of_other_seeds_are_not_shown_in_one_table(tmp_path):
    for name, seed in (("one", 0), ("two", 1)):
        (tmp_path / f"{name}.json").write_text(json.dumps({"request": {"seed": seed}}))
    with pytest.raises(click.ClickException, match="two has seed 1, one 0"):
        compare_report.read_cells(tmp_path)


def test_a_document_without_its_marks_is_left_alone(tmp_path):
    document = tmp_path / "methods.md"
    document.write_text(f"before {compare_report.BEGIN} all of this would be lost")
    (tmp_path / "results").mkdir()
    with pytest.raises(click.ClickException, match="has not one line"):
        compare_report.write_report(tmp_path / "results", document)
    assert "all of this" in document.read_text()


def test_zeros_have_no_decibels():
    assert compare_methods.db(0.0, 1.0) is compare_methods.db(1.0, 0.0) is None
    assert compare_methods.db(100.0, 1.0) == pytest.approx(20.0)


def test_all_trained_methods_have_the_iterations_that_are_asked_for():
    job = compare_methods.Job(0, 64, 16, 16, {"iterations": 7}, None, 1)
    trained = [cell for cell in compare_methods.cells(["m"], *everything()) if cell.method == "learned"]
    assert len(trained) >= 10
    assert {compare_methods.recipe_of(cell, job).rules[-1].method.options.iterations for cell in trained} == {7}


def everything():
    return list(compare_methods.SETTINGS), compare_methods.GRANULARITIES, list(compare_methods.METHODS)


def test_the_cells_that_the_bars_are_about_have_more_images():
    job = compare_methods.Job(0, 64, 16, 32, {}, None, 1)
    names = {cell.name for cell in compare_methods.cells(["m"], *everything())}
    assert set(compare_methods.BARRED) <= names
    assert {name for name in names if job.count(name) == 32} == set(compare_methods.BARRED)
    assert compare_methods.IMAGES["digits-dit"][1] >= 2000
    assert compare_methods.IMAGES["shapes-unet"][1] >= 512


def test_every_cell_has_a_name_a_recipe_and_a_place_in_the_table():
    job = compare_methods.Job(0, 64, 16, 32, {}, None, 1)
    found = list(compare_methods.cells(["m"], *everything()))
    assert len({cell.name for cell in found}) == len(found)
    for cell in found:
        rule = compare_methods.recipe_of(cell, job).rules[-1]
        assert rule.weight.granularity == cell.granularity
        assert cell.setting in compare_report.NAMES


@pytest.mark.parametrize(
    ("draw", "expected"),
    [(torch.randn(50, 4000, generator=torch.Generator().manual_seed(0)), 3.0), (torch.rand(50, 4000), 1.8)],
    ids=["normal", "uniform"],
)
def test_kurtosis_is_that_of_the_distribution(draw, expected):
    # 4,000 values a row, 50 rows: the mean's standard error is sqrt(24 / 4000 / 50) = 0.011
    assert compare_methods.kurtosis(draw.double()) == pytest.approx(expected, abs=0.05)


def test_rows_without_spread_have_no_kurtosis():
    rows = torch.stack([torch.ones(10), torch.arange(10.0)]).double()
    assert compare_methods.kurtosis(rows) == compare_methods.kurtosis(rows[1:])


def score(value, low, high):
    return {"value": value, "ci95": [low, high]}


def row(setting, method, psnr, *, lost=0.0, frechet=0.01):
    cell = {"model": "m", "setting": setting, "granularity": "channel", "method": method}
    scores = {"psnr_db": score(psnr, psnr - 0.5, psnr + 0.5), "frechet": score(frechet, frechet * 0.9, frechet * 1.1)}
    task = {"name": "accuracy", "float": 1.0, "quantized": 1 - lost, "lost": score(lost, lost - 0.001, lost + 0.001)}
    return {f"{setting}.channel.{method}": {"cell": cell, "images": 9, "bits_per_weight": 4.0, "task": task, **scores}}


def claims(*rows, model="m"):
    found = {}
    for one in rows:
        found |= one
    return compare_report.claims(model, found)


def test_a_bar_that_is_missed_is_said_to_be():
    worst = row("int4-int8", "rtn", 30.0, frechet=1.0)
    for lost, frechet, holds in ((0.0, 0.05, True), (0.02, 0.05, False), (0.0, 0.2, False)):
        told = claims(worst, row("fp8-fp8", "learned", 45.0, lost=lost, frechet=frechet))[0]
        assert told.startswith("holds" if holds else "**does not hold**")
    told = claims(row("e2m1-fp8", "rtn", 30.0), row("auto-fp8", "learned", 31.0))
    assert told[0].startswith("**does not hold**: auto-fp8 learned against e2m1-fp8 rtn: +1.00 dB")


def test_intervals_that_overlap_are_not_called_apart():
    near = claims(row("e2m1-fp8", "rtn", 30.0), row("int4-int8", "rtn", 30.5))
    far = claims(row("e2m1-fp8", "rtn", 30.0), row("int4-int8", "rtn", 32.0))
    assert near[0].endswith("integers ahead, the intervals overlap (channel ranges)")
    assert far[0].endswith("integers ahead, the intervals apart (channel ranges)")


def test_dilatequant_is_held_against_the_best_of_the_others_and_its_bar():
    rows = row("w4a4", "dilatequant", 30.4), row("w4a4", "one-scale", 24.0), row("w4a4", "distilled", 32.0)
    told = claims(*rows, model="digits-dit")
    assert told[0] == "**does not hold**: w4a4 dilatequant: 29.9 dB PSNR at least (bar 30)"
    assert told[1].startswith("**does not hold**: w4a4 dilatequant 30.4 dB")
    assert "(distilled, -1.60 dB, the intervals apart)" in told[1]
    assert told[2] == "w4a4 distilled against one scale: +8.00 dB, the intervals apart"
    assert len(claims(*rows)) == 2  # another model has no bar
    (_, told) = claims(row("w8a8", "dilatequant", 54.0), row("w8a8", "dilatequant-by-block", 52.5))
    assert told.endswith("jointly, against dilatequant-by-block: +1.50 dB, the intervals apart")


def test_the_document_says_what_the_committed_cells_say(tmp_path):
    copy = tmp_path / "methods.md"
    copy.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    results = tmp_path / "methods"
    for path in (ROOT / "docs" / "methods").glob("*/*.json"):
        (results / path.parent.name).mkdir(parents=True, exist_ok=True)
        (results / path.parent.name / path.name).write_bytes(path.read_bytes())
    compare_report.write_report(results, copy)
    assert copy.read_text(encoding="utf-8") == DOCUMENT.read_text(encoding="utf-8")


def test_every_baseline_is_there_with_and_without_learning():
    folders = [folder for folder in (ROOT / "docs" / "methods").iterdir() if folder.is_dir()]
    assert "digits-dit" in [folder.name for folder in folders]
    for folder in folders:
        found = compare_report.read_cells(folder)
        for setting in ("int8-int8", "fp8-fp8", "int4-int8", "e2m1-fp8"):
            assert {f"{setting}.channel.{m}" for m in ("rtn", "search", "learned")} <= found.keys()
        learned = [cell["request"]["options"]["iterations"] for n, cell in found.items() if n.endswith(".learned")]
        assert len(set(learned)) == 1


def test_splits_are_spelled_as_tables_spell_them():
    assert compare_methods.spelled({"format": "fp", "exponent_bits": 2, "mantissa_bits": 1}) == "E2M1"
    assert compare_methods.spelled({"format": "int", "bits": 4}) == "INT4"
    assert Fp(2, 1).kind == "fp4"
