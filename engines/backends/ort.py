"""ONNX Runtime: the graph itself and the options that keep its numbers exact, built and run on any machine."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engines import gpu as gpus
from engines import native
from engines.artifacts import Artifact, Json
from engines.errors import UserError
from engines.options import Options
from engines.plans import FLOATS, PlanRow, tensor_bytes, write_plan
from engines.runner import Feeds

if TYPE_CHECKING:
    import onnx
    import onnxruntime

DECODES = ("run", "load")
STANDARD = {"fp8", "int8", "int4"}  # weights that ONNX has a type for; others are looked up by ops of ours
OPTIONS: tuple[str, ...] = ()
LOG_FATAL = 4  # of ONNX Runtime's severities
DTYPE = "fp32"  # on a CPU, fp16 Q/DQ is not fused: eight matmuls took 260.8 ms against 11.0 ms
# onnx.TensorProto.DataType by number, in the spelling of plans
TYPES = {
    1: "fp32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "fp16", 11: "fp64",
    16: "bf16", 17: "fp8", 19: "fp8_e5m2", 21: "uint4", 22: "int4", 23: "fp4",
}  # fmt: skip


def fingerprint() -> dict[str, str]:
    import onnxruntime

    return {
        "onnxruntime": onnxruntime.__version__,
        "codebook_ops": "native" if native.library() else "portable",
        "int8_sums": "saturating" if sums_saturate() else "exact",  # of this CPU's fastest kernels
        "device": device(),  # whose kernels the plan lists
    }


@functools.cache
def sums_saturate() -> bool:
    """Whether this CPU's fastest INT8 kernels add pairs of products in saturating 16 bits, which is wrong.

    x86 CPUs do unless they have VNNI; where nobody can tell (not Linux), they are taken to.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").partition("flags")[2].partition("\n")[0].split()
    except OSError:
        return True
    return not {"avx512_vnni", "avx_vnni"} & set(flags)


def resolve_gpu(gpu: str | None) -> str | None:
    return None


def targets() -> list[str]:
    return []


def check(layers: Mapping[str, Mapping[str, str | None]], gpu: str | None) -> None:
    """ONNX Runtime computes every format we emit, in float where it has no kernel; there is nothing to refuse."""


# Kernels that multiply, and those of them that do so in integers whatever else they read.
MATMULS = ("matmul", "fusedmatmul", "gemm", "fusedgemm", "conv", "fusedconv", "einsum", "matmulnbits", "codebookmatmul")
INTEGER = ("matmulintegertofloat", "qlinearmatmul", "qgemm", "qlinearconv", "matmulinteger", "convinteger")


def multiplied(row: PlanRow) -> str | None:
    if row.kind in INTEGER:
        return "int8"
    return next((kind for kind in row.input_types if kind in FLOATS), "fp32") if row.kind in MATMULS else None


def explain(
    op: str, asked: Mapping[str, str | None], got: Mapping[str, str | None], versions: Mapping[str, str]
) -> str | None:
    """Returns what ONNX Runtime has no kernel for; the numbers are those asked for all the same."""
    in_float = got["activation"] in FLOATS and got["weight"] == asked["weight"]  # nothing excuses an expanded weight
    kept = got["activation"] in FLOATS and got["weight"] in (asked["weight"], "int8")
    if versions.get("device") == "cuda" and asked["activation"] == "int8" and kept:
        return "CUDA: no INT8 kernels for Q/DQ: INT8 values, multiplied in float"
    if asked["activation"] == "fp8" and in_float:
        return "no FP8 kernels: FP8 values, multiplied in float"
    if asked["activation"] == "int8" and in_float and op == "convolution":
        return "an INT8 convolution wants its output quantized too: INT8 values, convolved in float"
    if asked["weight"] == "int4" and got["weight"] == got["activation"] == "int8":
        return "no INT4 by INT8 kernels: 4 bits in the file, widened to INT8 when opened"
    return None


def cannot_run() -> str | None:
    return None


def device() -> str:
    """Returns `cuda` where a GPU and its provider are present, else `cpu`."""
    import onnxruntime

    return "cuda" if gpus.detect() and "CUDAExecutionProvider" in onnxruntime.get_available_providers() else "cpu"


