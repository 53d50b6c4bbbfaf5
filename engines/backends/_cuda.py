"""CUDA memory, streams and graphs through cuda-python, whose calls return an error beside their results."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.errors import UserError

FIX = "pip install 'cuda-python>=12.9'"


class CudaError(RuntimeError):
    """A call of the CUDA runtime failed."""


def missing() -> str | None:
    """Returns why cuda-python cannot be used, or None."""
    try:
        importlib.import_module("cuda.bindings.runtime")
    except ImportError as error:
        return f"cuda-python cannot be imported ({error}): {FIX}"
    return None


class Cuda:
    """The calls that a runner makes; `runtime` is `cuda.bindings.runtime`, or what stands in for it."""

    def __init__(self, runtime: Any = None) -> None:
        if runtime is None:
            if reason := missing():
                raise UserError(reason.removesuffix(f": {FIX}"), fix=FIX)
            runtime = importlib.import_module("cuda.bindings.runtime")
        self._runtime = runtime

    def _call(self, name: str, *arguments: Any) -> Any:
        """Returns a call's result, None where it has none."""
        error, *results = getattr(self._runtime, name)(*arguments)
        if int(error):
            text = self._runtime.cudaGetErrorString(error)[1]
            told = text.decode() if isinstance(text, bytes) else str(text)
            raise CudaError(f"{name}: {told}")
        return results[0] if results else None

    def allocate(self, size: int) -> int:
        """Returns the address of `size` bytes on the GPU, of one for none: TensorRT takes no null address."""
        return int(self._call("cudaMalloc", max(1, size)))

    def free(self, address: int) -> None:
        self._call("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """Returns host memory that the GPU copies from and to by itself; `unpin` gives it back."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        address = int(self._call("cudaHostAlloc", max(1, size), 0))
        held = (ctypes.c_uint8 * max(1, size)).from_address(address)
        return np.ctypeslib.as_array(held)[:size].view(dtype).reshape(shape)

    def unpin(self, address: int) -> None:
        self._call("cudaFreeHost", address)

    def to_device(self, target: int, source: NDArray[Any], stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", target, source.ctypes.data, source.nbytes, kind, stream)

    def to_host(self, target: NDArray[Any], source: int, stream: Any) -> None:
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", target.ctypes.data, source, target.nbytes, kind, stream)

    def new_stream(self) -> Any:
        """Returns a stream that does not wait for the default one."""
        return self._call("cudaStreamCreateWithFlags", self._runtime.cudaStreamNonBlocking)

    def end_stream(self, stream: Any) -> None:
        self._call("cudaStreamDestroy", stream)

    def wait(self, stream: Any) -> None:
        self._call("cudaStreamSynchronize", stream)

    def wait_for_all(self) -> None:
        self._call("cudaDeviceSynchronize")

    def capture(self, work: Callable[[], None], stream: Any) -> Any:
        """Returns, as a graph that can be launched, what `work` puts on the stream, without doing it.

        Raises what `work` raises, or a CudaError; the stream is usable again in either case.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal  # other threads go on allocating
        self._call("cudaStreamBeginCapture", stream, mode)
        with contextlib.ExitStack() as unless_done:
            unless_done.callback(self._end_broken, stream)
            work()
            unless_done.pop_all()
        graph = self._call("cudaStreamEndCapture", stream)
        try:
            return self._call("cudaGraphInstantiate", graph, 0)
        finally:
            self._call("cudaGraphDestroy", graph)

    def _end_broken(self, stream: Any) -> None:
        error, graph = self._runtime.cudaStreamEndCapture(stream)
        if not int(error):
            self._call("cudaGraphDestroy", graph)
        self._runtime.cudaGetLastError()  # or the next call is told of it

    def launch(self, graph: Any, stream: Any) -> None:
        self._call("cudaGraphLaunch", graph, stream)

    def end_graph(self, graph: Any) -> None:
        self._call("cudaGraphExecDestroy", graph)
