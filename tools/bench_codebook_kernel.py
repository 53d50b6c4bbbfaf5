"""Times one looked-up layer in ONNX Runtime: native kernel, run-time Gather path, dense weight; and weighs it.

    python tools/bench_codebook_kernel.py --out out/codebook_kernel.json

All run in turn in one process, so that ratios hold while the machine drifts: a ratio is the median over rounds of the
Gather path's time over the other's in the same round. Memory is what a layer adds to the resident set of a process that
opens and runs graphs of many such layers. Exit code 3 where a bar is missed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import click
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

from engines import native
from engines.backends import _codebooks, ort
from exporter import progress
from exporter.formats.codebook import Format
from exporter.lower.trace import IR_VERSION, OPSET
from exporter.ops import codebook
from exporter.tensors import pack

INFO = {"dtype": "fp32", "layers": {}, "points": {}}  # what a session asks of a graph's manifest
PATHS = ("native", "gather", "dense")
ROUND_MS = 40.0  # of each path, in each of the rounds
AT_LEAST = {1: 4.0, 1024: 1.15}  # rows → times as fast as the Gather path: what was promised for 256 × 4
MEMORY = 0.2  # of dense fp16, at most: likewise
LAYERS = (2, 18)  # of the graphs whose resident sets are compared


def random_weight(
    outputs: int, inputs: int, fmt: Format, seed: int = 0
) -> tuple[onnx.TensorProto, onnx.TensorProto, torch.Tensor]:
    """Returns codes and codebook as a graph holds them, and the weight [outputs, inputs] they stand for."""
    generator = torch.Generator().manual_seed(seed)
    count = inputs // fmt.vector_size
    codes = torch.randint(fmt.codebook_size, (outputs, count), generator=generator, dtype=torch.uint8)
    words = torch.randn(fmt.codebook_size, fmt.vector_size, generator=generator).half().float()
    shape = (outputs, count // 2, 3) if fmt.bits == 6 else (outputs, count)
    raw = pack(codes, fmt).numpy().tobytes()
    stored = TensorProto(name="codes", data_type=TensorProto.DataType.Value(fmt.onnx_type), dims=shape, raw_data=raw)
    table = words if fmt.bits == 6 else codebook.codebook_of(words, fmt.onnx_type)
    return stored, numpy_helper.from_array(table.numpy(), "codebook"), words[codes.int()].flatten(1)


def layer_graph(
    codes: onnx.TensorProto, table: onnx.TensorProto, scale: np.ndarray | None = None, copies: int = 1, rank: int = 2
) -> onnx.ModelProto:
    """Returns x [..., inputs] times the weight's transpose, as `lower` writes it, `copies` times over: y_0, y_1 …"""
    overload = "vectors6" if len(codes.dims) == 3 else "vectors"
    constants, nodes = [], []
    for i in range(copies):
        for tensor in (codes, table):
            constants.append(onnx.TensorProto())
            constants[-1].CopyFrom(tensor)
            constants[-1].name = f"{tensor.name}_{i}"
        names = [f"codes_{i}", f"codebook_{i}"]
        attributes = {"vector_size": table.dims[1], "bits": table.dims[0].bit_length() - 1, "overload": overload}
        path = {"name": f"{i}/{codebook.NAME}", "domain": codebook.DOMAIN}
        nodes.append(helper.make_node(codebook.NAME, names, [f"weight_{i}"], **path, **attributes))
        weight = f"weight_{i}"
        if scale is not None:
            nodes.append(helper.make_node("Reshape", ["scale", "column"], [f"scale_{i}"], name=f"{i}/Reshape"))
            nodes.append(helper.make_node("Mul", [weight, f"scale_{i}"], [f"scaled_{i}"], name=f"{i}/Mul"))
            weight = f"scaled_{i}"
        nodes.append(helper.make_node("Transpose", [weight], [f"turned_{i}"], perm=[1, 0], name=f"{i}/Transpose"))
        nodes.append(helper.make_node("MatMul", ["x", f"turned_{i}"], [f"y_{i}"], name=f"{i}/MatMul"))
    if scale is not None:
        constants += [numpy_helper.from_array(scale, "scale"), numpy_helper.from_array(np.array([-1, 1]), "column")]
    return _model(nodes, constants, copies, rank, [ir.to_proto(codebook.function(OPSET, overload))])


