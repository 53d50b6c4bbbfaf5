"""The runner of both TensorRT backends, against stand-ins for CUDA and TensorRT (tests/fake_gpu.py), not on a GPU."""

from __future__ import annotations

import gc
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from fake_gpu import GRAPH, FakeCuda, at, fake_tensorrt

from engines.backends import _cuda, _tensorrt_run, trt, trt_rtx
from engines.backends._cuda import Cuda
from engines.backends._tensorrt_api import RTX, TRT
from engines.backends._tensorrt_run import SHAPES, TensorRtRunner
from engines.errors import UserError


@pytest.fixture
def runtime():
    return FakeCuda()


@pytest.fixture
def opened(monkeypatch, tmp_path, runtime):
    """Opens a runner on stand-ins; returns it and the engine that it loaded."""

    def make(library=TRT, plan=b"a plan", loads=True, **options):
        name = {TRT: "tensorrt", RTX: "tensorrt_rtx"}[library]
        module, engine = fake_tensorrt(name, runtime, loads)
        monkeypatch.setitem(sys.modules, name, module)
        (tmp_path / "engine.plan").write_bytes(plan)
        return TensorRtRunner(library, tmp_path / "engine.plan", GRAPH, cuda=Cuda(runtime), **options), engine

    return make


def feeds(rows=2, seed=0):
    random = np.random.default_rng(seed)
    return {"x": random.integers(-8, 8, (rows, 3)).astype(np.float32), "timestep": np.arange(rows, dtype=np.float32)}


def expected(given):
    return 2 * given["x"] + given["timestep"][:, None]


def test_feeds_are_cast_to_the_engines_types_and_outputs_come_in_fp32(opened):
    runner, _ = opened()
    given = feeds()
    (y,) = runner.run(given | {"step": np.zeros(2, dtype=np.int64)}).values()  # an input that this engine lacks
    assert y.dtype == np.float32
    assert np.array_equal(y, expected(given))


def test_the_second_call_at_a_shape_is_captured_and_later_ones_replay_it(opened, runtime):
    runner, _ = opened()
    for call in range(4):
        before = len(runtime.calls)
        given = feeds(seed=call)
        assert np.array_equal(runner.run(given)["y"], expected(given))
        made = runtime.calls[before:]
        assert made.count("cudaStreamBeginCapture") == (call == 1)
        assert made.count("cudaGraphLaunch") == (call >= 1)
        if call > 1:
            assert made == ["cudaGraphLaunch", "cudaStreamSynchronize"]


def test_buffers_are_made_once_for_a_shape_and_results_are_the_callers_own(opened, runtime):
    runner, engine = opened()
    first = runner.run(feeds())["y"]
    kept, made = first.copy(), runtime.calls.count("cudaMalloc")
    runner.run(feeds(seed=1))
    assert runtime.calls.count("cudaMalloc") == made == 3
    assert np.array_equal(first, kept)
    runner.run(feeds(rows=3))
    assert runtime.calls.count("cudaMalloc") == 2 * made
    assert len(engine.contexts) == 2  # a graph holds for its context as it was captured: another shape, another context


def test_shapes_beyond_what_is_kept_give_their_memory_back(opened, runtime, monkeypatch):
    monkeypatch.setattr(_tensorrt_run, "SHAPES", 2)
    runner, _ = opened()
    for rows in (1, 2, 3, 4, 1):
        assert runner.run(feeds(rows))["y"].shape == (rows, 3)
    gc.collect()
    assert len(runtime.memory) == 2 * 6  # of two shapes: three buffers on either side
    assert SHAPES > 2


def test_a_runner_that_goes_gives_everything_back(opened, runtime):
    runner, engine = opened()
    for _ in range(3):
        runner.run(feeds())
    assert runtime.memory
    assert runtime.graphs
    del runner
    engine.contexts.clear()
    gc.collect()
    assert not (runtime.memory or runtime.graphs or runtime.streams)


def test_without_graphs_every_call_is_started(opened, runtime):
    runner, _ = opened(cuda_graphs=False)
    for _ in range(3):
        runner.run(feeds())
    assert "cudaStreamBeginCapture" not in runtime.calls
    assert runner.no_graphs == "not asked for"


