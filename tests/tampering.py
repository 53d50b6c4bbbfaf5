"""Artifacts that were changed and sealed anew: faults that digests cannot catch, for what must catch them otherwise."""

from __future__ import annotations

import shutil

import onnx

from engines import artifacts
from engines.artifacts import MANIFEST, TIMINGS, Request


def remade(artifact, folder, edit, model="model.onnx"):
    """Returns a copy of a graph or an engine whose ONNX model `edit` has changed, in place."""
    request = Request(artifact.manifest["kind"], artifact.manifest["made_from"], {"tampered": True}, {})
    with artifacts.drafting(folder, request) as draft:
        for file in artifact.path.iterdir():
            if file.name not in (MANIFEST, TIMINGS):
                shutil.copyfile(file, draft.path / file.name)
        graph = onnx.load(draft.path / model)
        edit(graph.graph)
        (draft.path / model).unlink()
        onnx.save(graph, draft.path / model)
        draft.info = artifact.info
    return artifacts.open_artifact(folder, artifact.manifest["kind"])


def scaled(name, factor):
    """Multiplies an initializer."""

    def edit(graph):
        (tensor,) = [one for one in graph.initializer if one.name == name]
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * factor, name))

    return edit


def without_quantizer(layer):
    """Takes away a layer's activation Q and DQ."""

    def edit(graph):
        makers = {value: node for node in graph.node for value in node.output}
        (matmul,) = [node for node in graph.node if node.name == f"{layer}/MatMul"]
        decode = makers[matmul.input[0]]
        encode = makers[decode.input[0]]
        matmul.input[0] = encode.input[0]
        graph.node.remove(decode)
        graph.node.remove(encode)

    return edit


def folded(layer, values):
    """Puts a dense weight where a layer's codebook is decoded."""

    def edit(graph):
        (node,) = [one for one in graph.node if one.name == f"{layer}/CodebookDequantizeLinear"]
        graph.initializer.append(onnx.numpy_helper.from_array(values, node.output[0]))
        graph.node.remove(node)

    return edit