def _model(
    nodes: Sequence[onnx.NodeProto],
    constants: Sequence[onnx.TensorProto],
    copies: int,
    rank: int,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    ends = ["x", *(f"y_{i}" for i in range(copies))]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [f"{n}_{d}" for d in range(rank)]) for n in ends]
    graph = helper.make_graph(nodes, "layers", values[:1], values[1:], constants)
    versions = [helper.make_opsetid("", OPSET), helper.make_opsetid(codebook.DOMAIN, codebook.VERSION)]
    return helper.make_model(graph, opset_imports=versions, functions=functions, ir_version=IR_VERSION)


def write_graphs(folder: Path, outputs: int, inputs: int, fmt: Format, copies: int) -> None:
    """Writes `<path>-<copies>.onnx` for every path."""
    codes, table, weight = random_weight(outputs, inputs, fmt)
    gather = folder / f"gather-{copies}.onnx"
    onnx.save(layer_graph(codes, table, copies=copies), gather)
    fused = _codebooks.rewrite(gather, "run")
    assert fused is not None
    onnx.save(fused, folder / f"native-{copies}.onnx")
    dense = [numpy_helper.from_array(weight.T.contiguous().numpy(), f"weight_{i}") for i in range(copies)]
    nodes = [helper.make_node("MatMul", ["x", f"weight_{i}"], [f"y_{i}"]) for i in range(copies)]
    onnx.save(_model(nodes, dense, copies, 2), folder / f"dense-{copies}.onnx")


def opened(folder: Path, path: str, copies: int, threads: int) -> onnxruntime.InferenceSession:
    """Opens a path's graph; the Gather path is that of an install without the library."""
    options = ort.session_options(INFO, threads)
    if path == "native":
        options.register_custom_ops_library(str(native.library()))
    return onnxruntime.InferenceSession(folder / f"{path}-{copies}.onnx", options, providers=["CPUExecutionProvider"])


def times_ms(
    sessions: dict[str, onnxruntime.InferenceSession], x: np.ndarray, outputs: int, rounds: int
) -> dict[str, list[float]]:
    """Returns each path's mean time in every round; the output's memory is there already, as inside a network."""
    found: dict[str, list[float]] = {name: [] for name in sessions}
    y = onnxruntime.OrtValue.ortvalue_from_shape_and_type([len(x), outputs], np.float32)
    bindings = {name: session.io_binding() for name, session in sessions.items()}
    for binding in bindings.values():
        binding.bind_cpu_input("x", x)
        binding.bind_ortvalue_output("y_0", y)
    for turn in range(rounds + 1):  # the first is to warm up
        for name, session in sessions.items():
            started, calls = time.perf_counter(), 0
            while not calls or (time.perf_counter() - started) * 1e3 < ROUND_MS:
                session.run_with_iobinding(bindings[name])
                calls += 1
            if turn:
                found[name].append((time.perf_counter() - started) * 1e3 / calls)
    return found


def resident_bytes(folder: Path, path: str, inputs: int, threads: int) -> float:
    """Returns what a layer adds to a process of its own that opens and runs a graph."""
    sizes = []
    for copies in LAYERS:
        command = [sys.executable, __file__, "--resident", f"{folder}:{path}:{copies}:{inputs}:{threads}"]
        sizes.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    return (sizes[1] - sizes[0]) / (LAYERS[1] - LAYERS[0])


