"""Loading a bundle: the engine that suits this machine, checked and ready to be called. torch is not needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import artifacts, backends, golden, gpu, sampling, schedule
from engines.artifacts import Artifact, Json
from engines.bundle import Bundle, open_bundle
from engines.contract import Contract
from engines.errors import UserError
from engines.runner import Runner

FASTEST_FIRST = ("trt", "trt-rtx", "ort")


class Engine:
    """An engine of a bundle, opened: call it with named arrays. Calls from several threads at once are served."""

    def __init__(
        self, bundle: Bundle, name: str, artifact: Artifact, threads: int = 0, *, runner: Runner | None = None
    ) -> None:
        info = bundle.info
        self.bundle, self.name, self.artifact = bundle, name, artifact
        self.inputs: list[Json] = info["inputs"]
        self.output: Json = info["output"]
        self.axes: dict[str, Json] = info["axes"]
        self.sampler: Json = info["sampler"]
        self._contract = Contract(name, self.inputs, self.axes)
        self._runner: Any = runner or backends.open_runner(artifact, threads)

    def __repr__(self) -> str:
        info = self.bundle.info
        return f"<engines.Engine {self.name} {self.dtype} of {info['model']['name']}, recipe {info['recipe']['name']}>"

    def run(self, feeds: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
        """Returns the output by name, fp32; `feeds` are arrays by name, of numpy or by DLPack, on the CPU.

        `step`, each row's position in the schedule, is needed where the engine has scales for every step.
        """
        found: dict[str, NDArray[np.float32]] = self._runner.run(self._contract.checked(feeds))
        return found

    def __call__(self, **feeds: Any) -> NDArray[np.float32]:
        """Returns the output itself."""
        return self.run(feeds)[self.output["name"]]

    def run_dlpack(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        """Returns outputs that speak DLPack; feeds are read where they lie (CPU or GPU), without a copy.

        But `step` and `timestep`, of engines with a scale for every step, are from the CPU: they are checked there.

        ONNX Runtime's outputs lie there too, those of TensorRT on the host. Feeds are of the engine's own
        types: floats `dtype`, but inputs that the contract calls fp32 or int64.
        """
        self._contract.check_names(feeds)
        self._contract.check_shapes({entry["name"]: self._shape(entry["name"], feeds) for entry in self.inputs})
        if not hasattr(self._runner, "run_dlpack"):
            raise UserError(f"{self.name}: takes host arrays alone", fix="call run")
        found: dict[str, Any] = self._runner.run_dlpack(feeds)
        return found

    def _shape(self, name: str, feeds: Mapping[str, Any]) -> Sequence[int]:
        if not hasattr(feeds[name], "shape"):
            raise UserError(
                f"{self.name}: input {name!r} is a {type(feeds[name]).__name__}, which speaks no DLPack",
                fix="feed a tensor, or call run",
            )
        shape: Sequence[int] = feeds[name].shape
        return shape

    @property
    def backend(self) -> str:
        return str(self.artifact.info["backend"])

    @property
    def dtype(self) -> str:
        return str(self.artifact.info["dtype"])

    def steps_of(self, timesteps: Any, *, nearest: bool = False) -> list[int]:
        """Returns the `step` to feed at each of a sampler's timesteps: see engines.schedule.steps_of."""
        return schedule.steps_of(self.artifact.info["graph"], timesteps, nearest=nearest)

    def sample(
        self,
        noise: Any,
        wanted: Mapping[str, Any],
        unwanted: Mapping[str, Any] | None = None,
        watch: Callable[[int, NDArray[np.float32]], None] | None = None,
    ) -> NDArray[np.float32]:
        """Returns finished samples of noise [n, …], however many: see engines.sampling.sample."""
        return sampling.sample(self, self.sampler, noise, wanted, unwanted, watch)

    def self_test(self) -> list[Json]:
        """Runs the recorded feeds; returns a row for each, and raises a UserError if one is off."""
        rows = golden.rows(self, self.bundle)
        if wrong := [row for row in rows if not row["passed"]]:
            raise UserError(
                f"{self.bundle.source}: engine {self.name!r} does not give what was recorded: {golden.line(wrong[0])}",
                fix="update the backend's library to the version in the manifest, or build the engine anew here",
            )
        return rows


def load(
    path: Path | str,
    *,
    backend: str | None = None,
    engine: str | Path | None = None,
    threads: int = 0,
    self_test: bool = False,
) -> Engine:
    """Opens a bundle (a folder or a zip), verifies it, and returns its best engine that can run here.

    `backend` asks for one, or `engine` for one by its name in the bundle, or by the folder in which
    `export-engine build BUNDLE` wrote one. On a CPU, with 0 `threads`, as many as it has, sharing it; else that many.
    """
    if not isinstance(threads, int | np.integer) or threads < 0:
        raise UserError(f"threads {threads!r}", fix="give a whole number: how many, or 0 for as many as the CPU has")
    bundle, threads = open_bundle(path), int(threads)
    if engine is not None and os.fspath(engine) not in bundle.info["engines"] and Path(engine).is_dir():
        built = _built_from(bundle, Path(engine), backend)
        opened = Engine(bundle, Path(engine).name, built, threads)
    else:
        name = choose(bundle, backend, None if engine is None else str(engine))
        opened = Engine(bundle, name, bundle.engine(name), threads)
    if self_test:
        opened.self_test()
    return opened


