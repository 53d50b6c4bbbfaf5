"""Fuzzes what reads files that others made: every input is read, or refused with a message; anything else is a fault.

`python tools/fuzz_loaders.py zip --runs 1000000 --out out/fuzz` runs atheris (pip install atheris), guided by coverage,
from the corpus in tests/corpus; what it finds lies in --out, and belongs into the corpus once it is mended.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import resource
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
CORPUS = ROOT / "tests/corpus"

try:
    import atheris
except ImportError:
    atheris = None
watched = ["bundles", "engines", "exporter", "zipfile", "tomllib", "numpy.lib.format"]
with atheris.instrument_imports(include=watched) if atheris else contextlib.nullcontext():
    import bundles

    from engines import artifacts, external_data, loading, schedule
    from engines.artifacts import Artifact
    from engines.backends import _codebooks
    from engines.bundle import DIGEST_CHARACTERS, MARK, _digest_of_zip, open_bundle, pack
    from engines.errors import UserError
    from engines.golden import read_tensors
    from exporter.formats import codebook
    from exporter.formats import int as integers
    from exporter.quantized import read_codes
    from exporter.recipe import load as load_recipe
    from exporter.tensors import pack as pack_codes
    from exporter.weights import read_header

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


ODD = (
    None, True, 0, -1, 1, 3, 8, 1 << 62, 0.5, -1e308, "", "..", "/", "fp16", "int64", "trt-rtx", "sm89", "row", "index",
    "step", "batch", "engines/ort", "x" * 300, [], {}, [[]], {"": {}}, ["batch", 1], [1, 2, 3],
)  # fmt: skip


def info(place: Place, data: bytes) -> None:
    """The bytes put odd values here and there into what a bundle says of itself, sealed as if by who means harm."""
    found = json.loads(json.dumps(place.manifest["info"]))
    for first, second, value in zip(data[0::3], data[1::3], data[2::3], strict=False):
        places = list(_places(found))
        owner, key = places[(first << 8 | second) % len(places)]
        if value == len(ODD):
            del owner[key]
        else:
            owner[key] = ODD[value % len(ODD)]
        if not found:
            return
    artifacts.seal(place.bundle / artifacts.MANIFEST, place.manifest | {"info": found})
    opened = open_bundle(place.bundle)
    engine = loading.Engine(opened, name := loading.choose(opened), opened.engine(name), 1)
    engine.run(bundles.feeds())
    engine.sample(np.zeros((2, *bundles.SHAPE), np.float32), {"class_labels": np.zeros(2, np.int64)})
    engine.self_test()


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every place of a JSON value, as the list or object that holds it and its key there."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def zip_(place: Place, data: bytes) -> None:
    """The bytes are a zip; where they end as a bundle's does, its digest is made to fit."""
    path = place.written("fuzz.zip", data)
    if data[-DIGEST_CHARACTERS - len(MARK) : -DIGEST_CHARACTERS] == MARK:
        path.write_bytes(data[:-DIGEST_CHARACTERS] + _digest_of_zip(path).encode())
    open_bundle(path).close()


def safetensors(place: Place, data: bytes) -> None:
    """The bytes are a file of weights, or of golden feeds."""
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
    path = place.written("fuzz.onnx", data)
    external_data.check(path, ["fuzz.onnx", "fuzz.onnx.data"])
    _codebooks.rewrite(path, "run")


def codes(place: Place, data: bytes) -> None:
    """The bytes are a layer's stored codes, of a format and in a shape that the first of them choose."""
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
    wanted = pack_codes(torch.empty_like(like), fmt)
    return wanted.shape if wanted.numel() == packed.numel() else packed.shape


def recipe(place: Place, data: bytes) -> None:
    """The bytes are a user's recipe."""
    load_recipe(str(place.written("fuzz.toml", data)))


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
        "info": bytes([0, 3, 1, 0, 20, 4, 1, 7, 9]),
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
    if atheris is None:
        sys.exit("atheris is not installed\n  fix: pip install atheris")
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
