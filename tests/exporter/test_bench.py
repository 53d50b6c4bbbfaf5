"""Timing: what of a run can be timed, and what a worker that cannot go on says."""

from __future__ import annotations

import pytest
from gated import made, made_run

from engines.errors import UserError
from exporter import baseline, bench, page_tables


def test_folders_that_are_no_engine_of_the_run_are_left_alone(tmp_path):
    folder = made_run(tmp_path / "run")
    made(folder / "engines" / "trt-rtx-sm120", "engine", {"graph": "0" * 64}, {}, "built by hand")
    made(folder / "engines" / ".ort.old", "engine", {"graph": "0" * 64}, {}, "left by a kill")
    assert list(bench.targets_of(folder)) == ["float", "quantized", "ort"]


def test_a_fault_of_the_user_in_a_worker_is_told_as_one(tmp_path):
    graph = made(tmp_path / "graph", "graph", {}, {}, "a graph").path
    (graph / "content").write_text("another")
    with pytest.raises(UserError, match="content") as caught:
        bench.throughput({"ort": f"graph:{graph}"}, batches=(1,), threads=1)
    assert caught.value.fix


@pytest.mark.parametrize(("device", "ratio"), [("cpu", 2.0), ("cuda", None)])
def test_times_of_two_devices_make_no_ratio(device, ratio):
    def row(runner, ms, device):
        return {"runner": runner, "batch": 8, "ms_p50": ms, "ms_p95": ms, "runs": 30, "device": device}

    rows = [row("float", 20.0, "cpu"), row("ort", 10.0, device)]
    found = page_tables.comparable(rows[0], rows[1])
    assert (found["ms_p50"] / rows[1]["ms_p50"] if found else None) == ratio
    assert list(baseline._speeds(rows, {"ort"})) == (["ort batch 8"] if ratio else [])
    shown = page_tables.throughput({"throughput": rows})
    assert ("2.00×" in str(shown)) == bool(ratio)


def test_a_runner_that_does_not_fit_the_gpu_has_no_row_and_the_others_do(monkeypatch, capsys):
    def ask(self, batch, calls):
        if self._target == "float:there":
            raise bench._Full("the GPU's memory is full", fix="free some")
        return {"ms": [1.0], "peak_rss_bytes": 1, "device": "cuda"}

    monkeypatch.setattr(bench._Worker, "__init__", lambda self, target, *_: setattr(self, "_target", target))
    monkeypatch.setattr(bench._Worker, "ask", ask)
    monkeypatch.setattr(bench._Worker, "stop", lambda self: None)
    rows = bench.throughput({"float": "float:there", "quantized": "quantized:there"}, batches=(8,))
    assert [(row["runner"], row["device"]) for row in rows] == [("quantized", "cuda")]
    assert "float is not timed at batch 8: the GPU's memory is full" in capsys.readouterr().err
