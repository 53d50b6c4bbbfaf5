"""TensorRT-RTX: engines compiled ahead of time for a named GPU, on any machine, with or without one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from engines import gpu as gpus
from engines.artifacts import Artifact, Json
from engines.backends import _tensorrt, _tensorrt_plan
from engines.errors import UserError, unknown
from engines.plans import write_plan

DTYPE = "fp16"
DECODES = ()  # its kernels decode while they run
DEFAULT_GPU = "sm89"  # Ada: the oldest that has every format of the shipped recipes


def _library() -> Any:
    try:
        import tensorrt_rtx
    except ImportError as error:
        raise UserError(
            f"TensorRT-RTX cannot be imported ({error})",
            fix="pip install tensorrt-rtx-cu13 (Linux and Windows on x86-64), or leave out --backend trt-rtx",
        ) from error
    return tensorrt_rtx


def fingerprint() -> dict[str, str]:
    return {"tensorrt_rtx": str(_library().__version__)}


def targets() -> list[str]:
    """Returns the GPUs this library compiles for, as `sm89`."""
    return [name.lower() for name in _library().ComputeCapability.__members__ if name.startswith("SM")]


def resolve_gpu(gpu: str | None) -> str:
    if gpu is None:
        return here if (here := gpus.detect()) in targets() and here else DEFAULT_GPU
    if gpu not in targets():
        raise unknown("GPU target", gpu, targets(), where="trt-rtx")
    return gpu


def check(layers: Mapping[str, Mapping[str, str | None]], gpu: str | None) -> None:
    _tensorrt.check_support(layers, gpu or DEFAULT_GPU, targets())


def note(graph: Json, decode: str | None) -> str | None:
    return None


def build(model: Path, graph: Json, folder: Path, gpu: str | None, decode: str | None) -> Mapping[str, int]:
    trt = _library()

    def configure(config: Any) -> None:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, (gpu or DEFAULT_GPU).upper()), 0)

    write_plan(_tensorrt.build_engine(trt, model, graph, folder, configure), folder)
    return {}


multiplied = _tensorrt_plan.multiplied


def explain(op: str, asked: Mapping[str, str | None], got: Mapping[str, str | None]) -> str | None:
    """It has kernels for every type that it takes: nothing excuses another."""
    return None


def cannot_run() -> str | None:
    if gpus.detect() is None:
        return "no NVIDIA GPU on this machine"
    return None


def open_runner(engine: Artifact, threads: int = 0) -> _tensorrt.PolygraphyRunner:
    """Opens the engine on this machine's GPU. Not run so far: no machine with a supported GPU was at hand."""
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"  # read by Polygraphy when it first imports TensorRT
    return _tensorrt.PolygraphyRunner("trt-rtx", engine.file("engine.plan"))