def note(graph: Json, options: Options) -> str | None:
    """Says so where codebooks will be decoded the slow way for want of the native library."""
    if options.decode != "run" or "codebook" not in graph["weights"]["by_format"] or native.library():
        return None
    return (
        f"ort: no native kernels for codebooks ({native.why_not()}): the portable path runs, slower, to the same "
        "numbers\n  fix: install a C++ compiler and ONNX Runtime's headers, then this package again (docs/recipes.md, "
        "On a CPU); or use --decode load"
    )


def build(model: Path, graph: Json, folder: Path, gpu: str | None, options: Options) -> Mapping[str, int]:
    import onnx

    from engines.backends import _codebooks, _int4

    for file in sorted(model.parent.glob(f"{model.name}*")):  # the graph and its external data
        link_or_copy(file, folder / file.name)
    decoding = _codebooks.rewrite(model, options.decode or DECODES[0])
    rewritten = decoding or onnx.load(model, load_external_data=False)
    widened = _int4.widen(rewritten) if graph["dtype"] == DTYPE else {}  # fp16 is multiplied in float all the same
    if decoding or widened:
        (folder / model.name).unlink()  # a link to the graph's own file
        (folder / model.name).write_bytes(rewritten.SerializeToString())
    write_plan(plan(folder / model.name, graph), folder)
    return widened


def link_or_copy(source: Path, target: Path) -> None:
    """Shares the bytes where the file system can, so that an engine costs no disk beside its graph."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


# MatMulNBits would otherwise quantize activations to int8, which no recipe asked for. A scale per channel becomes one
# per block there: of 32 inputs, 13 % more bytes, unless of as many as pad least.
CONFIG = {"session.qdq_matmulnbits_accuracy_level": "1", "session.qdq_matmulnbits_block_size": "-1"}
# Where sums saturate; elsewhere the fastest kernels are exact, and this would only slow them down.
CONFIG_IF_SUMS_SATURATE = {"session.x64quantprecision": "1"}
# With all cores: threads that spin while they wait keep those of torch, or of another process, from running.
CONFIG_IF_SHARED = {"session.intra_op.allow_spinning": "0"}


def session_record(graph: Json) -> Json:
    """Returns what any program must set for a session to compute what the graph says."""
    return {
        "disabled_optimizers": disabled_optimizers(graph),
        "config": CONFIG,
        "config_if_sums_saturate": CONFIG_IF_SUMS_SATURATE,
        "config_if_shared": CONFIG_IF_SHARED,
        "codebook_ops": bool(graph["weights"]["by_format"].keys() - STANDARD) and graph["dtype"] == DTYPE,
    }


def disabled_optimizers(graph: Json) -> list[str]:
    """Returns the optimizers that would break or unfuse this graph."""
    types = {kind for layer in graph["layers"].values() for kind in (layer["weight"], layer["activation"]) if kind}
    types |= set(graph["points"].values())
    disabled = []
    if "fp8" in types:
        disabled.append("QDQSelectorActionTransformer")  # makes a MatMulIntegerToFloat that has no fp8 kernel
    if types:
        disabled.append("MatMulAddFusion")  # makes a Gemm, which has no quantized kernel for a float bias
    return disabled


def session_options(graph: Json, threads: int = 0) -> onnxruntime.SessionOptions:
    """Returns options under which the session computes what the graph says."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    config = CONFIG | ({} if threads else CONFIG_IF_SHARED) | (CONFIG_IF_SUMS_SATURATE if sums_saturate() else {})
    for key, value in config.items():
        options.add_session_config_entry(key, value)
    return options


