"""Artifacts: folders with a manifest that names their content by digest, written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import ItemsView, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engines.errors import UserError

SCHEMA_VERSION = 5
MANIFEST = "manifest.json"
MARK = ".request"  # of a draft: what it is made for
TIMINGS = "timings.json"  # measured, so outside every digest
NO_DIGEST = "0" * 64  # stands in a manifest for its own digest while that is taken
MAX_MANIFEST_BYTES = 64 << 20  # a manifest is text about an artifact; more than this is not one of ours
MAX_NAME_BYTES = 255  # of a file in an artifact, its folders included: what every file system takes
TAMPERED = "do not use this folder: it was damaged or tampered with; get it, or make it, again"
BUNDLE = "bundle"
BUNDLE_AGAIN = "do not use it: it was damaged or tampered with; get it, or make it, again"  # who has one got it
COMMANDS = {  # that write the artifacts of a kind
    "calibration": "calibrate", "quantized": "quantize", "graph": "lower", "engine": "build", BUNDLE: "bundle"
}  # fmt: skip
Json = dict[str, Any]


@dataclass(frozen=True)
class Artifact:
    """A verified artifact folder and its manifest."""

    path: Path
    manifest: Json
    owner: object = field(default=None, repr=False, compare=False)  # whose end takes the folder away: a zip's bundle

    @property
    def digest(self) -> str:
        return str(self.manifest["digest"])

    @property
    def info(self) -> Json:
        return dict(self.manifest["info"])

    def file(self, name: str) -> Path:
        """Returns the path of a file the manifest lists; refuses any other name."""
        if name not in self.manifest["files"]:
            raise UserError(
                f"{self.path}: its manifest lists no file {name!r}",
                fix=f"it holds {', '.join(self.manifest['files'])}; delete the folder and make it again",
            )
        return inside(self.path, name)

    def files(self, prefix: str = "") -> list[str]:
        return [name for name in self.manifest["files"] if name.startswith(prefix)]

    @property
    def bytes(self) -> int:
        return sum(int(entry["bytes"]) for entry in self.manifest["files"].values())


@dataclass(frozen=True)
class Request:
    """What an artifact is asked to be; an artifact whose manifest holds the same request is up to date."""

    kind: str
    made_from: Mapping[str, str]
    settings: Mapping[str, Any]
    versions: Mapping[str, str]

    def to_json(self) -> Json:
        return {
            "kind": self.kind,
            "made_from": dict(self.made_from),
            "settings": dict(self.settings),
            "versions": dict(self.versions),
        }

    @property
    def digest(self) -> str:
        return digest_json(self.to_json())


def digest_json(value: object) -> str:
    """Returns the sha256 of a JSON value in canonical form (sorted keys, no white space)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_file(path: Path) -> str:
    """Returns the sha256 of a file; one that may not be read is the user's error."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except PermissionError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})", fix="make it readable") from error


def inside(folder: Path, name: str, *, links: bool = False) -> Path:
    """Returns folder/name, refusing a name that leaves the folder: absolute, by `..`, or, unless `links`, by a link.

    Model caches keep their files as links to a store elsewhere; artifacts hold none.
    """
    if not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:  # a NUL or half a character among others
        raise UserError(f"{folder}: {name[:80]!r} cannot be a file's name", fix=TAMPERED)
    path = folder / name
    leaves = Path(name).is_absolute() or ".." in Path(name).parts
    if leaves or not (links or path.resolve().is_relative_to(folder.resolve())):
        raise UserError(
            f"{folder}: the file name {name!r} leaves the folder",
            fix=TAMPERED,
        )
    return path


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON through a temporary name, so that a reader never meets half a file."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary name that takes the place of `path` once it is written; on an error nothing is left of it."""
    temporary = path.with_name(f".{path.name}.partial")
    with writing_errors(path):
        try:
            yield temporary
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path, *, fix: str = "mend it, or restore the file as it was") -> Json:
    """Reads a JSON object; a missing, oversized or malformed file is the user's error, `fix` how to mend the last."""
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise UserError(
                f"{path}: {path.stat().st_size} bytes, more than {MAX_MANIFEST_BYTES}",
                fix="check that this is the file you mean",
            )
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file", fix="check the path") from error
    except (ValueError, RecursionError) as error:  # a JSONDecodeError or UnicodeDecodeError is a ValueError
        raise UserError(f"{path}: not valid JSON ({error})", fix=fix) from error
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror})", fix="check the path and its permissions"
        ) from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: holds a {type(value).__name__}, not an object", fix=fix)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def open_artifact(path: Path, kind: str) -> Artifact:
    """Opens an artifact and checks that its kind is `kind` and that every file still has its digest."""
    if not (path / MANIFEST).is_file():
        raise _not_of(kind, path)
    again = BUNDLE_AGAIN if kind == BUNDLE else f"delete {path} and make it again"
    artifact = _read(path, again)
    if artifact.manifest["kind"] != kind:
        raise UserError(
            f"{path}: a folder of kind {artifact.manifest['kind']!r}, where one of kind {kind!r} is wanted",
            fix=f"give {_written(kind)}",
        )
    for name, entry in artifact.manifest["files"].items():
        file = inside(path, name)
        if not file.is_file():
            raise UserError(f"{path}: its file {name!r} is missing", fix=again)
        if file.stat().st_size != entry["bytes"]:
            raise UserError(
                f"{file}: {file.stat().st_size} bytes, its manifest says {entry['bytes']}",
                fix=again,
            )
        found = digest_file(file)
        if found != entry["sha256"]:
            raise UserError(
                f"{file}: sha256 {found[:16]}…, its manifest says {entry['sha256'][:16]}…: changed after it was made",
                fix=again,
            )
    return artifact


