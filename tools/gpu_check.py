"""Says what a machine with an NVIDIA GPU has, whether engines and kernels agree with their references on it, and times.

    python tools/gpu_check.py --out gpu.json

Needs torch and click; of Triton, TensorRT-RTX, TensorRT, cuda-python and onnxruntime-gpu it takes what is there, and of
each part that is not it says so and goes on. For TensorRT and TensorRT-RTX it builds by hand, and as `export-engine`
does: with CUDA graphs and without, by several threads, timings used again, weights exchanged and streamed. Where the
package is not installed, run it with PYTHONPATH=. from the repository.
Prints JSON; exit code 3 if an engine or a kernel disagrees with its reference. Each part runs in a process of its own:
a builder that crashes, or a kernel that leaves the GPU in an error, spoils no other part.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from engines import gpu

SCHEMA_VERSION = 1
DEVICE = "cuda"
TIMEOUT_S = 600  # for one part
PACKAGES = ("torch", "triton", "tensorrt_rtx", "tensorrt", "cuda", "onnxruntime", "onnx", "onnx_ir")

ENGINE_ROWS, ENGINE_INPUTS, ENGINE_OUTPUTS = 32, 256, 192
ENGINE_LIMIT_DB = 50.0  # rounding the output to fp16 leaves about 73 dB; an engine may sum in fp16, too

LINEARS = ((1152, 1152), (1152, 4608), (4608, 1152), (1152, 6912))  # DiT-XL/2: attention, MLP, adaLN; inputs, outputs
CODEBOOKS = {"codebook 2 bit": (256, 4), "codebook 3 bit": (64, 2), "codebook 4 bit": (16, 1)}  # entries, vector size
ODD_LINEARS = ((90, 77), (1150, 1))  # that divide no tile
KERNEL_ROWS = (0, 1, 4, 5, 16, 17, 100, 300, 1000, 2048)
TIMED_ROWS = (1, 4, 8, 32, 256, 2048, 16384)
WARM_UP, RUNS = 5, 30
FLUSH_BYTES = 512 * 2**20  # more than any L2, and longer to write than a launch takes on the CPU
HOW = (
    f"GPU time between CUDA events around one call, median of {RUNS} after {WARM_UP} to warm up; "
    f"{FLUSH_BYTES // 2**20} MiB written before each, so L2 is cold and the launch is not in the time"
)

Part = dict[str, Any]


class Missing(Exception):
    """A part that this machine lacks; says which."""


def need(*modules: str) -> None:
    """Raises Missing if there is no GPU, a module is not installed, or torch is one for CPUs."""
    lacking = [] if gpu.detect() else ["no NVIDIA GPU"]
    lacking += [f"{module} is not installed" for module in modules if importlib.util.find_spec(module) is None]
    if not lacking and "torch" in modules:
        import torch

        lacking += [] if torch.cuda.is_available() else ["torch does not find the GPU (is it a build for CPUs?)"]
    if lacking:
        raise Missing("; ".join(lacking))


def guarded(part: Callable[..., Any], *arguments: Any) -> Any:
    """Returns what `part` returns, or why there is nothing."""
    try:
        return part(*arguments)
    except Missing as reason:
        return {"missing": str(reason)}
    except Exception as error:  # noqa: BLE001  whatever a library throws is a finding, and the rest goes on
        return {"failed": f"{type(error).__name__}: {error}"}


def machine() -> Part:
    """Returns the GPU, the interpreter, and the packages that this tool can use."""
    names = importlib.metadata.packages_distributions()
    versions = {
        name: f"{names[name][0]} {importlib.metadata.version(names[name][0])}" if name in names else None
        for name in PACKAGES
    }
    return {
        "gpu": guarded(_gpu),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def _gpu() -> Part:
    need()
    found: Part = {"compute_capability": gpu.detect()}
    if (smi := shutil.which("nvidia-smi")) is None:
        return found | {"missing": "nvidia-smi, which tells name, driver and memory"}
    fields = "name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.memory"
    command = [smi, f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    line = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return found | dict(zip(fields.split(","), (value.strip() for value in line.split(",")), strict=True))


def graphs() -> dict[str, tuple[bytes, Any, Any]]:
    """Returns one-layer graphs, y = x · w, with x fp16 [rows, inputs] and the exact y, fp64 [rows, outputs].

    All numbers are exact in the types they meet, so that only sums and the output are rounded.
    """
    import torch
    from onnx import TensorProto, helper
    from onnx_ir import serde

    from engines.backends._functions import written_out
    from exporter.ops import codebook as op

    torch.manual_seed(0)
    x = torch.randn(ENGINE_ROWS, ENGINE_INPUTS).to(torch.float8_e4m3fn).half() / 2
    types = {
        torch.float16: TensorProto.FLOAT16,
        torch.float8_e4m3fn: TensorProto.FLOAT8E4M3FN,
        torch.int8: TensorProto.INT8,
    }

    def graph(nodes: list[Any], functions: list[Any], **constants: torch.Tensor) -> bytes:
        made = helper.make_graph(
            nodes,
            "layer",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [ENGINE_ROWS, ENGINE_INPUTS])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT16, [ENGINE_ROWS, ENGINE_OUTPUTS])],
            [helper.make_tensor(name, types[t.dtype], t.shape, _bytes(t), raw=True) for name, t in constants.items()],
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(op.DOMAIN, op.VERSION)]
        model = helper.make_model(made, ir_version=10, opset_imports=opsets, functions=functions)
        return written_out(model).SerializeToString()

    plain = torch.randn(ENGINE_INPUTS, ENGINE_OUTPUTS).half() / 16
    fp8 = torch.randn(ENGINE_INPUTS, ENGINE_OUTPUTS).to(torch.float8_e4m3fn)
    scale = 2.0 ** -torch.randint(3, 6, (ENGINE_OUTPUTS,)).half()
    codes = torch.randint(-128, 128, (ENGINE_OUTPUTS, ENGINE_INPUTS // 4), dtype=torch.int8)
    table = torch.randn(256, 4).half() / 16
    half, zero = torch.tensor(0.5).half(), torch.zeros(()).to(torch.float8_e4m3fn)
    node = helper.make_node
    decode = node(op.NAME, ["codes", "table"], ["rows"], "decode", domain=op.DOMAIN, overload="vectors")
    body = serde.serialize_function(op.function(21, "vectors"))
    return {
        "fp16": (graph([node("MatMul", ["x", "w"], ["y"])], [], w=plain), x, x.double() @ plain.double()),
        "fp8": (
            graph(
                [
                    node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                    node("DequantizeLinear", ["q", "s", "z"], ["d"]),
                    node("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
                    node("MatMul", ["d", "wd"], ["y"]),
                ],
                [],
                s=half, z=zero, w=fp8, ws=scale,
            ),
            x,
            x.double() @ (fp8.double() * scale.double()),
        ),
        "codebook": (
            graph(
                [decode, node("Transpose", ["rows"], ["w"], perm=[1, 0]), node("MatMul", ["x", "w"], ["y"])],
                [body],
                codes=codes, table=table,
            ),
            x,
            x.double() @ op.reference(codes, table).double().T,
        ),
    }  # fmt: skip


def _bytes(tensor: Any) -> bytes:
    import torch

    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def compared(y: Any, exact: Any) -> Part:
    """Returns how far an engine's output is from the exact one."""
    noise = (y.double().cpu() - exact).square().sum().item()
    sqnr_db = 10 * math.log10(exact.square().sum().item() / noise) if 0 < noise < math.inf else None
    passed = noise == 0 or (sqnr_db is not None and sqnr_db >= ENGINE_LIMIT_DB)
    return {"sqnr_db": sqnr_db, "limit_db": ENGINE_LIMIT_DB, "passed": passed, "how": "against fp64, same numbers"}


