"""What an ONNX file must be before anything reads it further: well-formed, its weights in files that are its own."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, MutableSequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import UserError

if TYPE_CHECKING:
    import onnx
    from google.protobuf.message import Message


def check(path: Path, files: Collection[str]) -> None:
    """Raises a UserError if the graph at `path` is malformed, or a tensor lies elsewhere than in `files` beside it."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(path, load_external_data=False)
        _check_texts(model)
    except (DecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is no ONNX file ({error})", fix="get the graph, or make it, again") from error
    for tensor in _tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            continue
        entries = {entry.key: entry.value for entry in tensor.external_data}
        place, numbers = entries.get("location", ""), [entries.get(key, "0") for key in ("offset", "length")]
        if place not in files or not all(map(str.isdecimal, numbers)):
            raise UserError(
                f"{path}: tensor {tensor.name!r} lies in {place!r}, which is none of the graph's own files, or nowhere",
                fix="do not use this graph: it was damaged or tampered with; get it, or make it, again",
            )
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, UnicodeDecodeError) as error:  # the latter: its message quotes bytes
        raise UserError(f"{path}: is malformed: {error}", fix="get the graph, or make it, again") from error


def _check_texts(message: Message) -> None:
    """Raises a UnicodeDecodeError for a text that is not UTF-8: protobuf hands out its bytes instead."""
    for field, value in message.ListFields():
        for inner in value if isinstance(value, MutableSequence) else (value,):
            if hasattr(inner, "ListFields"):
                _check_texts(inner)
            elif field.type == field.TYPE_STRING and isinstance(inner, bytes):
                inner.decode()


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from _of_graph(model.graph)
    for function in model.functions:
        yield from _of_nodes(function.node)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    yield from _of_nodes(graph.node)


def _of_nodes(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    for node in nodes:
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors)
            for graph in (attribute.g, *attribute.graphs):
                yield from _of_graph(graph)
