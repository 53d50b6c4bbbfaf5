"""Reads the network of a task."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from torch import nn

from engines.errors import UserError

Net = TypeVar("Net", bound=nn.Module)


def read(net: Net, path: Path) -> Net:
    """Fills a network from safetensors, of any float type, and sets it to evaluation."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        net.load_state_dict(load_file(path))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"{path}: not the weights of a task network ({error})", fix="restore the shipped file"
        ) from error
    return net.eval()
