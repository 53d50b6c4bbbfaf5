"""A bundle's engines as a model repository of NVIDIA's Triton Inference Server. docs/triton.md says what is in it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines import artifacts, golden, native, schedule
from engines.artifacts import Artifact, Json, Request
from engines.backends import ort
from engines.bundle import Bundle
from engines.errors import UserError
from engines.loading import Engine
from engines.plans import PLAN
from exporter import progress
from exporter.versions import versions

if TYPE_CHECKING:
    import onnxruntime

KIND = "triton"
VERSION, CONFIG, WARMUP = "1", "config.pbtxt", "warmup"  # Triton's own names
MODEL = "model.onnx"
BACKENDS = {"ort": "onnxruntime", "trt": "tensorrt"}  # Triton's, by ours
TYPES = {"fp32": "TYPE_FP32", "fp16": "TYPE_FP16", "int64": "TYPE_INT64"}
NUMPY = {"fp32": "<f4", "fp16": "<f2", "int64": "<i8"}
WHY_LEFT_OUT = "Triton's TensorRT backend loads no plan of TensorRT-RTX, which is another library"


def triton(bundle: Bundle, out: Path, *, native_ops: str | None = None) -> Artifact:
    """Writes a model of every engine that Triton serves; notes on each go into `info`.

    `native_ops` is where the server will find the library of codebook kernels; without it graphs' own bodies run.
    """
    entries = bundle.info["engines"]
    served = [name for name, entry in entries.items() if entry["backend"] in BACKENDS]
    if not served:
        raise UserError(
            f"{_title(bundle)}: Triton serves none of its engines ({', '.join(entries)}): {WHY_LEFT_OUT}",
            fix="build one for it: export-engine build … --backend ort, and add it with --engine",
        )
    if native_ops is not None:
        _check_ops(bundle, served)
    request = Request(KIND, {"bundle": bundle.artifact.digest}, {"ops": native_ops}, versions() | ort.fingerprint())
    if (made := artifacts.current(out, request)) is not None:
        return made
    with artifacts.drafting(out, request) as draft:
        draft.timed = False
        models = {_model_name(bundle, name): _place(bundle, name, draft.path, native_ops) for name in served}
        draft.info = {"models": models, "left_out": {n: WHY_LEFT_OUT for n in entries if n not in served}}
    return artifacts.open_artifact(out, KIND)


def _check_ops(bundle: Bundle, served: Sequence[str]) -> None:
    if native.library() is None:
        raise UserError(f"there are no native kernels to serve with: {native.why_not()}", fix="leave out --triton-ops")
    if not any(_looks_up(bundle.engine(name)) for name in served):
        raise UserError(f"{_title(bundle)}: none of its engines looks codebooks up", fix="leave out --triton-ops")


def _looks_up(engine: Artifact) -> bool:
    return bool((engine.info["session"] or {}).get("codebook_ops"))


def tell(made: Artifact) -> None:
    """Prints what whoever serves these models should know."""
    for name, reason in made.info["left_out"].items():
        progress.note(f"note: {name} is not served: {reason}")
    for name, model in made.info["models"].items():
        for line in model["notes"]:
            progress.note(f"note: {name}: {line}")


def _title(bundle: Bundle) -> str:
    return " ".join(f"{bundle.info['model']['name']}, recipe {bundle.info['recipe']['name']}".split())


def _model_name(bundle: Bundle, engine: str) -> str:
    """Returns a name for a folder and for URLs."""
    model, recipe = Path(bundle.info["model"]["name"]).name, bundle.info["recipe"]["name"]
    return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{model}-{recipe}-{engine}").strip("-.")


def _place(bundle: Bundle, name: str, root: Path, native_ops: str | None) -> Json:
    """Writes one engine's folder, and returns what its manifest says of it."""
    engine, model = bundle.engine(name), _model_name(bundle, name)
    folder = root / model
    (folder / VERSION).mkdir(parents=True)
    ops = native_ops if _looks_up(engine) else None
    plan = engine.info["backend"] == "trt"
    said = _place_plan(engine, folder) if plan else _place_onnx(bundle, name, folder, ops)
    said["notes"] += _notes(bundle, engine)
    if engine.info["step_input"] == "row":
        shutil.copyfile(engine.file(schedule.FILE), folder / schedule.FILE)
    batched = _batched(bundle)
    settings = {
        "title": f"{_title(bundle)}, {name}",
        "name": model,
        "backend": BACKENDS[engine.info["backend"]],
        "max_batch": bundle.info["axes"]["batch"]["max"] if batched else 0,
        "tensors": _tensors(bundle, engine, batched),
        "stepped": engine.info["step_input"] is not None,
        "warmup": _write_warmup(bundle, engine, folder / WARMUP, batched),
        "native": ops,
        **said,
    }
    (folder / CONFIG).write_text(_render(settings), encoding="utf-8")
    return {"engine": name, "digest": engine.digest, "notes": said["notes"]}


