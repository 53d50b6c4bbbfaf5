"""The part of gpu_check that builds and runs engines as `export-engine` does, with every option of a backend."""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from engines import backends
from engines.backends import _tensorrt_run
from engines.backends._tensorrt_api import RTX, TRT
from engines.options import Options
from engines.plans import PLAN

LIBRARIES = {library.name: library for library in (TRT, RTX)}
WARM_UP, RUNS = 5, 50
THREADS = 4
HOW = f"wall clock of a call, from and to the host's memory, median of {RUNS} after {WARM_UP} to warm up"
REFITTED = "fp16"  # the graph whose weights are exchanged: its only constant is the weight

Part = dict[str, Any]
Made = Mapping[str, tuple[bytes, Any, Any]]  # kind → graph, x, exact y


class Bench:
    """A folder, a backend, and how outputs are compared."""

    def __init__(self, name: str, folder: Path, compared: Callable[[Any, Any], Part]) -> None:
        self.library, self.backend = LIBRARIES[name], backends.load(name)
        self.gpu = self.backend.resolve_gpu(None)
        self._folder, self._compared = folder, compared

    def build(self, model: bytes, x: Any, **options: Any) -> tuple[Path, float]:
        """Returns an engine's folder, and the seconds that it took."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        (folder / "model.onnx").write_bytes(model)
        started = time.perf_counter()
        self.backend.build(folder / "model.onnx", graph_of(x), folder, self.gpu, Options(**options))
        return folder, time.perf_counter() - started

    def open(self, folder: Path, x: Any, **options: Any) -> Any:
        return _tensorrt_run.TensorRtRunner(self.library, folder / "engine.plan", graph_of(x), **options)

    def judged(self, runner: Any, x: Any, exact: Any) -> Part:
        """Returns how far outputs are from the exact ones: those of the first call, and of one that is replayed."""
        first, _, third = (self.output(runner, x) for _ in range(3))
        found, before = self._compared(third, exact), self._compared(first, exact)
        found |= {"first": before, "repeats": bool((first == third).all()), "no_cuda_graphs": runner.no_graphs}
        return found | {"passed": found["passed"] and before["passed"]}

    def output(self, runner: Any, x: Any) -> Any:
        import torch

        return torch.from_numpy(runner.run({"x": x.numpy()})["y"])


def graph_of(x: Any) -> Part:
    return {"axes": {}, "inputs": [{"name": "x", "shape": list(x.shape)}]}


def check(name: str, made: Made, compared: Callable[[Any, Any], Part], guarded: Callable[..., Any]) -> Part:
    """Returns what came of every graph, and of every option that the backend has."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(name, Path(folder), compared)
        report: Part = {"gpu": bench.gpu, "versions": bench.backend.fingerprint()}
        report["graphs"] = {kind: guarded(engine, bench, *one) for kind, one in made.items()}
        for part in (timing_cache, refit, weight_streaming):
            has = part.__name__ in bench.backend.OPTIONS
            came = guarded(part, bench, *made[REFITTED]) if has else {"missing": f"{name} has no such option"}
            report[part.__name__] = came
    return report


def engine(bench: Bench, model: bytes, x: Any, exact: Any) -> Part:
    """Builds an engine and runs it with CUDA graphs and without, alone and by several threads, beside ONNX Runtime."""
    folder, seconds = bench.build(model, x)
    found: Part = {"build_s": seconds, "plan": json.loads((folder / PLAN).read_text(encoding="utf-8"))}
    for key, graphs in (("cuda_graphs", True), ("no_cuda_graphs", False)):
        runner = bench.open(folder, x, cuda_graphs=graphs)
        found[key] = bench.judged(runner, x, exact) | timed(lambda runner=runner: bench.output(runner, x))
    found["threads"] = threads(bench, bench.open(folder, x), x)
    found["from_onnxruntime"] = apart(bench.output(runner, x), model, x)
    return found


def timed(call: Callable[[], Any]) -> Part:
    for _ in range(WARM_UP):
        call()
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - started))
    return {"ms_p50": statistics.median(times), "ms_min": min(times), "how_timed": HOW}


def threads(bench: Bench, runner: Any, x: Any) -> Part:
    """Returns whether calls of several threads at once give what one gives alone; each feeds rows of its own."""
    feeds = [x.roll(number, 0) for number in range(THREADS)]
    alone = [bench.output(runner, one) for one in feeds]
    with ThreadPoolExecutor(THREADS) as pool:
        calls = [(number, pool.submit(bench.output, runner, feeds[number])) for number in list(range(THREADS)) * RUNS]
        wrong = sum(not bool((call.result() == alone[number]).all()) for number, call in calls)
    return {"threads": THREADS, "calls": len(calls), "wrong": wrong, "passed": wrong == 0}


def apart(y: Any, model: bytes, x: Any) -> Part:
    """Returns the largest difference from ONNX Runtime on the CPU."""
    import onnxruntime as ort

    (theirs,) = ort.InferenceSession(model, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})
    return {"max_abs": float(np.abs(y.numpy() - theirs.astype(np.float32)).max())}


def timing_cache(bench: Bench, model: bytes, x: Any, exact: Any) -> Part:
    """Builds twice with one file of timings, then with a damaged one."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "timings"
        _, cold = bench.build(model, x, timing_cache=str(file))
        size = file.stat().st_size
        again, warm = bench.build(model, x, timing_cache=str(file))
        file.write_bytes(b"damaged" * 100)
        bench.build(model, x, timing_cache=str(file))
        rewritten = file.read_bytes()[:7] != b"damaged"
        found = bench.judged(bench.open(again, x), x, exact)
        passed = found["passed"] and rewritten
        return found | {"cold_s": cold, "warm_s": warm, "bytes": size, "damaged_is_left": rewritten, "passed": passed}


def refit(bench: Bench, model: bytes, x: Any, exact: Any) -> Part:
    """Builds a refittable engine, and gives it weights of the other sign."""
    folder, _ = bench.build(model, x, refit=True)
    runner = bench.open(folder, x)
    before = bench.judged(runner, x, exact)
    (other := folder / "other.onnx").write_bytes(negated(model))
    runner.refit(other)
    return {"before": before, "after": bench.judged(runner, x, -exact)}


def negated(model: bytes) -> bytes:
    """Returns a graph whose weights have the other sign."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load_model_from_string(model)
    for held in graph.graph.initializer:
        held.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(held), held.name))
    return bytes(graph.SerializeToString())


def weight_streaming(bench: Bench, model: bytes, x: Any, exact: Any) -> Part:
    """Builds an engine whose weights can be streamed, and runs it with none, with all and with as many as it likes."""
    folder, _ = bench.build(model, x, weight_streaming=0)
    budgets: dict[str, int | str] = {"none on the GPU": 0, "all on the GPU": 1 << 62, "auto": "auto"}
    return {
        what: bench.judged(bench.open(folder, x, budget=budget), x, exact) | {"budget": budget}
        for what, budget in budgets.items()
    }