def tensorrt(name: str) -> Part:
    """Builds, loads and runs every graph with a TensorRT library, for each target that could suit this GPU."""
    need(name, "torch", "onnx", "onnx_ir")
    trt = importlib.import_module(name)
    made = graphs()
    targets = targets_of(trt, gpu.detect() or "")
    return {target: {kind: guarded(engine, trt, target, *made[kind]) for kind in made} for target in targets}


def targets_of(trt: Any, here: str) -> list[str]:
    """Returns this GPU by name where the library knows it, else as what is here; then portable, where there is such."""
    if not hasattr(trt, "ComputeCapability"):
        return ["this GPU"]
    known = trt.ComputeCapability.__members__
    return [here.upper() if here.upper() in known else "CURRENT", "portable"]


def engine(trt: Any, target: str, model: bytes, x: Any, exact: Any) -> Part:
    """Builds an engine, runs it and returns how far it is from its reference."""
    from engines.backends._tensorrt import Logger

    log = Logger(trt)
    try:
        return compared(run(trt, log, plan(trt, log, target, model), x), exact)
    except RuntimeError as error:
        raise RuntimeError(f"{error}: {' '.join(log.errors) or 'no reason given'}") from error


def plan(trt: Any, log: Any, target: str, model: bytes) -> Any:
    """Builds a graph; raises a RuntimeError where the library refuses it."""
    from engines.backends._tensorrt_api import network_flags

    builder = trt.Builder(log.logger)
    network = builder.create_network(network_flags(trt))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse(model):
        raise RuntimeError("the parser refuses it")
    config = builder.create_builder_config()
    if target not in ("portable", "this GPU"):
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.__members__[target], 0)
    made = builder.build_serialized_network(network, config)
    if made is None:
        raise RuntimeError("the builder refuses it")
    return made