def _batched(bundle: Bundle) -> bool:
    """Whether any number of rows up to the most may run together, so that Triton may choose it."""
    batch = bundle.info["axes"]["batch"]
    return bool(batch["min"] == 1 and batch["multiple"] == 1)


def _place_plan(engine: Artifact, folder: Path) -> Json:
    ort.link_or_copy(engine.file(engine.info["file"]), folder / VERSION / "model.plan")
    built_with = ", ".join(f"{k} {v}" for k, v in engine.info["versions"].items() if k != "export_engine")
    notes = [f"The plan runs on {engine.info['gpu']} alone, in a server that has {built_with}; it was not run here."]
    return {"instances": "KIND_GPU", "notes": notes}


def _place_onnx(bundle: Bundle, name: str, folder: Path, ops: str | None) -> Json:
    """Writes model.onnx such that a session as Triton opens it computes what the graph says, which is then checked.

    Triton's backend sets neither optimizers that stay off nor these config entries: a graph that needs them is
    optimized under them here, and is served as it then is.
    Source: triton-inference-server/onnxruntime_backend, src/onnxruntime.cc, of June 2026.
    """
    engine, target = bundle.engine(name), folder / VERSION / MODEL
    library = native.library() if ops else None
    if optimized := bool(engine.info["session"]["disabled_optimizers"]):
        _optimize(engine, target, library)
    else:
        for file in (n for n in engine.files() if n not in (PLAN, schedule.FILE)):
            ort.link_or_copy(engine.file(file), target.parent / file)
    if library is not None:
        shutil.copyfile(library, folder / library.name)
    _check(bundle, name, _open_as_triton(target, optimized, library))
    notes = [f"The server must find this folder's {library.name} at {ops}."] if library else []
    if optimized:
        notes.append(f"Written by ONNX Runtime {ort.fingerprint()['onnxruntime']}: the server's should be no older.")
    if optimized and not ort.sums_saturate() and _multiplies_integers(target):
        notes.append(
            "Served on an x86 CPU, it needs one with VNNI: on others INT8 sums saturate; for those, write it on one."
        )
    return {"instances": "KIND_CPU", "optimized": optimized, "notes": notes}


def _optimize(engine: Artifact, target: Path, library: Path | None) -> None:
    """Writes the graph as ONNX Runtime runs it, but for the layouts of this CPU's own vector width."""
    import onnxruntime

    options = ort.session_options(engine.info["graph"])
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    ort.dump_to(options, target)
    _open(engine.file(MODEL), options, library, engine.info["session"]["disabled_optimizers"])


