"""TensorRT's backend without a GPU: built through TensorRT-RTX's builder, its own calls held against stand-ins."""

from __future__ import annotations

import json
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from engines.backends import _tensorrt, _tensorrt_api, trt, trt_rtx
from engines.backends._tensorrt_api import RTX, TRT
from engines.errors import UserError
from engines.options import Options
from engines.plans import from_json

GRAPH = {
    "axes": {"batch": {"min": 1, "opt": 2, "max": 8}},
    "inputs": [{"name": "x", "dtype": "float16", "shape": ["batch", 64]}],
}
INSPECTED = json.dumps(
    {
        "Layers": [
            {
                "Name": "proj/MatMul", "LayerType": "gemm", "Inputs": [{"Name": "x", "Datatype": "Half"}],
                "Constants": [{"Name": "w", "Dimensions": [64, 64], "Datatype": "Half"}],
                "Outputs": [{"Name": "y", "Datatype": "Half"}], "Metadata": "[ONNX Layer: proj/MatMul]",
            }
        ]
    }
)  # fmt: skip


@pytest.fixture
def model(tmp_path):
    w = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "proj/MatMul")],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["batch", 64])],
        [helper.make_tensor("w", TensorProto.FLOAT16, w.shape, w.tobytes(), raw=True)],
    )
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


@pytest.fixture
def inspector():
    """What an engine that was loaded would be asked: its context is the one whose shapes were set."""
    return SimpleNamespace(shapes={}, get_engine_information=lambda layout: INSPECTED)


@pytest.fixture
def on_gpu(monkeypatch, inspector):
    """Puts TensorRT-RTX's builder in TensorRT's place, on a machine whose GPU loads what it builds."""
    import tensorrt_rtx

    def set_input_shape(name, shape):
        inspector.shapes[name] = shape

    context = SimpleNamespace(set_input_shape=set_input_shape, infer_shapes=list)
    loaded = SimpleNamespace(create_execution_context=lambda: context, create_engine_inspector=lambda: inspector)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda plan: loaded)
    module = ModuleType("tensorrt")
    module.__dict__.update(vars(tensorrt_rtx) | {"Runtime": lambda logger: runtime, "__version__": "11.4.0"})
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    monkeypatch.setattr(_tensorrt_api.gpus, "detect", lambda: "sm89")
    return module


@pytest.fixture
def built(model, tmp_path):
    """Builds with a backend; returns its folder."""

    def build(backend, name, **options):
        (folder := tmp_path / name).mkdir()
        assert backend.build(model, GRAPH, folder, "sm89", Options(**options)) == {}
        return folder

    return build


def test_an_engine_is_built_and_its_plan_is_the_inspectors_at_the_shapes_of_the_profile(on_gpu, built, inspector):
    folder = built(trt, "engine")
    (row,) = from_json(json.loads((folder / "plan.json").read_text()))
    assert (row.name, row.kind, row.constant_bytes) == ("proj/MatMul", "gemm", 64 * 64 * 2)
    assert trt.multiplied(row) == "fp16"
    assert inspector.shapes == {"x": (2, 64)}
    assert inspector.execution_context is not None
    assert trt.fingerprint() == {"tensorrt": "11.4.0"}


def test_both_libraries_are_given_one_network_and_one_profile(on_gpu, built, monkeypatch):
    monkeypatch.setattr(type(RTX), "aim", lambda *_: None)  # TensorRT has no target to be told
    ours, theirs = built(trt, "trt"), built(trt_rtx, "rtx")
    assert (ours / "engine.plan").read_bytes() == (theirs / "engine.plan").read_bytes()
    (row,) = [r for r in from_json(json.loads((theirs / "plan.json").read_text())) if r.onnx_nodes == ("proj/MatMul",)]
    assert (row.kind, row.constant_types[0]) == ("gemm", "fp16")


def test_streamed_weights_are_asked_of_the_builder_and_leave_the_plan_as_it_is(built):
    plain, streamed = built(trt_rtx, "plain"), built(trt_rtx, "streamed", weight_streaming="auto")
    assert (plain / "engine.plan").read_bytes() != (streamed / "engine.plan").read_bytes()
    assert (plain / "plan.json").read_bytes() == (streamed / "plan.json").read_bytes()


