"""Bundles for the C++ library's tests: good ones, and those that must be refused, with what is to be said of them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import zipfile

import bundles
import numpy as np
import onnx
from onnx import TensorProto, helper
from safetensors.numpy import save

from engines import artifacts
from engines.bundle import FORMAT_VERSION
from engines.bundle_shape import GOLDEN
from engines.zipped import DIGEST_CHARACTERS, MARK, digest_of_zip, pack

MODEL = "engines/ort/model.onnx"


def good(root):
    """Writes what engines/cpp/tests/test_bundles.cpp opens."""
    bundles.tiny_bundle(root / "tiny")
    pack(root / "tiny", root / "tiny.zip")
    for step_input in ("index", "row"):
        bundles.tiny_bundle(root / step_input, step_input=step_input)
    bundles.tiny_bundle(root / "guided", guided=True)
    bundles.tiny_bundle(root / "foreign", edit=foreign)
    bundles.tiny_bundle(root / "worse", files={GOLDEN: save({n: v + 1 for n, v in bundles.golden().items()})})
    no_rows = {name: array[:0] for name, array in bundles.golden().items()}
    bundles.tiny_bundle(root / "no_rows", files={GOLDEN: save(no_rows)})
    half = bundles.network(dtype="fp16").SerializeToString()
    bundles.tiny_bundle(root / "half", edit=with_half, files={"engines/half/model.onnx": half})
    parts = {"text_encoder/fp32/model.onnx": text_encoder(), "vae_decoder/fp32/model.onnx": decoder()}
    parts["tokenizer/tokenizer.json"] = b"{}"
    recorded, zeros = pictures(), pictures(nothing=0)
    others = recorded | {"picture/picture": recorded["picture/picture"] + 1}
    bundles.tiny_bundle(root / "pipeline", guided=True, edit=with_pipeline, files=parts | {GOLDEN: save(recorded)})
    bundles.tiny_bundle(root / "other_pictures", guided=True, edit=with_pipeline, files=parts | {GOLDEN: save(others)})
    parts[GOLDEN] = save(zeros)
    bundles.tiny_bundle(root / "zeros", guided=True, edit=lambda info: with_pipeline(info, "zeros"), files=parts)
    bundles.tiny_bundle(root / "table", files={MODEL: with_table()})


def with_table():
    """Returns the network with a table of ten labels, beyond which it takes none."""
    model = bundles.network()
    model.graph.initializer.append(helper.make_tensor("table", TensorProto.INT64, [10], range(10)))
    model.graph.node.insert(0, helper.make_node("Gather", ["table", "class_labels"], ["label"]))
    next(node for node in model.graph.node if node.op_type == "Cast").input[0] = "label"
    return model.SerializeToString()


def pictures(nothing=1):
    """Returns what a pipeline's bundle has recorded: two captions that begin with 3 and 5, and the empty one."""
    noise = np.random.default_rng(0).standard_normal((2, *bundles.SHAPE), dtype=np.float32)
    wanted, unwanted = np.array([3, 5]), np.full(2, nothing)
    latent = noise
    for _ in range(3):
        half, other = latent * np.float32(0.5) + wanted[:, None, None, None], latent * np.float32(0.5) + nothing
        latent = (latent - 0.25 * (other + 2 * (half - other))).astype(np.float32)
    return bundles.golden() | {
        "picture/noise": noise, "picture/latent": latent, "picture/wanted/class_labels": wanted,
        "picture/unwanted/class_labels": unwanted, "picture/input_ids": np.array([[3, 2, 0], [5, 2, 0]]),
        "picture/unwanted_input_ids": np.array([[1, 2, 0]] * 2), "picture/picture": (latent / 64 + 0.25).clip(-1, 1),
    }  # fmt: skip


def foreign(info):
    info["sampler"] |= {"portable": None, "why_not_portable": "UniPC is none of ours"}


def with_half(info):
    info["engines"]["half"] = bundles.engine_entry(folder="engines/half", dtype="fp16")
    info["graphs"]["fp16"] = {"folder": "engines/half", "digest": "b" * 64, "info": bundles.graph_info(dtype="fp16")}
    info["golden"]["limits_db"]["fp16"] = {"0": 40.0, "2": 40.0}