def _open_as_triton(model: Path, optimized: bool, library: Path | None) -> onnxruntime.InferenceSession:
    """Opens a session under what config.pbtxt can say, and nothing else."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return _open(model, options, library)


def _open(
    model: Path, options: onnxruntime.SessionOptions, library: Path | None, disabled: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    import onnxruntime

    options.log_severity_level = 3
    if library is not None:
        options.register_custom_ops_library(str(library))
    try:
        return onnxruntime.InferenceSession(
            str(model), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except Exception as error:
        raise UserError(
            f"ONNX Runtime cannot open {model.name} as Triton would: {error}", fix="serve it by engines.load instead"
        ) from error


def _check(bundle: Bundle, name: str, session: onnxruntime.InferenceSession) -> None:
    """Runs what the bundle has recorded; a session that is off is refused."""
    artifact = bundle.engine(name)
    runner = schedule.with_steps(ort.OrtRunner(session), artifact.info["graph"], artifact)
    rows = golden.step_rows(Engine(bundle, name, artifact, runner=runner), bundle)
    if wrong := [row for row in rows if not row["passed"]]:
        raise UserError(
            f"{_title(bundle)}: engine {name!r}, opened as Triton opens it, is off: {golden.line(wrong[0])}",
            fix="serve it by engines.load instead: Triton cannot set what this graph needs",
        )


def _multiplies_integers(model: Path) -> bool:
    import onnx

    nodes = onnx.load(model, load_external_data=False).graph.node
    return any(node.op_type.lower() in ort.INTEGER for node in nodes)


def _notes(bundle: Bundle, engine: Artifact) -> list[str]:
    """Returns what holds for the engine whatever serves it, and Triton cannot check."""
    notes = []
    if engine.info["step_input"] == "row":
        notes.append(f"{schedule.ROW} is fed row `step` of {schedule.FILE}, which lies beside the config.")
    elif engine.info["step_input"] == "index":
        notes.append("step is each row's position in the sampler's schedule; Triton does not check it.")
    for axis, sizes in bundle.info["axes"].items():
        if axis != "batch" or not _batched(bundle):
            multiple = f" in multiples of {sizes['multiple']}" if sizes["multiple"] > 1 else ""
            notes.append(f"{axis}: {sizes['min']} … {sizes['max']}{multiple}; Triton does not check it.")
    return notes


def _tensors(bundle: Bundle, engine: Artifact, batched: bool) -> list[tuple[str, Json]]:
    graph, output = engine.info["graph"], bundle.info["output"]
    inputs = [("input", _tensor(entry["name"], entry["dtype"], entry["shape"], batched)) for entry in graph["inputs"]]
    return [*inputs, ("output", _tensor(graph["output"], graph["dtype"], output["shape"], batched))]


def _tensor(name: str, dtype: str, shape: Sequence[int | str], batched: bool) -> Json:
    """Returns what the config says of a tensor [batch, …]: without the batch, but at least one dimension."""
    dims = [size if isinstance(size, int) else -1 for size in shape[batched:]]
    return {"name": name, "type": TYPES[dtype], "dims": dims or [1], "scalar": not dims}


def _write_warmup(bundle: Bundle, engine: Artifact, folder: Path, batched: bool) -> Json:
    """Writes recorded rows of the first step as Triton reads them: one, which it repeats, or as few as may run."""
    folder.mkdir()
    batch = bundle.info["axes"]["batch"]
    inputs = []
    for entry in engine.info["graph"]["inputs"]:
        rows = _recorded(bundle, engine, entry["name"])[: batch["min"]].astype(NUMPY[entry["dtype"]])
        artifacts.inside(folder, entry["name"]).write_bytes(rows.tobytes())
        dims = list(rows.shape[batched:]) or [1]
        inputs.append({"name": entry["name"], "type": TYPES[entry["dtype"]], "dims": dims})
    return {"rows": batch["opt"] if batched else 1, "inputs": inputs}


def _recorded(bundle: Bundle, engine: Artifact, name: str) -> NDArray[Any]:
    feeds = golden.read(bundle, f"{bundle.info['golden']['steps'][0]}/feeds/")
    if name != schedule.ROW:
        return feeds[name]
    steps: NDArray[np.int64] = feeds["step"]
    return schedule.read_table(engine, len(engine.info["graph"]["fed_timesteps"]))[steps]


def _render(settings: Json) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    templates = Environment(
        loader=PackageLoader("exporter"), trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined,
        keep_trailing_newline=True,
    )  # fmt: skip
    return templates.get_template(f"{CONFIG}.j2").render({"optimized": False, **settings})
