"""Every call that differs between TensorRT (10.x, 11.x) and TensorRT-RTX; all else is the same for both.

| | TensorRT | TensorRT-RTX |
|---|---|---|
| builds | on the GPU that it builds for | anywhere, for a named compute capability |
| keeps timings | in a timing cache | times nothing: those calls do nothing |
| tells its plan | to the engine inspector | in the verbose log of the build |
| CUDA graphs | captured by whoever runs it | captured by itself, if asked |
| compiles | at the build | the rest when it is run, so runs share a cache |

Source: the Python bindings of 10.16.1, 11.4.0 and RTX 1.7.1, read; of them only RTX's builder was run so far.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from engines import gpu as gpus
from engines.artifacts import Json
from engines.backends import _tensorrt_plan
from engines.errors import UserError, unknown
from engines.plans import PlanRow

RTX_DEFAULT_GPU = "sm89"  # Ada: the oldest that has every format of the shipped recipes
LEFT_OUT = ("sm90", "sm100", "sm103")  # that TensorRT has and TensorRT-RTX has not
MAX_CACHE_BYTES = 1 << 30  # timings of a large model are some megabytes


class Library(Protocol):
    """One of the two libraries, by its differences."""

    name: str  # the backend's
    captures: bool  # whether it replays CUDA graphs by itself

    def module(self) -> Any:
        """Imports the library; a missing one is a UserError."""

    def targets(self) -> list[str]:
        """Returns the GPUs that it builds for here, as `sm89`."""

    def resolve_gpu(self, gpu: str | None) -> str:
        """Returns the target that is meant; raises a UserError where that cannot be built for here."""

    def aim(self, trt: Any, config: Any, gpu: str) -> None:
        """Sets what to build for."""

    def time(self, config: Any, file: Path | None) -> Callable[[], list[str]]:
        """Has a build start from the timings in `file`; returns what keeps them after it, and says what went wrong."""

    def plan(self, trt: Any, logger: Any, lines: Sequence[str], engine: Any, graph: Json) -> list[PlanRow]:
        """Returns what a built engine runs."""

    def context(self, trt: Any, engine: Any, shared: dict[str, Any], cuda_graphs: bool) -> Any:
        """Returns a new execution context; contexts of one engine are given the same `shared`."""

    def unsupported(self, gpu: str) -> str | None:
        """Returns why no engine runs on a GPU, where the library leaves out its whole kind."""

    def refusal(self, trt: Any, runtime: Any, plan: bytes) -> str | None:
        """Returns why a plan does not suit this machine, where the library can tell before it loads it."""


class TensorRt:
    """TensorRT: what it builds, it builds by timing kernels on the GPU at hand."""

    name = "trt"
    captures = False

    def module(self) -> Any:
        return _import("tensorrt", "TensorRT", "pip install tensorrt cuda-python, or --backend trt-rtx")

    def targets(self) -> list[str]:
        return [here] if (here := gpus.detect()) else []

    def resolve_gpu(self, gpu: str | None) -> str:
        self.module()
        here = gpus.detect()
        elsewhere = "--backend trt-rtx, which builds anywhere"
        if here is None:
            raise UserError(
                "trt: TensorRT builds on the GPU that it builds for, and this machine has none",
                fix=f"build on the machine it is to run on, or {elsewhere}",
            )
        if gpu not in (None, here):
            raise UserError(
                f"trt --gpu {gpu}: TensorRT builds for the GPU at hand alone, and that is {here}",
                fix=f"leave out --gpu, build on a machine with {gpu}, or {elsewhere}",
            )
        return here

    def aim(self, trt: Any, config: Any, gpu: str) -> None:
        """There is but one target."""

    def time(self, config: Any, file: Path | None) -> Callable[[], list[str]]:
        kept, notes = _read(file)
        cache = config.create_timing_cache(kept)
        if cache is None or not config.set_timing_cache(cache, False):
            notes.append(f"{file}: no timings of this TensorRT on this GPU: left aside, and kept anew")
            cache = config.create_timing_cache(b"")
            config.set_timing_cache(cache, False)
        return lambda: notes + _write(file, cache)

    def plan(self, trt: Any, logger: Any, lines: Sequence[str], engine: Any, graph: Json) -> list[PlanRow]:
        """Asks the inspector, of a context whose shapes are set: an engine with dynamic ones does not know its types.

        Raises a UserError if the engine cannot be loaded.
        """
        runtime = trt.Runtime(logger)
        loaded = runtime.deserialize_cuda_engine(engine)
        if loaded is None:
            raise UserError("the engine does not load where it was built", fix="look at the GPU: export-engine doctor")
        context, inspector = loaded.create_execution_context(), loaded.create_engine_inspector()
        for entry in graph["inputs"]:
            context.set_input_shape(entry["name"], shape_of(graph, entry, "opt"))
        context.infer_shapes()
        inspector.execution_context = context
        return _tensorrt_plan.read_inspector(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def context(self, trt: Any, engine: Any, shared: dict[str, Any], cuda_graphs: bool) -> Any:
        return engine.create_execution_context()

    def unsupported(self, gpu: str) -> str | None:
        return None

    def refusal(self, trt: Any, runtime: Any, plan: bytes) -> str | None:
        return None


class TensorRtRtx:
    """TensorRT-RTX: compiles ahead of time for a named GPU, and the rest when an engine is run."""

    name = "trt-rtx"
    captures = True

    def module(self) -> Any:
        fix = "pip install tensorrt-rtx-cu13 (Linux and Windows on x86-64), or leave out --backend trt-rtx"
        return _import("tensorrt_rtx", "TensorRT-RTX", fix)

    def targets(self) -> list[str]:
        return [name.lower() for name in self.module().ComputeCapability.__members__ if name.startswith("SM")]

    def resolve_gpu(self, gpu: str | None) -> str:
        known = self.targets()
        if gpu is None:
            return here if (here := gpus.detect()) in known and here else RTX_DEFAULT_GPU
        if gpu in LEFT_OUT:
            raise UserError(
                f"{self.name}: {self.unsupported(gpu)}", fix=f"use one of {', '.join(known)}, or trt, or ort"
            )
        if gpu not in known:
            raise unknown("GPU target", gpu, known, where=self.name)
        return gpu

    def aim(self, trt: Any, config: Any, gpu: str) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, gpu.upper()), 0)

    def time(self, config: Any, file: Path | None) -> Callable[[], list[str]]:
        return list

    def plan(self, trt: Any, logger: Any, lines: Sequence[str], engine: Any, graph: Json) -> list[PlanRow]:
        return _tensorrt_plan.read_log(lines)

    def context(self, trt: Any, engine: Any, shared: dict[str, Any], cuda_graphs: bool) -> Any:
        """Kernels for a shape are compiled before its first call (eager), not in the background: numbers stay put."""
        config = engine.create_runtime_config()
        strategy = trt.CudaGraphStrategy
        config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if cuda_graphs else strategy.DISABLED
        config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
        if "cache" not in shared:
            shared["cache"] = config.create_runtime_cache()
        config.set_runtime_cache(shared["cache"])
        return engine.create_execution_context(config)

    def unsupported(self, gpu: str) -> str | None:
        """Hopper and the data centre's Blackwell are left out. Source: its refusal on an H200, docs/gpu.md."""
        known = self.targets()
        if gpu in known or int(gpu[2:]) > max(int(target[2:]) for target in known):  # newer ones take portable engines
            return None
        return f"TensorRT-RTX runs on no {gpu} GPU, only on {', '.join(known)} and newer: take --backend trt there"

    def refusal(self, trt: Any, runtime: Any, plan: bytes) -> str | None:
        validity, diagnostics = runtime.get_engine_validity(plan)
        if validity != trt.EngineValidity.INVALID:
            return None
        return f"made for another GPU, or by another version ({diagnostics})"