def _print_resident(what: str) -> None:
    folder, path, copies, inputs, threads = what.split(":")
    session = opened(Path(folder), path, int(copies), int(threads))
    session.run(None, {"x": np.zeros((1, int(inputs)), np.float32)})
    text = Path("/proc/self/status").read_text()
    click.echo(1024 * next(int(line.split()[1]) for line in text.splitlines() if line.startswith("VmRSS")))


@click.command()
@click.option("--rows", multiple=True, type=int, default=(1, 8, 64, 1024), show_default=True)
@click.option("--outputs", default=4608, show_default=True)
@click.option("--inputs", default=1152, show_default=True)
@click.option("--vector-size", default=4, show_default=True)
@click.option("--codebook-size", default=256, show_default=True)
@click.option("--threads", default=2, show_default=True)
@click.option("--rounds", default=15, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the figures there, as JSON.")
@click.option("--resident", hidden=True)
def main(
    rows: tuple[int, ...],
    outputs: int,
    inputs: int,
    vector_size: int,
    codebook_size: int,
    threads: int,
    rounds: int,
    out: Path | None,
    resident: str | None,
) -> None:
    if resident:
        return _print_resident(resident)
    if native.library() is None:
        raise click.ClickException(f"no native kernels: {native.why_not()}")
    fmt = Format(vector_size, codebook_size)
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for copies in (1, *LAYERS):
            write_graphs(folder, outputs, inputs, fmt, copies)
        sessions = {path: opened(folder, path, 1, threads) for path in PATHS}
        for count in rows:
            x = np.random.default_rng(count).standard_normal((count, inputs), np.float32)
            times = times_ms(sessions, x, outputs, rounds)
            faster = {p: median(g / t for g, t in zip(times["gather"], times[p], strict=True)) for p in PATHS}
            found.append({"rows": count, "ms": {p: median(t) for p, t in times.items()}, "times_as_fast": faster})
        bytes_of = {path: resident_bytes(folder, path, inputs, threads) for path in PATHS}
    memory = {path: size / (2 * outputs * inputs) for path, size in bytes_of.items()}
    report(fmt, outputs, inputs, threads, found, memory)
    missed = [f"{count} rows" for count, least in AT_LEAST.items() for row in found if slower(row, count, least)]
    missed += ["memory"] if memory["native"] > MEMORY else []
    if out:
        layer = {"outputs": outputs, "inputs": inputs, "vector_size": vector_size, "codebook_size": codebook_size}
        content = {"layer": layer, "threads": threads, "cores": os.cpu_count(), "rounds": rounds, "times": found}
        content |= {"resident_of_dense_fp16": memory, "at_least": AT_LEAST, "memory_at_most": MEMORY, "missed": missed}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(content, indent=1) + "\n")
    if missed and (vector_size, codebook_size) == (4, 256):  # what the bars are of
        click.echo(f"missed: {', '.join(missed)}", err=True)
        sys.exit(3)
    return None


def slower(row: dict, rows: int, least: float) -> bool:
    return row["rows"] == rows and row["times_as_fast"]["native"] < least


def report(fmt: Format, outputs: int, inputs: int, threads: int, found: Sequence[dict], memory: dict) -> None:
    title = f"{outputs} × {inputs}, codebook {fmt.codebook_size} × {fmt.vector_size}, {threads} threads"
    table = Table(title=f"{title}: ms (times as fast as the Gather path)")
    for header in ("rows", *PATHS, "promised"):
        table.add_column(header, justify="right")
    for row in found:
        cells = [f"{row['ms'][path]:.2f} ({row['times_as_fast'][path]:.2f})" for path in PATHS]
        table.add_row(str(row["rows"]), *cells, str(AT_LEAST.get(row["rows"], "")))
    cells = [f"{memory[path]:.3f}" for path in PATHS]
    table.add_row("memory, of dense fp16", *cells, f"≤ {MEMORY}")
    progress.stdout().print(table)


if __name__ == "__main__":
    main()
