"""TensorRT-RTX: engines for a named NVIDIA GPU, built on any machine, with or without one, and run on that GPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engines.artifacts import Artifact, Json
from engines.backends import _tensorrt, _tensorrt_plan, _tensorrt_run
from engines.backends._tensorrt_api import RTX, RTX_DEFAULT_GPU
from engines.options import Options

DTYPE = "fp16"
DECODES = ()  # its kernels decode while they run
OPTIONS = ("weight_streaming",)

targets = RTX.targets
resolve_gpu = RTX.resolve_gpu
multiplied = _tensorrt_plan.multiplied


def fingerprint() -> dict[str, str]:
    return {"tensorrt_rtx": str(RTX.module().__version__)}


def check(layers: Mapping[str, Mapping[str, str | None]], gpu: str | None) -> None:
    _tensorrt.check_support(layers, gpu or RTX_DEFAULT_GPU, targets())


def note(graph: Json, options: Options) -> str | None:
    return None


def build(model: Path, graph: Json, folder: Path, gpu: str | None, options: Options) -> Mapping[str, int]:
    _tensorrt.build_engine(RTX, model, graph, folder, gpu or RTX_DEFAULT_GPU, options)
    return {}


def explain(
    op: str, asked: Mapping[str, str | None], got: Mapping[str, str | None], versions: Mapping[str, str]
) -> str | None:
    """It has kernels for every type that it takes: nothing excuses another."""
    return None


def cannot_run() -> str | None:
    return _tensorrt_run.cannot_run(RTX)


def open_runner(engine: Artifact, threads: int = 0) -> _tensorrt_run.TensorRtRunner:
    """Opens the engine on this machine's GPU. Not run so far: no machine with a supported GPU was at hand."""
    return _tensorrt_run.open_runner(RTX, engine)
