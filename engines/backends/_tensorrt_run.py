"""Runs engines of TensorRT and TensorRT-RTX on this machine's GPU: held against stand-ins, never run on one so far."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import gpu as gpus
from engines.artifacts import Artifact, Json
from engines.backends import _cuda
from engines.backends._cuda import Cuda, CudaError
from engines.backends._on_device import OnDevice, on_device
from engines.backends._tensorrt import Logger, parsable, reasons
from engines.backends._tensorrt_api import Library
from engines.errors import UserError
from engines.options import AUTO

SHAPES = 4  # that a lane keeps ready: each holds the memory of a context and of its buffers
Shapes = Mapping[str, tuple[int, ...]]


def cannot_run(library: Library) -> str | None:
    """Returns why engines of a library cannot run on this machine, or None."""
    here = gpus.detect()
    if here is None:
        return "no NVIDIA GPU on this machine"
    try:
        library.module()
    except UserError as error:
        return f"{error.what}: {error.fix}"
    return library.unsupported(here) or _cuda.missing()


def open_runner(library: Library, engine: Artifact) -> TensorRtRunner:
    info = engine.info
    return TensorRtRunner(library, engine.file("engine.plan"), info["graph"], budget=info.get("weight_streaming"))


@dataclass(frozen=True)
class Port:
    """An input of an engine: its type there, and its axes, by size or by name."""

    name: str
    dtype: np.dtype[Any]
    axes: tuple[int | str, ...]


class TensorRtRunner:
    """Runs an engine; may be called by several threads at once.

    Feeds are numpy arrays, or lie on the GPU (DLPack or the CUDA array interface, as of torch and CuPy): those are read
    there, and must be of the engine's own type. Each call under way has a lane of its own. With `cuda_graphs`, the
    second and later calls at a shape replay one; `no_graphs` says why they do not. `budget`: bytes of streamed weights
    to keep on the GPU, or `auto`, for an engine built for that.
    """

    def __init__(
        self,
        library: Library,
        plan: Path,
        graph: Json,
        *,
        cuda_graphs: bool = True,
        budget: int | str | None = None,
        cuda: Cuda | None = None,
    ) -> None:
        self.name = library.name
        self.no_graphs = None if cuda_graphs else "not asked for"
        self._library, self._axes = library, graph["axes"]
        self._cuda = cuda or Cuda()
        self._trt = library.module()
        self._log = Logger(self._trt, verbose=False)
        self._runtime = self._trt.Runtime(self._log.logger)
        self._engine = self._load(plan)
        if budget is not None:  # before there is a context
            self._engine.weight_streaming_budget_v2 = self._budget(budget)
        axes = {entry["name"]: tuple(entry["shape"]) for entry in graph["inputs"]}
        self._inputs = [Port(name, self._dtype(name), axes[name]) for name in self._names("INPUT")]
        self._outputs = {name: self._dtype(name) for name in self._names("OUTPUT")}
        self._shared: dict[str, Any] = {}  # by all contexts
        self._lock = threading.Lock()  # of what follows, and of making contexts
        self._idle: list[_Lane] = []
        self._busy = 0

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        given = {port.name: self._given(port, feeds) for port in self._inputs}
        shapes = self._checked({name: tuple(value.shape) for name, value in given.items()})
        try:
            with self._lane() as lane:
                return lane.run(shapes, given)
        except CudaError as error:
            raise UserError(
                f"{self.name}: the engine does not run at {dict(shapes)}: {error}; {self._log.reason}",
                fix="feed fewer rows or free the GPU's memory; tools/gpu_check.py says whether engines run here at all",
            ) from error

    def run_dlpack(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Reads feeds where they lie, as `run` does; outputs are on the host."""
        return self.run(feeds)

    @contextlib.contextmanager
    def _lane(self) -> Iterator[_Lane]:
        """Yields a lane of the call's own; one in which it fails is not used again: nobody knows its state."""
        with self._lock:
            lane = self._idle.pop() if self._idle else None
            self._busy += 1
        done = []
        try:
            lane = lane or _Lane(self, self._cuda)
            yield lane
            done.append(lane)
        finally:
            with self._lock:
                self._busy -= 1
                self._idle += done

    def refit(self, model: Path) -> None:
        """Exchanges the weights for those of another graph of the same recipe and shapes; no call may be under way."""
        if not self._engine.refittable:
            raise UserError(f"{self.name}: this engine's weights are fixed", fix="build it with --refit")
        with self._lock:
            if self._busy:
                raise UserError(f"{self.name}: {self._busy} calls are under way", fix="refit when they are done")
            self._idle.clear()  # graphs may hold what the old weights were copied to
            refitter = self._trt.Refitter(self._engine, self._log.logger)
            parser = self._trt.OnnxParserRefitter(refitter, self._log.logger)
            if not (parser.refit_from_bytes(parsable(model), str(model)) and refitter.refit_cuda_engine()):
                raise UserError(
                    f"{model}: its weights do not fit the engine: {reasons(parser) or self._log.reason}",
                    fix="build an engine of this graph",
                )

    def new_context(self) -> Any:
        with self._lock:
            asked = self._library.captures and self.no_graphs is None
            context = self._library.context(self._trt, self._engine, self._shared, asked)
        if context is None:
            raise CudaError("no execution context could be made")
        return context

    @property
    def captures(self) -> bool:
        """Whether calls are to be captured here, rather than by the library itself."""
        return self.no_graphs is None and not self._library.captures

    def give_up_graphs(self, reason: str) -> None:
        self.no_graphs = reason
        warnings.warn(f"{self.name}: goes on without CUDA graphs: {reason}", RuntimeWarning, stacklevel=2)

    @property
    def outputs(self) -> Mapping[str, np.dtype[Any]]:
        return self._outputs

    @property
    def inputs(self) -> list[Port]:
        return self._inputs

    def _load(self, plan: Path) -> Any:
        content = plan.read_bytes()
        reason = self._library.refusal(self._trt, self._runtime, content)
        engine = None if reason else self._runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise UserError(
                f"{plan}: {self.name} {self._trt.__version__} does not load it on {gpus.detect() or 'this machine'}: "
                f"{reason or self._log.reason}",
                fix=f"build it for this machine: export-engine build GRAPH --backend {self.name} --out DIR",
            )
        return engine

    def _budget(self, budget: int | str) -> int:
        automatic = self._engine.get_weight_streaming_automatic_budget
        return int(automatic() if budget == AUTO else min(int(budget), self._engine.streamable_weights_size))

    def _names(self, mode: str) -> list[str]:
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        return [n for n in names if self._engine.get_tensor_mode(n) == getattr(self._trt.TensorIOMode, mode)]

    def _dtype(self, name: str) -> np.dtype[Any]:
        found: np.dtype[Any] = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
        return found

    def _given(self, port: Port, feeds: Mapping[str, Any]) -> NDArray[Any] | OnDevice:
        if port.name not in feeds:
            known = ", ".join(feeds) or "nothing"
            raise UserError(f"{self.name}: input {port.name!r} is missing among {known}", fix="feed it")
        value = feeds[port.name]
        if (lies := on_device(value)) is not None:
            if lies.dtype != port.dtype or not lies.dense:
                how = f"{lies.dtype or 'a type of its own'}{'' if lies.dense else ', with gaps'}"
                raise UserError(
                    f"{self.name}: input {port.name!r} lies on the GPU as {how}",
                    fix=f"give it as {port.dtype}, contiguous: it is read where it lies",
                )
            return lies
        array = np.asarray(value)
        if not np.can_cast(array.dtype, port.dtype, "same_kind"):
            raise UserError(f"{self.name}: input {port.name!r} is {array.dtype}", fix=f"feed {port.dtype}")
        return array

    def _checked(self, shapes: Shapes) -> Shapes:
        """Returns shapes that the engine was built for; others are a UserError that says the range."""
        sizes: dict[str, int] = {}
        for port in self._inputs:
            shape = shapes[port.name]
            where = f"{self.name}: input {port.name!r} is {shape}"
            if len(shape) != len(port.axes):
                raise UserError(f"{where}: {len(shape)} axes for {port.axes}", fix=f"feed {len(port.axes)} axes")
            for axis, size in zip(port.axes, shape, strict=True):
                bounds = self._axes[axis] if isinstance(axis, str) else {"min": axis, "max": axis}
                if not bounds["min"] <= size <= bounds["max"]:
                    span = f"{bounds['min']} … {bounds['max']}"
                    raise UserError(
                        f"{where}: {axis} of {size}, and the engine was built for {span}",
                        fix="feed within that, in parts if need be",
                    )
                if isinstance(axis, str) and sizes.setdefault(axis, size) != size:
                    raise UserError(f"{where}: {axis} is {sizes[axis]} in another input", fix="feed one size for both")
        return shapes


