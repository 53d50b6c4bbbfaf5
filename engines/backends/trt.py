"""TensorRT 10.x and 11.x: built on the NVIDIA GPU that they run on. None was so far: no such machine was at hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engines.artifacts import Artifact, Json
from engines.backends import _tensorrt, _tensorrt_plan, _tensorrt_run
from engines.backends._tensorrt_api import TRT
from engines.options import Options

DTYPE = "fp16"
DECODES = ()  # its kernels decode while they run
OPTIONS = ("refit", "weight_streaming", "timing_cache")

targets = TRT.targets
resolve_gpu = TRT.resolve_gpu
multiplied = _tensorrt_plan.multiplied


def fingerprint() -> dict[str, str]:
    return {"tensorrt": str(TRT.module().__version__)}


def check(layers: Mapping[str, Mapping[str, str | None]], gpu: str | None) -> None:
    target = gpu or resolve_gpu(None)
    _tensorrt.check_support(layers, target, [target])


def note(graph: Json, options: Options) -> str | None:
    """Says what is known against a refittable engine.

    Source: NVIDIA, "Refitting an Engine" (TensorRT 11.3), under known issues.
    """
    if not options.refit:
        return None
    return (
        "trt: in a refittable engine TensorRT 11.3 may drop the bias of a matmul, refitted or not (its release notes): "
        "have its accuracy validated"
    )


def build(model: Path, graph: Json, folder: Path, gpu: str | None, options: Options) -> Mapping[str, int]:
    _tensorrt.build_engine(TRT, model, graph, folder, resolve_gpu(gpu), options)
    return {}


def explain(
    op: str, asked: Mapping[str, str | None], got: Mapping[str, str | None], versions: Mapping[str, str]
) -> str | None:
    """It is not known to lack a kernel for a type that it takes."""
    return None


def cannot_run() -> str | None:
    return _tensorrt_run.cannot_run(TRT)


def open_runner(engine: Artifact, threads: int = 0) -> _tensorrt_run.TensorRtRunner:
    """Opens the engine on this machine's GPU."""
    return _tensorrt_run.open_runner(TRT, engine)