def open_session(
    model: Path | bytes, graph: Json, *, threads: int = 0, dump: Path | None = None
) -> onnxruntime.InferenceSession:
    """Opens a session on this machine's device; never falls back to another one."""
    import onnxruntime

    options = session_options(graph, threads)
    if dump is not None:
        dump_to(options, dump)
    want = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}[device()]
    providers: list[Any] = ["CPUExecutionProvider"]
    if not want.startswith("CPU"):
        _load_cuda()
        providers.insert(0, (want, {"use_tf32": "0"}))  # fp32 is fp32: TF32 has 10 bits of mantissa
    try:
        library = native.library()
        if library and want.startswith("CPU") and graph["dtype"] == DTYPE:  # what it has kernels for
            options.register_custom_ops_library(str(library))
        session = onnxruntime.InferenceSession(
            str(model) if isinstance(model, Path) else model,
            options,
            providers=providers,
            disabled_optimizers=disabled_optimizers(graph),
        )
    except Exception as error:
        raise UserError(
            f"ONNX Runtime cannot open {model if isinstance(model, Path) else 'the graph'}: {error}",
            fix="see the operator it names; `export-engine inspect` on the graph lists its layers",
        ) from error
    if want not in session.get_providers():
        raise UserError(
            f"ONNX Runtime did not get {want}, only {', '.join(session.get_providers())}",
            fix="install the CUDA libraries this onnxruntime-gpu needs, or hide the GPU (CUDA_VISIBLE_DEVICES=)",
        )
    return session


@functools.cache
def _load_cuda() -> None:
    """Loads the CUDA libraries that packages of pip hold; what cannot be loaded is told on stderr."""
    import onnxruntime

    with contextlib.redirect_stdout(sys.stderr):
        onnxruntime.preload_dlls()


def dump_to(options: onnxruntime.SessionOptions, path: Path) -> None:
    """Lets a session write its graph as it optimized it, with weights beside it."""
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{path.name}.data")
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")


