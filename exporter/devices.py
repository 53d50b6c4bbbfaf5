"""Where PyTorch computes what takes long: sampling for calibration, searching ranges, training. CPU, or one GPU.

What a run is held against, the reference outputs, is computed on the CPU whatever the device.
"""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator

import torch
from torch import nn

from engines.errors import UserError

CPU = torch.device("cpu")


def resolve(name: str) -> torch.device:
    """Returns the device `cpu`, `cuda` or `cuda:N`; one that is not there is a UserError."""
    if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", name):
        raise UserError(f"--device {name}: is none", fix="use cpu, cuda, or cuda:N for the GPU of that number")
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        raise UserError(
            f"--device {name}: PyTorch {torch.__version__} sees no GPU",
            fix="use cpu, or install a build of PyTorch for CUDA on a machine with an NVIDIA GPU",
        )
    number = int(name.partition(":")[2] or 0)
    if (count := torch.cuda.device_count()) <= number:
        raise UserError(f"--device {name}: there are {count} GPUs", fix=f"use cuda:0 … cuda:{count - 1}")
    torch.backends.cudnn.allow_tf32 = False  # convolutions in fp32, as matmuls are by default
    return torch.device("cuda", number)


def place(model: nn.Module, device: torch.device) -> None:
    """Moves a model; diffusers' own .to() would warn of what it may keep in fp32."""
    nn.Module.to(model, device)


def of(model: nn.Module) -> torch.device:
    """Returns where a model's parameters lie; a bias or an embedding is left even where all weights are codes."""
    return next((parameter.device for parameter in model.parameters()), CPU)


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """Turns a GPU whose memory is full into a UserError; what a resumable stage has finished is kept."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full: {str(error).partition(' If reserved')[0]}",
            fix="free what other programs hold, lower the method's `batch` in the recipe, or leave out --device",
            keeps=True,
        ) from error


def release() -> None:
    """Hands back to the GPU what PyTorch keeps for later: engines are run beside it."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        gc.collect()
        torch.cuda.empty_cache()


def name(device: torch.device) -> str:
    """Returns what a record says of a device."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)
