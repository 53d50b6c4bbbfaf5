"""What tools/fuzz_loaders.py feeds: one target for each loader, and whole inputs to begin from."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx.external_data_helper import set_external_data
from safetensors.numpy import save

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tools")]

import bench_codebook_kernel as codebooks
import bundles
import common
import cpp_bundles

from engines import artifacts, external_data, loading, schedule
from engines.artifacts import MANIFEST, NO_DIGEST, Artifact
from engines.backends import _codebooks, _int4
from engines.bundle import open_bundle
from engines.bundle_shape import GOLDEN
from engines.errors import UserError
from engines.golden import read_tensors
from engines.pipeline import Pipeline
from engines.zipped import DIGEST_CHARACTERS, MARK, digest_of_zip, pack
from exporter.checkpoint import open_checkpoint
from exporter.formats import codebook
from exporter.formats import int as integers
from exporter.quantized import read_codes
from exporter.recipe import FOLDER as RECIPES
from exporter.recipe import load as load_recipe
from exporter.recipe import parse as parse_recipe
from exporter.sampling import scheduler_for
from exporter.tensors import pack as pack_codes
from exporter.verify import contract_lines
from exporter.weights import read_header

MOST = 1 << 16  # numbers in an array that a target makes because an input asks for it


class Place:
    """A folder, in memory where there is one, for all that is written; in it a whole tiny bundle, made once."""

    def __init__(self) -> None:
        shared = Path("/dev/shm")
        self.path = Path(tempfile.mkdtemp(prefix="fuzz-", dir=shared if shared.is_dir() else None))
        tempfile.tempdir = str(self.path)  # zips are unpacked there too
        self.golden = bundles.golden("row") | _picture()
        self.bundle = bundles.tiny_bundle(
            self.path / "bundle", step_input="row", guided=True, edit=_with_picture, files={GOLDEN: save(self.golden)}
        )
        self.manifest = json.loads((self.bundle / MANIFEST).read_text())
        self.captions = bundles.tiny_bundle(
            self.path / "captions", guided=True, edit=cpp_bundles.with_pipeline, files=_around_an_engine()
        )
        self.captions_manifest = json.loads((self.captions / MANIFEST).read_text())

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *error: object) -> None:
        tempfile.tempdir = None
        shutil.rmtree(self.path, ignore_errors=True)

    def written(self, name: str, data: bytes) -> Path:
        (self.path / name).parent.mkdir(exist_ok=True)
        (self.path / name).write_bytes(data)
        return self.path / name


def _around_an_engine() -> dict[str, bytes]:
    recorded = {"input_ids": np.ones((2, 3), np.int64), "unwanted_input_ids": np.zeros((2, 3), np.int64)}
    pictures = {f"picture/{name}": value for name, value in recorded.items()} | {
        "picture/picture": _picture()["picture/latent"]
    }
    return {
        "text_encoder/fp32/model.onnx": cpp_bundles.text_encoder(),
        "vae_decoder/fp32/model.onnx": cpp_bundles.decoder(),
        "tokenizer/tokenizer.json": b"{}",
        GOLDEN: save(bundles.golden() | _picture() | pictures),
    }


def _picture() -> dict[str, np.ndarray]:
    latent, labels = np.ones((2, *bundles.SHAPE), np.float32), np.arange(2)
    rows = {f"picture/{half}/class_labels": labels for half in ("wanted", "unwanted")}
    return {"picture/noise": latent, "picture/latent": latent, **rows}


def _with_picture(info: dict[str, Any]) -> None:
    info["golden"]["picture"] = {"runner": "quantized", "count": 2, "limits_db": {"fp32": -1e9}, "peak": 2.0}


# What a JSON value is replaced by: of every type, on both sides of every limit, and names that other places know.
ODD: Sequence[Any] = (
    None, True, 0, -1, 1, 2, 3, 8, 1 << 62, 10**30, 0.5, -1e308, "", "..", "/", "a\0b", "\ud800", "x" * 300, "fp16",
    "fp32", "int64", "float", "row", "index", "step", "step_row", "timestep", "batch", "ort", "trt-rtx", "sm89",
    "engines/ort", [], {}, [[]], {"": {}}, ["batch"], ["batch", 1], [1, 2, 3], [0.5],
)  # fmt: skip


def edited(value: dict[str, Any], data: bytes, odd: Sequence[Any] = ODD) -> dict[str, Any]:
    """Returns a copy of a JSON object in which each three bytes replace, rename or take away what lies at one place."""
    found: dict[str, Any] = json.loads(json.dumps(value))
    for first, second, choice in zip(data[0::3], data[1::3], data[2::3], strict=False):
        places = list(_places(found))
        owner, key = places[(first << 8 | second) % len(places)] if places else (found, "")
        times, which = divmod(choice, len(odd) + 1)
        if which < len(odd):
            owner[key] = json.loads(json.dumps(odd[which]))
        elif places and times % 2 and isinstance(owner, dict):
            owner[str(odd[first % len(odd)])] = owner.pop(key)
        elif places:
            del owner[key]
    return found


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yields every place of a JSON value, as the list or object that holds it and its key there."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in list(pairs):
        yield value, key
        yield from _places(inner)


def manifest(place: Place, data: bytes) -> None:
    """The bytes are a manifest, sealed if they leave room for a digest; else they change a whole one."""
    if not data.startswith(b"{"):
        found = edited({key: value for key, value in place.manifest.items() if key != "info"}, data)
        data = _unsealed({"info": place.manifest["info"]} | found)
    (place.bundle / MANIFEST).write_bytes(_sealed(data))
    artifacts.open_artifact(place.bundle, artifacts.kind_of(place.bundle))
    open_bundle(place.bundle)


def _unsealed(manifest: dict[str, Any]) -> bytes:
    return json.dumps(manifest | {"digest": NO_DIGEST}).encode()


def _sealed(manifest: bytes) -> bytes:
    """Returns a manifest with its digest, if it leaves room for one."""
    room, own = NO_DIGEST.encode(), hashlib.sha256(manifest).hexdigest().encode()
    return manifest.replace(room, own) if manifest.count(room) == 1 else manifest


def info(place: Place, data: bytes) -> None:
    """The bytes change what a bundle says of itself, sealed as if by who means harm; then it is used as it says."""
    found = edited(place.manifest["info"], data)
    (place.bundle / GOLDEN).write_bytes(save(place.golden))
    (place.bundle / MANIFEST).write_bytes(_sealed(_unsealed(place.manifest | {"info": found})))
    list(contract_lines(open_bundle(place.bundle).info))
    engine = loading.load(place.bundle, threads=1)
    _refused_or(engine.self_test)
    fed = {entry["name"]: _zeros(engine, entry["shape"], entry["dtype"]) for entry in engine.inputs}
    if "timestep" in fed:
        fed["timestep"][:] = engine.sampler["timesteps"][0]
    _refused_or(lambda: engine.run(fed))
    noise = _zeros(engine, ["batch", *engine.sampler["latent"]["shape"]], "fp32")
    rows = {name: fed[name] for name in fed.keys() - {"timestep", "step", engine.sampler["latent"]["input"]}}
    _refused_or(lambda: engine.sample(noise, rows, rows if engine.sampler["guided"] else None))


def _zeros(engine: loading.Engine, shape: Sequence[Any], dtype: str) -> np.ndarray:
    """Returns what an application would feed that believes the bundle."""
    sizes = [engine.axes[axis]["opt"] if isinstance(axis, str) else axis for axis in shape]
    if any(size < 0 for size in sizes) or np.prod([float(size) for size in sizes]) > MOST:
        raise UserError(f"an input of {sizes}", fix="an application has no room for it")
    return np.zeros(sizes, np.int64 if dtype == "int64" else np.float32)


def pipeline(place: Place, data: bytes) -> None:
    """The bytes change what a bundle says of its text encoder and VAE, which then draw."""
    whole = place.captions_manifest["info"]
    found = whole | {"pipeline": edited(whole["pipeline"], data)}
    (place.captions / MANIFEST).write_bytes(_sealed(_unsealed(place.captions_manifest | {"info": found})))
    drawing = Pipeline(loading.load(place.captions, threads=1), 1)
    _refused_or(drawing.self_test)
    entries = [found["pipeline"]["text"], *found["pipeline"]["text"]["more"]]
    if max(entry["tokens"] for entry in entries) <= MOST:
        ids = {entry["input"]: np.zeros((2, max(0, entry["tokens"])), np.int64) for entry in entries}
        _refused_or(lambda: drawing.draw_tokens(ids, ids))


def golden(place: Place, data: bytes) -> None:
    """Each three bytes change one of a bundle's recorded arrays, in type, shape or numbers; the manifest fits them."""
    arrays = dict(place.golden)
    for which, how, much in zip(data[0::3], data[1::3], data[2::3], strict=False):
        name = sorted(arrays)[which % len(arrays)]
        arrays[name] = REARRANGED[how % len(REARRANGED)](arrays[name], much)
        if how % (len(REARRANGED) + 1) == len(REARRANGED) and len(arrays) > 1:
            del arrays[name]
    content = save({name: np.ascontiguousarray(value) for name, value in arrays.items()})
    (place.bundle / GOLDEN).write_bytes(content)
    listed = {GOLDEN: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    changed = place.manifest | {"files": place.manifest["files"] | listed}
    (place.bundle / MANIFEST).write_bytes(_sealed(_unsealed(changed)))
    loading.load(place.bundle, threads=1, self_test=True)


REARRANGED: Sequence[Callable[[np.ndarray, int], np.ndarray]] = (
    lambda value, much: value.ravel(),
    lambda value, much: value[None],
    lambda value, much: value[:much] if value.ndim else value,
    lambda value, much: value.ravel()[:1].reshape(()) if value.size else value,
    lambda value, much: np.repeat(value, much % 9, axis=0) if value.ndim and value.size < MOST else value,
    lambda value, much: value.T,
    lambda value, much: value.astype(("i1", "u8", "f2", "f8", "?", "i8", "f4")[much % 7]),
    lambda value, much: np.full_like(value, np.int64((0, 1, -1, 127)[much % 4]).astype(value.dtype)),
    lambda value, much: value.astype("f4") + np.float32((np.nan, np.inf, -np.inf, 3e38)[much % 4]),
)


def zip_(place: Place, data: bytes) -> None:
    """The bytes are a zip; where they end as a bundle's does, its digest is made to fit."""
    path = place.written("fuzz.zip", data)
    if data[-DIGEST_CHARACTERS - len(MARK) : -DIGEST_CHARACTERS] == MARK:
        path.write_bytes(data[:-DIGEST_CHARACTERS] + digest_of_zip(path).encode())
    open_bundle(path).close()


def safetensors(place: Place, data: bytes) -> None:
    """The bytes are a file of weights, or of golden feeds."""
    path = place.written("fuzz.safetensors", data)
    _refused_or(lambda: read_header(path))
    _refused_or(lambda: read_tensors(path, "0/"))


def step_table(place: Place, data: bytes) -> None:
    """The bytes are an engine's table of scales."""
    place.written(schedule.FILE, data)
    files = {schedule.FILE: {"bytes": len(data), "sha256": ""}}
    schedule.read_table(Artifact(place.path, {"files": files}), steps=3)


def onnx(place: Place, data: bytes) -> None:
    """The bytes are a graph: its external data, functions, codebooks and INT4 weights are looked at as a build does."""
    path = place.written("fuzz.onnx", data)
    place.written("fuzz.onnx.data", bytes(64))
    external_data.check(path, ["fuzz.onnx", "fuzz.onnx.data"])
    for decode in ("run", "load"):
        _refused_or(lambda decode=decode: _widened(_codebooks.rewrite(path, decode)))


def _widened(model: Any) -> None:
    if model is not None:
        _int4.widen(model)


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
    assert load_recipe(str(place.written("fuzz.toml", data))).digest


WORDS = (*ODD, "codebook", "fp", "int", "auto", "mse", "percentile", "absmax", "rtn", "kmeans", "fp_search",
    "fp_rounding", "dilatequant", "vq4dit", "smoothquant", "tensor", "channel", "block", "attention", "conv", "*",
    {"format": "int", "bits": 8}, {"format": "codebook", "vector_size": 4, "codebook_size": 256}, {"name": "rtn"},
    {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}, {"format": "int", "bits": 4, "granularity": "step"},
)  # fmt: skip
SHIPPED = {file.stem: tomllib.loads(file.read_text()) for file in sorted(RECIPES.glob("*.toml"))}


def rules(place: Place, data: bytes) -> None:
    """The bytes change a shipped recipe, which the first of them chooses."""
    source = list(SHIPPED.values())[data[0] % len(SHIPPED)] if data else {}
    assert parse_recipe("fuzz", edited(source, data[1:], WORDS)).digest


SIZES = (*(value for value in ODD if not isinstance(value, int) or value < 16), "DDIMScheduler", "silu")


def checkpoint(place: Place, data: bytes) -> None:
    """The bytes change a model's config, sampler.json and scheduler, of a family that the first of them chooses."""
    files = {
        "config.json": list(common.FAMILIES.values())[data[0] % len(common.FAMILIES)] if data else common.TINY,
        "sampler.json": {"steps": 2, "guidance_scale": 1.5, "pixels": True, "task": "digits", "prompts": "p.txt"},
        "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000},
    }
    found = edited(files, data[1:], SIZES)
    for name in files:
        place.written(f"model/{name}", json.dumps(found.get(name, {})).encode())
    place.written("model/p.txt", b"a caption\n")
    opened = open_checkpoint(f"random:{place.path / 'model'}")
    _refused_or(lambda: scheduler_for(opened))
    _refused_or(lambda: (opened.skeleton(), opened.family.inputs(), opened.family.output(), opened.family.axes()))


TARGETS: dict[str, Callable[[Place, bytes], None]] = {
    "manifest": manifest, "info": info, "pipeline": pipeline, "golden": golden, "zip": zip_, "safetensors": safetensors,
    "step_table": step_table, "onnx": onnx, "codes": codes, "recipe": recipe, "rules": rules, "checkpoint": checkpoint,
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
    with Place() as place:
        return _SEEDS[target](place)


def _zips(place: Place) -> dict[str, bytes]:
    pack(place.bundle, place.path / "whole.zip")
    return {"whole": (place.path / "whole.zip").read_bytes()}


def _tables(place: Place) -> dict[str, bytes]:
    np.save(place.path / "table.npy", np.zeros((3, 2), np.float32))
    return {"whole": (place.path / "table.npy").read_bytes()}


def _graphs(place: Place) -> dict[str, bytes]:
    formats = {"bytes": codebook.Format(4, 256), "sixes": codebook.Format(2, 64), "nibbles": codebook.Format(2, 16)}
    made = {
        name: codebooks.layer_graph(*codebooks.random_weight(4, 16, fmt)[:2], scale=np.ones(4, np.float32))
        for name, fmt in formats.items()
    }
    made["outside"] = codebooks.layer_graph(*codebooks.random_weight(4, 16, formats["nibbles"])[:2])
    codes = made["outside"].graph.initializer[0]
    set_external_data(codes, "fuzz.onnx.data", length=len(codes.raw_data))
    codes.ClearField("raw_data")
    return {"plain": bundles.network().SerializeToString()} | {n: m.SerializeToString() for n, m in made.items()}


_SEEDS: dict[str, Callable[[Place], dict[str, bytes]]] = {
    "manifest": lambda place: {"whole": json.dumps(place.manifest | {"digest": NO_DIGEST}).encode(), "edit": bytes(3)},
    "info": lambda place: {"edit": bytes([0, 3, 1, 0, 20, 4, 1, 7, 9])},
    "pipeline": lambda place: {"edit": bytes([0, 3, 1])},
    "golden": lambda place: {"edit": bytes([0, 3, 1])},
    "zip": _zips,
    "safetensors": lambda place: {"whole": (place.bundle / GOLDEN).read_bytes()},
    "step_table": _tables,
    "onnx": _graphs,
    "codes": lambda place: {
        "int4": struct.pack("BBB", 2, 3, 7) + bytes(32),
        "codebook": struct.pack("BBB", 128, 3, 7) + bytes(64),
    },
    "recipe": lambda place: {file.stem: file.read_bytes() for file in sorted(RECIPES.glob("*.toml"))},
    "rules": lambda place: {name: bytes([number, 0, 3, 1]) for number, name in enumerate(SHIPPED)},
    "checkpoint": lambda place: {name: bytes([number, 0, 3, 1]) for number, name in enumerate(common.FAMILIES)},
}