def _not_of(kind: str, path: Path) -> UserError:
    """Returns the error for a path where no artifact lies and one of a kind is wanted."""
    article = "an" if kind[0] in "aeiou" else "a"
    if not path.is_dir():
        why = "it is a file" if path.exists() else "no such folder"
        return UserError(f"{path}: not {article} {kind} folder: {why}", fix=f"check the path; give {_written(kind)}")
    made = path / "quantized" / MANIFEST
    fix = f"bundle this run first: export-engine bundle {path} --out BUNDLE" if made.is_file() else None
    return UserError(
        f"{path}: not {article} {kind} folder (no {MANIFEST})",
        fix=(fix if kind == BUNDLE else None) or f"give {_written(kind)}",
    )


def _written(kind: str) -> str:
    """Returns what a folder of a kind comes from, in words."""
    command = COMMANDS.get(kind)
    return f"the {kind} folder that `export-engine {command}` wrote" if command else f"a folder of kind {kind}"


def kind_of(path: Path) -> str:
    """Returns the kind of the artifact at `path`."""
    if not (path / MANIFEST).is_file():
        raise _no_artifact(path)
    return str(_read(path, f"delete {path} and make it again").manifest["kind"])


def _no_artifact(path: Path) -> UserError:
    """Returns the error for a path where no artifact lies; it names those that lie beneath."""
    parts: list[Path] = []
    with contextlib.suppress(OSError):  # what may not be read, or goes meanwhile, is nothing to name
        parts = sorted([*path.glob(f"*/{MANIFEST}"), *path.glob(f"*/*/{MANIFEST}")])  # as deep as a run's lie
    if parts:
        names = ", ".join(part.parent.relative_to(path).as_posix() for part in parts[:8])
        return UserError(f"{path}: is a folder of artifacts, not one", fix=f"name one of them: {names}")
    why = f"it holds no {MANIFEST}" if path.is_dir() else "it is a file" if path.exists() else "no such folder"
    return UserError(
        f"{path}: is no artifact: {why}",
        fix="give the folder of a calibration set, quantized model, graph or engine, e.g. RUN/quantized: a stage left "
        f"{MANIFEST} in it",
    )


def _read(path: Path, again: str) -> Artifact:
    """Reads a manifest; `again` is how to mend a damaged one."""
    manifest = read_json(path / MANIFEST, fix=again)
    missing = {"schema_version", "kind", "digest", "made_from", "files", "info"} - manifest.keys()
    if missing:
        raise UserError(f"{path / MANIFEST}: lacks {', '.join(sorted(missing))}", fix="make the artifact again")
    if manifest["schema_version"] != SCHEMA_VERSION:
        newer = isinstance(manifest["schema_version"], int) and manifest["schema_version"] > SCHEMA_VERSION
        raise UserError(
            f"{path / MANIFEST}: schema version {manifest['schema_version']}, this program reads {SCHEMA_VERSION}",
            fix="update export-engine" if newer else "make the artifact again with this version",
        )
    if not _well_formed(manifest):
        raise UserError(f"{path / MANIFEST}: malformed", fix=again)
    if not _sealed(path / MANIFEST, manifest["digest"]):
        raise UserError(f"{path / MANIFEST}: was changed after it was written", fix=again)
    return Artifact(path, manifest)


