"""What TensorRT and TensorRT-RTX share: network, profile, configuration, and the plan in the builder's log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.artifacts import Json
from engines.errors import UserError
from engines.plans import PlanRow, tensor_bytes

# Targets that have a format in hardware. Source: TensorRT support matrix (FP8 from Ada, FP4 on Blackwell,
# INT4 weights from Ampere); the pairs of TensorRT-RTX were confirmed by building for each target.
SUPPORT = {
    "int8": ("sm75", "sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    "fp8": ("sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    "fp4": ("sm100", "sm103", "sm120", "sm121"),
    "int4": ("sm80", "sm86", "sm87", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
}
TYPES = {
    "Float": "fp32", "Half": "fp16", "BFloat16": "bf16", "FP8": "fp8", "FP4": "fp4", "Int8": "int8", "Int4": "int4",
    "Int32": "int32", "Int64": "int64", "Bool": "bool", "UInt8": "uint8",
}  # fmt: skip


def check_support(layers: Mapping[str, Mapping[str, str | None]], gpu: str, known: Sequence[str]) -> None:
    """Raises a UserError that names the first layer whose format the target lacks, and the targets that have it."""
    for path, layer in layers.items():
        for kind in filter(None, layer.values()):
            have = [target for target in known if target in SUPPORT.get(kind, ())]
            if gpu not in have:
                where = f"build for one that has {kind} (--gpu {', '.join(have)}), or " if have else ""
                raise UserError(
                    f"layer {path!r} is {kind}, which {gpu} has no hardware for", fix=f"{where}choose another recipe"
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
    return read_plan(log.lines)


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


_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), "
    r"Outputs: (?P<outputs>.*?), TacticName: .*?, StreamId: .*?Metadata: ?(?P<nodes>.*)$"
)
_TENSOR = re.compile(r"\{ Name: (.*?), Dimensions: \[([^\]]*)\].*?Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: (.*?)\](?=\x1f|\[|$)")  # TensorRT-RTX 1.7 writes a unit separator between them


def read_plan(lines: Sequence[str]) -> list[PlanRow]:
    """Reads the compiled layers out of a verbose build log; a constant that layers share counts in the first."""
    text = "\n".join(lines)
    start = text.rfind("Layers:\n")
    if start < 0:
        raise UserError(
            "the builder's log has no list of layers, so nobody can tell what the engine runs",
            fix="use the tested version of the library (constraints.txt)",
        )
    rows, counted = [], set[str]()
    for line in text[start + len("Layers:\n") :].splitlines():
        if not line.startswith("Name: "):
            break
        rows.append(_row(line, counted))
    return rows


def _row(line: str, counted: set[str]) -> PlanRow:
    match = _LAYER.match(line)
    if match is None:
        raise UserError(
            f"a layer of the plan cannot be read: {line[:200]}", fix="use the tested version (constraints.txt)"
        )
    inputs, constants, outputs = (_TENSOR.findall(match[part]) for part in ("inputs", "constants", "outputs"))
    fresh = [c for c in constants if c[0] not in counted]
    counted.update(c[0] for c in fresh)
    return PlanRow(
        name=match["name"],
        kind=match["kind"].lower(),
        input_types=tuple(_type(t) for _, _, t in inputs),
        constant_types=tuple(_type(t) for _, _, t in constants),
        constant_bytes=sum(tensor_bytes(_dims(d), _type(t)) for _, d, t in fresh),
        output_types=tuple(_type(t) for _, _, t in outputs),
        onnx_nodes=tuple(dict.fromkeys(_outermost(node) for node in _NODE.findall(match["nodes"]))),
    )


def _outermost(node: str) -> str:
    """Returns the graph's own node: one inside a function's body is listed as `Add | path/Op (Op)`."""
    _, inside, call = node.rpartition(" | ")
    return call.rpartition(" (")[0] if inside else node


def _type(name: str) -> str:
    if name not in TYPES:
        raise UserError(
            f"the plan names a type {name!r} that is not known", fix="use the tested version (constraints.txt)"
        )
    return TYPES[name]


def _dims(text: str) -> tuple[int, ...]:
    return tuple(int(d) for d in text.split(",") if d.strip())


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