@pytest.mark.parametrize("failing", ["cudaStreamBeginCapture", "cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_fails_is_told_once_and_calls_go_on(failing, opened, runtime):
    runner, _ = opened()
    runner.run(feeds())
    runtime.fails.add(failing)
    with pytest.warns(RuntimeWarning, match=f"without CUDA graphs: {failing}: out of luck"):
        second = runner.run(feeds(seed=1))["y"]
    assert np.array_equal(second, expected(feeds(seed=1)))
    assert failing in runner.no_graphs
    assert np.array_equal(runner.run(feeds(seed=2))["y"], expected(feeds(seed=2)))
    assert runtime.calls.count("cudaStreamBeginCapture") == 1


def test_a_call_that_breaks_the_capture_leaves_the_stream_usable(opened, runtime):
    runner, engine = opened()
    runner.run(feeds())
    engine.can_be_captured = False
    with pytest.warns(RuntimeWarning, match="could not start it"):
        second = runner.run(feeds(seed=1))["y"]
    assert np.array_equal(second, expected(feeds(seed=1)))
    assert not (runtime.captures or runtime.graphs)
    assert runtime.calls.count("cudaGetLastError") == 1


def test_tensorrt_rtx_captures_by_itself_and_its_contexts_share_what_they_compile(opened, runtime):
    runner, engine = opened(RTX)
    for rows in (1, 2, 2):
        assert np.array_equal(runner.run(feeds(rows))["y"], expected(feeds(rows)))
    assert "cudaStreamBeginCapture" not in runtime.calls
    first_cache, first, second_cache, second = engine.settings
    assert first_cache is second_cache
    assert {one.cuda_graph_strategy for one in (first, second)} == {"whole graph"}
    assert {one.dynamic_shapes_kernel_specialization_strategy for one in (first, second)} == {"eager"}
    plain, engine = opened(RTX, cuda_graphs=False)
    plain.run(feeds())
    assert engine.settings[1].cuda_graph_strategy == "disabled"


def test_calls_of_many_threads_are_each_their_own(opened, runtime):
    runner, engine = opened()
    together = threading.Barrier(4)

    def calls(thread):
        together.wait()
        rows = 1 + thread % 2
        wrong = 0
        for call in range(50):
            given = feeds(rows, seed=100 * thread + call)
            wrong += not np.array_equal(runner.run(given)["y"], expected(given))
        return wrong

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(calls, range(4))) == [0] * 4
    assert len(engine.contexts) <= 4 * 2  # a lane for each thread at most, a context for each shape in it
    assert len(runtime.streams) <= 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": np.zeros((5, 3)), "timestep": np.zeros(5)}, "batch of 5, and the engine was built for 1 … 4"),
        ({"x": np.zeros((2, 4))}, "3 of 4, and the engine was built for 3 … 3"),
        ({"x": np.zeros((2, 3, 1))}, "3 axes for"),
        ({"timestep": np.zeros(1)}, "batch is 2 in another input"),
        ({"x": np.zeros((2, 3), dtype=complex)}, "is complex128"),
        ({"timestep": None}, "'timestep' is missing among x"),
    ],
)
def test_feeds_that_do_not_fit_are_refused_with_what_would(change, told, opened, runtime):
    runner, _ = opened()
    given = {name: value for name, value in (feeds() | change).items() if value is not None}
    with pytest.raises(UserError) as raised:
        runner.run(given)
    assert told in raised.value.what
    assert raised.value.fix
    assert "cudaMalloc" not in runtime.calls


def on_gpu(runtime, array, **change):
    """Returns an array that lies on the stand-in's GPU, as torch's or CuPy's do."""
    address = runtime.cudaMalloc(array.nbytes)[1]
    np.copyto(at(address, array.shape, array.dtype), array)
    told = {"shape": array.shape, "typestr": array.dtype.str, "data": (address, False), "version": 3, "strides": None}
    return SimpleNamespace(__cuda_array_interface__=told | change)