def seal(path: Path, manifest: Json) -> None:
    """Writes a manifest whose `digest` is that of the file itself, the digest's own characters being zeros."""
    write_json(path, manifest | {"digest": NO_DIGEST})
    write_json(path, manifest | {"digest": digest_file(path)})


def _sealed(path: Path, digest: str) -> bool:
    text = path.read_bytes()
    own = digest.encode()
    return text.count(own) == 1 and hashlib.sha256(text.replace(own, NO_DIGEST.encode())).hexdigest() == digest


def _well_formed(manifest: Json) -> bool:
    files = manifest["files"]
    return (
        isinstance(files, dict)
        and all(isinstance(e, dict) and {"bytes": int, "sha256": str}.items() == _types(e) for e in files.values())
        and all(isinstance(manifest[key], dict) for key in ("info", "made_from"))
        and all(isinstance(manifest[key], str) for key in ("kind", "digest"))
        and len(manifest["digest"]) == len(NO_DIGEST)
        and manifest["digest"].isascii()
    )


def _types(entry: Json) -> ItemsView[str, type]:
    return {key: type(value) for key, value in entry.items()}.items()


def current(path: Path, request: Request) -> Artifact | None:
    """Returns the artifact at `path` if it was made by the same request, else None; a damaged one is an error.

    One of an earlier version of export-engine, which wrote another schema, is None too: it is made again.
    """
    again = f"delete {path} and make it again"
    if not (path / MANIFEST).is_file() or outdated(path, again):
        return None
    if _read(path, again).manifest.get("request") != request.digest:
        return None
    return open_artifact(path, request.kind)


def outdated(path: Path, again: str) -> bool:
    """Whether an artifact is of an earlier schema, which this version does not read; `again`: see `_read`."""
    version = read_json(path / MANIFEST, fix=again).get("schema_version")
    return isinstance(version, int) and version < SCHEMA_VERSION


class Draft:
    """An artifact being written: files go into `path`, facts into `info`."""

    def __init__(self, path: Path, resumed: bool) -> None:
        self.path = path
        self.info: Json = {}
        self.timings: Json = {}
        self.timed = True  # whether the artifact holds its timings
        self.resumed = resumed


@contextlib.contextmanager
def drafting(path: Path, request: Request, *, resumable: bool = False) -> Iterator[Draft]:
    """Yields a draft in a hidden sibling folder and, on success, renames it to `path`; on an error removes it.

    A `resumable` draft survives a kill, Ctrl-C, a full disk or memory, and whatever else is no fault of the request,
    and is handed back, files and all, to the same request. While one process writes an artifact, another that would is
    refused.
    """
    path = path.resolve()  # so that `.` has a name, and a link keeps pointing at what is written
    partial = path.with_name(f".{path.name}.partial")
    with contextlib.ExitStack() as stack:
        with writing_errors(path):
            refuse_foreign(path, request.kind)
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_alone(partial, path))
        yield from _drafted(partial, path, request, resumable)


