"""Throughput: each runner in a process of its own, timed in turn, so that ratios hold while the machine drifts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from engines import artifacts, backends
from engines.artifacts import Json
from engines.backends import ort
from engines.errors import UserError
from engines.loading import elsewhere
from engines.memory import peak_rss_bytes
from engines.runner import Feeds, Runner
from engines.schedule import with_steps
from exporter import progress

ROUNDS = 10  # of one turn per runner
TURN_MS = 150.0  # a turn runs at least this long,
LEAST_CALLS = 3  # and at least this often
WARM_UP = 3
BATCHES = (8, 1)  # with guidance a batch of 8 is 4 images; 1 is the latency of one call


def throughput(targets: Mapping[str, str], batches: Sequence[int] = BATCHES, threads: int | None = None) -> list[Json]:
    """Times runners (name → target, as `open_target` takes it) with warm-up; returns a row per runner and batch.

    PyTorch is timed where the engines beside it run, on the GPU if any does; what does not fit there has no row.
    """
    threads = threads or os.cpu_count() or 1
    where = "cuda" if any(_place(target) == "cuda" for target in targets.values()) else "cpu"
    workers = {name: _Worker(target, threads, where) for name, target in targets.items()}
    rows = []
    try:
        for batch in batches:
            for name in [name for name, worker in workers.items() if not worker.fits(batch)]:
                progress.note(f"note: {name} is not timed at batch {batch}: the GPU's memory is full")
                workers.pop(name).stop()
            times: dict[str, list[float]] = {name: [] for name in workers}
            for _ in progress.track(range(ROUNDS), ROUNDS, f"timing, batch {batch}"):
                for name, worker in workers.items():
                    times[name] += worker.ask(batch, 0)["ms"]
            for name, worker in workers.items():
                last = worker.ask(batch, 1)
                row = _row(name, batch, times[name], last["peak_rss_bytes"])
                rows.append(row | {"device": last["device"]})
    finally:
        for worker in workers.values():
            worker.stop()
    return rows


def _row(name: str, batch: int, times: Sequence[float], peak: int | None) -> Json:
    p50, p95 = (float(np.percentile(times, q)) for q in (50, 95))
    return {"runner": name, "batch": batch, "ms_p50": p50, "ms_p95": p95, "runs": len(times), "peak_rss_bytes": peak}


def targets_of(folder: Path) -> dict[str, str]:
    """Returns what can be timed in a RUN, a GRAPH or an ENGINE folder."""
    if (folder / "quantized" / artifacts.MANIFEST).is_file():
        targets = {"float": f"float:{folder}", "quantized": f"quantized:{folder}"}
        engines = [path.parent for path in sorted(folder.glob(f"engines/*/{artifacts.MANIFEST}"))]
        ours = [path for path in engines if path.name in backends.names()]  # as `validate` finds them
        runnable = [path for path in ours if elsewhere(artifacts.open_artifact(path, "engine")) is None]
        return targets | {path.name: f"engine:{path}" for path in runnable}
    kind = artifacts.kind_of(folder)
    if kind == "graph":
        return {"ort": f"graph:{folder}"}
    if kind == "engine":
        backend = str((engine := artifacts.open_artifact(folder, "engine")).info["backend"])
        if reason := elsewhere(engine):
            raise UserError(f"{folder}: {backend} cannot run here: {reason}", fix="run it on a machine that has one")
        return {backend: f"engine:{folder}"}
    raise UserError(f"{folder}: an artifact of kind {kind} cannot be timed", fix="give a RUN, GRAPH or ENGINE folder")


def _place(target: str) -> str:
    """Returns where a target runs: `cuda` or `cpu`, which PyTorch's models leave to what is beside them."""
    kind, _, path = target.partition(":")
    if kind not in ("graph", "engine"):
        return "cpu"
    backend = "ort" if kind == "graph" else artifacts.open_artifact(Path(path), "engine").info["backend"]
    return ort.device() if backend == "ort" else "cuda"


def open_target(target: str, threads: int, where: str = "cpu") -> tuple[Runner, Json]:
    """Opens `float:RUN`, `quantized:RUN`, `graph:DIR` or `engine:DIR`; returns the runner, and its inputs and axes.

    PyTorch's models lie on the device `where`.
    """
    kind, _, path = target.partition(":")
    folder = Path(path)
    if kind == "engine":
        engine = artifacts.open_artifact(folder, "engine")
        return backends.open_runner(engine, threads), engine.info["graph"]
    if kind == "graph":
        graph = artifacts.open_artifact(folder, "graph")
        runner = ort.OrtRunner(ort.open_session(graph.file("model.onnx"), graph.info, threads=threads))
        return with_steps(runner, graph.info, graph), graph.info
    return _torch_target(kind, folder, threads, where)


