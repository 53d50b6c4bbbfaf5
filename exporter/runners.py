"""A torch module as a runner, so that everything downstream treats it like an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from engines.runner import Feeds
from exporter import devices, steps
from exporter.models import Family


class WideSums(TorchFunctionMode):
    """Sums fp16 products in fp32 and rounds once, as GPUs do; a CPU without fp16 units is also far faster that way."""

    FUNCTIONS = (F.linear, F.conv2d, F.scaled_dot_product_attention)

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func not in self.FUNCTIONS or next(iter((*args, *kwargs.values()))).dtype != torch.float16:
            return func(*args, **kwargs)
        wide_args, wide_kwargs = tree_map(_widened, (args, kwargs))
        return func(*wide_args, **wide_kwargs).to(torch.float16)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, torch.Tensor) and value.dtype == torch.float16 else value


def in_chunks(run: Callable[[Any], Mapping[str, Any]], feeds: Mapping[str, Any], rows: int) -> torch.Tensor:
    """Returns a runner's only output for feeds of any number of rows, `rows` at a time."""
    count = len(next(iter(feeds.values())))
    parts = []
    for first in range(0, count, rows):
        (output,) = run({name: value[first : first + rows] for name, value in feeds.items()}).values()
        parts.append(torch.as_tensor(output))
    return torch.cat(parts)


class TorchRunner:
    """Runs a denoiser in `dtype` where it lies; quantizers that want it are told the feeds' `step`."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        family: Family,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.name = name
        self._model, self.family = model, family
        self._output = family.output().name
        # "fp32" inputs, timesteps, stay so in fp16, and are fp64 where everything is
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        types = {"float": dtype, "fp32": wide, "int64": torch.int64}
        self._types = {spec.name: types[spec.dtype] for spec in family.inputs()}

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        return {n: t.float().numpy(force=True) for n, t in self.run_tensors(feeds).items()}

    def run_tensors(self, feeds: Any) -> dict[str, torch.Tensor]:
        """Runs numpy arrays or tensors; returns the outputs in this runner's own type."""
        with torch.no_grad():
            return {self._output: self.call(feeds)}

    def call(self, feeds: Any) -> torch.Tensor:
        """Runs as `run_tensors` does, and keeps what gradients need."""
        device = devices.of(self._model)
        tensors = {n: torch.as_tensor(v, device=device) for n, v in feeds.items()}
        position = steps.Position(tensors.pop("step")) if "step" in feeds else None
        tensors = {n: t.to(self._types.get(n, t.dtype)) for n, t in tensors.items()}
        with steps.at(position), WideSums():
            return self.family.call(self._model, tensors)

    def first_not_finite(self, feeds: Any) -> str | None:
        """Returns the first module, as they finish, that gives NaN or infinity, None if none does."""
        found: list[str] = []

        def hook(path: str) -> Any:
            def see(_module: nn.Module, _args: Any, output: Any) -> None:
                if not found and not all(bool(one.isfinite().all()) for one in _tensors(output)):
                    found.append(path)

            return see

        handles = [one.register_forward_hook(hook(path)) for path, one in self._model.named_modules() if path]
        try:
            self.run_tensors(feeds)
        finally:
            for handle in handles:
                handle.remove()
        return next(iter(found), None)


def _tensors(output: Any) -> Iterator[torch.Tensor]:
    parts = output if isinstance(output, (tuple, list)) else (output,)
    return (one for one in parts if isinstance(one, torch.Tensor) and one.is_floating_point())
