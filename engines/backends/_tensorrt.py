"""What TensorRT and TensorRT-RTX share: what targets have, network, profile and configuration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.artifacts import Json
from engines.backends._tensorrt_plan import read_log
from engines.errors import UserError
from engines.plans import PlanRow

# Targets that have a format in hardware. Source: TensorRT support matrix (FP8 from Ada, FP4 on Blackwell,
# INT4 weights from Ampere); the pairs of TensorRT-RTX were confirmed by building for each target.
SUPPORT = {
    "int8": ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    "fp8": ("sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    "fp4": ("sm100", "sm103", "sm120", "sm121"),
    "int4": ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
}


def check_support(layers: Mapping[str, Mapping[str, str | None]], gpu: str, known: Sequence[str]) -> None:
    """Raises a UserError that names the first layer whose format the target lacks, and the targets that have it."""
    for path, layer in layers.items():
        for kind in filter(None, layer.values()):
            have = [target for target in known if target in SUPPORT.get(kind, ())]
            if gpu not in have:
                where = f"build for one that has {kind} (--gpu {', '.join(have)}), or " if have else ""
                raise UserError(
                    f"layer {path!r} is {kind}, with no hardware for it in {gpu}", fix=f"{where}choose another recipe"
                )


class Logger:
    """Collects the builder's log: the plan stands in its verbose lines, the reason of a failure in its errors."""

    def __init__(self, trt: Any) -> None:
        self.lines: list[str] = []
        self.errors: list[str] = []
        outer = self

        class _Logger(trt.ILogger):  # type: ignore[misc]  # the binding calls back into this class
            def log(self, severity: Any, message: str) -> None:
                outer.lines.append(message)
                if severity <= trt.ILogger.Severity.ERROR:
                    outer.errors.append(message)

        self.logger = _Logger()


def build_engine(trt: Any, model: Path, graph: Json, folder: Path, configure: Any) -> list[PlanRow]:
    """Parses, builds and writes `engine.plan`; `configure(config)` sets what only one of the two libraries has."""
    log = Logger(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(_parsable(model), str(model)):
        reasons = "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))
        raise UserError(f"{model}: the parser refuses it: {reasons}", fix="keep the layer it names in float (recipe)")
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.add_optimization_profile(_profile(builder, network, graph))
    configure(config)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        reason = " ".join(log.errors) or "no reason given"
        raise UserError(f"{model}: the builder refuses it: {reason}", fix="choose another --gpu or another recipe")
    (folder / "engine.plan").write_bytes(engine)
    return read_log(log.lines)


def _parsable(model: Path) -> bytes:
    """Returns the graph as the parser takes it: it would give the Q/DQ layers of every call of a function one name."""
    import onnx

    from engines.backends._functions import written_out

    graph = onnx.load(model, load_external_data=False)
    return written_out(graph).SerializeToString() if graph.functions else model.read_bytes()


def _profile(builder: Any, network: Any, graph: Json) -> Any:
    profile = builder.create_optimization_profile()
    for entry in graph["inputs"]:
        shapes = [
            tuple(graph["axes"][d][bound] if isinstance(d, str) else d for d in entry["shape"])
            for bound in ("min", "opt", "max")
        ]
        profile.set_shape(entry["name"], *shapes)
    return profile


class PolygraphyRunner:
    """Runs a plan file on this machine's GPU through Polygraphy."""

    def __init__(self, name: str, plan: Path) -> None:
        from polygraphy.backend.common import BytesFromPath
        from polygraphy.backend.trt import EngineFromBytes, TrtRunner

        self.name = name
        self._runner = TrtRunner(EngineFromBytes(BytesFromPath(str(plan))))
        self._runner.activate()
        self._types = {n: meta.dtype.numpy() for n, meta in self._runner.get_input_metadata().items()}

    def run(self, feeds: Any) -> dict[str, Any]:
        import numpy as np

        outputs = self._runner.infer({n: np.ascontiguousarray(feeds[n].astype(t)) for n, t in self._types.items()})
        return {n: np.asarray(o, dtype=np.float32) for n, o in outputs.items()}
