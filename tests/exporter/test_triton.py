"""The model repository: what Triton reads of it, and that a session opened as Triton opens one gives the same numbers.

config.pbtxt is parsed by Triton's own schema. No Triton server is run.
"""

from __future__ import annotations

import bundles
import numpy as np
import onnx
import onnxruntime
import pytest
from bench_codebook_kernel import layer_graph, random_weight
from common import ROOT
from google.protobuf import descriptor_pool, message_factory, text_format
from onnx import TensorProto, helper, numpy_helper

import engines
from engines import artifacts, golden, schedule
from engines.backends import _codebooks, ort
from engines.bundle import open_bundle
from engines.errors import UserError
from exporter import triton
from exporter.bundle import opened
from exporter.formats.codebook import Format

SCHEMA = ROOT / "tests/exporter/triton_model_config/model_config.binpb"


def config_of(folder):
    """Returns config.pbtxt as Triton's schema reads it; an unknown field or a wrong type is an error."""
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(SCHEMA.read_bytes())
    message = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))()
    return text_format.Parse((folder / "config.pbtxt").read_text(), message)


def served(tmp_path, native_ops=None, **options):
    """Writes a tiny bundle and its repository; returns the bundle, its one model's folder and the artifact."""
    bundle = open_bundle(bundles.tiny_bundle(tmp_path / "tiny", **options))
    made = triton.triton(bundle, tmp_path / "repository", native_ops=native_ops)
    (name,) = made.info["models"]
    return bundle, tmp_path / "repository" / name, made


def quantized(info):
    """Lets an engine need an optimizer switched off."""
    info["graphs"]["fp32"]["info"]["layers"] = {"one": {"weight": "fp8", "activation": "fp8"}}
    info["engines"]["ort"]["session"]["disabled_optimizers"] = ort.disabled_optimizers(info["graphs"]["fp32"]["info"])


def with_layer(nodes, constants, functions=()):
    """Returns the network with a layer in its labels' way, from `x` [batch, 1] to `y` [batch, 1], the same numbers."""
    model = bundles.network()
    at, reshape = next((i, n) for i, n in enumerate(model.graph.node) if n.input[0] == "class_labels_float")
    reshape.input[0] = "y"
    column = helper.make_node("Reshape", ["class_labels_float", "column"], ["x"])
    rest = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*rest[:at], column, *nodes, *rest[at:]])
    model.graph.initializer.extend([*constants, helper.make_tensor("column", TensorProto.INT64, [2], [-1, 1])])
    model.functions.extend(functions)
    model.opset_import.append(helper.make_opsetid("export_engine", 1))
    return model.SerializeToString()


def fp8_layer():
    """Whole numbers to 16 are exact in FP8."""
    constants = [
        helper.make_tensor("unit", TensorProto.FLOAT, [], [1.0]),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, [], [0.0]),
        helper.make_tensor("weight", TensorProto.FLOAT8E4M3FN, [1, 1], [1.0]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "unit", "zero"], ["codes"]),
        helper.make_node("DequantizeLinear", ["codes", "unit", "zero"], ["values"]),
        helper.make_node("DequantizeLinear", ["weight", "unit", "zero"], ["weight_values"]),
        helper.make_node("MatMul", ["values", "weight_values"], ["y"]),
    ]
    return with_layer(nodes, constants)


def codebook_layer(tmp_path):
    """Four times the number, by a row of quarters that is looked up."""
    codes, _, _ = random_weight(1, 4, Format(4, 256))
    quarters = numpy_helper.from_array(np.full((256, 4), 0.25, np.float32), "codebook")
    onnx.save(layer_graph(codes, quarters), tmp_path / "layer.onnx")
    layer = _codebooks.rewrite(tmp_path / "layer.onnx", "run")
    (node,) = layer.graph.node
    node.input[0], node.output[0] = "four", "y"
    ones = helper.make_tensor("ones", TensorProto.FLOAT, [1, 4], [1.0] * 4)
    four = helper.make_node("MatMul", ["x", "ones"], ["four"])
    return with_layer([four, node], [ones, *layer.graph.initializer], layer.functions)


def codebooks(info):
    quantized(info)
    info["engines"]["ort"]["session"]["codebook_ops"] = True


def as_triton(folder, library=None):
    """Opens the model under what the config asks for, and nothing else."""
    level = {0: "ORT_ENABLE_ALL", 2: "ORT_DISABLE_ALL"}[config_of(folder).optimization.graph.level]
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    if library is not None:
        options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(str(folder / "1/model.onnx"), options, providers=["CPUExecutionProvider"])


def fed(session, rows=3):
    feeds = bundles.feeds(rows, 1)
    feeds[schedule.ROW] = np.tile(np.array([1.0, 0.0], np.float32), (rows, 1))
    return {value.name: feeds[value.name] for value in session.get_inputs()}


