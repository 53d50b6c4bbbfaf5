"""Calibration sets on disk: the denoiser's inputs at every sampling step, in shards that are read lazily."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import safe_open

from calib_data.tensors import save_whole
from engines.artifacts import Artifact


class ShardWriter:
    """Collects one batch of trajectories and writes it as one file, whole or not at all."""

    def __init__(self, folder: Path, number: int) -> None:
        self.path = folder / shard_name(number)
        self._tensors: dict[str, torch.Tensor] = {}

    def add(self, step: int, feeds: Mapping[str, NDArray[Any]]) -> None:
        self._tensors |= {f"{step}/{name}": torch.from_numpy(value) for name, value in feeds.items()}

    def close(self) -> None:
        save_whole(self._tensors, self.path)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.safetensors"


class CalibrationSet:
    """Records of a calibration artifact: the feeds of one denoising call each, `step` and `timestep` among them."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.steps: list[int] = list(artifact.info["record_steps"])

    @property
    def shards(self) -> list[str]:
        return sorted(self.artifact.files("shard-"))

    def first(self, trajectories: int | None) -> list[str]:
        """Returns the shards that hold the first `trajectories`, whole ones; all where it is None."""
        shards = self.shards
        if trajectories is None:
            return shards
        return shards[: -(-len(shards) * trajectories // self.artifact.info["samples"])]

    def read(self, shard: str, steps: Sequence[int] | None = None) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Yields (step, feeds) of one shard, opened once, one record in memory at a time."""
        with safe_open(self.artifact.file(shard), framework="pt") as handle:
            names = sorted({key.partition("/")[2] for key in handle.keys()})  # noqa: SIM118  not a dict
            for step in self.steps if steps is None else steps:
                yield step, {name: handle.get_tensor(f"{step}/{name}") for name in names}

    def batches(self, shards: Sequence[str], rows: int = 64) -> Iterator[dict[str, torch.Tensor]]:
        """Yields feeds of about `rows` rows that mix steps, over every record of some shards."""
        for shard in shards:
            held: list[dict[str, torch.Tensor]] = []
            for _, feeds in self.read(shard):
                held.append(feeds)
                if sum(len(f["step"]) for f in held) >= rows:
                    yield _joined(held)
                    held = []
            if held:
                yield _joined(held)


def _joined(records: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.cat([record[name] for record in records]) for name in records[0]}