def _torch_target(kind: str, folder: Path, threads: int, where: str) -> tuple[Runner, Json]:
    import torch

    from exporter import devices, quantized
    from exporter.runners import TorchRunner

    torch.set_num_threads(threads)
    source = artifacts.open_artifact(folder / "quantized", "quantized")
    checkpoint = quantized.checkpoint_of(source)
    model = checkpoint.load() if kind == "float" else quantized.load(source)
    devices.place(model, devices.resolve(where))
    family = checkpoint.family
    inputs = [
        {"name": s.name, "dtype": "fp32" if s.dtype == "float" else s.dtype, "shape": list(s.shape)}
        for s in family.inputs()
    ]
    axes = {name: axis.to_json() for name, axis in family.axes().items()}
    return TorchRunner(kind, model, family), {"inputs": inputs, "axes": axes, "timesteps": source.info["timesteps"]}


def random_feeds(graph: Json, batch: int) -> dict[str, Any]:
    """Returns seeded feeds of the shapes an engine is built for: noise for floats, small indices for integers.

    Rows are of all steps of the sampler.
    """
    generator = np.random.default_rng(0)
    sizes = {name: axis["opt"] for name, axis in graph["axes"].items()} | {"batch": batch}
    feeds: dict[str, Any] = {}
    for entry in graph["inputs"]:
        shape = [sizes[d] if isinstance(d, str) else d for d in entry["shape"]]
        if entry["dtype"].startswith("int"):
            feeds[entry["name"]] = generator.integers(0, 2, shape).astype(entry["dtype"])
        else:
            feeds[entry["name"]] = generator.standard_normal(shape).astype(np.float32)
    steps = generator.integers(0, len(graph["timesteps"]), batch)
    if fed := graph.get("fed_timesteps"):  # an engine checks that its steps are those of its timesteps
        feeds["timestep"] = np.array([fed[step] for step in steps], feeds["timestep"].dtype)
    return feeds | {"step": steps}


class _Full(UserError):
    """The GPU has no memory for what is timed."""


class _Worker:
    """A process that holds one runner and times it when asked to."""

    def __init__(self, target: str, threads: int, where: str) -> None:
        self._target = target
        command = [sys.executable, "-m", "exporter.bench", target, str(threads), where]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )  # a session of its own: Ctrl-C is the parent's to handle, and the end of stdin ends the worker

    def ask(self, batch: int, calls: int) -> Json:
        """Has the runner called `calls` times, or with 0 for one turn; returns the times and the peak memory so far."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{batch} {calls}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"a timing process ended with {self._process.wait()}: {self._target}")
        found: Json = json.loads(answer)
        if "fault" in found:
            raise UserError(found["fault"], fix=found["fix"])
        if "full" in found:
            raise _Full(f"the GPU's memory is full: {found['full']}", fix="free what other programs hold on it")
        return found

    def fits(self, batch: int) -> bool:
        """Warms up at a batch; returns whether the device's memory takes it."""
        try:
            self.ask(batch, WARM_UP)
        except _Full:
            return False
        return True

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


def _times(runner: Runner, feeds: Feeds, calls: int) -> list[float]:
    times: list[float] = []
    while len(times) < (calls or LEAST_CALLS) or (not calls and sum(times) < TURN_MS):
        started = time.perf_counter()
        runner.run(feeds)
        times.append((time.perf_counter() - started) * 1e3)
    return times


def _worker(target: str, threads: str, where: str) -> None:
    device = _place(target) if target.partition(":")[0] in ("graph", "engine") else _torch_place(where)
    try:
        _serve(*open_target(target, int(threads), device), device)
    except UserError as error:
        print(json.dumps({"fault": error.what, "fix": error.fix}), flush=True)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which is not imported for every target
            raise
        print(json.dumps({"full": str(error)}), flush=True)


def _torch_place(where: str) -> str:
    """Returns `where`, or the CPU where this build of PyTorch is for CPUs alone."""
    import torch

    return where if torch.cuda.is_available() else "cpu"


def _serve(runner: Runner, graph: Json, device: str) -> None:
    for line in sys.stdin:
        batch, calls = map(int, line.split())
        times = _times(runner, random_feeds(graph, batch), calls)
        print(json.dumps({"ms": times, "peak_rss_bytes": peak_rss_bytes(), "device": device}), flush=True)


if __name__ == "__main__":
    _worker(*sys.argv[1:])
