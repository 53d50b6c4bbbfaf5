"""A bundle of a network of four nodes, made without torch: for what reads bundles, and for what must be refused."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from engines import artifacts, schedule
from engines.artifacts import Request
from engines.bundle import FORMAT_VERSION, KIND
from engines.bundle_shape import GOLDEN
from engines.plans import PLAN

SHAPE = (1, 2, 4)  # of a latent: other sides than 1, so that a wrong broadcast shows
AXES = {"batch": {"min": 1, "opt": 2, "max": 8, "multiple": 1}, "width": {"min": 2, "opt": 4, "max": 8, "multiple": 2}}
TIMESTEPS = [900.0, 500.0, 100.0]
IDENTITY = {"scale_input": 1.0, "x0_latent": 0.0, "x0_prediction": 0.0, "next_x0": 0.0, "next_latent": 1.0}
PORTABLE = {"clip": None, "steps": [{**IDENTITY, "next_prediction": -0.25}] * 3}


def network(step_input=None, dtype="fp32"):
    """Returns sample = hidden_states · 0.5 + class_labels + step, or + step_row's first column."""
    kind = TensorProto.FLOAT if dtype == "fp32" else TensorProto.FLOAT16
    batch = ["batch"]
    inputs = [
        helper.make_tensor_value_info("hidden_states", kind, ["batch", 1, 2, "width"]),
        helper.make_tensor_value_info("timestep", TensorProto.INT64, batch),
        helper.make_tensor_value_info("class_labels", TensorProto.INT64, batch),
    ]
    added, nodes = ["class_labels"], []
    if step_input == "index":
        inputs.append(helper.make_tensor_value_info("step", TensorProto.INT64, batch))
        added.append("step")
    elif step_input == "row":
        inputs.append(helper.make_tensor_value_info(schedule.ROW, TensorProto.FLOAT, ["batch", 2]))
        nodes.append(helper.make_node("ReduceSum", [schedule.ROW, "one"], ["row"], keepdims=0))
        added.append("row")
    nodes.append(helper.make_node("Mul", ["hidden_states", "half"], ["total_0"]))
    for number, name in enumerate(added):
        nodes += [
            helper.make_node("Cast", [name], [f"{name}_float"], to=kind),
            helper.make_node("Reshape", [f"{name}_float", "rows"], [f"{name}_rows"]),
            helper.make_node("Add", [f"total_{number}", f"{name}_rows"], [f"total_{number + 1}"]),
        ]
    nodes.append(helper.make_node("Identity", [f"total_{len(added)}"], ["sample"]))
    constants = [
        helper.make_tensor("half", kind, [1], [0.5]),
        helper.make_tensor("rows", TensorProto.INT64, [4], [-1, 1, 1, 1]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
    ]
    output = helper.make_tensor_value_info("sample", kind, ["batch", 1, 2, "width"])
    graph = helper.make_graph(nodes, "network", inputs, [output], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def expected(feeds):
    """Returns what the network gives."""
    total = feeds["hidden_states"] * np.float32(0.5)
    for name in ("class_labels", "step"):
        if name in feeds:
            total = total + feeds[name].astype(np.float32)[:, None, None, None]
    return total


def feeds(rows=2, step=0, width=4):
    generator = np.random.default_rng(step)
    return {
        "hidden_states": generator.standard_normal((rows, 1, 2, width), dtype=np.float32),
        "timestep": np.full(rows, TIMESTEPS[step], np.int64),
        "class_labels": np.arange(rows, dtype=np.int64),
        "step": np.full(rows, step, np.int64),
    }


def graph_info(step_input=None, dtype="fp32"):
    inputs = [
        {"name": "hidden_states", "dtype": dtype, "shape": ["batch", 1, 2, "width"]},
        {"name": "timestep", "dtype": "int64", "shape": ["batch"]},
        {"name": "class_labels", "dtype": "int64", "shape": ["batch"]},
    ]
    if step_input == "index":
        inputs.append({"name": "step", "dtype": "int64", "shape": ["batch"]})
    elif step_input == "row":
        inputs.append({"name": schedule.ROW, "dtype": "fp32", "shape": ["batch", 2]})
    return {
        "dtype": dtype, "output": "sample", "inputs": inputs, "axes": AXES, "layers": {}, "points": {},
        "timesteps": TIMESTEPS, "fed_timesteps": TIMESTEPS if step_input else None, "step_input": step_input,
        "weights": {"by_format": {}}, "weight_bytes": 0, "module_bytes": {},
    }  # fmt: skip


def engine_entry(step_input=None, **changes):
    entry = {
        "folder": "engines/ort", "file": "model.onnx", "backend": "ort", "gpu": None, "dtype": "fp32", "decode": "run",
        "refit": False, "weight_streaming": None, "digest": "e" * 64, "versions": {}, "weight_bytes": 0,
        "resident_weight_bytes": 0, "step_input": step_input,
        "session": {
            "disabled_optimizers": [], "config": {}, "config_if_sums_saturate": {}, "config_if_shared": {},
            "codebook_ops": False,
        },
    }  # fmt: skip
    return entry | changes


def info(step_input=None, guided=False):
    inputs = [{**entry, "means": entry["name"]} for entry in graph_info()["inputs"]]
    inputs[0]["dtype"] = "float"
    inputs[2]["largest"] = 99
    if step_input:
        inputs.append({"name": "step", "dtype": "int64", "shape": ["batch"], "means": "position in the schedule"})
    return {
        "format_version": FORMAT_VERSION,
        "model": {"name": "tiny", "class": "DiTTransformer2DModel", "config": {}, "parameters": 0},
        "recipe": {"name": "none", "digest": "d" * 64, "methods": []},
        "inputs": inputs,
        "output": {"name": "sample", "dtype": "float", "shape": ["batch", 1, 2, "width"]},
        "axes": AXES,
        "sampler": {
            "scheduler": {}, "steps": 3, "guidance_scale": 2.0 if guided else 1.0, "guided": guided,
            "latent": {"input": "hidden_states", "shape": list(SHAPE), "init_noise_sigma": 1.0, "pixels": True},
            "schedule": TIMESTEPS, "timesteps": TIMESTEPS, "portable": PORTABLE, "why_not_portable": None,
        },
        "engines": {"ort": engine_entry(step_input)},
        "graphs": {"fp32": {"folder": "engines/ort", "digest": "a" * 64, "info": graph_info(step_input)}},
        "golden": {"steps": [0, 2], "limits_db": {"fp32": {"0": 100.0, "2": 100.0}}, "picture": None},
        "pipeline": None,
        "checks": [],
        "scores": {},
    }  # fmt: skip


def tiny_bundle(folder, *, step_input=None, guided=False, edit=None, files=None):
    """Writes a whole bundle; `edit` may change its info before it is sealed, `files` are added."""
    with artifacts.drafting(folder, Request(KIND, {}, {}, {})) as draft:
        draft.timed = False
        draft.info = info(step_input, guided)
        place = draft.path / "engines/ort"
        place.mkdir(parents=True)
        onnx.save(network(step_input), place / "model.onnx")
        (place / PLAN).write_text("[]")
        if step_input:
            np.save(place / schedule.FILE, np.arange(3, dtype=np.float32)[:, None] * np.array([[1.0, 0.0]], np.float32))
        save_file(golden(step_input), draft.path / GOLDEN)
        for name, content in (files or {}).items():
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            (draft.path / name).write_bytes(content)
        if edit is not None:
            edit(draft.info)
    return folder


def golden(step_input=None):
    found = {}
    for step in (0, 2):
        fed = feeds(4, step)
        found |= {f"{step}/feeds/{name}": value for name, value in fed.items()}
        seen = fed if step_input else {name: value for name, value in fed.items() if name != "step"}
        found[f"{step}/expected"] = expected(seen)
    return found
