"""An ONNX file that reaches for weights outside its artifact is refused before anything reads them."""

from __future__ import annotations

import bundles
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import engines
from engines import artifacts, external_data
from engines.artifacts import Request
from engines.errors import UserError

PLACES = ["../secret", "{root}/secret", "link", "sub/../../secret", "/proc/self/environ", ""]


def tensor(place, name="half"):
    made = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", place), ("offset", "0"), ("length", "4")):
        entry = made.external_data.add()
        entry.key, entry.value = key, value
    return made


def reaching(place):
    """Returns the tiny network with one weight that lies in `place`."""
    model = bundles.network()
    model.graph.initializer[0].CopyFrom(tensor(place))
    return model


@pytest.fixture
def root(tmp_path):
    (tmp_path / "secret").write_bytes(np.float32(0.5).tobytes())
    return tmp_path


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_outside_the_graphs_files_is_refused(root, place):
    folder = root / "graph"
    folder.mkdir()
    (folder / "link").symlink_to(root / "secret")
    onnx.save(reaching(place.format(root=root)), folder / "model.onnx")
    with pytest.raises(UserError, match="tensor 'half' lies in") as caught:
        external_data.check(folder / "model.onnx", ["model.onnx", "model.onnx.data"])
    assert "do not use this graph" in caught.value.fix


def test_weights_in_the_graphs_own_file_are_let_pass(root):
    (root / "model.onnx.data").write_bytes(np.float32(0.5).tobytes())
    onnx.save(reaching("model.onnx.data"), root / "model.onnx")
    external_data.check(root / "model.onnx", ["model.onnx", "model.onnx.data"])


def test_a_tensor_deep_inside_is_found_too(root):
    inner = helper.make_graph([], "inner", [], [], [tensor("../secret", "deep")])
    model = bundles.network()
    model.graph.node.append(helper.make_node("If", ["half"], ["unused"], then_branch=inner, else_branch=inner))
    onnx.save(model, root / "model.onnx")
    with pytest.raises(UserError, match="tensor 'deep'"):
        external_data.check(root / "model.onnx", ["model.onnx"])


def test_what_is_no_onnx_file_is_refused(root):
    (root / "model.onnx").write_bytes(b"\xff" * 64)
    with pytest.raises(UserError, match="is no ONNX file"):
        external_data.check(root / "model.onnx", ["model.onnx"])


@pytest.mark.parametrize(("key", "value"), [("length", "4x"), ("offset", "-1")])
def test_a_weight_at_no_place_in_its_file_is_refused(root, key, value):
    model = reaching("model.onnx.data")
    (entry,) = [one for one in model.graph.initializer[0].external_data if one.key == key]
    entry.value = value
    onnx.save(model, root / "model.onnx")
    with pytest.raises(UserError, match="or nowhere"):
        external_data.check(root / "model.onnx", ["model.onnx", "model.onnx.data"])


def test_a_malformed_graph_is_refused(root):
    model = bundles.network()
    model.graph.node[0].input.pop()
    onnx.save(model, root / "model.onnx")
    with pytest.raises(UserError, match="is malformed"):
        external_data.check(root / "model.onnx", ["model.onnx"])


def test_a_name_that_is_no_text_is_refused(root):
    content = bundles.network().SerializeToString()
    (root / "model.onnx").write_bytes(content.replace(b"hidden_states", b"hidden\xff\xfestate"))
    with pytest.raises(UserError, match="is no ONNX file"):
        external_data.check(root / "model.onnx", ["model.onnx"])


def test_build_looks_before_it_builds(root):
    from engines.build import build

    with artifacts.drafting(root / "graph", Request("graph", {}, {}, {})) as draft:
        onnx.save(reaching("../../secret"), draft.path / "model.onnx")
        draft.info = bundles.graph_info()
    graph = artifacts.open_artifact(root / "graph", "graph")
    with pytest.raises(UserError, match="none of the graph's own files"):
        build(graph, "ort", root / "engine")
    assert not (root / "engine").exists()


@pytest.mark.parametrize("place", [*PLACES[:2], PLACES[3]])
def test_a_bundle_whose_engine_reaches_outside_is_not_opened(root, place):
    content = reaching(place.format(root=root)).SerializeToString()
    folder = bundles.tiny_bundle(root / "tiny", files={"engines/ort/model.onnx": content})
    with pytest.raises(UserError, match="ONNX Runtime cannot open") as caught:
        engines.load(folder)
    assert caught.value.fix
