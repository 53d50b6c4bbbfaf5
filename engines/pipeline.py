"""From captions to pictures, without torch, transformers and diffusers: the whole pipeline that a bundle carries.

Text encoder and VAE decoder are graphs for ONNX Runtime, whatever backend the denoiser's engine is of.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines import golden
from engines.artifacts import Json
from engines.backends import ort
from engines.contract import as_numpy
from engines.errors import UserError
from engines.loading import Engine, load
from engines.text import Words

Floats = NDArray[np.float32]
Rows = dict[str, Floats]
CAPTIONS, PICTURES = 8, 1  # that are encoded, and decoded, at once: memory is bounded, and a VAE's is large
UNWANTED_CAPTION, UNWANTED_ZEROS = "caption", "zeros"  # what guidance goes away from: the empty caption, or nothing


def load_pipeline(path: Path | str, *, threads: int = 0, **options: Any) -> Pipeline:
    """Opens a bundle's best engine, with the options of `engines.load`, and the text half and VAE around it."""
    return Pipeline(load(path, threads=threads, **options), int(threads))


class Pipeline:
    """An engine of a bundle with what its pipeline has around it; calls from several threads at once are served."""

    def __init__(self, engine: Engine, threads: int = 0) -> None:
        info = engine.bundle.info["pipeline"]
        if info is None:
            raise UserError(
                f"{engine.bundle.source}: carries no text encoder",
                fix="feed its engine yourself (engines.load), or bundle a text-to-image pipeline's folder",
            )
        self.engine, self._text, self._vae, self._constants = engine, info["text"], info["vae"], info["constants"]
        self._inputs: list[Json] = [self._text, *self._text["more"]]
        inputs = [entry["input"] for entry in self._inputs]
        self._encoder = self._open(self._text["encoders"], inputs, self._text["outputs"], threads)
        self._decoder = None
        if self._vae:
            self._decoder = self._open(self._vae["decoders"], [self._vae["input"]], [self._vae["output"]], threads)
        self._words: dict[str, Words] = {}

    def draw(self, captions: Sequence[str], *, seed: int = 0, noise: Floats | None = None) -> Floats:
        """Returns a picture for every caption, [n, channels, height, width] in [−1, 1].

        Each starts from its own `noise` [n, …], or from what `noise_of` draws for `seed`.
        """
        return self.draw_tokens(self.tokens(captions), self.tokens([""]), seed=seed, noise=noise)

    def draw_tokens(
        self,
        wanted: Mapping[str, NDArray[np.int64]],
        unwanted: Mapping[str, NDArray[np.int64]],
        *,
        seed: int = 0,
        noise: Floats | None = None,
    ) -> Floats:
        """Draws as `draw` does, for token ids [n, tokens] by the encoder's inputs; `unwanted` are as many, or one."""
        count = len(wanted.get(self._text["input"], ()))
        self._check(wanted, [count])
        self._check(unwanted, [count, 1])
        noise = self.noise_of(count, seed) if noise is None else as_numpy(noise)
        if noise.shape[:1] != (count,):
            given = noise.shape[0] if noise.ndim else "no"
            raise UserError(f"noise for {given} pictures, and {count} captions", fix="give as many of both")
        rows = self.conditions(wanted)
        nothing = self._nothing(unwanted, count) if self.engine.sampler["guided"] else None
        return self.decode(self.engine.sample(noise, rows, nothing))

    def noise_of(self, count: int, seed: int) -> Floats:
        """Returns standard normal noise [count, …]: row i is numpy's Philox stream of (seed, i), of its own kind.

        torch's generators give other numbers for the same seed.
        """
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise UserError(f"seed {seed!r}", fix="give a whole number, 0 or more")
        shape = self.engine.sampler["latent"]["shape"]
        streams = (np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, i)))) for i in range(count))
        return np.stack([stream.standard_normal(shape, dtype=np.float32) for stream in streams])

    def tokens(self, captions: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """Returns token ids [n, tokens] of captions, by the encoder's inputs."""
        if isinstance(captions, str) or not captions:
            raise UserError(f"captions: {captions!r}", fix="give a list of at least one caption")
        return {entry["input"]: self._words_of(entry).ids(captions) for entry in self._inputs}

    def conditions(self, tokens: Mapping[str, NDArray[np.int64]], *, wanted: bool = True) -> Rows:
        """Returns what the denoiser reads for token ids, a row each; without `wanted`, for guidance's other half."""
        count = len(next(iter(tokens.values())))
        parts = [
            self._encoder.run({name: ids[first : first + CAPTIONS].astype(np.int64) for name, ids in tokens.items()})
            for first in range(0, count, CAPTIONS)
        ]
        found = {self._text["outputs"][name]: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        if not wanted and self._text["unwanted"] == UNWANTED_ZEROS:
            found = {name: np.zeros_like(value) for name, value in found.items()}
        constants = {name: np.array([row] * count, np.float32) for name, row in self._constants.items()}
        return found | constants

    def _nothing(self, tokens: Mapping[str, NDArray[np.int64]], count: int) -> Rows:
        found = self.conditions(tokens, wanted=False)
        return {name: np.broadcast_to(value, (count, *value.shape[1:])) for name, value in found.items()}

    def decode(self, latents: Floats) -> Floats:
        """Returns finished latents [n, …] as pictures in [−1, 1]."""
        if self._decoder is None:
            return latents.clip(-1, 1)
        scaled = latents / np.float32(self._vae["scaling_factor"]) + np.float32(self._vae["shift_factor"])
        parts = [
            self._decoder.run({self._vae["input"]: scaled[first : first + PICTURES]})[self._vae["output"]]
            for first in range(0, len(scaled), PICTURES)
        ]
        return np.concatenate(parts).clip(-1, 1)

    def _open(
        self, graphs: Mapping[str, str], inputs: Collection[str], outputs: Collection[str], threads: int
    ) -> ort.OrtRunner:
        kind = _held(graphs, self.engine.dtype)
        file = self.engine.bundle.file(graphs[kind])
        session = ort.open_session(file, plain_record(kind), threads=threads)
        takes, gives = ({one.name for one in part} for part in (session.get_inputs(), session.get_outputs()))
        if not takes <= {*inputs} or not outputs or not gives >= {*outputs}:
            raise UserError(
                f"{file}: takes {', '.join(takes)} and gives {', '.join(gives)}, which its manifest does not say",
                fix="do not use this bundle: it was damaged or tampered with; get it, or make it, again",
            )
        return ort.OrtRunner(session, "pipeline", list(outputs))

    def self_test(self) -> list[Json]:
        """Encodes the recorded tokens and decodes the recorded latents; returns a row for each, as an engine's test."""
        recorded = golden.read(self.engine.bundle, "picture/")
        found = [self._text_row(recorded, "wanted")]
        if self.engine.sampler["guided"]:
            found.append(self._text_row(recorded, "unwanted"))
        if self._vae:
            value = golden.decibels(recorded["picture"], self.decode(recorded["latent"]))
            found.append(golden.row("VAE decoder", value, self._limit_db(self._vae)))
        return found

    def _text_row(self, recorded: Mapping[str, NDArray[Any]], half: str) -> Json:
        prefix = "" if half == "wanted" else "unwanted_"
        tokens = {entry["input"]: recorded[f"{prefix}{entry['input']}"] for entry in self._inputs}
        states = self.conditions(tokens, wanted=half == "wanted")
        worst = min(golden.decibels(recorded[f"{half}/{name}"], value) for name, value in states.items())
        return golden.row(f"text encoder, {half}", worst, self._limit_db(self._text))

    def _limit_db(self, part: Json) -> float:
        limits: dict[str, float] = part["limits_db"]
        return limits[_held(limits, self.engine.dtype)]

    def _check(self, tokens: Mapping[str, NDArray[Any]], counts: Sequence[int]) -> None:
        for entry in self._inputs:
            found, wanted = tokens.get(entry["input"]), [(count, entry["tokens"]) for count in counts if count]
            if found is None or found.dtype.kind not in "iu" or found.shape not in wanted:
                told = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
                kinds = " or ".join(str(list(shape)) for shape in wanted) or f"[n, {entry['tokens']}]"
                raise UserError(
                    f"tokens {entry['input']!r}: {told}", fix=f"give whole numbers {kinds}, as tokens() does"
                )

    def _words_of(self, entry: Json) -> Words:
        """Opens a tokenizer when a caption first needs it: who gives token ids need not have the library."""
        file = entry["tokenizer"]
        if file not in self._words:
            self._words[file] = Words(self.engine.bundle.file(file), (entry["pad"], entry["eos"]))
        return self._words[file]


def _held(by_type: Mapping[str, Any], dtype: str) -> str:
    """Returns the engine's float type, or fp32 for a graph that would overflow in it."""
    return dtype if dtype in by_type else "fp32"


def plain_record(dtype: str) -> Json:
    """Returns what a backend must know of a graph in which nothing is quantized."""
    return {"dtype": dtype, "layers": {}, "points": {}, "weights": {"by_format": {}}}
