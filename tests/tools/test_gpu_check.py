"""The check of a GPU machine: what is missing is named, what disagrees fails, and its graphs and figures are right."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import gpu_check
import pytest
import torch
from click.testing import CliRunner
from common import ROOT

from exporter.kernels import codebook

GRAPHS = gpu_check.graphs()


@pytest.fixture
def on_cpu(monkeypatch):
    """Lets parts run here, on small sizes."""
    monkeypatch.setattr(gpu_check, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_check, "need", lambda *modules: None)
    monkeypatch.setattr(gpu_check, "LINEARS", ((96, 40),))
    monkeypatch.setattr(gpu_check, "KERNEL_ROWS", (0, 1, 17))
    monkeypatch.setattr(gpu_check, "TIMED_ROWS", (1, 17))
    monkeypatch.setattr(gpu_check, "FLUSH_BYTES", 1)


def stand_in(monkeypatch, name, wrong=0.0):
    """Puts torch in a kernel's place."""

    def kernel(x, weight):
        return codebook.reference(x, weight).half() + wrong

    kernel.__name__ = name
    monkeypatch.setattr(codebook, name, kernel)


def only(part):
    """Runs one part in this process; returns its result and the exit code."""
    result = CliRunner().invoke(gpu_check.main, ["--only", part])
    return json.loads(result.stdout)[part], result.exit_code


def test_a_machine_without_a_gpu_is_told_so_part_by_part(tmp_path):
    out = tmp_path / "gpu.json"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, str(ROOT / "tools" / "gpu_check.py"), "--out", str(out)]
    done = subprocess.run(command, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert set(report) == {"schema_version", "date", *gpu_check.PARTS}
    assert report["machine"]["gpu"] == {"missing": "no NVIDIA GPU"}
    assert set(report["machine"]["packages"]) == set(gpu_check.PACKAGES)
    assert torch.__version__ in report["machine"]["packages"]["torch"]
    for part in set(gpu_check.PARTS) - {"machine"}:
        assert "no NVIDIA GPU" in report[part]["missing"], part


def test_a_package_that_is_not_there_is_named():
    found = gpu_check.guarded(gpu_check.need, "torch", "no_such_package")
    assert found["missing"].endswith("no_such_package is not installed")


def test_a_part_whose_process_dies_is_a_finding(monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text("import os, sys; print('the last words', file=sys.stderr, flush=True); os.abort()")
    monkeypatch.setattr(gpu_check, "__file__", str(script))
    assert gpu_check.in_a_process("machine") == {
        "failed": "its process ended with -6: the last words",
        "passed": False,
    }


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graphs_compute_what_is_said_of_them(kind):
    model, x, exact = GRAPHS[kind]
    found = gpu_check.session("CPUExecutionProvider", model, x, exact)
    assert found["passed"]
    assert found["sqnr_db"] > 70  # rounding the output to fp16 leaves 73.7
    assert not gpu_check.session("CPUExecutionProvider", model, x, exact.roll(1, 0))["passed"]
    assert not gpu_check.compared(torch.full_like(exact, torch.nan), exact)["passed"]


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_graphs_build_and_what_the_library_refuses_is_in_its_words(kind):
    import tensorrt_rtx as trt

    from engines.backends._tensorrt import Logger

    assert gpu_check.plan(trt, Logger(trt), "SM89", GRAPHS[kind][0]).nbytes > 10_000
    refused = gpu_check.guarded(gpu_check.engine, trt, "SM75", b"no graph", None, None)
    assert refused["failed"].startswith("RuntimeError: the parser refuses it: ")
    assert "no reason given" not in refused["failed"]


def test_an_engine_is_built_for_this_gpu_where_the_library_knows_it():
    import tensorrt_rtx as trt

    assert gpu_check.targets_of(trt, "sm89") == ["SM89", "portable"]
    assert gpu_check.targets_of(trt, "sm90") == ["CURRENT", "portable"]
    assert gpu_check.targets_of(object(), "sm90") == ["this GPU"]


@pytest.mark.parametrize(("wrong", "code"), [(0.0, 0), (0.5, 3), (torch.nan, 3)])
def test_a_kernel_that_disagrees_fails(on_cpu, monkeypatch, wrong, code):
    stand_in(monkeypatch, "few_rows")
    stand_in(monkeypatch, "many_rows", wrong)
    rows, exit_code = only("kernels")
    assert exit_code == code
    assert {(row["kernel"], row["passed"]) for row in rows if row["rows"]} == {
        ("few_rows", True),
        ("many_rows", code == 0),
    }
    assert {row["rows"] for row in rows} == {0, 1, 17}
    assert {row["scale"] for row in rows} == {"channel", "tensor", "none"}
    assert {row["weight"] for row in rows} == set(gpu_check.CODEBOOKS)
    assert all(row["limit"] == 1 and row["how"] for row in rows)


def test_a_kernel_that_cannot_be_launched_has_not_passed(on_cpu):
    rows, exit_code = only("kernels")
    assert exit_code == 3
    assert all("x is on cpu" in row["failed"] and not row["passed"] for row in rows if row["rows"])
    assert all(row["passed"] for row in rows if not row["rows"])


def test_a_torch_without_cuda_is_missing_beside_a_gpu(monkeypatch):
    monkeypatch.setattr(gpu_check.gpu, "detect", lambda: "sm90")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "torch does not find the GPU" in gpu_check.guarded(gpu_check.need, "torch")["missing"]


def test_times_are_medians_of_gpu_events_and_say_how_they_were_taken(on_cpu, monkeypatch):
    clock = itertools.count()

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.ms = next(clock) ** 2

        def elapsed_time(self, end):
            return end.ms - self.ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    calls = []
    found = gpu_check.timed(lambda: calls.append(1))
    assert len(calls) == gpu_check.WARM_UP + gpu_check.RUNS
    assert found["us_p50"] == 1000 * (2 * gpu_check.RUNS - 1)  # the n-th, from 0, takes 4n + 1 ms
    assert (found["us_min"], found["us_max"]) == (1000, 1000 * (4 * gpu_check.RUNS - 3))

    stand_in(monkeypatch, "few_rows")
    stand_in(monkeypatch, "many_rows")
    rows, exit_code = only("timings")
    assert exit_code == 0
    assert {row["matmul"] for row in rows} >= {"codebook 2 bit, few_rows", "codebook 3 bit, many_rows", "fp8", "bf16"}
    assert {row["rows"] for row in rows} == {1, 17}
    assert all(row["how"] == gpu_check.HOW for row in rows if "us_p50" in row)
    assert all("us_p50" in row or "failed" in row for row in rows)