def test_an_array_on_the_gpu_is_read_where_it_lies(opened, runtime):
    runner, engine = opened()
    given = feeds()
    for seed in (0, 1, 2):
        given = feeds(seed=seed)
        x = on_gpu(runtime, given["x"].astype(np.float16), stream=7)
        before = len(runtime.calls)
        y = runner.run({"x": x, "timestep": given["timestep"]})["y"]
        assert np.array_equal(y, expected(given))
        assert engine.contexts[-1].addresses["x"] == x.__cuda_array_interface__["data"][0]
        assert runtime.calls[before:].count("cudaMemcpyAsync") == 2  # the timestep in, the result out
    assert "cudaStreamBeginCapture" not in runtime.calls  # the next one lies elsewhere
    assert np.array_equal(runner.run(feeds())["y"], expected(feeds()))  # from the host again


class FromDlpack:
    """A numpy array that says it lies on a GPU, as its capsule does not."""

    def __init__(self, array, device=(2, 0)):
        self.array, self.device, self.stream = array, device, None

    def __dlpack_device__(self):
        return self.device

    def __dlpack__(self, *, stream):
        self.stream = stream
        return self.array.__dlpack__()


def test_an_array_is_taken_by_dlpack_too_and_its_owner_is_not_let_go(opened, runtime):
    runner, engine = opened()
    given = feeds(rows=4)
    whole = np.concatenate([np.zeros((2, 3)), given["x"]]).astype(np.float16)
    part = whole[2:]
    address, x = part.ctypes.data, FromDlpack(part)
    before = len(runtime.calls)
    assert np.array_equal(runner.run(given | {"x": x})["y"], expected(given))
    assert engine.contexts[-1].addresses["x"] == address
    assert x.stream == 1  # its maker has the default stream wait, and that is waited for
    assert "cudaStreamSynchronize" in runtime.calls[before:][: runtime.calls[before:].index("cudaMemcpyAsync")]


@pytest.mark.parametrize(
    ("x", "told"),
    [
        (FromDlpack(np.zeros((2, 3), np.float32)), "lies on the GPU as float32"),
        (FromDlpack(np.zeros((2, 6), np.float16)[:, ::2]), "float16, with gaps"),
        (FromDlpack(np.zeros((2, 3), bool)), "a type of its own"),
        (FromDlpack(np.zeros((2, 3), np.float16), (2, 1)), "lies on GPU 1"),
        (FromDlpack(np.zeros((2, 5), np.float16)), "3 of 5"),
    ],
    ids=["type", "gaps", "no number", "another GPU", "shape"],
)
def test_an_array_by_dlpack_that_does_not_fit_is_refused(x, told, opened):
    runner, _ = opened()
    with pytest.raises(UserError) as raised:
        runner.run(feeds() | {"x": x})
    assert told in raised.value.what


def test_a_torch_tensor_in_the_hosts_memory_is_fed_as_numpy_is(opened):
    import torch

    runner, _ = opened()
    given = feeds()
    assert np.array_equal(
        runner.run({name: torch.from_numpy(one) for name, one in given.items()})["y"], expected(given)
    )


def test_the_maker_of_an_array_on_the_gpu_is_waited_for(opened, runtime):
    runner, _ = opened()
    half = feeds()["x"].astype(np.float16)
    for change, waits in (({"stream": 7}, "cudaStreamSynchronize"), ({}, "cudaDeviceSynchronize")):
        x = on_gpu(runtime, half, **change)
        before = len(runtime.calls)
        runner.run(feeds() | {"x": x})
        assert waits in runtime.calls[before:][: runtime.calls[before:].index("cudaMemcpyAsync")]


@pytest.mark.parametrize(("dtype", "change"), [(np.float32, {}), (np.float16, {"strides": (2, 4)})])
def test_an_array_on_the_gpu_of_another_type_or_layout_is_refused(dtype, change, opened, runtime):
    runner, _ = opened()
    x = on_gpu(runtime, feeds()["x"].astype(dtype), **change)
    with pytest.raises(UserError, match="lies on the GPU as") as raised:
        runner.run(feeds() | {"x": x})
    assert "float16, contiguous" in raised.value.fix
    same = on_gpu(runtime, feeds()["x"].astype(np.float16), strides=(6, 2))  # dense, and said to be
    assert np.array_equal(runner.run(feeds() | {"x": same})["y"], expected(feeds()))