def _drafted(partial: Path, path: Path, request: Request, resumable: bool) -> Iterator[Draft]:
    with writing_errors(path):
        mark = partial / MARK
        resumed = resumable and mark.is_file() and mark.read_text(encoding="utf-8") == request.digest
        if not resumed:
            _empty(partial)
            mark.write_text(request.digest)
    draft, started = Draft(partial, resumed), time.monotonic()
    try:
        with writing_errors(path):
            yield draft
            _finish(draft, path, request, started)
    except BaseException as error:
        refused = isinstance(error, UserError) and not (error.keeps or isinstance(error.__cause__, OSError))
        if refused or not resumable:
            shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def _alone(partial: Path, path: Path) -> Iterator[None]:
    """Makes the folder of a draft and holds a lock on it, which goes with the process and moves with the folder."""
    handle = _locked(partial, path)
    try:
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(partial: Path, path: Path) -> int | None:
    """Returns a handle that holds the lock; None where folders cannot be locked: Windows, some network file systems."""
    while True:
        if partial.is_symlink() or partial.is_file():
            partial.unlink()
        partial.mkdir(exist_ok=True)
        if sys.platform == "win32":
            return None
        import fcntl

        try:
            handle = os.open(partial, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:  # whoever wrote there has just finished, and renamed it
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(handle)
            if not isinstance(error, BlockingIOError):
                return None
            raise UserError(
                f"{path}: another process is writing it", fix="wait for it, or choose another --out"
            ) from error
        with contextlib.suppress(FileNotFoundError):  # likewise
            if os.path.samestat(os.fstat(handle), partial.stat()):
                return handle
        os.close(handle)


def _empty(folder: Path) -> None:
    for place in folder.iterdir():
        shutil.rmtree(place) if place.is_dir() and not place.is_symlink() else place.unlink()


def _finish(draft: Draft, path: Path, request: Request, started: float) -> None:
    own = {draft.path / name for name in (MARK, MANIFEST, TIMINGS)}  # the last two of a try that got no further
    files = {}
    for file in sorted(p for p in draft.path.rglob("*") if p.is_file() and p not in own):
        files[file.relative_to(draft.path).as_posix()] = {"bytes": file.stat().st_size, "sha256": digest_file(file)}
        _fsync(file)
    manifest: Json = {"schema_version": SCHEMA_VERSION, **request.to_json(), "request": request.digest}
    manifest |= {"files": files, "info": draft.info}
    seal(draft.path / MANIFEST, manifest)
    if draft.timed:
        spent = {"seconds": time.monotonic() - started, "resumed": draft.resumed}
        write_json(draft.path / TIMINGS, spent | draft.timings)
    (draft.path / MARK).unlink()
    _fsync(draft.path)
    old = path.with_name(f".{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(draft.path, path)
    _fsync(path.parent)
    shutil.rmtree(old, ignore_errors=True)


def refuse_beneath_file(path: Path) -> None:
    """Refuses a folder that is a file, or lies beneath one."""
    for place in (path, *path.parents):
        if place.exists() and not place.is_dir():
            where = "it is a file" if place == path else f"{place} is a file, so nothing can lie beneath it"
            raise UserError(f"{path}: cannot be a folder: {where}", fix="choose another --out, or move the file away")


def refuse_no_folder(path: Path) -> None:
    """Refuses a file whose folder is not there: where one of many is meant, a new folder would hide a mistyped name."""
    if not path.parent.is_dir():
        missing = next(place for place in reversed(path.parents) if not place.is_dir())
        if missing.exists():
            raise UserError(f"{path}: {missing} is a file, so nothing can lie beneath it", fix="check the path")
        raise UserError(
            f"{path}: there is no folder {missing}", fix=f"check the path, or make the folder: mkdir -p {path.parent}"
        )


def refuse_foreign(path: Path, kind: str) -> None:
    """Refuses to write over anything but an artifact of ours and of this kind, within one, or beneath a file."""
    refuse_beneath_file(path)
    if path.is_dir() and any(path.iterdir()) and (found := _kind_if_ours(path)) != kind:
        other = f"no {MANIFEST} of ours" if found is None else f"a {found}, which a {kind} would replace"
        raise UserError(f"{path}: is a folder that holds other things ({other})", fix="choose a new or an empty folder")
    for place in path.parents:
        if _kind_if_ours(place) is not None:
            raise UserError(
                f"{path}: lies within {place}, which would then hold what its manifest does not list",
                fix="choose a folder outside of it",
            )


def _kind_if_ours(path: Path) -> str | None:
    """Returns the kind of an artifact of ours, None for anything else."""
    if not (path / MANIFEST).is_file():
        return None
    try:
        manifest = read_json(path / MANIFEST)
    except UserError:
        return None
    return str(manifest["kind"]) if manifest.keys() >= {"schema_version", "kind", "digest", "request"} else None


@contextlib.contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system refuses while writing `path` into an error with a fix."""
    try:
        yield
    except OSError as error:
        reason = _reason(error)
        if reason is None:
            raise
        raise UserError(
            f"{error.filename or path}: could not be written: {reason}", fix=_FIXES.get(error.errno or 0, _FIX)
        ) from error


_FIX = "choose another --out, or make this one writable"
_LEFT = "what is finished is kept, nothing half-written"
_FIXES = {
    errno.ENOSPC: f"free some space or choose an --out on a larger disk; {_LEFT}",
    errno.EDQUOT: f"free some of your quota or choose another --out; {_LEFT}",
    errno.EFBIG: f"raise the file-size limit (ulimit -f) or choose another --out; {_LEFT}",
}


def _reason(error: OSError) -> str | None:
    known = {*_FIXES, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
    return os.strerror(error.errno) if error.errno in known else None


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows has no handle for a folder to flush
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