TRT: Library = TensorRt()
RTX: Library = TensorRtRtx()


def network_flags(trt: Any) -> int:
    """Types are the graph's: to be said to TensorRT 10, the only way in 11 and RTX."""
    return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)


def shape_of(graph: Json, entry: Json, bound: str) -> tuple[int, ...]:
    """Returns an input's shape at a `bound` of its axes: min, opt or max."""
    return tuple(graph["axes"][d][bound] if isinstance(d, str) else d for d in entry["shape"])


def _import(module: str, title: str, fix: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{title} cannot be imported ({error})", fix=fix) from error


def _read(file: Path | None) -> tuple[bytes, list[str]]:
    """Returns what a cache file holds, nothing where there is none, and why it was left aside."""
    try:
        if file is None or not file.exists():
            return b"", []
        if file.stat().st_size > MAX_CACHE_BYTES:
            return b"", [f"{file}: more than {MAX_CACHE_BYTES} bytes: left aside"]
        return file.read_bytes(), []
    except OSError as error:
        return b"", [f"{file}: cannot be read ({error.strerror}): left aside"]


def _write(file: Path | None, cache: Any) -> list[str]:
    """Writes through a name of this process's own, as builds may share the file; returns why it could not."""
    if file is None:
        return []
    temporary = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(bytes(cache.serialize()))
        os.replace(temporary, file)
    except OSError as error:
        return [f"{file}: timings could not be kept ({error.strerror})"]
    return []
