"""What TensorRT and TensorRT-RTX share: what targets have, network, profile and configuration."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.artifacts import Json
from engines.backends._tensorrt_api import Library, network_flags, shape_of
from engines.errors import UserError
from engines.options import Options
from engines.plans import write_plan

# Targets that have a format in hardware. Source: TensorRT support matrix (FP8 from Ada, FP4 on Blackwell,
# INT4 weights from Ampere); the pairs of TensorRT-RTX were confirmed by building for each target.
SUPPORT = {
    "int8": ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    "fp8": ("sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    "fp4": ("sm100", "sm103", "sm120", "sm121"),
    "int4": ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
}

LAST_ERRORS = 20


def check_support(layers: Mapping[str, Mapping[str, str | None]], gpu: str, known: Sequence[str]) -> None:
    """Raises a UserError that names the first layer whose format the target lacks, and the targets that have it."""
    for path, layer in layers.items():
        for part, kind in layer.items():
            if kind is None:
                continue
            have = [target for target in known if target in SUPPORT.get(kind, ())]
            if gpu not in have:
                where = f"build for one that has {kind} (--gpu {', '.join(have)}), or " if have else ""
                does = "stores its weight in" if part == "weight" and layer["activation"] != kind else "is"
                raise UserError(
                    f"layer {path!r} {does} {kind}, with no hardware for it in {gpu}",
                    fix=f"{where}choose another recipe",
                )


class Logger:
    """Collects the library's log: the plan stands in the builder's verbose lines, the reason of a failure in errors.

    What is not `verbose` keeps the last errors alone, as long as it may live.
    """

    def __init__(self, trt: Any, *, verbose: bool = True) -> None:
        self.lines: deque[str] = deque(maxlen=None if verbose else 0)
        self.errors: deque[str] = deque(maxlen=None if verbose else LAST_ERRORS)
        outer = self

        class _Logger(trt.ILogger):  # type: ignore[misc]  # the binding calls back into this class
            def log(self, severity: Any, message: str) -> None:
                outer.lines.append(message)
                if severity <= trt.ILogger.Severity.ERROR:
                    outer.errors.append(message)

        self.logger = _Logger()

    @property
    def reason(self) -> str:
        return " ".join(self.errors) or "no reason given"


def build_engine(library: Library, model: Path, graph: Json, folder: Path, gpu: str, options: Options) -> None:
    """Parses, builds and writes `engine.plan` and its plan.json."""
    trt = library.module()
    log = Logger(trt)
    builder = trt.Builder(log.logger)
    network = parsed(trt, log, builder, model)
    config = configured(library, trt, builder, graph, gpu, options)
    keep = library.time(config, Path(options.timing_cache) if options.timing_cache else None)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UserError(f"{model}: the builder refuses it: {log.reason}", fix="choose another --gpu or another recipe")
    for note in keep():
        print(f"note: {note}", file=sys.stderr)  # engines.build hands it on
    (folder / "engine.plan").write_bytes(engine)
    write_plan(library.plan(trt, log.logger, list(log.lines), engine, graph), folder)


def parsed(trt: Any, log: Logger, builder: Any, model: Path) -> Any:
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(parsable(model), str(model)):
        raise UserError(
            f"{model}: the parser refuses it: {reasons(parser)}", fix="keep the layer it names in float (recipe)"
        )
    return network


def reasons(parser: Any) -> str:
    """Returns what an ONNX parser, or a refitter, found wrong."""
    return "; ".join(str(parser.get_error(i).desc()) for i in range(parser.num_errors))


def parsable(model: Path) -> bytes:
    """Returns the graph as the parser takes it: it would give the Q/DQ layers of every call of a function one name."""
    import onnx

    from engines.backends._functions import written_out

    graph = onnx.load(model, load_external_data=False)
    return written_out(graph).SerializeToString() if graph.functions else model.read_bytes()


def configured(library: Library, trt: Any, builder: Any, graph: Json, gpu: str, options: Options) -> Any:
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # so that the plan can be read
    profile = builder.create_optimization_profile()
    for entry in graph["inputs"]:
        profile.set_shape(entry["name"], *(shape_of(graph, entry, bound) for bound in ("min", "opt", "max")))
    config.add_optimization_profile(profile)
    library.aim(trt, config, gpu)
    if options.refit:
        config.set_flag(trt.BuilderFlag.REFIT)
    if options.weight_streaming is not None:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    return config