@pytest.mark.parametrize("failing", ["cudaMalloc", "cudaHostAlloc", "cudaStreamCreateWithFlags", "cudaMemcpyAsync"])
def test_a_gpu_that_refuses_is_an_error_with_a_fix_and_the_next_call_starts_anew(failing, opened, runtime):
    runner, _ = opened()
    runtime.fails.add(failing)
    with pytest.raises(UserError, match=f"{failing}: out of luck") as raised:
        runner.run(feeds())
    assert "free the GPU's memory" in raised.value.fix
    runtime.fails.clear()
    assert np.array_equal(runner.run(feeds())["y"], expected(feeds()))


def test_an_engine_that_does_not_start_is_an_error(opened):
    runner, engine = opened()
    engine.starts = False
    with pytest.raises(UserError, match="could not start it"):
        runner.run(feeds())


@pytest.mark.parametrize(
    ("library", "plan", "loads", "told"),
    [(TRT, b"a plan", False, "another version"), (RTX, b"of another GPU", True, "made for another GPU")],
)
def test_a_plan_that_does_not_load_says_why_and_how_to_build_one(library, plan, loads, told, opened):
    with pytest.raises(UserError) as raised:
        opened(library, plan, loads)
    assert told in raised.value.what
    assert f"--backend {library.name}" in raised.value.fix


@pytest.mark.parametrize(("budget", "kept"), [(None, None), (0, 0), (600, 600), (5000, 1000), ("auto", 700)])
def test_streamed_weights_get_their_budget_before_there_is_a_context(budget, kept, opened):
    runner, engine = opened(budget=budget)
    assert not engine.contexts
    assert engine.weight_streaming_budget_v2 == kept
    assert runner.run(feeds())["y"].shape == (2, 3)


class Refitter:
    fits = True

    def __init__(self, engine, logger):
        self.engine = engine

    def refit_cuda_engine(self):
        return True


class OnnxParserRefitter:
    num_errors = 1

    def __init__(self, refitter, logger):
        self.refitter = refitter

    def refit_from_bytes(self, model, path):
        return Refitter.fits

    def get_error(self, index):
        return SimpleNamespace(desc=lambda: "no such weights")


def test_weights_are_exchanged_and_calls_are_captured_anew(opened, runtime, monkeypatch, tmp_path):
    runner, engine = opened()
    runner._trt.Refitter, runner._trt.OnnxParserRefitter = Refitter, OnnxParserRefitter
    monkeypatch.setattr(_tensorrt_run, "parsable", lambda model: b"a graph")
    for _ in range(2):
        runner.run(feeds())
    runner.refit(tmp_path / "model.onnx")
    for _ in range(2):
        runner.run(feeds())
    assert runtime.calls.count("cudaStreamBeginCapture") == 2
    monkeypatch.setattr(Refitter, "fits", False)
    with pytest.raises(UserError, match="do not fit the engine: no such weights"):
        runner.refit(tmp_path / "model.onnx")
    engine.refittable = False
    with pytest.raises(UserError, match="weights are fixed") as raised:
        runner.refit(tmp_path / "model.onnx")
    assert "--refit" in raised.value.fix


@pytest.mark.parametrize(("gpu", "runs"), [("sm89", True), ("sm90", False), ("sm100", False), ("sm130", True)])
def test_a_gpu_that_the_library_leaves_out_is_named(gpu, runs, monkeypatch):
    monkeypatch.setattr(_tensorrt_run.gpus, "detect", lambda: gpu)
    monkeypatch.setattr(_cuda, "missing", lambda: None)
    reason = trt_rtx.cannot_run()
    assert (reason is None) == runs
    assert runs or f"runs on no {gpu} GPU" in reason


def test_why_engines_cannot_run_here_is_said(monkeypatch):
    monkeypatch.setattr(_tensorrt_run.gpus, "detect", lambda: None)
    assert trt.cannot_run() == "no NVIDIA GPU on this machine"
    monkeypatch.setattr(_tensorrt_run.gpus, "detect", lambda: "sm89")
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install tensorrt" in trt.cannot_run()
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert "pip install 'cuda-python" in trt.cannot_run()
    with pytest.raises(UserError, match="cuda-python cannot be imported"):
        _cuda.Cuda()


@pytest.mark.parametrize("gpu", ["sm90", "sm100"])
def test_a_target_that_the_library_leaves_out_is_refused_with_what_runs_there(gpu):
    with pytest.raises(UserError, match=f"runs on no {gpu} GPU") as raised:
        RTX.resolve_gpu(gpu)
    assert "ort" in raised.value.fix