def run(trt: Any, log: Any, plan: Any, x: Any) -> Any:
    """Loads a plan and runs it on x; raises a RuntimeError where the library refuses."""
    import torch

    runtime = trt.Runtime(log.logger)
    loaded = runtime.deserialize_cuda_engine(plan)
    if loaded is None:
        raise RuntimeError("it does not load")
    context = loaded.create_execution_context()
    x, y = x.to(DEVICE), torch.empty(ENGINE_ROWS, ENGINE_OUTPUTS, dtype=torch.float16, device=DEVICE)
    torch.cuda.synchronize()
    context.set_tensor_address("x", x.data_ptr())
    context.set_tensor_address("y", y.data_ptr())
    stream = torch.cuda.Stream()
    if not context.execute_async_v3(stream.cuda_stream):
        raise RuntimeError("it does not run")
    stream.synchronize()
    return y


def backend(name: str) -> Part:
    """Builds and runs every graph as `export-engine` does, with every option of the backend."""
    from engines import backends

    if reason := backends.load(name).cannot_run():
        raise Missing(reason)
    need("torch", "onnx", "onnx_ir", "onnxruntime")
    import gpu_backends

    return gpu_backends.check(name, graphs(), compared, guarded)


def onnxruntime() -> Part:
    """Runs every graph on ONNX Runtime's CUDA provider."""
    need("onnxruntime", "torch", "onnx", "onnx_ir")
    import onnxruntime as ort

    if "CUDAExecutionProvider" not in ort.get_available_providers():
        raise Missing("this onnxruntime has no CUDA provider")
    ort.preload_dlls()  # the CUDA libraries that came with torch
    return {kind: guarded(session, "CUDAExecutionProvider", *made) for kind, made in graphs().items()}


def session(provider: str, model: bytes, x: Any, exact: Any) -> Part:
    """Runs a graph on one of ONNX Runtime's providers."""
    import onnxruntime as ort
    import torch

    opened = ort.InferenceSession(model, providers=[provider])
    if opened.get_providers()[0] != provider:
        raise RuntimeError(f"{provider} was asked for and {opened.get_providers()} came")
    (y,) = opened.run(None, {"x": x.numpy()})
    return compared(torch.from_numpy(y), exact)


def kernels() -> list[Part]:
    """Holds every Triton kernel against its torch reference, over packings, sizes and scales."""
    need("torch", "triton")
    import torch

    from exporter.kernels import codebook

    found = []
    for bits, inputs, outputs, scale, rows in cases():
        weight = random_weight(*CODEBOOKS[bits], inputs, outputs, scale)
        x = torch.randn(rows, inputs, device=DEVICE).half()
        for kernel in (codebook.few_rows, codebook.many_rows) if rows <= codebook.FEW_ROWS else (codebook.many_rows,):
            sizes = {"rows": rows, "inputs": weight.shape[1], "outputs": outputs, "scale": scale}
            result = {"passed": False} | guarded(agreement, kernel, x, weight)
            found.append({"kernel": kernel.__name__, "weight": bits} | sizes | result)
    return found


def cases() -> Iterator[tuple[str, int, int, str, int]]:
    """Yields packing, inputs, outputs, scale and rows."""
    for bits, (_, vector_size) in CODEBOOKS.items():
        for rows in KERNEL_ROWS:
            for inputs, outputs in LINEARS:
                yield bits, inputs, outputs, "channel", rows
            for (inputs, outputs), scale in zip(ODD_LINEARS, ("none", "tensor"), strict=True):
                yield bits, inputs - inputs % (2 * vector_size), outputs, scale, rows


def agreement(kernel: Callable[..., Any], x: Any, weight: Any) -> Part:
    """Returns by how much a kernel exceeds what rounding may do."""
    from exporter.kernels import codebook

    error = codebook.disagreement(kernel(x, weight), x, weight)
    how = "largest |kernel − fp64| over the bound on rounding to fp16 and on sums in fp32"
    return {"error": error if math.isfinite(error) else None, "limit": 1.0, "passed": error <= 1.0, "how": how}