@pytest.mark.parametrize("step_input", [None, "index", "row"])
def test_the_config_is_one_that_triton_reads_and_is_of_the_model_beside_it(tmp_path, step_input):
    bundle, folder, _ = served(tmp_path, step_input=step_input)
    config, session = config_of(folder), as_triton(folder)
    assert (config.name, config.backend, config.max_batch_size) == ("tiny-none-ort", "onnxruntime", 8)
    assert folder.name == config.name
    assert config.HasField("dynamic_batching")
    kinds = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}
    for ours, theirs in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [one.name for one in ours] == [one.name for one in theirs]
        for one, other in zip(ours, theirs, strict=True):
            assert (
                one.DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number[one.data_type].name
                == (kinds[other.type])
            )
            dims = one.reshape.shape if one.HasField("reshape") else one.dims
            assert list(dims) == [size if isinstance(size, int) else -1 for size in other.shape[1:]]
            assert len(one.dims) > 0  # Triton refuses a tensor without
    alone = engines.load(bundle.path).run(bundles.feeds(3, 1))["sample"]
    np.testing.assert_array_equal(session.run(None, fed(session))[0], alone)


def test_rows_to_warm_up_with_are_recorded_ones_in_the_models_types(tmp_path):
    _, folder, _ = served(tmp_path, step_input="row")
    (warmup,) = config_of(folder).model_warmup
    assert warmup.batch_size == bundles.AXES["batch"]["opt"]
    inputs = {value.name: value for value in config_of(folder).input}
    assert warmup.inputs.keys() == inputs.keys()
    for name, entry in warmup.inputs.items():
        assert entry.data_type == inputs[name].data_type
        assert all(
            size in (wanted, max(wanted, size)) for size, wanted in zip(entry.dims, inputs[name].dims, strict=True)
        )
        kind = np.int64 if name in ("timestep", "class_labels") else np.float32
        row = np.fromfile(folder / "warmup" / entry.input_data_file, kind)
        assert row.size == np.prod(entry.dims)
    np.testing.assert_array_equal(
        np.fromfile(folder / "warmup/hidden_states", np.float32), bundles.feeds(4, 0)["hidden_states"][0].ravel()
    )
    assert (folder / schedule.FILE).is_file()


def test_a_graph_that_a_plain_session_cannot_open_is_served_as_it_was_optimized(tmp_path):
    model = fp8_layer()
    with pytest.raises(Exception, match="MatMulIntegerToFloat"):
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    bundle, folder, _ = served(tmp_path, edit=quantized, files={"engines/ort/model.onnx": model})
    session = as_triton(folder)
    alone = engines.load(bundle.path).run(bundles.feeds(3, 1))["sample"]
    np.testing.assert_array_equal(session.run(None, fed(session))[0], alone)


def test_codebooks_are_looked_up_by_plain_nodes_unless_the_servers_library_is_named(tmp_path, library):
    files = {"engines/ort/model.onnx": codebook_layer(tmp_path)}
    bundle, folder, _ = served(tmp_path / "plain", edit=codebooks, files=files)
    assert not config_of(folder).model_operations.op_library_filename
    own = {node.op_type for node in onnx.load(folder / "1/model.onnx").graph.node if node.domain == "export_engine"}
    assert not own
    there = "/models/tiny-none-ort/codebook_ops.so"
    _, native, made = served(tmp_path / "native", native_ops=there, edit=codebooks, files=files)
    assert list(config_of(native).model_operations.op_library_filename) == [there]
    assert any(there in note for note in made.info["models"]["tiny-none-ort"]["notes"])
    assert (native / library.name).read_bytes() == library.read_bytes()
    kept = [node.op_type for node in onnx.load(native / "1/model.onnx").graph.node if node.domain == "export_engine"]
    assert kept == ["CodebookMatMul"]
    alone = engines.load(bundle.path).run(bundles.feeds(3, 1))["sample"]
    for session in (as_triton(folder), as_triton(native, native / library.name)):
        np.testing.assert_array_equal(session.run(None, fed(session))[0], alone)


def test_a_model_that_is_off_as_triton_opens_it_is_not_written(tmp_path):
    def strict(info):
        info["golden"]["limits_db"]["fp32"]["2"] = 1e9
        info["golden"]["steps"] = [2]

    model = bundles.network()
    model.graph.initializer[0].float_data[0] = 0.25
    with pytest.raises(UserError, match="opened as Triton opens it, is off: step 2"):
        served(tmp_path, edit=strict, files={"engines/ort/model.onnx": model.SerializeToString()})
    assert not (tmp_path / "repository").exists()


