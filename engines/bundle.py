"""Bundles: everything that an application loads, in one folder or one uncompressed zip, verified before it is used.

docs/bundle.md is the format.
"""

from __future__ import annotations

import errno
import hashlib
import shutil
import stat
import tempfile
import zipfile
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from engines import artifacts
from engines.artifacts import MANIFEST, MAX_MANIFEST_BYTES, Artifact, Json
from engines.errors import UserError, unknown
from engines.schedule import ROW
from engines.shape import NUMBER, Each, Maybe, fault

KIND = artifacts.BUNDLE
FORMAT_VERSION = 1
GOLDEN = "golden.safetensors"
DTYPES = ("int64", "fp32", "float")  # of inputs: the last is the engine's own float type
OF_ROWS = {"timestep": DTYPES, "step": ("int64",)}  # inputs of one number for each row, and their types
MARK = b"export-engine sha256 "  # of a zip's comment, before the digest of all that comes before it
DIGEST_CHARACTERS = 64
CHUNK = 1 << 20
UNREADABLE = (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError)  # the second: of features we do not write
NO_SUCH_PLACE = (errno.EINVAL, errno.EEXIST, errno.ENOTDIR)  # before the file's start; of a name both file and folder

_INPUT = {"name": str, "dtype": str, "shape": Each((int, str), list), "means": str}
_AXIS = {"min": int, "opt": int, "max": int, "multiple": int}
_ENGINE: Json = {
    "folder": str, "file": str, "backend": str, "gpu": Maybe(str), "dtype": str, "decode": Maybe(str), "digest": str,
    "refit": bool, "weight_streaming": Maybe((int, str)),
    "versions": Each(str, dict), "weight_bytes": int, "resident_weight_bytes": int, "step_input": Maybe(str),
    "session": Maybe(
        {
            "disabled_optimizers": Each(str, list), "config": Each(str, dict), "codebook_ops": bool,
            "config_if_sums_saturate": Each(str, dict), "config_if_shared": Each(str, dict),
        }
    ),
}  # fmt: skip
_STEP = dict.fromkeys(
    ("scale_input", "x0_latent", "x0_prediction", "next_x0", "next_latent", "next_prediction"), NUMBER
)
_SAMPLER: Json = {
    "scheduler": dict, "steps": int, "guidance_scale": NUMBER, "guided": bool, "schedule": Each(NUMBER, list),
    "timesteps": Each(NUMBER, list), "why_not_portable": Maybe(str),
    "latent": {"input": str, "shape": Each(int, list), "init_noise_sigma": NUMBER, "pixels": bool},
    "portable": Maybe({"clip": Maybe(NUMBER), "steps": Each(_STEP, list)}),
}  # fmt: skip
# What a graph's own record must hold for an engine of it to run.
_GRAPH: Json = {
    "dtype": str, "output": str, "inputs": Each({"name": str, "dtype": str, "shape": list}, list),
    "axes": Each(_AXIS, dict), "timesteps": Each(NUMBER, list), "step_input": Maybe(str),
    "fed_timesteps": Maybe(Each(NUMBER, list)), "points": Each(Maybe(str), dict), "weights": {"by_format": dict},
    "layers": Each({"weight": Maybe(str), "activation": Maybe(str)}, dict), "weight_bytes": int,
    "module_bytes": Each(int, dict),
}  # fmt: skip
_TOKENIZER: Json = {
    "tokenizer": str, "tokens": int, "pad": Maybe(int), "bos": Maybe(int), "eos": Maybe(int), "input": str
}  # fmt: skip
_TEXT: Json = {
    **_TOKENIZER, "more": Each(_TOKENIZER, list), "encoders": Each(str, dict), "outputs": Each(str, dict),
    "unwanted": str, "limits_db": Each(NUMBER, dict),
}  # fmt: skip
_VAE: Json = {
    "decoders": Each(str, dict), "input": str, "output": str, "scaling_factor": NUMBER, "shift_factor": NUMBER,
    "limits_db": Each(NUMBER, dict),
}  # fmt: skip
SHAPE: Json = {
    "model": {"name": str, "class": str, "config": dict, "parameters": int},
    "recipe": {"name": str, "digest": str},
    "inputs": Each(_INPUT, list),
    "output": {"name": str, "dtype": str, "shape": Each((int, str), list)},
    "axes": Each(_AXIS, dict),
    "sampler": _SAMPLER,
    "engines": Each(_ENGINE, dict),
    "graphs": Each({"folder": str, "digest": str, "info": _GRAPH}, dict),
    "golden": {
        "steps": Each(int, list),
        "limits_db": Each(Each(NUMBER, dict), dict),
        "picture": Maybe({"runner": str, "count": int, "limits_db": Each(NUMBER, dict), "peak": NUMBER}),
    },
    "pipeline": Maybe({"text": _TEXT, "vae": Maybe(_VAE), "constants": Each(Each(NUMBER, list), dict)}),
    "checks": Each(dict, list),
    "scores": dict,
}  # fmt: skip


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
        _unpack(path, folder)
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
    reason = fault(info, {"format_version": int, **SHAPE}, "info") or _inconsistent(artifact)
    if reason:
        raise UserError(f"{path / MANIFEST}: malformed: {reason}", fix="get the bundle, or make it, again")
    listed = {*artifact.manifest["files"], MANIFEST}
    for file in path.rglob("*"):
        name = file.relative_to(path).as_posix()
        if name not in listed and not (file.is_dir() and not file.is_symlink()):
            raise UserError(
                f"{path}: holds {name!r}, which its manifest does not list", fix="remove it, or get it again"
            )
    return artifact


