"""Engine backends: one module each; the file name, with `-` for `_`, is the backend's name."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from engines.artifacts import Artifact, Json
from engines.errors import UserError, unknown
from engines.options import Options
from engines.plans import PlanRow
from engines.runner import Runner
from engines.schedule import with_steps

ALSO = {"tensorrt": "trt-rtx", "tensorrt-rtx": "trt-rtx", "onnxruntime": "ort"}  # what people call them
Layers = Mapping[str, Mapping[str, str | None]]  # path → its types: weight, activation


class Backend(Protocol):
    """What a backend module holds.

    `DTYPE` is the float type it wants its graph in: fp32 or fp16. `DECODES` are the ways in which it can decode weights
    of codebooks, its default first: while it runs (`run`), or when an engine is opened (`load`); none, if it has no
    choice. `OPTIONS` are the fields of `engines.options.Options` that it takes beside that.
    """

    DTYPE: str
    DECODES: tuple[str, ...]
    OPTIONS: tuple[str, ...]

    def fingerprint(self) -> dict[str, str]:
        """Versions that decide what is built; an engine made under others is out of date."""

    def resolve_gpu(self, gpu: str | None) -> str | None:
        """Returns the target to build for, None for a backend that has none; a UserError where it cannot build."""

    def targets(self) -> list[str]:
        """Returns the GPUs that can be built for; none for a backend whose engines run wherever they are opened."""

    def check(self, layers: Layers, gpu: str | None) -> None:
        """Raises a UserError if this target cannot run a layer's format."""

    def note(self, graph: Json, options: Options) -> str | None:
        """Returns what whoever builds this graph should know, or None."""

    def build(self, model: Path, graph: Json, folder: Path, gpu: str | None, options: Options) -> Mapping[str, int]:
        """Builds into `folder`, with the plan as plan.json; runs in a process of its own.

        Returns, by module, the bytes that its weight takes in memory beyond the file, on purpose. What it writes to
        stderr in lines that begin with `note: ` is shown to the user.
        """

    def multiplied(self, row: PlanRow) -> str | None:
        """Returns the type that a row of its plans multiplies in, None for one that multiplies nothing."""

    def explain(
        self, op: str, asked: Mapping[str, str | None], got: Mapping[str, str | None], versions: Mapping[str, str]
    ) -> str | None:
        """Returns why it runs a matmul, convolution or attention in other types than asked, None if it should not.

        `versions`: what `fingerprint` told when the engine was built.
        """

    def cannot_run(self) -> str | None:
        """Returns why engines of this backend cannot run on this machine, or None if they can."""

    def open_runner(self, engine: Artifact, threads: int = 0) -> Runner:
        """Opens an engine; on a CPU, with 0 `threads` as many as it has, sharing it; else that many, for themselves."""


def names() -> list[str]:
    """Returns the backends found in this folder; a leading underscore marks shared code."""
    return sorted(m.name.replace("_", "-") for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def about(name: str) -> str:
    """Returns the first line of a backend's module, which says what it is and where it builds and runs."""
    source = Path(__file__).with_name(f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def resolve(name: str, options: Options) -> Options:
    """Returns the options of a backend's engine, what was not said filled in; refuses those that it lacks."""
    module = load(name)
    if options.decode is not None and options.decode not in module.DECODES:
        raise UserError(
            f"--decode {options.decode}: {name} has no such choice, it decodes codebooks its own way",
            fix="leave it out, or build for ort",
        )
    for option, written in lacking(name, options).items():
        have = " or ".join(other for other in names() if option in load(other).OPTIONS)
        raise UserError(f"{written}: {name} has no such option", fix=f"leave it out, or build for {have}")
    return replace(options, decode=options.decode or next(iter(module.DECODES), None))


def check_taken(names: Sequence[str], options: Options) -> None:
    """Refuses what was asked for and none of some backends has."""
    for option in options.asked():
        if all(option in lacking(name, options) for name in names):
            resolve(names[0], options)  # which refuses it


def lacking(name: str, options: Options) -> dict[str, str]:
    """Returns what was asked for and a backend has no such choice of, by name, as it is written."""
    module = load(name)
    have = {*module.OPTIONS, *(["decode"] if module.DECODES else [])}
    return {option: written for option, written in options.asked().items() if option not in have}


def load(name: str) -> Backend:
    """Imports a backend by name."""
    if name not in names():
        raise unknown("backend", name, names(), also=ALSO)
    return cast(Backend, importlib.import_module(f"engines.backends.{name.replace('-', '_')}"))


def open_runner(engine: Artifact, threads: int = 0) -> Runner:
    """Opens an engine with its backend; where it wants the `step` of every row, that is checked."""
    return with_steps(load(engine.info["backend"]).open_runner(engine, threads), engine.info["graph"], engine)
