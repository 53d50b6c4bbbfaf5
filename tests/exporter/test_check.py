"""`check` as a user meets it: exit codes, messages, tables, JSON and JUnit."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from gated import a_check, made, made_run

from engines.artifacts import open_artifact
from exporter.baseline import read
from exporter.cli import main
from exporter.thresholds import SHIPPED


@pytest.fixture
def call(tmp_path):
    """Runs `check` against tmp_path/mine.json; returns the result."""

    def run(folder, *options):
        arguments = ["check", str(folder), "--baseline", str(tmp_path / "mine.json"), *map(str, options)]
        return CliRunner().invoke(main, arguments, env={"COLUMNS": "200"})

    return run


@pytest.fixture
def kept(tmp_path, call):
    """A run, and its baseline in tmp_path/mine.json."""
    folder = made_run(tmp_path / "good")
    assert call(folder, "--update").exit_code == 0
    return folder


def assert_refused(result, *words):
    assert result.exit_code == 2, result.output
    assert "fix:" in result.stderr
    for word in words:
        assert word in result.stderr
    assert result.stdout == ""


def test_a_run_passes_against_its_own_baseline(kept, call):
    result = call(kept)
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1].startswith("check: pass")
    assert "changed since the baseline: nothing" in result.stdout


def test_a_worse_run_fails_and_the_last_lines_say_by_what(kept, call, tmp_path):
    result = call(made_run(tmp_path / "bad", lost_db=1.5))
    assert result.exit_code == 3
    *lines, last = result.stdout.splitlines()
    assert any(line.startswith("fail: PSNR: lost 1.50 dB") for line in lines)
    assert last.startswith("check: fail: PSNR")
    assert len(last) < 80
    assert "changed since the baseline: quantized" in result.stdout


def test_a_run_of_another_seed_is_not_paired_and_that_is_said(kept, call, tmp_path):
    result = call(made_run(tmp_path / "other", seed=1))
    assert "256 images, not paired" in result.stdout
    assert "another seed (0 → 1)" in result.stdout


def test_a_run_with_4_images_is_not_enough(kept, call, tmp_path):
    few = made_run(tmp_path / "few", images=4)
    result = call(few)
    assert result.exit_code == 3
    assert result.stdout.splitlines()[-1].startswith("check: not enough samples: PSNR, SSIM")
    before = (tmp_path / "mine.json").read_bytes()
    result = call(few, "--update")
    assert result.exit_code == 3
    assert "4 images, it takes 32 or more" in result.stdout
    assert (tmp_path / "mine.json").read_bytes() == before


def test_a_failed_check_of_the_report_fails_the_gate_by_name(kept, call, tmp_path):
    bad = [a_check("NaN or infinite values in the images of ort", 3, passed=False)]
    folder = made_run(tmp_path / "nan", checks=bad)
    for options in ((), ("--update",)):
        result = call(folder, *options)
        assert result.exit_code == 3
        assert "NaN or infinite values in the images of ort: 3 dB, limit 3.0" in result.stdout


def test_without_a_baseline_the_message_says_how_to_make_one(call, tmp_path):
    assert_refused(call(made_run(tmp_path / "run")), "mine.json: no such baseline", "--update")


def test_a_baseline_of_another_model_is_refused_and_both_are_named(kept, call, tmp_path):
    other = made_run(tmp_path / "other", model="9" * 64)
    for options in ((), ("--update",), ("--other-recipe",)):
        assert_refused(call(other, *options), "'net' (aaaaaaaaaaaa)", "'net' (999999999999)")


def test_another_recipe_is_refused_unless_asked_for(kept, call, tmp_path):
    other = made_run(tmp_path / "other", recipe="int8", source="9" * 64)
    assert_refused(call(other), "'fp8' (bbbbbbbbbbbb)", "'int8' (999999999999)", "--other-recipe")
    assert call(other, "--other-recipe").exit_code == 0


def test_a_recipe_that_was_edited_is_judged(kept, call, tmp_path):
    result = call(made_run(tmp_path / "edited", source="9" * 64))
    assert result.exit_code == 0, result.output
    assert "recipe bbbbbbbbbbbb → 999999999999" in result.stdout


def test_a_report_about_an_engine_that_was_built_again_is_refused(kept, call, tmp_path):
    graph = open_artifact(kept / "graph" / "fp32", "graph")
    made(kept / "engines" / "ort", "engine", {"graph": graph.digest}, {}, "another engine")
    assert_refused(call(kept), "is about other artifacts", "engine ort", f"export-engine validate {kept}")


def test_a_run_without_a_report_and_one_of_an_earlier_version_are_refused(kept, call, tmp_path):
    report = json.loads((kept / "report.json").read_text())
    del report["accuracy"]["images"]["psnr_db"]["per_image"]
    (kept / "report.json").write_text(json.dumps(report))
    assert_refused(call(kept), "image by image", "export-engine validate")
    (kept / "report.json").unlink()
    assert_refused(call(kept), "has no report.json", "export-engine validate")
    assert_refused(call(tmp_path / "nowhere"), "holds no run")


@pytest.mark.parametrize("key", ["made_from", "settings", "weights", "engines", "checks", "recipe"])
def test_a_report_that_lacks_something_is_refused(kept, call, key):
    report = json.loads((kept / "report.json").read_text())
    del report[key]
    (kept / "report.json").write_text(json.dumps(report))
    assert_refused(call(kept), "malformed", key, "validate again")


def test_an_update_shows_what_is_new_and_writes_it(kept, call, tmp_path):
    result = call(made_run(tmp_path / "better", lost_db=-2.0), "--update")
    assert result.exit_code == 0
    assert "PSNR" in result.stdout
    assert "digest of quantized" in result.stdout
    assert "digest of model" not in result.stdout  # which is the same
    mean = sum(read(tmp_path / "mine.json").scores["psnr_db"]) / 256
    assert mean == pytest.approx(50, abs=1)
    assert "nothing is new" in call(tmp_path / "better", "--update").stdout


@pytest.mark.parametrize("p95_over_p50", [1.4, 3.0], ids=["interval past the limit", "busy"])
def test_an_update_warns_of_times_that_no_later_run_can_be_judged_by(p95_over_p50, call, tmp_path):
    folder = made_run(tmp_path / "busy")
    report = json.loads((folder / "report.json").read_text())
    for row in report["throughput"]:
        row["ms_p95"] = p95_over_p50 * row["ms_p50"]
    (folder / "report.json").write_text(json.dumps(report))
    result = call(folder, "--update", "--json")
    assert result.exit_code == 0
    assert "warning: time of ort batch 8: too noisy" in result.stderr
    assert len(json.loads(result.stdout)["warnings"]) == 1
    assert "check: not enough samples: time of ort batch 8" in call(folder).stdout
    no_times = tmp_path / "limits.toml"
    no_times.write_text("[psnr_db]\nmost_lost = 0.5\n")
    assert call(folder, "--update", "--thresholds", no_times).stderr == ""


def test_quiet_times_are_kept_without_a_warning(call, tmp_path):
    assert call(made_run(tmp_path / "quiet"), "--update").stderr == ""


def test_a_folder_that_is_not_there_is_named_and_not_made(kept, call, tmp_path):
    missing = tmp_path / "basline" / "new"
    arguments = ["check", str(kept), "--baseline", str(missing / "mine.json"), "--update"]
    assert_refused(CliRunner().invoke(main, arguments), f"no folder {missing.parent}", f"mkdir -p {missing}")
    assert_refused(call(kept, "--junit", missing / "gate.xml"), f"no folder {missing.parent}", f"mkdir -p {missing}")
    assert not missing.parent.exists()
    assert_refused(call(kept, "--junit", kept / "report.json" / "gate.xml"), "report.json is a file")


def test_an_update_judges_nothing_for_junit(kept, call, tmp_path):
    assert_refused(call(kept, "--update", "--junit", tmp_path / "j.xml"), "--junit")


def test_json_is_one_document(kept, call, tmp_path):
    found = json.loads(call(made_run(tmp_path / "bad", lost_db=1.5), "--json").stdout)
    assert (found["verdict"], found["passed"], found["paired"], found["images"]) == ("fail", False, True, 256)
    psnr = found["scores"][0]
    assert psnr["name"] == "PSNR"
    assert psnr["lost"] == pytest.approx(1.5, abs=1e-4)  # scores are kept to six digits
    assert psnr["verdict"] == "fail"
    written = json.loads(call(kept, "--update", "--json").stdout)
    assert (written["updated"], written["new"]) == (True, [])


def test_junit_has_a_case_for_every_score_and_check_and_types_of_failures(kept, call, tmp_path):
    bad = [a_check("fine", 0), a_check("broken", 9, passed=False)]
    path = tmp_path / "gate.xml"
    folder = made_run(tmp_path / "bad", lost_db=0.5, seed=1, checks=bad)
    assert call(folder, "--junit", path).exit_code == 3
    suite = ElementTree.parse(path).getroot()
    cases = {case.get("name"): case.find("failure") for case in suite.iter("testcase")}
    assert list(cases)[:4] == ["PSNR", "SSIM", "cosine", "task score lost"]
    assert list(cases)[-2:] == ["fine", "broken"]
    assert cases["fine"] is None
    assert cases["broken"].get("type") == "Failed"
    assert cases["PSNR"].get("type") == "NotEnoughSamples"
    assert "cannot tell" in cases["PSNR"].get("message")
    assert int(suite.get("tests")) == len(cases)
    assert int(suite.get("failures")) == sum(failure is not None for failure in cases.values())


def test_thresholds_of_ones_own_are_what_is_judged_by(kept, call, tmp_path):
    limits = tmp_path / "limits.toml"
    limits.write_text("[psnr_db]\nmost_lost = 3.0\n")
    found = json.loads(call(made_run(tmp_path / "bad", lost_db=1.5), "--thresholds", limits, "--json").stdout)
    assert [row["name"] for row in found["scores"]] == ["PSNR"]
    assert found["passed"]
    assert found["thresholds"] == str(limits)
    assert f"thresholds: {limits}\n" in call(kept, "--thresholds", limits).stdout
    assert f"thresholds: {SHIPPED}\n" in call(kept).stdout
    limits.write_text("[psnrdb]\nmost_lost = 3.0\n")
    assert_refused(call(kept, "--thresholds", limits), "did you mean 'psnr_db'")