def _inconsistent(artifact: Artifact) -> str | None:
    """Returns what of a manifest's own parts do not go together, None if all do."""
    info, files = artifact.manifest["info"], artifact.manifest["files"]
    faults = [_of_contract(info), _of_sampler(info), *(_of_engine(name, info, files) for name in info["engines"])]
    faults += [_of_golden(info), _of_pipeline(info, files)]
    faults.append(None if GOLDEN in files else f"there is no {GOLDEN}")
    return next(filter(None, faults), None)


def _of_contract(info: Json) -> str | None:
    for name, axis in info["axes"].items():
        if not (1 <= axis["min"] <= axis["opt"] <= axis["max"] and axis["multiple"] >= 1):
            return f"axis {name!r} has no size from its min to its max"
    if "batch" not in info["axes"]:
        return "there is no axis 'batch'"
    for entry in [*info["inputs"], info["output"]]:
        axes = [axis for axis in entry["shape"] if isinstance(axis, str)]
        if entry["dtype"] not in DTYPES or entry["shape"][:1] != ["batch"]:
            return f"{entry['name']!r} is of an unknown type, or its first axis is not 'batch'"
        if any(axis not in info["axes"] for axis in axes):
            return f"{entry['name']!r} has an unknown axis"
        if entry["name"] in OF_ROWS and (entry["shape"] != ["batch"] or entry["dtype"] not in OF_ROWS[entry["name"]]):
            return f"input {entry['name']!r} is not one number for each row"
    return None


def _of_sampler(info: Json) -> str | None:
    sampler, names = info["sampler"], [entry["name"] for entry in info["inputs"]]
    if not sampler["latent"]["shape"] or sampler["latent"]["input"] not in names:
        return "the sampler's latent has no shape, or no input"
    portable = sampler["portable"] or {"steps": sampler["timesteps"]}
    if not len(sampler["timesteps"]) == len(portable["steps"]) == sampler["steps"] >= 1:
        return "the sampler's timesteps are not as many as its steps"
    return None


def _of_golden(info: Json) -> str | None:
    golden = info["golden"]
    tables = [golden["limits_db"], *([golden["picture"]["limits_db"]] if golden["picture"] else [])]
    if golden["picture"] and not golden["picture"]["peak"] > 0:
        return "the golden pictures' peak is not above 0"
    for dtype in {entry["dtype"] for entry in info["engines"].values()}:
        if any(dtype not in table for table in tables):
            return f"golden outputs have no limit for {dtype}"
        if not golden["limits_db"][dtype].keys() >= {str(step) for step in golden["steps"]}:
            return f"golden outputs have not a limit for every step in {dtype}"
    return None


def _of_engine(name: str, info: Json, files: Json) -> str | None:
    engine = info["engines"][name]
    if engine["dtype"] not in info["graphs"]:
        return f"engine {name!r} is of a {engine['dtype']} graph, which is not there"
    if f"{engine['folder']}/{engine['file']}" not in files:
        return f"engine {name!r} has no {engine['file']}"
    graph = info["graphs"][engine["dtype"]]["info"]
    if engine["step_input"] != graph["step_input"] or (graph["step_input"] and not graph["fed_timesteps"]):
        return f"engine {name!r} and its graph differ in step_input"
    if graph["step_input"] and not OF_ROWS.keys() <= {entry["name"] for entry in info["inputs"]}:
        return f"engine {name!r} is told the step, and not both it and its timestep"
    given = {"step" if entry["name"] == ROW else entry["name"] for entry in graph["inputs"]}
    if given != {entry["name"] for entry in info["inputs"]} or graph["output"] != info["output"]["name"]:
        return f"engine {name!r} and the bundle differ in their inputs or outputs"
    return None