class _Lane:
    """What one call at a time goes through: a stream, and the shapes that were last called."""

    def __init__(self, runner: TensorRtRunner, cuda: Cuda) -> None:
        self._runner, self._cuda = weakref.proxy(runner), cuda
        self._stream = cuda.new_stream()
        self._bound: OrderedDict[Any, _Bound] = OrderedDict()
        weakref.finalize(self, cuda.end_stream, self._stream).atexit = False  # at exit the driver may be gone

    def run(self, shapes: Shapes, given: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        in_place = {name for name, value in given.items() if isinstance(value, OnDevice)}
        key = (tuple(shapes.items()), frozenset(in_place))
        if key not in self._bound:
            while len(self._bound) >= SHAPES:
                self._bound.popitem(last=False)
            self._bound[key] = _Bound(self._runner, self._cuda, self._stream, shapes, in_place)
        self._bound.move_to_end(key)
        return self._bound[key].run(given)


@dataclass(frozen=True)
class _Buffer:
    host: NDArray[Any]
    device: int


class _Bound:
    """A context at one shape, its buffers, and the graph of a call: a graph holds for the context as it was captured.

    Feeds in place come at another address each time, so such calls are not captured.
    """

    def __init__(self, runner: Any, cuda: Cuda, stream: Any, shapes: Shapes, in_place: set[str]) -> None:
        self._cuda, self._stream, self._runner = cuda, stream, runner
        self._held = contextlib.ExitStack()
        weakref.finalize(self, self._held.close).atexit = False
        self._context = runner.new_context()
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise CudaError(f"the context takes no shape {shape} of {name!r}")
        if lacking := self._context.infer_shapes():
            raise CudaError(f"the shapes of {', '.join(lacking)} are not known")
        staged = [port for port in runner.inputs if port.name not in in_place]
        self._feeds = {port.name: self._buffer(port.name, port.dtype) for port in staged}
        self._results = {name: self._buffer(name, dtype) for name, dtype in runner.outputs.items()}
        self._capturing, self._warm, self._graph = not in_place, False, None

    def _buffer(self, name: str, dtype: np.dtype[Any]) -> _Buffer:
        shape = tuple(self._context.get_tensor_shape(name))
        if any(size < 0 for size in shape):
            raise CudaError(f"the shape of {name!r} depends on values: {shape}")
        host = self._cuda.pinned(shape, dtype)
        self._held.callback(self._cuda.unpin, host.ctypes.data)
        device = self._cuda.allocate(host.nbytes)
        self._held.callback(self._cuda.free, device)
        self._context.set_tensor_address(name, device)
        return _Buffer(host, device)

    def run(self, given: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        for name, value in given.items():
            if isinstance(value, OnDevice):
                self._cuda.wait_for_all() if value.stream is None else self._cuda.wait(value.stream)
                self._context.set_tensor_address(name, value.address)
            else:
                np.copyto(self._feeds[name].host, value, casting="same_kind")
        self._start()
        self._cuda.wait(self._stream)
        return {name: buffer.host.astype(np.float32) for name, buffer in self._results.items()}

    def _start(self) -> None:
        if self._graph is None and self._warm and self._capturing and self._runner.captures:
            self._capture()
        if self._graph is None:
            self._enqueue()
        else:
            self._cuda.launch(self._graph, self._stream)
        self._warm = True  # a context settles its state in the first call at a shape, which is not to be captured

    def _enqueue(self) -> None:
        for buffer in self._feeds.values():
            self._cuda.to_device(buffer.device, buffer.host, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise CudaError("the library could not start it")
        for buffer in self._results.values():
            self._cuda.to_host(buffer.host, buffer.device, self._stream)

    def _capture(self) -> None:
        self._capturing = False
        try:
            self._graph = self._cuda.capture(self._enqueue, self._stream)
        except CudaError as error:
            self._runner.give_up_graphs(str(error))
            return
        self._held.callback(self._cuda.end_graph, self._graph)
