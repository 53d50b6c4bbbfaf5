"""Fuzzes what reads files that others made: every input is read, or refused with a message; anything else is a fault.

`python tools/fuzz_loaders.py zip --runs 1000000 --out out/fuzz` runs atheris (pip install atheris), guided by coverage,
from the corpus in tests/corpus; what it finds lies in --out, and belongs into the corpus once it is mended.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CORPUS = ROOT / "tests/corpus"

import bundles  # noqa: E402

from engines import artifacts, external_data, loading, schedule  # noqa: E402
from engines.artifacts import Artifact  # noqa: E402
from engines.bundle import DIGEST_CHARACTERS, MARK, _digest_of_zip, open_bundle  # noqa: E402
from engines.contract import Contract  # noqa: E402
from engines.errors import UserError  # noqa: E402

MAX_RSS_GROWTH = 256 << 20  # bytes beyond what the first thousand inputs needed: the fuzzer's own corpus lies in memory


class Place:
    """A folder of memory that inputs are written to, and a whole tiny bundle in it, made once."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
        self.bundle = bundles.tiny_bundle(self.path / "bundle")
        self.manifest = json.loads((self.bundle / artifacts.MANIFEST).read_text())

    def written(self, name: str, data: bytes) -> Path:
        (self.path / name).write_bytes(data)
        return self.path / name


def manifest(place: Place, data: bytes) -> None:
    """The bytes are a manifest, and beside them lie the files of a bundle."""
    (place.bundle / artifacts.MANIFEST).write_bytes(data)
    artifacts.open_artifact(place.bundle, artifacts.kind_of(place.bundle))


def info(place: Place, data: bytes) -> None:
    """The bytes are what a bundle's manifest says of itself, sealed as only somebody who means harm would."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return
    artifacts.seal(place.bundle / artifacts.MANIFEST, place.manifest | {"info": found})
    opened = open_bundle(place.bundle)
    engine = opened.engine(loading.choose(opened))
    engine.file(opened.info["engines"]["ort"]["file"] if "ort" in opened.info["engines"] else "model.onnx")
    Contract("fuzz", opened.info["inputs"], opened.info["axes"]).checked(bundles.feeds())


def zip_(place: Place, data: bytes) -> None:
    """The bytes are a zip; where they end as a bundle's does, its digest is made to fit."""
    path = place.written("fuzz.zip", data)
    if data[-DIGEST_CHARACTERS - len(MARK) : -DIGEST_CHARACTERS] == MARK:
        path.write_bytes(data[:-DIGEST_CHARACTERS] + _digest_of_zip(path).encode())
    open_bundle(path).close()


def safetensors(place: Place, data: bytes) -> None:
    """The bytes are a file of weights, or of golden feeds."""
    from engines.golden import read_tensors
    from exporter.weights import read_header

    path = place.written("fuzz.safetensors", data)
    for read in (read_header, lambda path: read_tensors(path, "0/")):
        _refused_or(lambda read=read: read(path))


def step_table(place: Place, data: bytes) -> None:
    """The bytes are an engine's table of scales."""
    place.written(schedule.FILE, data)
    files = {schedule.FILE: {"bytes": len(data), "sha256": ""}}
    schedule.read_table(Artifact(place.path, {"files": files}), steps=3)


def onnx(place: Place, data: bytes) -> None:
    """The bytes are a graph: its external data, functions and codebooks are looked at as a build does."""
    from engines.backends import _codebooks

    path = place.written("fuzz.onnx", data)
    external_data.check(path, ["fuzz.onnx", "fuzz.onnx.data"])
    _codebooks.rewrite(path, "run")