@pytest.mark.parametrize("options", [{}, {"refit": True}, {"weight_streaming": 0}])
def test_flags_are_set_as_asked(options, on_gpu):
    log = _tensorrt.Logger(on_gpu)
    builder = on_gpu.Builder(log.logger)
    config = _tensorrt.configured(TRT, on_gpu, builder, GRAPH, "sm89", Options(**options))
    flags = {name: config.get_flag(getattr(on_gpu.BuilderFlag, name)) for name in ("REFIT", "WEIGHT_STREAMING")}
    assert flags == {"REFIT": "refit" in options, "WEIGHT_STREAMING": "weight_streaming" in options}
    assert config.num_optimization_profiles == 1
    assert config.profiling_verbosity == on_gpu.ProfilingVerbosity.DETAILED


def test_an_engine_that_the_gpu_does_not_load_is_an_error(on_gpu, built):
    on_gpu.Runtime = lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    with pytest.raises(UserError, match="does not load where it was built"):
        built(trt, "engine")


class Timings:
    """A builder's configuration, and the timing caches that it makes: it takes those that begin with its version."""

    def __init__(self, refuses=""):
        self.refuses, self.made, self.cache = refuses, [], None

    def create_timing_cache(self, content):
        self.made.append(content)
        if content and self.refuses == "create":
            return None
        return SimpleNamespace(content=content, serialize=lambda: content + b"+timed")

    def set_timing_cache(self, cache, ignore_mismatch):
        assert not ignore_mismatch
        if cache.content and self.refuses == "set":
            return False
        self.cache = cache
        return True


def test_timings_are_kept_and_used_again(tmp_path):
    file = tmp_path / "made" / "trt.timing_cache"
    assert TRT.time(Timings(), file)() == []
    assert file.read_bytes() == b"+timed"
    later = Timings()
    assert TRT.time(later, file)() == []
    assert later.made == [b"+timed"]
    assert file.read_bytes() == b"+timed+timed"
    assert [f.name for f in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("refuses", ["create", "set"])
def test_timings_of_another_gpu_or_damaged_ones_are_left_aside_with_a_note(refuses, tmp_path):
    file = tmp_path / "trt.timing_cache"
    file.write_bytes(b"garbage")
    config = Timings(refuses)
    (note,) = TRT.time(config, file)()
    assert str(file) in note
    assert "left aside" in note
    assert config.cache.content == b""
    assert file.read_bytes() == b"+timed"


def test_timings_that_cannot_be_read_or_kept_cost_no_engine(tmp_path, monkeypatch):
    (tmp_path / "trt.timing_cache").mkdir()
    notes = TRT.time(Timings(), tmp_path / "trt.timing_cache")()
    assert ["cannot be read" in notes[0], "could not be kept" in notes[1]] == [True, True]
    monkeypatch.setattr(_tensorrt_api, "MAX_CACHE_BYTES", 3)
    (file := tmp_path / "large").write_bytes(b"long")
    config = Timings()
    assert "more than 3 bytes" in TRT.time(config, file)()[0]
    assert config.made == [b""]


def test_the_rtx_library_keeps_no_timings(tmp_path):
    assert RTX.time(object(), tmp_path / "none")() == []
    assert not list(tmp_path.iterdir())


def test_it_builds_for_the_gpu_at_hand_alone(on_gpu, monkeypatch):
    assert trt.resolve_gpu(None) == trt.resolve_gpu("sm89") == "sm89"
    assert trt.targets() == ["sm89"]
    with pytest.raises(UserError, match="that is sm89") as raised:
        trt.resolve_gpu("sm120")
    assert "trt-rtx" in raised.value.fix
    monkeypatch.setattr(_tensorrt_api.gpus, "detect", lambda: None)
    assert trt.targets() == []
    for gpu in (None, "sm89"):
        with pytest.raises(UserError, match="this machine has none") as raised:
            trt.resolve_gpu(gpu)
        assert "trt-rtx" in raised.value.fix


def test_without_the_library_it_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    for call in (trt.fingerprint, lambda: trt.resolve_gpu(None)):
        with pytest.raises(UserError, match="TensorRT cannot be imported") as raised:
            call()
        assert "pip install tensorrt" in raised.value.fix


def test_a_format_that_the_gpu_lacks_names_the_layer(on_gpu):
    layers = {"proj": {"weight": "fp8", "activation": "fp8"}}
    assert trt.check(layers, "sm89") is None
    with pytest.raises(UserError, match=r"'proj' is fp8, with no hardware for it in sm86") as raised:
        trt.check(layers, "sm86")
    assert "--gpu" not in raised.value.fix  # there is but one to build for


def test_what_is_known_against_refittable_engines_is_noted():
    assert "bias" in trt.note({}, Options(refit=True))
    assert trt.note({}, Options()) is None