class OrtRunner:
    """Runs an ONNX Runtime session, all its outputs or some."""

    def __init__(
        self, session: onnxruntime.InferenceSession, name: str = "ort", outputs: Sequence[str] | None = None
    ) -> None:
        import onnxruntime

        self.name = name
        self._session = session
        self._quiet = onnxruntime.RunOptions()  # what goes wrong is told once, by the error
        self._quiet.log_severity_level = LOG_FATAL
        self._types = {i.name: np.float16 if i.type == "tensor(float16)" else None for i in session.get_inputs()}
        self._onnx_types = {i.name: i.type for i in session.get_inputs()}
        self._outputs = list(outputs or (o.name for o in session.get_outputs()))

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        cast = {n: feeds[n].astype(t) if t else np.ascontiguousarray(feeds[n]) for n, t in self._types.items()}
        outputs = self._called(self._session.run, self._outputs, cast, self._quiet)
        return {n: np.asarray(o, dtype=np.float32) for n, o in zip(self._outputs, outputs, strict=True)}

    def run_dlpack(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Runs tensors that speak DLPack where they lie, and returns such. On a GPU not run so far."""
        binding, kind, number = self._session.io_binding(), "cpu", 0
        for name, wanted in self._onnx_types.items():
            value = self._ort_value(name, feeds[name])
            if value.data_type() != wanted:
                raise UserError(
                    f"{self.name}: input {name!r} is {value.data_type()}, and {wanted} is wanted",
                    fix="convert it to the engine's own type",
                )
            binding.bind_ortvalue_input(name, value)
            if value.device_name() != "cpu":
                kind, number = value.device_name(), feeds[name].__dlpack_device__()[1]
        for name in self._outputs:
            binding.bind_output(name, kind, number)
        self._called(self._session.run_with_iobinding, binding, self._quiet)
        return dict(zip(self._outputs, binding.get_outputs(), strict=True))

    def _ort_value(self, name: str, value: Any) -> onnxruntime.OrtValue:
        import onnxruntime

        try:
            return onnxruntime.OrtValue.from_dlpack(value)
        except (AttributeError, BufferError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(
                f"{self.name}: input {name!r} cannot be read where it lies: {_line(error)}",
                fix="feed a tensor that holds numbers, detached and contiguous: tensor.detach().contiguous(); or call "
                "run",
            ) from error

    def _called(self, run: Callable[..., Any], *given: Any) -> Any:
        """Returns what `run` does; what ONNX Runtime raises has no class of its own beneath Exception."""
        from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, NotImplemented, RuntimeException

        try:
            return run(*given)
        except (InvalidArgument, RuntimeError) as error:  # the second: for tensors that are bound
            raise UserError(
                f"{self.name}: ONNX Runtime cannot run it on what was fed: {_line(error)}",
                fix="check the values fed: one may be out of the model's range, such as a class that it does not have",
            ) from error
        except (Fail, NotImplemented, RuntimeException) as error:
            raise UserError(
                f"{self.name}: ONNX Runtime cannot run it: {_line(error)}",
                fix="the graph does not fit its manifest, or memory is short: get it, or make it, again",
            ) from error


def _line(error: Exception) -> str:
    """Returns what an error says in one line, without the stack that ONNX Runtime adds."""
    return " ".join(str(error).split("Stacktrace:")[0].split())


def open_runner(engine: Artifact, threads: int = 0) -> OrtRunner:
    graph = engine.info["graph"]
    session = open_session(engine.file("model.onnx"), graph, threads=threads)
    found, said = {i.name for i in session.get_inputs()}, {entry["name"] for entry in graph["inputs"]}
    if found != said or graph["output"] not in {o.name for o in session.get_outputs()}:
        raise UserError(
            f"{engine.path}: its model takes {', '.join(sorted(found))}, its manifest says {', '.join(sorted(said))}",
            fix="do not use this engine: it was tampered with; get it, or make it, again",
        )
    return OrtRunner(session)


def plan(model: Path, graph: Json) -> list[PlanRow]:
    """Reads the layers of the graph that ONNX Runtime really runs, after its own optimizations."""
    import onnx

    dump = model.with_name("optimized.onnx")
    try:
        open_session(model, graph, dump=dump)
        rows = read_plan(onnx.load(dump, load_external_data=False), onnx.load(model, load_external_data=False))
    finally:
        for file in model.parent.glob(f"{dump.name}*"):
            file.unlink()
    return rows


def read_plan(optimized: onnx.ModelProto, source: onnx.ModelProto) -> list[PlanRow]:
    """Returns a row per node; a node stands for those of `source` that made its outputs or used its constants."""
    graph = optimized.graph
    types = _types(source) | _types(optimized)
    constants = {i.name: (tuple(i.dims), TYPES.get(i.data_type, "other")) for i in graph.initializer}
    origin: dict[str, list[str]] = {}
    for node in source.graph.node:
        for value in (*node.input, *node.output):
            origin.setdefault(value, []).append(node.name)
    made_by = {value: node.name for node in source.graph.node for value in node.output}
    named = {node.name for node in source.graph.node}
    rows, counted = [], set[str]()
    for node in graph.node:
        own = [value for value in node.input if value in constants]
        nodes = [name for name in _names(node.name) if name in named]
        laid_out = node.name.removesuffix("_nchwc")  # a convolution in another layout, called after what it gives
        nodes += [made_by[value] for value in (*node.output, laid_out) if value in made_by]
        nodes += [name for value in own if len(origin.get(value, [])) == 1 for name in origin[value]]
        fresh = [value for value in dict.fromkeys(own) if value not in counted]
        counted.update(fresh)
        rows.append(
            PlanRow(
                name=node.name,
                kind=node.op_type.lower(),
                input_types=tuple(types.get(v, "other") for v in node.input if v and v not in constants),
                constant_types=_packed(node, tuple(constants[v][1] for v in own)),
                constant_bytes=sum(tensor_bytes(*_sized(constants[v])) for v in fresh),
                output_types=tuple(types.get(v, "other") for v in node.output if v),
                onnx_nodes=tuple(dict.fromkeys(nodes)),
            )
        )
    return rows


def _names(name: str) -> list[str]:
    """Returns what a node may have been called before a fusion added to its name: `path/MatMul/MatMulScaleFusion/`."""
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _packed(node: onnx.NodeProto, kinds: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the types of a node's constants; MatMulNBits holds codes of a few bits in bytes."""
    bits = next((a.i for a in node.attribute if a.name == "bits" and node.op_type == "MatMulNBits"), None)
    return (f"int{bits}", *kinds[1:]) if bits else kinds


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Returns the type of every tensor that ONNX's own inference knows; it stops at ONNX Runtime's own ops."""
    import onnx

    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    return {v.name: TYPES.get(v.type.tensor_type.elem_type, "other") for v in values}


def _sized(constant: tuple[tuple[int, ...], str]) -> tuple[tuple[int, ...], str]:
    dims, kind = constant
    return dims, "int8" if kind == "other" else kind
