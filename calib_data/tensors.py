"""Safetensors files, written so that what the disk refuses comes as an OSError, as from any other file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engines.errors import UserError


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors by name; tensors that share memory are written each for itself."""
    owned: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        owned[name] = tensor.clone() if tensor.data_ptr() in seen else tensor.contiguous()
        seen.add(owned[name].data_ptr())
    try:
        save_file(owned, path)
    except SafetensorError as error:
        code = _os_error(str(error))
        if code is None:
            raise
        raise OSError(code, str(error)) from error


def load_tensors(path: Path, fix: str) -> dict[str, torch.Tensor]:
    """Reads a file of tensors; a damaged one is a UserError with `fix`."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path}: cannot be read ({error})", fix=fix, keeps=True) from error


def save_whole(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Writes tensors so that a file of this name is there whole or not at all."""
    temporary = path.with_suffix(".unfinished")
    save_tensors(tensors, temporary)
    temporary.rename(path)


def _os_error(message: str) -> int | None:
    _, found, rest = message.partition("os error ")  # the library tells the number only in its text
    return int(rest.split(")")[0]) if found else None
