"""The text half of a pipeline as one graph: token ids in, what the denoiser reads out.

What is traced is the family's own `encode`, so that the graph computes what diffusers' pipeline does, to the layer
whose output it takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from engines.artifacts import Json
from exporter.models import Axis, Family, TensorSpec

TOKENIZER, TOKENS = "tokenizer", "tokens"  # `tokenizer_2` is read by the graph's input `tokens_2`
AXES = {"batch": Axis(1, 2, 2)}  # what it is traced with


class _Fed:
    """Stands for a tokenizer: whatever it is asked to read, it gives the ids that the graph is fed."""

    def __init__(self, ids: torch.Tensor) -> None:
        self.model_max_length, self._ids = ids.shape[1], ids

    def tokenize(self, text: str) -> list[str]:
        return []  # no token of a caption stands for several

    def __call__(self, prompts: Sequence[str], padding: str, **options: Any) -> Any:
        # "longest" is asked for only to warn of words that were cut off: of none.
        return SimpleNamespace(input_ids=self._ids if padding == "max_length" else self._ids[:, :0])


class TextHalf(nn.Module):
    """A diffusers pipeline's tokenizers and encoders; called with ids in order, gives what the denoiser reads."""

    def __init__(self, pipeline: Any, family: Family) -> None:
        super().__init__()
        self._pipeline, self._family = [pipeline], family
        parts = {name: part for name, part in pipeline.components.items() if part is not None}
        self.tokenizers = {name: parts[name] for name in sorted(parts) if name.startswith(TOKENIZER)}
        for name, part in parts.items():
            if name.startswith("text_encoder"):
                self.add_module(name, part)

    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(name.replace(TOKENIZER, TOKENS), "int64", ("batch", part.model_max_length))
            for name, part in self.tokenizers.items()
        )

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Returns those inputs of the denoiser that come from captions, of as many tokens as are read."""
        fixed = {"timestep", *self._family.constants(1)}
        tokens = self.inputs()[0].shape[1]
        return tuple(
            TensorSpec(spec.name, spec.dtype, tuple(tokens if d == "text_tokens" else d for d in spec.shape))
            for spec in self._family.inputs()[1:]
            if spec.name not in fixed
        )

    def forward(self, *ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        (pipeline,) = self._pipeline
        try:
            for name, fed in zip(self.tokenizers, ids, strict=True):
                object.__setattr__(pipeline, name, _Fed(fed))
            wanted, _ = self._family.encode(pipeline, [""])
        finally:
            for name, part in self.tokenizers.items():
                object.__setattr__(pipeline, name, part)
        return tuple(wanted[spec.name] for spec in self.outputs())

    def unwanted_is_zeros(self) -> bool:
        """Whether guidance goes away from zeros, as SDXL's does, and not from the empty caption."""
        with torch.no_grad():
            _, unwanted = self._family.encode(self._pipeline[0], [""])
        return not any(bool(value.any()) for value in unwanted.values())

    def read(self, captions: Sequence[str]) -> dict[str, torch.Tensor]:
        """Returns the graph's inputs for captions, [n, tokens] each."""
        found = {}
        for spec, part in zip(self.inputs(), self.tokenizers.values(), strict=True):
            found[spec.name] = _padded(part, captions)
        return found

    def write_tokenizers(self, folder: Path) -> list[Json]:
        """Writes each tokenizer as the library `tokenizers` reads it, padding and cutting as the encoder wants it."""
        entries = []
        for spec, (name, part) in zip(self.inputs(), self.tokenizers.items(), strict=True):
            _padded(part, [""])  # sets how it pads and cuts
            (folder / name).mkdir()
            file = f"{name}/tokenizer.json"
            (folder / file).write_text(part.backend_tokenizer.to_str(), encoding="utf-8")
            ids = {"pad": part.pad_token_id, "bos": part.bos_token_id, "eos": part.eos_token_id}
            entries.append({"tokenizer": file, "tokens": spec.shape[1], **ids, "input": spec.name})
        return entries


def _padded(tokenizer: Any, captions: Sequence[str]) -> torch.Tensor:
    """Source: diffusers, StableDiffusionPipeline.encode_prompt."""
    options = {"padding": "max_length", "max_length": tokenizer.model_max_length, "truncation": True}
    found: torch.Tensor = tokenizer(list(captions), **options, return_tensors="pt").input_ids
    return found