def random_weight(entries: int, vector_size: int, inputs: int, outputs: int, scale: str) -> Any:
    """Returns a weight of random codes on the device."""
    import torch

    from exporter.formats.codebook import Format
    from exporter.kernels.codebook import PackedWeight
    from exporter.tensors import CodebookTensor

    torch.manual_seed(0)
    codes = torch.randint(entries, (outputs, inputs // vector_size), dtype=torch.uint8)
    table = torch.randn(entries, vector_size).half()
    scales = {"none": None, "tensor": torch.tensor(0.25), "channel": torch.rand(outputs).half() + 0.5}
    return PackedWeight.of(CodebookTensor(codes, table, scales[scale], Format(vector_size, entries))).to(DEVICE)


def timings() -> list[Part]:
    """Times codebook, FP8 and bf16 matmuls at DiT-XL/2's shapes."""
    need("torch", "triton")
    found = []
    for inputs, outputs in LINEARS:
        weights = {name: random_weight(*sizes, inputs, outputs, "channel") for name, sizes in CODEBOOKS.items()}
        for rows in TIMED_ROWS:
            for name, call in matmuls(rows, inputs, outputs, weights).items():
                sizes = {"matmul": name, "rows": rows, "inputs": inputs, "outputs": outputs}
                found.append(sizes | guarded(timed, call))
    return found


def matmuls(rows: int, inputs: int, outputs: int, weights: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Returns what to time: each takes its operands as they lie, FP8's x quantized already."""
    import torch

    from exporter.kernels import codebook

    x = torch.randn(rows, inputs, device=DEVICE)
    w = torch.randn(outputs, inputs, device=DEVICE)
    one = torch.ones((), device=DEVICE)

    def fp8() -> Callable[[], Any]:
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        return lambda: torch._scaled_mm(x8, w8.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)

    half, bf16, w16 = x.half(), x.bfloat16(), w.bfloat16()
    packed = {
        f"{name}, {kernel.__name__}": functools.partial(kernel, half, weight)
        for name, weight in weights.items()
        for kernel in ((codebook.few_rows, codebook.many_rows) if rows <= codebook.FEW_ROWS else (codebook.many_rows,))
    }
    return packed | {"fp8": fp8(), "bf16": lambda: bf16 @ w16.T}


def timed(call: Callable[[], Any]) -> Part:
    """Returns the median GPU time of a call, in µs."""
    import torch

    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=DEVICE)
    for _ in range(WARM_UP):
        call()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    times = [1000 * start.elapsed_time(end) for start, end in events]
    return {"us_p50": statistics.median(times), "us_min": min(times), "us_max": max(times), "how": HOW}


PARTS: dict[str, Callable[[], Any]] = {
    "machine": machine,
    "tensorrt_rtx": functools.partial(tensorrt, "tensorrt_rtx"),
    "tensorrt": functools.partial(tensorrt, "tensorrt"),
    "backend_trt_rtx": functools.partial(backend, "trt-rtx"),
    "backend_trt": functools.partial(backend, "trt"),
    "onnxruntime": onnxruntime,
    "kernels": kernels,
    "timings": timings,
}


def in_a_process(part: str) -> Any:
    """Returns a part's result, or how its process ended."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--only", part, "--out", str(out)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        except subprocess.TimeoutExpired:
            return {"failed": f"not done after {TIMEOUT_S} s", "passed": False}
        if not out.is_file():
            why = f"its process ended with {done.returncode}: {done.stderr[-2000:].strip()}"
            return {"failed": why, "passed": False}
        return json.loads(out.read_text())[part]


def disagrees(report: Any) -> bool:
    """Returns whether anything was compared and did not pass, hung or died, or kernels could not be compared at all.

    An engine that a library refuses to build or load is said to be refused, not to disagree: it may be its GPU's fault.
    """
    if isinstance(report, dict):
        crashed = "failed" in report.get("kernels", {})
        return crashed or report.get("passed") is False or any(map(disagrees, report.values()))
    return isinstance(report, list) and any(map(disagrees, report))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes; without it, to stdout.")
@click.option("--only", type=click.Choice(list(PARTS)), help="This part alone, in this process.")
def main(out: Path | None, only: str | None) -> None:
    report: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "date": datetime.date.today().isoformat()}
    for part in [only] if only else PARTS:
        click.echo(f"{part} …", err=True)
        report[part] = guarded(PARTS[part]) if only else in_a_process(part)
    text = json.dumps(report, indent=1, ensure_ascii=False)
    if out:
        out.write_text(text + "\n")
    else:
        click.echo(text)
    sys.exit(3 if disagrees(report) else 0)


if __name__ == "__main__":
    main()
