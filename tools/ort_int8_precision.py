"""Prints how exact ONNX Runtime's INT8 matmul is on this CPU, by its own default and with the option we set.

    python tools/ort_int8_precision.py

One layer, 768 → 3072, 512 rows, seeded codes over the full range, against the sums in 64-bit integers. x86 CPUs with
AVX2 and no VNNI add pairs of products in saturating 16 bits by default; elsewhere both rows are exact.
"""

import json

import click
import numpy as np
import onnx
import onnxruntime
import torch
from bench_wide_dit import cpu
from onnx import TensorProto, helper, numpy_helper

from exporter.metrics import sqnr_db

ROWS, INPUTS, OUTPUTS, SCALE = 512, 768, 3072, 0.02


def layer(codes: np.ndarray, scales: np.ndarray) -> bytes:
    """Builds x → Q/DQ → MatMul with INT8 weights."""
    constants = {
        "w": codes,
        "ws": scales,
        "wz": np.zeros(OUTPUTS, np.int8),
        "s": np.float32(SCALE),
        "z": np.int8(0),
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=1),
        helper.make_node("MatMul", ["d", "wd"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUTPUTS])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    made = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(made)
    return made.SerializeToString()


@click.command()
def main() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(-127, 128, (INPUTS, OUTPUTS)).astype(np.int8)
    scales = (rng.random(OUTPUTS) * 0.01 + 0.001).astype(np.float32)
    x = (0.8 * rng.standard_normal((ROWS, INPUTS))).astype(np.float32)
    rounded = np.clip(np.rint(x / np.float32(SCALE)), -128, 127).astype(np.int64)
    exact = (rounded @ codes.astype(np.int64)) * np.float64(np.float32(SCALE)) * scales
    model, found = layer(codes, scales), {}
    for name, value in (("default", "0"), ("session.x64quantprecision = 1", "1")):
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.x64quantprecision", value)
        session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (output,) = session.run(None, {"x": x})
        found[name] = sqnr_db(torch.from_numpy(exact), torch.from_numpy(output))
    click.echo(json.dumps({"cpu": cpu(), "onnxruntime": onnxruntime.__version__, "sqnr_db": found}, indent=1))


if __name__ == "__main__":
    main()