def choose(bundle: Bundle, backend: str | None = None, engine: str | None = None) -> str:
    """Returns the name of the fastest engine that can run here, of those that are asked for."""
    names: list[str] = sorted(bundle.info["engines"], key=lambda name: _rank(bundle.info["engines"][name]["backend"]))
    if engine is not None:
        _check_agree(engine, bundle.engine(engine), backend)  # which refuses a name that is not there
        names = [engine]
    if backend is not None:
        backends.load(backend)
        names = [name for name in names if bundle.info["engines"][name]["backend"] == backend]
        if not names:
            raise UserError(f"{bundle.source}: holds no engine for {backend}", fix=_rebuild(bundle, backend, None))
    reasons: dict[str, str] = {}
    for name in names:
        if (reason := why_not(bundle.engine(name))) is None:
            return name
        reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    wanted = backend or (bundle.engine(names[0]).info["backend"] if names else "ort")
    raise UserError(f"{bundle.source}: no engine can run here ({told or 'it holds none'})", fix=_fix(bundle, wanted))


def _check_agree(name: str | Path, engine: Artifact, backend: str | None) -> None:
    """Refuses an engine and a backend that were asked for together, and do not go together."""
    own = engine.info["backend"]
    if backend is not None:
        backends.load(backend)  # which refuses a name that is not there
    if backend not in (None, own):
        raise UserError(
            f"engine={str(name)!r} is of backend {own}, and backend={backend!r} was asked for: the two contradict "
            "each other",
            fix=f"give one of them, or backend={own!r}",
        )


def elsewhere(engine: Artifact) -> str | None:
    """Returns why an engine is for other machines than this one, None if it is for such as this."""
    info = engine.info
    if info["backend"] not in backends.names():
        return f"this version has no backend {info['backend']!r}"
    module, here = backends.load(info["backend"]), gpu.detect()
    if info["gpu"] is not None and here not in (None, info["gpu"]) and here in _targets(info["backend"]):
        return f"it was built for {info['gpu']}, and this GPU is {here}"
    return module.cannot_run()


def _targets(backend: str) -> list[str | None]:
    """Returns the GPUs that a backend can be built for; where it cannot say, this one."""
    try:
        return [*backends.load(backend).targets()]
    except UserError:
        return [gpu.detect()]


def why_not(engine: Artifact) -> str | None:
    """Returns why an engine cannot run here, None if it can; its info must hold the versions it was built under."""
    info = engine.info
    if (reason := elsewhere(engine)) is not None or info["gpu"] is None:
        return reason
    ours, theirs = backends.load(info["backend"]).fingerprint(), info["versions"]
    other = [
        f"{name} {theirs.get(name)}, here is {version}" for name, version in ours.items() if theirs.get(name) != version
    ]
    return f"it was built with {', '.join(other)}" if other else None


def _fix(bundle: Bundle, backend: str) -> str:
    here = gpu.detect()
    if backend != "ort" and (here is None or here not in _targets(backend)):
        others = [entry["backend"] for entry in bundle.info["engines"].values() if entry["backend"] == "ort"]
        return "ask for the backend ort" if others else _rebuild(bundle, "ort", None)
    return _rebuild(bundle, backend, here)


def _rebuild(bundle: Bundle, backend: str, target: str | None) -> str:
    gpu_option = f" --gpu {target}" if target else ""
    return (
        f"build one: export-engine build {bundle.source} --backend {backend}{gpu_option} --out DIR, then "
        "engines.load(…, engine=DIR)"
    )


def _rank(backend: str) -> int:
    return FASTEST_FIRST.index(backend) if backend in FASTEST_FIRST else len(FASTEST_FIRST)


def _built_from(bundle: Bundle, folder: Path, backend: str | None) -> Artifact:
    """Opens an engine that was built of one of the bundle's graphs, for this machine."""
    opened = artifacts.open_artifact(folder, "engine")
    _check_agree(folder, opened, backend)
    graphs = {entry["digest"] for entry in bundle.info["graphs"].values()}
    if opened.manifest["made_from"]["graph"] not in graphs:
        raise UserError(
            f"{folder}: was built of another graph than those of {bundle.source}",
            fix=f"build it from the bundle: export-engine build {bundle.source} --backend … --out {folder}",
        )
    if (reason := why_not(with_versions(opened))) is not None:
        target, here = opened.info["gpu"], gpu.detect()
        needs = f"load it on a machine that has this GPU, {target}; here, ask for the backend ort instead"
        fix = needs if target and here is None else _rebuild(bundle, opened.info["backend"], here if target else None)
        raise UserError(f"{folder}: cannot run here: {reason}", fix=fix)
    return opened


def with_versions(engine: Artifact) -> Artifact:
    """Returns an engine's artifact whose info also holds the versions it was built under, as a bundle's does."""
    return Artifact(engine.path, engine.manifest | {"info": engine.info | {"versions": engine.manifest["versions"]}})
