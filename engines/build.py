"""Stage `build`: graph → engine, in a process of its own, so that a builder that crashes is a message, not a crash."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from engines import artifacts, backends, external_data, schedule
from engines import bundle as bundles
from engines.artifacts import Artifact, Request
from engines.audit import check_compression
from engines.errors import UserError
from engines.memory import peak_rss_bytes
from engines.options import Options
from engines.plans import PLAN, constant_bytes, from_json
from engines.version import code_version

FAULT = 2  # the worker's exit code for a fault of the user's, told as JSON on its last line
NOTE = "note: "  # begins a line of the worker's stderr that is for the user


def points_as_layers(types: Mapping[str, str]) -> dict[str, dict[str, str | None]]:
    """Returns an attention's points, path → type multiplied, as a backend's `check` takes layers."""
    return {path: {"weight": None, "activation": kind} for path, kind in types.items()}


def graph_of(path: Path, backend: str) -> Artifact:
    """Opens a graph, or that of a bundle in the float type that the backend wants, or the only one it has."""
    if path.is_dir() and (path / artifacts.MANIFEST).is_file() and artifacts.kind_of(path) != bundles.KIND:
        return artifacts.open_artifact(path, "graph")
    if not path.is_file() and not (path / artifacts.MANIFEST).is_file():
        return artifacts.open_artifact(path, "graph")  # which says what is wrong
    opened = bundles.open_bundle(path)
    wanted, graphs = backends.load(backend).DTYPE, opened.info["graphs"]
    return opened.graph(wanted if wanted in graphs else next(iter(graphs), wanted))


def build(
    graph: Artifact, backend: str, out: Path, *, gpu: str | None = None, options: Options | None = None
) -> Artifact:
    """Builds `graph` for a backend and a target; returns what lies in `out` already if nothing changed.

    Timings of TensorRT are kept beside `out` unless the options name another file. `weight_bytes` in the manifest
    counts what lies in the engine's file, `resident_weight_bytes` what an opened engine holds: more where codebooks
    are decoded at `load`, and where a backend widens weights to multiply them.
    """
    module = backends.load(backend)
    target, asked = module.resolve_gpu(gpu), backends.resolve(backend, options or Options())
    module.check(graph.info["layers"] | points_as_layers(graph.info["points"]), target)
    versions = {"export_engine": code_version(), **module.fingerprint()}
    settings = {"backend": backend, "gpu": target, **asked.settings()}
    request = Request("engine", {"graph": graph.digest}, settings, versions)
    if (made := artifacts.current(out, request)) is not None:
        return made
    if asked.timing_cache is None and "timing_cache" in module.OPTIONS:
        asked = replace(asked, timing_cache=str(out.resolve().with_name(f"{out.resolve().name}.timing_cache")))
    with artifacts.drafting(out, request) as draft:
        widened, draft.timings["peak_rss_bytes"] = _run_worker(backend, graph, draft.path, target, asked)
        rows = from_json(json.loads((draft.path / PLAN).read_text(encoding="utf-8")))
        where = f"{backend} engine{f' for {target}' if target else ''}"
        if asked.decode != "load":  # which expands codebooks on purpose, in memory alone
            held = graph.info["module_bytes"]
            promised = {path: size + widened.get(path, 0) for path, size in held.items()}
            total = graph.info["weight_bytes"] + sum(widened.values())
            check_compression(rows, graph.info["layers"], promised, total, where)
        resident = constant_bytes(rows)
        draft.info = {
            "backend": backend,
            "gpu": target,
            "dtype": graph.info["dtype"],
            "graph": graph.info,
            **asked.settings(),
            "weight_bytes": graph.info["weight_bytes"] if asked.decode == "load" or widened else resident,
            "resident_weight_bytes": resident,
        }
    return artifacts.open_artifact(out, "engine")


def _run_worker(
    backend: str, graph: Artifact, folder: Path, gpu: str | None, options: Options
) -> tuple[dict[str, int], int | None]:
    """Returns what the backend's `build` does, and the peak memory of the process it ran in."""
    command = [sys.executable, "-m", "engines.build", backend, str(graph.path.resolve()), str(folder.resolve())]
    lifeline, held = os.pipe()
    worker = subprocess.Popen(
        [*command, gpu or "", json.dumps(options.to_json())],
        stdin=lifeline,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # Ctrl-C is the parent's to handle
    )
    try:
        out, err = worker.communicate()
    finally:
        worker.kill()  # after Ctrl-C or an error; one that has ended is left alone
        worker.wait()
        os.close(lifeline)
        os.close(held)
    if worker.returncode == FAULT and out.strip():
        fault = json.loads(out.strip().splitlines()[-1])
        raise UserError(fault["what"], fix=fault["fix"])
    if worker.returncode < 0:
        name = signal.Signals(-worker.returncode).name
        if name == "SIGKILL":  # of the system's own, mostly
            raise UserError(
                f"the {backend} builder was killed on {graph.path}: the machine may have run out of memory",
                fix="close other programs, or build on a machine with more: preflight says how much a build takes",
            )
        raise UserError(
            f"the {backend} builder crashed ({name}) on {graph.path}{f' for {gpu}' if gpu else ''}",
            fix="it is a fault of the library: try another --gpu or recipe, or its tested version (constraints.txt)",
        )
    if worker.returncode:
        raise RuntimeError(f"the {backend} build worker failed ({worker.returncode}):\n{err}")
    for line in err.splitlines():
        if line.startswith(NOTE):  # the rest is the library's own talk
            print(line, file=sys.stderr)
    told = json.loads(out.strip().splitlines()[-1])
    return told["widened"], told["peak_rss_bytes"]


def _die_with_parent() -> None:
    # stdin is a pipe that only the parent holds open: it ends when the parent does, even by kill -9. So must the
    # worker, or it would go on writing into a folder that the next run is using.
    def wait() -> None:
        sys.stdin.buffer.read()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def _reopened(folder: Path) -> Artifact:
    """Opens the graph in a folder, which may be a part of a bundle."""
    if (folder / artifacts.MANIFEST).is_file():
        return artifacts.open_artifact(folder, "graph")
    opened = bundles.open_bundle(folder.parent.parent)
    graphs = opened.info["graphs"]
    return opened.graph(next(dtype for dtype, entry in graphs.items() if opened.path / entry["folder"] == folder))


def _worker(backend: str, graph_folder: str, folder: str, gpu: str, options: str) -> int:
    _die_with_parent()
    asked = Options(**json.loads(options))
    try:
        graph = _reopened(Path(graph_folder))
        with artifacts.writing_errors(Path(folder)):
            model = graph.file("model.onnx")
            external_data.check(model, graph.files())
            widened = backends.load(backend).build(model, graph.info, Path(folder), gpu or None, asked)
            if schedule.FILE in graph.files():
                shutil.copyfile(graph.file(schedule.FILE), Path(folder) / schedule.FILE)
    except UserError as error:
        print(json.dumps({"what": error.what, "fix": error.fix}))
        return FAULT
    print(json.dumps({"widened": dict(widened), "peak_rss_bytes": peak_rss_bytes()}))
    return 0


if __name__ == "__main__":
    code = _worker(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # skips the interpreter's shutdown, which waits for the thread that reads stdin
