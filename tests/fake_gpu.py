"""Stand-ins for cuda-python's runtime and for TensorRT's: a GPU whose memory is the host's and whose engine doubles.

They keep to the rules that a GPU would: memory is freed once, a graph replays addresses as they were captured, and what
may not be captured breaks the capture. Nothing here proves that an engine runs on a GPU.
"""

from __future__ import annotations

import ctypes
import threading
from types import ModuleType, SimpleNamespace

import numpy as np

OK, FAULT = 0, 1
AXES = {"batch": {"min": 1, "opt": 2, "max": 4}}
GRAPH = {
    "axes": AXES,
    "inputs": [
        {"name": "x", "dtype": "float16", "shape": ["batch", 3]},
        {"name": "timestep", "dtype": "float32", "shape": ["batch"]},
    ],
}
TYPES = {"x": np.float16, "timestep": np.float32, "y": np.float16}


class FakeCuda:
    """`cuda.bindings.runtime`; `calls` lists what was called, `fails` what is to fail."""

    cudaStreamNonBlocking = 1
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)

    def __init__(self):
        self.calls, self.fails = [], set()
        self.memory, self.captures, self.graphs, self.streams = {}, {}, {}, set()
        self._lock = threading.Lock()

    def __getattribute__(self, name):
        if not name.startswith("cuda") or name in ("cudaStreamNonBlocking", "cudaMemcpyKind", "cudaStreamCaptureMode"):
            return object.__getattribute__(self, name)
        found = object.__getattribute__(self, name)

        def call(*arguments):
            with self._lock:
                self.calls.append(name)
                if name not in self.fails:
                    return found(*arguments)
                if name == "cudaStreamEndCapture":  # a capture that went wrong has ended all the same
                    self.captures.pop(arguments[0])
                return FAULT, None

        return call

    def put(self, stream, work):
        """Does what is put on a stream, or records it where that is being captured."""
        self.captures[stream].append(work) if stream in self.captures else work()

    def cudaGetErrorString(self, error):
        return OK, b"out of luck"

    def cudaGetLastError(self):
        return (OK,)

    def cudaMalloc(self, size):
        held = (ctypes.c_uint8 * size)()
        self.memory[ctypes.addressof(held)] = held
        return OK, ctypes.addressof(held)

    def cudaHostAlloc(self, size, flags):
        return FakeCuda.cudaMalloc(self, size)

    def cudaFree(self, address):
        del self.memory[address]
        return (OK,)

    def cudaFreeHost(self, address):
        del self.memory[address]
        return (OK,)

    def cudaMemcpyAsync(self, target, source, size, kind, stream):
        self.put(stream, lambda: ctypes.memmove(target, source, size))
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags):
        self.streams.add(stream := len(self.calls))
        return OK, stream

    def cudaStreamDestroy(self, stream):
        self.streams.remove(stream)
        return (OK,)

    def cudaStreamSynchronize(self, stream):
        return (OK,)

    def cudaDeviceSynchronize(self):
        return (OK,)

    def cudaStreamBeginCapture(self, stream, mode):
        self.captures[stream] = []
        return (OK,)

    def cudaStreamEndCapture(self, stream):
        self.graphs[graph := object()] = self.captures.pop(stream)
        return OK, graph

    def cudaGraphInstantiate(self, graph, flags):
        self.graphs[made := object()] = self.graphs[graph]
        return OK, made

    def cudaGraphDestroy(self, graph):
        del self.graphs[graph]
        return (OK,)

    def cudaGraphExecDestroy(self, graph):
        del self.graphs[graph]
        return (OK,)

    def cudaGraphLaunch(self, graph, stream):
        for work in self.graphs[graph]:
            work()
        return (OK,)


class Context:
    """Computes y = 2 x + timestep, at the addresses that it was given when it was started."""

    def __init__(self, engine):
        self.engine, self.shapes, self.addresses = engine, {}, {}
        engine.contexts.append(self)

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def infer_shapes(self):
        return [name for name in ("x", "timestep") if name not in self.shapes]

    def get_tensor_shape(self, name):
        return self.shapes["x"] if name == "y" else self.shapes[name]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        if stream in self.engine.cuda.captures and not self.engine.can_be_captured:
            return False
        shapes, addresses = {**self.shapes, "y": self.shapes["x"]}, dict(self.addresses)

        def work():
            x, timestep, y = (at(addresses[n], shapes[n], TYPES[n]) for n in ("x", "timestep", "y"))
            np.copyto(y, 2 * x + timestep[:, None], casting="same_kind")

        self.engine.cuda.put(stream, work)
        return self.engine.starts


def at(address, shape, dtype):
    """Returns memory as an array."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address)).view(dtype).reshape(shape)


class Engine:
    num_io_tensors = 3
    refittable = True
    starts = can_be_captured = True
    streamable_weights_size = 1000
    weight_streaming_budget_v2 = None

    def __init__(self, cuda):
        self.cuda, self.contexts, self.settings = cuda, [], []

    def get_tensor_name(self, index):
        return ("x", "timestep", "y")[index]

    def get_tensor_mode(self, name):
        return "output" if name == "y" else "input"

    def get_tensor_dtype(self, name):
        return TYPES[name]

    def get_weight_streaming_automatic_budget(self):
        return 700

    def create_execution_context(self, settings=None):
        self.settings.append(settings)
        return Context(self)

    def create_runtime_config(self):
        return SimpleNamespace(
            create_runtime_cache=lambda: object(), set_runtime_cache=lambda cache: self.settings.append(cache)
        )


class ILogger:
    Severity = SimpleNamespace(ERROR=1)


def fake_tensorrt(name, cuda, loads=True):
    """Returns a module in the place of `tensorrt` or `tensorrt_rtx`, and the engine that it loads from any plan."""
    module, engine = ModuleType(name), Engine(cuda)
    module.__version__ = "11.4.0"
    module.ILogger, module.nptype = ILogger, lambda kind: kind
    module.TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    module.CudaGraphStrategy = SimpleNamespace(DISABLED="disabled", WHOLE_GRAPH_CAPTURE="whole graph")
    module.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")
    module.EngineValidity = SimpleNamespace(INVALID="invalid")

    class Runtime:
        def __init__(self, logger):
            self.logger = logger

        def get_engine_validity(self, plan):
            return ("invalid", 4) if plan == b"of another GPU" else ("valid", 0)

        def deserialize_cuda_engine(self, plan):
            if not loads:
                self.logger.log(1, "serialized by another version")
            return engine if loads else None

    module.Runtime = Runtime
    return module, engine
