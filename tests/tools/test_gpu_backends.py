"""What gpu_check does with a backend, on a stand-in for its builder and its runner: ONNX Runtime on this CPU."""

from __future__ import annotations

import gpu_backends
import gpu_check
import onnxruntime
import pytest
import torch

from engines.errors import UserError

MADE = {kind: made for kind, made in gpu_check.graphs().items() if kind in ("fp16", "codebook")}


class StandIn:
    """Runs the graph that stands in an engine's place; `wrong` is added to what calls give that `when` takes."""

    wrong, refits = 0.0, True
    when = staticmethod(lambda call: call > 2)

    def __init__(self, library, plan, graph, *, cuda_graphs=True, budget=None):
        self.no_graphs = None if cuda_graphs else "not asked for"
        self._open(plan.read_bytes())
        self._calls = 0

    def _open(self, model):
        self._session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])

    def run(self, feeds):
        self._calls += 1
        (y,) = self._session.run(None, feeds)
        return {"y": y.astype("float32") + (self.wrong if self.when(self._calls) else 0)}

    def refit(self, model):
        if self.refits:
            self._open(model.read_bytes())


@pytest.fixture
def checked(monkeypatch):
    """Checks a backend whose builder and runner are stand-ins; returns the report."""
    monkeypatch.setattr(gpu_backends, "RUNS", 2)
    monkeypatch.setattr(gpu_backends._tensorrt_run, "TensorRtRunner", StandIn)

    def check(name):
        backend = gpu_backends.backends.load(name)
        monkeypatch.setattr(backend, "resolve_gpu", lambda gpu: "sm89")
        monkeypatch.setattr(backend, "fingerprint", lambda: {"library": "1.0"})

        def build(model, graph, folder, gpu, options):
            assert (gpu, graph["inputs"][0]["shape"]) == ("sm89", [32, 256])
            (folder / "engine.plan").write_bytes(model.read_bytes())
            (folder / "plan.json").write_text("[]")
            if options.timing_cache:
                gpu_backends.Path(options.timing_cache).write_bytes(b"timed")

        monkeypatch.setattr(backend, "build", build)
        return gpu_backends.check(name, MADE, gpu_check.compared, gpu_check.guarded)

    monkeypatch.setattr(StandIn, "wrong", 0.0)
    monkeypatch.setattr(StandIn, "refits", True)
    return check


def test_every_graph_is_built_run_both_ways_timed_and_held_against_both_references(checked):
    report = checked("trt")
    assert set(report["graphs"]) == set(MADE)
    for found in report["graphs"].values():
        assert found["cuda_graphs"]["passed"]
        assert found["cuda_graphs"]["no_cuda_graphs"] is None
        assert found["no_cuda_graphs"]["no_cuda_graphs"] == "not asked for"
        assert found["cuda_graphs"]["ms_p50"] > 0
        assert found["threads"] == {"threads": 4, "calls": 8, "wrong": 0, "passed": True}
        assert found["from_onnxruntime"]["max_abs"] < 1e-2
        assert found["plan"] == []
    assert not gpu_check.disagrees(report)


def test_every_option_is_tried(checked):
    report = checked("trt")
    assert report["timing_cache"]["damaged_is_left"]
    assert report["timing_cache"]["bytes"] == 5
    assert report["refit"]["before"]["passed"]
    assert report["refit"]["after"]["passed"]
    assert {part["budget"] for part in report["weight_streaming"].values()} == {0, 1 << 62, "auto"}


def test_options_that_a_backend_lacks_are_said_to_be(checked):
    report = checked("trt-rtx")
    assert report["refit"] == report["timing_cache"] == {"missing": "trt-rtx has no such option"}
    assert report["weight_streaming"]["auto"]["passed"]


@pytest.mark.parametrize(("change", "part"), [({"wrong": 0.5}, "graphs"), ({"refits": False}, "refit")])
def test_what_disagrees_with_its_reference_fails(change, part, checked, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(StandIn, name, value)
    report = checked("trt")
    assert gpu_check.disagrees(report[part])


def test_a_part_that_a_library_refuses_is_a_finding_and_the_rest_goes_on(checked, monkeypatch):
    def refuse(self, model):
        raise UserError("its weights do not fit", fix="build anew")

    monkeypatch.setattr(StandIn, "refit", refuse)
    report = checked("trt")
    assert "its weights do not fit" in report["refit"]["failed"]
    assert report["weight_streaming"]["auto"]["passed"]


def test_weights_of_the_other_sign_give_the_other_result():
    model, x, exact = MADE["fp16"]
    session = onnxruntime.InferenceSession(gpu_backends.negated(model), providers=["CPUExecutionProvider"])
    assert gpu_check.compared(torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), -exact)["passed"]


def test_a_first_call_that_is_wrong_and_is_replayed_right_is_found(checked, monkeypatch):
    monkeypatch.setattr(StandIn, "wrong", 1.0)
    monkeypatch.setattr(StandIn, "when", staticmethod(lambda call: call == 1))
    assert gpu_check.disagrees(checked("trt-rtx")["graphs"])
