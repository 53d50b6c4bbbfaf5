"""Bundles: everything that an application loads, in one folder or one uncompressed zip, verified before it is used.

docs/bundle.md is the format.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from engines import artifacts
from engines.artifacts import MANIFEST, Artifact, Json
from engines.bundle_shape import malformed
from engines.errors import UserError, unknown
from engines.zipped import unpack

KIND = artifacts.BUNDLE
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Bundle:
    """A verified bundle; `engine` and `graph` are its parts, as artifacts of their own."""

    artifact: Artifact
    unpacked: tempfile.TemporaryDirectory[str] | None = None  # of a zip: removed with this object
    zipped: Path | None = None

    @property
    def path(self) -> Path:
        return self.artifact.path

    @property
    def source(self) -> Path:
        """What was opened: the folder, or the zip."""
        return self.zipped or self.path

    @property
    def info(self) -> Json:
        return dict(self.artifact.manifest["info"])

    def file(self, name: str) -> Path:
        return self.artifact.file(name)

    def engine(self, name: str) -> Artifact:
        """Returns an engine by its name in the bundle."""
        engines = self.info["engines"]
        if name not in engines:
            raise unknown("engine", name, engines, str(self.path))
        entry = engines[name]
        info = entry | {"graph": self.graph(entry["dtype"]).info}
        return self._part("engine", entry, info, {"graph": self.info["graphs"][entry["dtype"]]["digest"]})

    def graph(self, dtype: str) -> Artifact:
        """Returns the graph of a float type."""
        graphs = self.info["graphs"]
        if dtype not in graphs:
            raise UserError(f"{self.path}: holds no {dtype} graph", fix=f"it holds {', '.join(graphs) or 'none'}")
        return self._part("graph", graphs[dtype], graphs[dtype]["info"], {})

    def _part(self, kind: str, entry: Json, info: Json, made_from: Json) -> Artifact:
        prefix = f"{entry['folder']}/"
        files = {
            name.removeprefix(prefix): value
            for name, value in self.artifact.manifest["files"].items()
            if name.startswith(prefix)
        }
        manifest = {"kind": kind, "digest": entry["digest"], "made_from": made_from, "files": files, "info": info}
        return Artifact(self.path / entry["folder"], manifest, owner=self)

    def close(self) -> None:
        """Removes what a zip was unpacked into."""
        if self.unpacked is not None:
            self.unpacked.cleanup()


def open_bundle(path: Path | str) -> Bundle:
    """Opens a bundle, a folder or a zip; one that was damaged, or holds anything else, is refused."""
    path = Path(path)
    if not path.is_file():
        return Bundle(_opened(path))
    unpacked = tempfile.TemporaryDirectory(prefix="export-engine-")
    folder = Path(unpacked.name) / path.stem
    try:
        unpack(path, folder)
        return Bundle(_opened(folder), unpacked, path)
    except BaseException as error:
        if isinstance(error, UserError):  # what the user knows is the zip
            error.what, error.fix = (text.replace(str(folder), str(path)) for text in (error.what, error.fix))
        unpacked.cleanup()
        raise


def _opened(path: Path) -> Artifact:
    artifact = artifacts.open_artifact(path, KIND)
    info = artifact.manifest["info"]
    version = info.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise UserError(
            f"{path}: is a bundle of format version {version}, this program reads {FORMAT_VERSION}",
            fix="update export-engine",
        )
    if reason := malformed(artifact):
        raise UserError(f"{path / MANIFEST}: malformed: {reason}", fix="get the bundle, or make it, again")
    listed = {*artifact.manifest["files"], MANIFEST}
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if name not in listed and not (file.is_dir() and not file.is_symlink()):
            raise UserError(
                f"{path}: holds {name!r}, which its manifest does not list", fix="remove it, or get it again"
            )
    return artifact