def _of_pipeline(info: Json, files: Collection[str]) -> str | None:
    """Every engine needs graphs of its float type, or fp32's; what captions give, the denoiser must take."""
    if info["pipeline"] is None:
        return None
    text, decoding, names = info["pipeline"]["text"], info["pipeline"]["vae"], {one["name"] for one in info["inputs"]}
    for what, part in (("encoders", text), ("decoders", decoding)):
        held = part[what].keys() & part["limits_db"].keys() if part else {"fp32"}
        if lacking := [one["dtype"] for one in info["engines"].values() if not held & {one["dtype"], "fp32"}]:
            return f"its pipeline has no {what} for a {lacking[0]} engine"
    fed = {*text["outputs"].values(), *info["pipeline"]["constants"]}
    if other := sorted(fed - names):
        return f"its pipeline gives {other[0]!r}, which is no input"
    tokenizers = [entry["tokenizer"] for entry in (text, *text["more"])]
    graphs = [*text["encoders"].values(), *(decoding["decoders"].values() if decoding else ())]
    missing = [name for name in (*tokenizers, *graphs) if name not in files]
    return f"its pipeline's {missing[0]} is not there" if missing else None


def is_packed(path: Path) -> bool:
    """Whether a file ends as a bundle's zip does."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - DIGEST_CHARACTERS - len(MARK)))
        return file.read(len(MARK)) == MARK


def pack(folder: Path, path: Path) -> None:
    """Writes a bundle's folder as one uncompressed zip, sealed by the digest in its comment, always the same bytes."""
    temporary = path.with_name(f".{path.name}.partial")
    with artifacts.writing_errors(path):
        try:
            _write_zip(folder, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def _write_zip(folder: Path, path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            entry = zipfile.ZipInfo(file.relative_to(folder).as_posix())  # its time is 1980's first day
            entry.external_attr = (stat.S_IFREG | 0o644) << 16
            entry.file_size = file.stat().st_size
            with file.open("rb") as source, archive.open(entry, "w") as target:
                shutil.copyfileobj(source, target, CHUNK)
        archive.comment = MARK + artifacts.NO_DIGEST.encode()
    digest = _digest_of_zip(path)
    with path.open("r+b") as written:
        written.seek(-DIGEST_CHARACTERS, 2)
        written.write(digest.encode())


def _digest_of_zip(path: Path) -> str:
    """Returns the sha256 of a file but for its last 64 bytes."""
    left = path.stat().st_size - DIGEST_CHARACTERS
    found = hashlib.sha256()
    with path.open("rb") as file:
        while left > 0 and (part := file.read(min(CHUNK, left))):
            found.update(part)
            left -= len(part)
    return found.hexdigest()


def _unpack(path: Path, folder: Path) -> None:
    """Unpacks a sealed zip of plain, uncompressed files; nothing of it is written outside `folder`."""
    try:
        with artifacts.writing_errors(folder), zipfile.ZipFile(path) as archive:
            if archive.comment[:-DIGEST_CHARACTERS] != MARK:
                raise UserError(f"{path}: is a zip, but no bundle of ours", fix="give what `bundle --zip` wrote")
            if _digest_of_zip(path).encode() != archive.comment[-DIGEST_CHARACTERS:]:
                raise UserError(f"{path}: was changed after it was written", fix="get it, or make it, again")
            entries = archive.infolist()
            _check_entries(path, entries)
            for entry in entries:
                target = artifacts.inside(folder, entry.filename)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as source, target.open("xb") as written:
                    shutil.copyfileobj(source, written, CHUNK)
    except (OSError, *UNREADABLE) as error:
        if isinstance(error, OSError) and error.errno not in NO_SUCH_PLACE:
            raise
        raise UserError(f"{path}: no zip that can be read ({error})", fix="get it, or make it, again") from error


def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if MANIFEST not in names:
        raise UserError(f"{path}: holds no {MANIFEST}", fix="give what `bundle --zip` wrote")
    total, twice = sum(entry.file_size for entry in entries), len(set(names)) < len(names)
    for entry in entries:
        plain = stat.S_IFMT(entry.external_attr >> 16) in (0, stat.S_IFREG) and entry.filename[-1:] not in ("", "/")
        stored = entry.compress_type == zipfile.ZIP_STORED and entry.compress_size == entry.file_size
        if not plain or not stored or entry.flag_bits & 1 or twice:
            raise UserError(
                f"{path}: {entry.filename!r} is a folder, a link, packed or locked, has no name, or names occur twice",
                fix="do not use this file: it was damaged or tampered with; get it, or make it, again",
            )
        if entry.filename == MANIFEST and entry.file_size > MAX_MANIFEST_BYTES:
            raise UserError(f"{path}: its {MANIFEST} has {entry.file_size} bytes", fix="this is no bundle of ours")
    if total > path.stat().st_size:
        raise UserError(
            f"{path}: declares {total} bytes, more than it holds", fix="do not use this file: it was tampered with"
        )
