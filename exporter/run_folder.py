"""What a run leaves in its folder, and who may write there."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines import artifacts, backends
from engines.artifacts import Artifact
from engines.errors import UserError
from exporter import progress, quantized
from exporter.checkpoint import Checkpoint
from exporter.lower import DTYPES

REPORT, LOCK = "report.json", ".lock"


@dataclass(frozen=True)
class Run:
    """The artifacts of one run."""

    quantized: Artifact
    graphs: Mapping[str, Artifact]
    engines: Mapping[str, Artifact]

    @property
    def judged(self) -> dict[str, str]:
        """Returns the digests of what a report is about."""
        engines = {f"engine {name}": engine.digest for name, engine in sorted(self.engines.items())}
        return {"quantized": self.quantized.digest} | engines


def open_run(out: Path) -> tuple[Checkpoint, Run]:
    """Opens what `run` left in a folder, and the checkpoint that it was made from."""
    run = open_artifacts(out)
    return quantized.checkpoint_of(run.quantized), run


def open_artifacts(out: Path) -> Run:
    """Opens what `run` left in a folder, wherever the checkpoint has gone."""
    if not (out / "quantized").is_dir():
        raise UserError(f"{out}: holds no run (no quantized/)", fix="give the --out of an export-engine run")
    source = artifacts.open_artifact(out / "quantized", "quantized")
    if stale := _stale(out, source):
        raise UserError(
            f"{stale[0].path}: was made from another model than {source.path}",
            fix="remove it, or run again into this folder",
        )
    return Run(source, _graphs(out), _engines(out))


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Holds a lock on `out`, so that two runs never write into one folder; one that wrote nothing leaves no folder."""
    made = [place for place in (out, *out.parents) if not place.exists()]
    lock = _lock(out)
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # somebody else may have written there meanwhile, or taken it away
            if [path.name for path in out.iterdir()] == [LOCK]:
                (out / LOCK).unlink()
                for place in made:
                    place.rmdir()


def _lock(out: Path) -> Any:
    """Makes the folder `out` and returns a lock on it, taken."""
    from filelock import FileLock, Timeout

    with artifacts.writing_errors(out):
        artifacts.refuse_beneath_file(out)
        if out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists() and not (out / "quantized").exists():
            raise UserError(f"{out}: is a folder that holds other things", fix="choose a new or an empty folder")
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"{out}: another run is writing here", fix="wait for it, or choose another --out"
            ) from error
    return lock


def remove_stale(out: Path, source: Artifact) -> None:
    """Removes graphs and engines that an earlier run left here and that are not of this run's quantized model.

    So are those that an earlier version of export-engine wrote, where this one cannot read them.
    """
    for manifest in sorted(out.glob(f"*/*/{artifacts.MANIFEST}")):
        place = manifest.parent
        if place.parent.name in ("graph", "engines") and artifacts.outdated(place, f"remove {place}"):
            progress.note(f"{place.relative_to(out)}: of an earlier version of export-engine, removed")
            shutil.rmtree(place)
    for artifact in _stale(out, source):
        progress.note(f"{artifact.path.relative_to(out)}: of an earlier run with another recipe or model, removed")
        shutil.rmtree(artifact.path)


def _stale(out: Path, source: Artifact) -> list[Artifact]:
    graphs, engines = _graphs(out).values(), _engines(out).values()
    old = [graph for graph in graphs if graph.manifest["made_from"]["quantized"] != source.digest]
    fresh = {graph.digest for graph in graphs} - {graph.digest for graph in old}
    return [*old, *(engine for engine in engines if engine.manifest["made_from"]["graph"] not in fresh)]


def _graphs(out: Path) -> dict[str, Artifact]:
    return {d: artifacts.open_artifact(out / "graph" / d, "graph") for d in DTYPES if (out / "graph" / d).is_dir()}


def _engines(out: Path) -> dict[str, Artifact]:
    folders = sorted((out / "engines").glob("*")) if (out / "engines").is_dir() else []
    return {f.name: artifacts.open_artifact(f, "engine") for f in folders if f.name in backends.names()}
