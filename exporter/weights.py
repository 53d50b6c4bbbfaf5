"""Where a model's float weights come from, one tensor at a time: safetensors, or a generator keyed by name."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from engines.artifacts import digest_file, digest_json, inside, read_json
from engines.errors import UserError

GENERATOR_VERSION = 1  # part of a random model's digest: raise it when `RandomWeights` draws differently
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8, "U8": 8, "BOOL": 8,
}  # fmt: skip


class Weights(Protocol):
    """Named tensors, read one at a time."""

    @property
    def digest(self) -> str: ...

    def names(self) -> set[str]: ...

    def halves(self) -> set[str]:
        """Returns the names of those that are stored in fp16."""

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Returns the tensor as it is stored; a wrong shape, a NaN or an infinity is an error."""


def read_header(path: Path) -> dict[str, dict[str, Any]]:
    """Returns name → {dtype, shape, data_offsets} after checking that the file holds every byte it promises."""

    def broken(why: str) -> UserError:
        return UserError(
            f"{path}: {why}", fix="the file is truncated or damaged: copy it again from where it came from"
        )

    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > MAX_HEADER_BYTES or 8 + length > size:
            raise broken(f"{size} bytes are too few for its header of {length} bytes")
        try:
            header: dict[str, dict[str, Any]] = json.loads(file.read(length))
        except (ValueError, RecursionError) as error:
            raise broken(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise broken(f"its header is a {type(header).__name__}, not an object")
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if not _well_formed(entry):
            raise broken(f"tensor {name!r} has a malformed entry {str(entry)[:200]}")
    end = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        want = math.prod(entry["shape"]) * BITS[entry["dtype"]] // 8
        if last - first != want:
            raise broken(f"tensor {name!r} claims {last - first} bytes where its shape {entry['shape']} needs {want}")
        if first != end:
            raise broken(f"tensor {name!r} starts at byte {first} where the one before it ends at {end}")
        end = last
    if 8 + length + end != size:
        raise broken(f"holds {size} bytes where its header promises {8 + length + end}")
    return header


def _well_formed(entry: object) -> bool:
    if not isinstance(entry, dict) or entry.get("dtype") not in list(BITS):
        return False
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return False
    return all(type(value) is int and value >= 0 for value in (*shape, *offsets))


class SafetensorsWeights:
    """A file, or the shards of an index file, in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._promised: int | None = None  # by an index
        self._files = {name: inside(folder, file, links=True) for name, file in self._find().items()}
        files = sorted(set(self._files.values()))
        self._headers = {file: read_header(file) for file in files}
        for name, file in self._files.items():
            if name not in self._headers[file]:
                raise UserError(
                    f"{file}: lacks tensor {name!r}, which the index puts there", fix="copy the model again"
                )
        if self._promised is not None and self._promised != (held := self._bytes()):
            raise UserError(
                f"{folder}: its index promises {self._promised} bytes of weights, its {len(files)} shards hold {held}",
                fix="shards of different downloads do not go together: copy the model again, with its index",
            )

    @cached_property
    def digest(self) -> str:
        return digest_json([[file.name, digest_file(file)] for file in sorted(set(self._files.values()))])

    def _bytes(self) -> int:
        entries = (self._headers[file][name] for name, file in self._files.items())
        return sum(entry["data_offsets"][1] - entry["data_offsets"][0] for entry in entries)

    def _find(self) -> dict[str, str]:
        for stem in ("diffusion_pytorch_model", "model"):
            index = self.folder / f"{stem}.safetensors.index.json"
            if index.is_file():
                content = read_json(index, fix="copy the model again")
                table, metadata = content.get("weight_map"), content.get("metadata")
                if isinstance(metadata, dict) and type(metadata.get("total_size")) is int:
                    self._promised = metadata["total_size"]
                if not isinstance(table, dict) or not all(isinstance(file, str) for file in table.values()):
                    raise UserError(f"{index}: has no weight_map of names to files", fix="copy the model again")
                files = sorted(set(table.values()))
                if missing := [f for f in files if not inside(self.folder, f, links=True).is_file()]:
                    raise UserError(
                        f"{self.folder}: lacks {missing[0]}", fix="copy the model again, with all its shards"
                    )
                return table
            if (file := self.folder / f"{stem}.safetensors").is_file():
                return dict.fromkeys(read_header(file), file.name)
        pickled = [f.name for f in self.folder.iterdir() if f.suffix in (".bin", ".pt", ".ckpt", ".pth")]
        hint = f"{pickled[0]} is a pickle, which can run code and is never read; " if pickled else ""
        raise UserError(
            f"{self.folder}: has no weights (diffusion_pytorch_model.safetensors)",
            fix=f"{hint}save it with save_pretrained(…, safe_serialization=True), or use random:{self.folder}",
        )

    def names(self) -> set[str]:
        return set(self._files)

    def halves(self) -> set[str]:
        return {name for name, file in self._files.items() if self._headers[file][name]["dtype"] == "F16"}

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        from safetensors import safe_open

        file = self._files[name]
        found = tuple(self._headers[file][name]["shape"])
        if found != shape:
            raise UserError(
                f"{file}: tensor {name!r} is {list(found)}, the config makes it {list(shape)}",
                fix="config.json and the weights are of different models: copy both again",
            )
        with safe_open(file, framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        if bad := int((~tensor.float().isfinite()).sum()):
            raise UserError(
                f"{file}: tensor {name!r} holds {bad} values that are NaN or infinite, of {tensor.numel()}",
                fix="the checkpoint is damaged (or was saved in a type it overflows): get it again",
            )
        return tensor


class RandomWeights:
    """Weights drawn per tensor from a generator keyed by seed and name: equal everywhere, needing no disk."""

    def __init__(self, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], seed: int) -> None:
        self._shapes, self._seed = dict(shapes), seed
        self.digest = digest_json({"config": dict(config), "seed": seed, "generator": GENERATOR_VERSION})

    def names(self) -> set[str]:
        return set(self._shapes)

    def halves(self) -> set[str]:
        return set()

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Draws matrices with variance 1/fan-in, vectors near 0 (biases) or near 1 (norm weights)."""
        key = hashlib.sha256(f"{self._seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
        drawn = torch.randn(shape, generator=generator)
        if len(shape) >= 2:
            return drawn / math.sqrt(math.prod(shape[1:]))
        return 0.02 * drawn + (1.0 if name.endswith("weight") else 0.0)
