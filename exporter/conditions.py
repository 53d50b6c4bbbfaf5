"""What samples are asked to show: class labels, captions, or nothing; one entry per sample, keyed by its index."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch

from calib_data.prompts import GENERAL, read_list
from engines.artifacts import inside
from engines.errors import UserError
from exporter import progress, text
from exporter.checkpoint import Checkpoint
from exporter.models import Tensors

ENCODE = 8  # captions that a text encoder reads at once


class Conditions:
    """The conditioning inputs of samples; sample i is asked entry i of the list, which is read around and around.

    Captions are encoded once each, when a sample first asks for one.
    """

    def __init__(self, checkpoint: Checkpoint, entries: Sequence[str]) -> None:
        self._checkpoint, self._family = checkpoint, checkpoint.family
        self.entries = list(entries)
        self._encoded: dict[str, tuple[Tensors, Tensors]] = {}

    def asked(self, indices: Sequence[int]) -> list[str]:
        """Returns what each sample is asked to show; nothing for a model without condition."""
        return [self.entries[i % len(self.entries)] for i in indices] if self.entries else []

    def of(self, indices: Sequence[int], *, null: bool = False) -> Tensors:
        """Returns the conditioning inputs of samples, a row each, or with `null` those of guidance's other half."""
        asked = self.asked(indices)
        rows: Tensors = {}
        if asked:
            self._encode(asked)
            each = [self._encoded[entry][int(null)] for entry in asked]
            rows = {name: torch.cat([row[name] for row in each]) for name in each[0]}
        return rows | self._family.constants(len(indices))

    def read(self, indices: Sequence[int]) -> None:
        """Encodes what samples ask for, all at once, and lets the text encoder go: the model may need its memory."""
        self._encode(self.asked(indices))
        self.__dict__.pop("_pipeline", None)

    def _encode(self, entries: Sequence[str]) -> None:
        fresh = [entry for entry in dict.fromkeys(entries) if entry not in self._encoded]
        for first in range(0, len(fresh), ENCODE):
            chunk = fresh[first : first + ENCODE]
            found = self._read(chunk)
            for row, entry in enumerate(chunk):
                wanted, unwanted = ({n: t[row : row + 1].clone() for n, t in half.items()} for half in found)
                self._encoded[entry] = wanted, unwanted

    def _read(self, entries: Sequence[str]) -> tuple[Tensors, Tensors]:
        if self._family.text_pipeline() is None:
            return self._family.label(torch.tensor([int(entry) for entry in entries]))
        if self._pipeline is None:
            return text.drawn(self._family, entries)
        with torch.no_grad():
            wanted, unwanted = self._family.encode(self._pipeline, entries)
        return _floats(wanted), _floats(unwanted)

    @cached_property
    def _pipeline(self) -> Any:
        pipeline = text.open_pipeline(self._checkpoint)
        if pipeline is None:
            progress.note(
                f"note: {self._checkpoint.root} has no text encoder: captions are stood for by random embeddings"
            )
        else:
            text.check_words(pipeline, self.entries, str(self._checkpoint.root))
        return pipeline


def _floats(tensors: Tensors) -> Tensors:
    return {name: t.float() if t.is_floating_point() else t for name, t in tensors.items()}


def calibration_entries(checkpoint: Checkpoint, given: Sequence[str] | None) -> list[str]:
    """Returns what calibration asks for: the user's list, the model's own, or what ships for its kind."""
    family = checkpoint.family
    classes = family.classes()
    if family.text_pipeline() is None and classes is None:
        if given is not None:
            raise UserError(f"{checkpoint.name}: draws without prompt or label", fix="leave out --prompts")
        return []
    own = _own(checkpoint, "prompts")
    if classes is not None:
        asked = own if given is None else given
        return [str(i) for i in range(classes)] if asked is None else _labels(asked, classes, checkpoint.name)
    if given is not None:
        return list(given)
    return read_list(GENERAL) if own is None else own


def validation_entries(checkpoint: Checkpoint, calibrated: Sequence[str]) -> list[str]:
    """Returns what validation asks for: the model's held-out captions where it ships some, else calibration's."""
    own, classes = _own(checkpoint, "validation_prompts"), checkpoint.family.classes()
    if own is None:
        return list(calibrated)
    return own if classes is None else _labels(own, classes, checkpoint.name)


def _own(checkpoint: Checkpoint, key: str) -> list[str] | None:
    """Returns the list that a model's sampler.json names, if it does."""
    name, family = checkpoint.sampler.get(key), checkpoint.family
    if name is None:
        return None
    if family.text_pipeline() is None and family.classes() is None:
        raise UserError(f"{checkpoint.name}: draws without prompt or label", fix=f"drop {key!r} from its sampler.json")
    return read_list(inside(checkpoint.root, name))


def _labels(given: Sequence[str], classes: int, name: str) -> list[str]:
    for entry in given:
        if not entry.isdecimal() or int(entry) >= classes:
            raise UserError(
                f"prompts: {entry!r} is no class of {name}",
                fix=f"write one class to a line, a number 0 … {classes - 1}",
            )
    return [str(int(entry)) for entry in given]
