"""The benchmark of the runtime: everything it compares is there, and what differs, or is beyond a bar, fails."""

from __future__ import annotations

import json
import sys

import bench_runtime
import bundles
import numpy as np
import pytest
from click.testing import CliRunner

QUICK = ("--batch", "1", "--batch", "4", "--calls", "3", "--loads", "2", "--workers", "3", "--worker-calls", "5")


def run(folder, *options):
    result = CliRunner().invoke(bench_runtime.main, [str(folder), *QUICK, *options])
    assert result.exit_code in (0, 3), result.output + repr(result.exception)  # nothing here asserts on time
    return result


def program(tmp_path, text):
    """Writes a program in the C++ runtime's place."""
    path = tmp_path / "export-engine-run"
    path.write_text(f"#!{sys.executable}\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("step_input", [None, "row"])
def test_every_comparison_is_a_row_with_its_bar(tmp_path, step_input):
    folder = bundles.tiny_bundle(tmp_path / "tiny", step_input=step_input)
    result = run(folder, "--json")
    found = json.loads(result.stdout)
    assert [row["what"] for row in found["rows"]] == [
        "Engine.run over its bare session, 1 rows",
        "Engine.run over its bare session, 4 rows",
        "loading over session and hashing",
        "outputs that differ, 3 threads of 5 calls",
        "C++ over Python",
    ]
    for row in found["rows"][:3]:
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
        assert row["passed"] == (row["value"] <= row["limit"])
    assert found["rows"][3]["value"] == 0
    assert found["rows"][4]["passed"] is None
    assert found["passed"] == (result.exit_code == 0)


def test_the_cpp_runtime_is_timed_in_turn_where_it_is_given(tmp_path):
    folder = bundles.tiny_bundle(tmp_path / "tiny")
    report = "import json, sys; print(json.dumps({'engine': 'ort', 'rows': 2, 'ms': [1e6] * int(sys.argv[-1])}))"
    slow = program(tmp_path, report)
    row = json.loads(run(folder, "--json", "--cpp", slow, "--rounds", "2").stdout)["rows"][4]
    assert row["what"] == "C++ over Python, 2 rows"
    assert row["passed"] is False
    fast = program(tmp_path, report.replace("1e6", "0.0"))
    assert json.loads(run(folder, "--json", "--cpp", fast, "--rounds", "2").stdout)["rows"][4]["passed"] is True


def test_a_program_that_is_not_there_or_fails_is_said(tmp_path):
    folder = bundles.tiny_bundle(tmp_path / "tiny")
    mistyped = CliRunner().invoke(bench_runtime.main, [str(folder), *QUICK, "--cpp", str(tmp_path / "none")])
    assert mistyped.exit_code == 2
    assert "does not exist" in mistyped.output
    bad = program(tmp_path, "import sys; sys.exit('out of luck')")
    result = CliRunner().invoke(bench_runtime.main, [str(folder), *QUICK, "--cpp", str(bad)])
    assert "ended with 1: out of luck" in str(result.exception)


def test_a_person_sees_a_table(tmp_path):
    shown = run(bundles.tiny_bundle(tmp_path / "tiny")).stdout
    assert "loading over session" in shown
    assert "GB/s" in shown


def test_threads_that_get_other_numbers_are_counted(tmp_path):
    _, _, engine = bench_runtime.opened(bundles.tiny_bundle(tmp_path / "tiny"), 1)
    assert bench_runtime.together(engine, 2, 9)["passed"]
    calls, right = iter(range(1000)), engine.run
    engine.run = lambda feeds: {name: value + (next(calls) == 20) for name, value in right(feeds).items()}
    row = bench_runtime.together(engine, 2, 9)
    assert (row["value"], row["passed"]) == (1, False)


def test_a_ratio_is_of_medians_and_its_interval_of_pairs():
    theirs = np.linspace(1.0, 2.0, 101)
    row = bench_runtime.compared("x", theirs * 1.5, theirs, 1.4)
    np.testing.assert_allclose([row["value"], *row["interval"]], 1.5)  # pairs move together
    assert not row["passed"]


def test_calls_are_timed_in_an_order_that_changes():
    order = []
    bench_runtime.paired(lambda: order.append("a"), lambda: order.append("b"), 2, warm_up=0)
    assert order == ["b", "a", "a", "b"]


def test_a_bundle_without_an_engine_for_onnx_runtime_is_refused(tmp_path):
    def other(info):
        info["engines"]["ort"]["backend"] = "trt-rtx"

    folder = bundles.tiny_bundle(tmp_path / "tiny", edit=other)
    result = CliRunner().invoke(bench_runtime.main, [str(folder)])
    assert "no engine for ONNX Runtime" in str(result.exception)