def with_pipeline(info, unwanted="caption"):
    info["pipeline"] = {
        "text": {
            "tokenizer": "tokenizer/tokenizer.json", "tokens": 3, "pad": 0, "bos": 1, "eos": 2, "input": "input_ids",
            "more": [], "encoders": {"fp32": "text_encoder/fp32/model.onnx"}, "outputs": {"first": "class_labels"},
            "unwanted": unwanted, "limits_db": {"fp32": 60.0},
        },
        "constants": {},
        "vae": {
            "decoders": {"fp32": "vae_decoder/fp32/model.onnx"}, "input": "latent", "output": "picture",
            "scaling_factor": 64.0, "shift_factor": 0.25, "limits_db": {"fp32": 60.0},
        },
    }  # fmt: skip
    info["golden"]["picture"] = {"runner": "ort", "count": 2, "limits_db": {"fp32": 60.0}, "peak": 2.0}


def _model(node, inputs, outputs, constants):
    graph = helper.make_graph([node], "part", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()


def text_encoder():
    """Returns a graph that gives each caption's first token."""
    return _model(
        helper.make_node("Gather", ["input_ids", "zero"], ["first"], axis=1),
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", 3])],
        [helper.make_tensor_value_info("first", TensorProto.INT64, ["batch"])],
        [helper.make_tensor("zero", TensorProto.INT64, [], [0])],
    )


def decoder():
    """Returns a graph that gives what it is given."""
    shape = ["batch", 1, 2, "width"]
    return _model(
        helper.make_node("Identity", ["latent"], ["picture"]),
        [helper.make_tensor_value_info("latent", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("picture", TensorProto.FLOAT, shape)],
        [],
    )


def codebook_bundle(folder):
    """Writes a bundle of one layer of 2-bit weights, as an engine holds it."""
    from bench_codebook_kernel import layer_graph, random_weight

    from engines.backends import _codebooks
    from exporter.formats.codebook import Format

    outputs, inputs, rows = 37, 64, 7
    codes, table, _ = random_weight(outputs, inputs, Format(4, 256))
    graph = folder.with_suffix(".onnx")
    onnx.save(layer_graph(codes, table), graph)
    x = np.random.default_rng(0).standard_normal((rows, inputs), dtype=np.float32)

    def one_layer(info):
        info["inputs"] = [{"name": "x", "dtype": "float", "shape": ["batch", inputs], "means": "anything"}]
        info["output"] = {"name": "y_0", "dtype": "float", "shape": ["batch", outputs]}
        info["axes"] = {"batch": {"min": 1, "opt": rows, "max": rows, "multiple": 1}}
        info["sampler"]["latent"]["input"] = "x"
        graph = {"inputs": [{"name": "x", "dtype": "fp32", "shape": ["batch", inputs]}], "output": "y_0"}
        info["graphs"]["fp32"]["info"] |= graph
        info["engines"]["ort"]["session"]["codebook_ops"] = True
        info["golden"] = {"steps": [0], "limits_db": {"fp32": {"0": 0.0}}, "picture": None}

    golden = save({"0/feeds/x": x, "0/expected": np.zeros((rows, outputs), np.float32)})
    files = {MODEL: _codebooks.rewrite(graph, "run").SerializeToString(), GOLDEN: golden}
    return bundles.tiny_bundle(folder, edit=one_layer, files=files)


def bad(root):
    """Writes what must be refused, bundles and what is none; returns the names, which are those of TOLD."""
    for name, (change, _) in CHANGED.items():
        change(bundles.tiny_bundle(root / name))
    for name, (change, _) in RESIGNED.items():
        resign(bundles.tiny_bundle(root / name), change)
    for name, (entries, _) in ZIPPED.items():
        zipped(root / name, entries)
    pack(bundles.tiny_bundle(root / "whole"), root / "cut.zip")
    (root / "cut.zip").write_bytes((root / "cut.zip").read_bytes()[:-1])
    bundles.tiny_bundle(root / "outside", files={MODEL: outside()})
    bundles.tiny_bundle(root / "no_tokenizer", guided=True, edit=with_pipeline)
    return TOLD


def outside():
    """Returns a graph whose constant lies in a file elsewhere."""
    model = bundles.network()
    tensor = model.graph.initializer[0]
    tensor.raw_data = bytes(4)
    onnx.external_data_helper.set_external_data(tensor, "../../../../etc/passwd")
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    return model.SerializeToString()


def resign(folder, change):
    """Changes a manifest and gives it the digest that fits, as someone who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    artifacts.seal(folder / "manifest.json", manifest)


def zipped(path, entries):
    """Writes a zip of our kind with the entries as given."""
    with zipfile.ZipFile(path, "w") as archive:
        for entry, content in entries:
            archive.writestr(entry, content)
        archive.comment = MARK + b"0" * DIGEST_CHARACTERS
    path.write_bytes(path.read_bytes()[:-DIGEST_CHARACTERS] + digest_of_zip(path).encode())


def _link(folder):
    shutil.move(folder / MODEL, folder.with_suffix(".onnx"))
    (folder / MODEL).symlink_to(folder.with_suffix(".onnx"))


def _move_file(name):
    return lambda manifest: manifest["files"].update({name: manifest["files"].pop(MODEL)})


def _info(**changes):
    return lambda manifest: manifest["info"].update(changes)


def _engine(**changes):
    return lambda manifest: manifest["info"]["engines"]["ort"].update(changes)


def _entry(name, mode=stat.S_IFREG | 0o644, packed=False):
    entry = zipfile.ZipInfo(name)
    entry.external_attr = mode << 16
    entry.compress_type = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    return entry


CHANGED = {
    "unlisted": (lambda folder: (folder / "engines/extra.so").write_bytes(b"\x7fELF"), "'engines/extra.so', which its"),
    "lacking": (lambda folder: (folder / MODEL).unlink(), f"its file '{MODEL}' is missing"),
    "longer": (lambda folder: (folder / GOLDEN).open("ab").write(b"\0"), "bytes, its manifest says"),
    "link": (_link, "is a link"),
    "pipe": (lambda folder: os.mkfifo(folder / "pipe"), "no regular file"),
    "no_manifest": (lambda folder: (folder / "manifest.json").unlink(), "no_manifest: not a bundle (no manifest.json)"),
    "no_json": (lambda folder: (folder / "manifest.json").write_bytes(b"{"), "not valid JSON, at byte 2"),
}
RESIGNED = {
    "newer": (_info(format_version=FORMAT_VERSION + 1), f"format version {FORMAT_VERSION + 1}; this library reads"),
    "other_kind": (lambda manifest: manifest.update(kind="engine"), "of kind 'engine', where a bundle is wanted"),
    "dots": (_move_file("../model.onnx"), "'../model.onnx' leaves the folder"),
    "absolute": (_move_file("/etc/passwd"), "'/etc/passwd' leaves the folder"),
    "folder_of_dots": (_engine(folder=".."), "'..' leaves the folder"),
    "no_engine_file": (_engine(file="engine.plan"), "'engines/ort/engine.plan', which it does not list"),
    "no_sampler_key": (lambda manifest: manifest["info"].pop("sampler"), "info: lacks 'sampler'"),
    "axis": (lambda manifest: manifest["info"]["axes"].pop("width"), "info.axes: lacks 'width'"),
    "fewer_timesteps": (lambda m: m["info"]["sampler"].update(timesteps=[1.0]), "not as many as its steps"),
    "step_input": (_engine(step_input="row"), "lists no file 'engines/ort/step_table.npy'"),
    "inputs": (_info(inputs={}), "info.inputs: not a list"),
    "session_entry": (
        lambda m: m["info"]["engines"]["ort"]["session"]["config"].update(
            {"session.collect_node_memory_stats_to_file": "/tmp/export-engine-was-here"}
        ),
        "'session.collect_node_memory_stats_to_file' is nothing that engines are recorded with",
    ),
    "wide_timestep": (
        lambda m: next(one for one in m["info"]["inputs"] if one["name"] == "timestep").update(shape=["batch", 4096]),
        "shape: not one number for each row",
    ),
    "no_golden_steps": (
        lambda m: m["info"]["golden"].update(steps=[]),
        "golden.steps: not a list of steps: an engine would be tested on none",
    ),
    "huge": (lambda m: m["info"]["sampler"]["latent"].update(shape=[2**40]), "latent.shape[0]: not a whole number"),
}
MANIFEST = ("manifest.json", b"{}")
ZIPPED = {
    "dots.zip": ([MANIFEST, ("../out", b"x")], "'../out' leaves the folder"),
    "absolute.zip": ([MANIFEST, ("/tmp/out", b"x")], "'/tmp/out' leaves the folder"),
    "link.zip": ([MANIFEST, (_entry("link", stat.S_IFLNK | 0o777), b"/etc/passwd")], "no plain file"),
    "folder.zip": ([MANIFEST, ("folder/", b"")], "'folder/' leaves the folder"),
    "packed.zip": ([MANIFEST, (_entry("zeros", packed=True), bytes(1 << 20))], "'zeros' is packed"),
    "nothing.zip": ([MANIFEST], "nothing.zip/manifest.json: lacks 'kind'"),
}
OTHERS = {
    "no_tokenizer": "names the file 'tokenizer/tokenizer.json', which it does not list",
    "missing": "missing: cannot be opened",
    "cut.zip": "no zip that `export-engine bundle` wrote",
    "outside": "'../../../../etc/passwd' leaves the folder",
}
TOLD = OTHERS | {name: told for group in (CHANGED, RESIGNED, ZIPPED) for name, (_, told) in group.items()}