def codes(place: Place, data: bytes) -> None:
    """The bytes are a layer's stored codes, of a format and in a shape that the first of them choose."""
    import torch

    from exporter.formats import codebook
    from exporter.formats import int as integers
    from exporter.quantized import read_codes

    if len(data) < 4:
        return
    kind, rows, columns, raw = data[0], data[1] % 16 + 1, 2 * (data[2] % 8 + 1), bytearray(data[3:])
    whole = kind < 128
    fmt: Any = integers.Format(kind % 7 + 2) if whole else codebook.Format(kind % 4 + 1, (16, 64, 256)[kind % 3])
    like = torch.zeros(rows, columns, dtype=fmt.carrier)
    packed = torch.frombuffer(raw, dtype=(torch.uint8, torch.int8, torch.float8_e4m3fn)[data[1] // 16 % 3])
    assert read_codes(packed.reshape(_like_stored(packed, fmt, like)), fmt, like, "a layer").shape == like.shape


def _like_stored(packed: Any, fmt: Any, like: Any) -> Any:
    """Returns the shape that codes of a format are stored in, where there are as many."""
    import torch

    from exporter.tensors import pack

    wanted = pack(torch.empty_like(like), fmt)
    return wanted.shape if wanted.numel() == packed.numel() else packed.shape


def recipe(place: Place, data: bytes) -> None:
    """The bytes are a user's recipe."""
    from exporter.recipe import load

    load(str(place.written("fuzz.toml", data)))


TARGETS: dict[str, Callable[[Place, bytes], None]] = {
    "manifest": manifest, "info": info, "zip": zip_, "safetensors": safetensors, "step_table": step_table, "onnx": onnx,
    "codes": codes, "recipe": recipe,
}  # fmt: skip


def _refused_or(read: Callable[[], object]) -> None:
    try:
        read()
    except UserError as error:
        if not error.fix:
            raise AssertionError("a refusal without a fix") from error


def once(target: str, place: Place, data: bytes) -> None:
    """Reads one input; raises whatever is no refusal with a message."""
    _refused_or(lambda: TARGETS[target](place, data))


def seeds(target: str) -> dict[str, bytes]:
    """Returns inputs that are whole, from which a corpus begins."""
    place = Place()
    try:
        return _seeds(target, place)
    finally:
        shutil.rmtree(place.path)


def _seeds(target: str, place: Place) -> dict[str, bytes]:
    from engines.bundle import pack

    sealed = (place.bundle / artifacts.MANIFEST).read_bytes()
    if target == "zip":
        pack(place.bundle, place.path / "whole.zip")
        return {"whole": (place.path / "whole.zip").read_bytes()}
    if target == "step_table":
        np.save(place.path / "table.npy", np.zeros((3, 2), np.float32))
        return {"whole": (place.path / "table.npy").read_bytes()}
    if target == "codes":
        return {"int4": struct.pack("BBB", 2, 3, 7) + bytes(16), "codebook": struct.pack("BBB", 130, 3, 7) + bytes(32)}
    if target == "recipe":
        return {file.stem: file.read_bytes() for file in sorted((ROOT / "exporter/recipes").glob("*.toml"))}
    whole = {
        "manifest": sealed,
        "info": json.dumps(place.manifest["info"]).encode(),
        "safetensors": (place.bundle / "golden.safetensors").read_bytes(),
        "onnx": (place.bundle / "engines/ort/model.onnx").read_bytes(),
    }
    return {"whole": whole[target]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=list(TARGETS))
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, required=True, help="Folder of the growing corpus, and of what is found.")
    arguments = parser.parse_args()
    try:
        import atheris
    except ImportError:
        sys.exit("atheris is not installed\n  fix: pip install atheris")
    with atheris.instrument_imports(include=["engines", "exporter", "zipfile", "tomllib"]):
        for name in ("exporter.recipe", "exporter.tensors", "exporter.quantized", "engines.backends._codebooks"):
            __import__(name)
    atheris.instrument_func(tomllib.loads)
    out = arguments.out / arguments.target
    out.mkdir(parents=True, exist_ok=True)
    for name, content in seeds(arguments.target).items():
        (out / f"seed-{name}").write_bytes(content)
    for file in (CORPUS / arguments.target).glob("*"):
        shutil.copyfile(file, out / file.name)
    place, done, started = Place(), 0, time.monotonic()
    rss: list[int] = []

    def one(data: bytes) -> None:
        nonlocal done
        once(arguments.target, place, data)
        done += 1
        if done in (1000, arguments.runs):
            rss.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        if done == arguments.runs:
            result = {"target": arguments.target, "runs": done, "seconds": round(time.monotonic() - started, 1)}
            result |= {"rss_growth_bytes": rss[-1] - rss[0], "faults": 0}
            (arguments.out / f"{arguments.target}.json").write_text(json.dumps(result) + "\n")
            print(json.dumps(result), flush=True)
            if rss[-1] - rss[0] > MAX_RSS_GROWTH:
                raise MemoryError(f"memory grew by {rss[-1] - rss[0]} bytes")

    options = [
        f"-atheris_runs={arguments.runs}",
        "-timeout=20",
        f"-artifact_prefix={arguments.out}/{arguments.target}-",
    ]
    atheris.Setup([sys.argv[0], *options, str(out)], one)
    try:
        atheris.Fuzz()
    finally:
        shutil.rmtree(place.path, ignore_errors=True)


if __name__ == "__main__":
    main()