def test_a_batch_that_triton_may_not_choose_is_written_out(tmp_path):
    def pairs(info):
        info["axes"] = bundles.AXES | {"batch": {"min": 2, "opt": 2, "max": 8, "multiple": 2}}

    _, folder, made = served(tmp_path, edit=pairs)
    config = config_of(folder)
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")
    assert [list(value.dims) for value in config.input] == [[-1, 1, 2, -1], [-1], [-1]]
    assert not any(value.HasField("reshape") for value in config.input)
    (warmup,) = config.model_warmup
    assert warmup.batch_size == 1
    assert list(warmup.inputs["hidden_states"].dims) == [2, 1, 2, 4]
    assert any("batch: 2 … 8 in multiples of 2" in note for note in made.info["models"]["tiny-none-ort"]["notes"])


def with_plan(backend):
    """Adds a plan of TensorRT or TensorRT-RTX to a bundle's engines."""

    def edit(info):
        info["engines"]["gpu"] = bundles.engine_entry(
            folder="engines/gpu", file="engine.plan", backend=backend, gpu="sm89", session=None, dtype="fp16",
            versions={"tensorrt": "11.0.0", "export_engine": "0"},
        )  # fmt: skip
        info["graphs"]["fp16"] = info["graphs"]["fp32"] | {"info": bundles.graph_info(dtype="fp16")}
        info["golden"]["limits_db"]["fp16"] = info["golden"]["limits_db"]["fp32"]

    return edit


def test_a_tensorrt_plan_is_served_in_its_own_types(tmp_path):
    bundle = open_bundle(
        bundles.tiny_bundle(tmp_path / "tiny", edit=with_plan("trt"), files={"engines/gpu/engine.plan": b"plan"})
    )
    made = triton.triton(bundle, tmp_path / "repository")
    folder = tmp_path / "repository/tiny-none-gpu"
    config = config_of(folder)
    assert (folder / "1/model.plan").read_bytes() == b"plan"
    assert config.backend == "tensorrt"
    assert config.instance_group[0].Kind.Name(config.instance_group[0].kind) == "KIND_GPU"
    assert np.fromfile(folder / "warmup/hidden_states", np.float16).size == 8
    assert any("sm89" in note and "tensorrt 11.0.0" in note for note in made.info["models"][folder.name]["notes"])


def test_what_triton_does_not_serve_is_said(tmp_path, capsys):
    bundle = open_bundle(
        bundles.tiny_bundle(tmp_path / "tiny", edit=with_plan("trt-rtx"), files={"engines/gpu/engine.plan": b"plan"})
    )
    made = triton.triton(bundle, tmp_path / "repository")
    assert list(made.info["models"]) == ["tiny-none-ort"]
    triton.tell(made)
    assert "gpu is not served: Triton's TensorRT backend loads no plan of TensorRT-RTX" in (
        " ".join(capsys.readouterr().err.split())
    )


def test_a_bundle_without_an_engine_for_triton_is_refused(tmp_path):
    def alone(info):
        with_plan("trt-rtx")(info)
        del info["engines"]["ort"]

    path = bundles.tiny_bundle(tmp_path / "tiny", edit=alone, files={"engines/gpu/engine.plan": b"plan"})
    with pytest.raises(UserError, match="Triton serves none of its engines"):
        triton.triton(open_bundle(path), tmp_path / "repository")


def test_a_repository_is_sealed_and_is_not_written_twice(tmp_path):
    bundle, folder, made = served(tmp_path)
    assert artifacts.kind_of(folder.parent) == "triton"
    before = (folder / "config.pbtxt").stat().st_mtime_ns
    assert triton.triton(bundle, folder.parent).digest == made.digest
    assert (folder / "config.pbtxt").stat().st_mtime_ns == before
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "kept").write_text("mine")
    with pytest.raises(UserError, match="holds other things"):
        triton.triton(bundle, foreign)


def test_kernels_that_nothing_needs_are_refused(tmp_path, library):
    with pytest.raises(UserError, match="none of its engines looks codebooks up"):
        served(tmp_path, native_ops="/models/codebook_ops.so")


def test_a_runs_engine_draws_the_same_served_as_loaded(run_of, tmp_path):
    run, repository = run_of("int8"), tmp_path / "repository"
    with opened(run, None, near=repository) as bundle:
        made = triton.triton(bundle, repository)
        alone = engines.load(bundle.path)
        feeds = {name: value[:8] for name, value in golden.read(bundle, "0/feeds/").items()}
    assert [path.name for path in tmp_path.iterdir()] == ["repository"]
    (name,) = made.info["models"]
    assert name == "digits-dit-int8-ort"
    session = as_triton(repository / name)
    (output,) = session.run(None, {value.name: feeds[value.name] for value in session.get_inputs()})
    np.testing.assert_allclose(output, alone.run(feeds)["sample"], rtol=0, atol=1e-5)


def test_somewhere_to_write_to_is_asked_for(cli):
    done = cli("bundle", "run", "--zip", "--triton", "repository")
    assert done.returncode == 2
    assert "--zip needs --out" in done.stderr
