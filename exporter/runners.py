"""A torch module as a runner, so that everything downstream treats it like an engine."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from engines.runner import Feeds
from exporter.models import Family
from exporter.modules import StepContext


class TorchRunner:
    """Runs a denoiser in `dtype` on the CPU; `steps` carries the feeds' `step` to quantizers that want it."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        family: Family,
        *,
        dtype: torch.dtype = torch.float32,
        steps: StepContext | None = None,
    ) -> None:
        self.name = name
        self._model, self._family, self._dtype = model, family, dtype
        self._steps = steps or StepContext()

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]:
        return {n: t.float().numpy() for n, t in self.run_tensors(feeds).items()}

    def run_tensors(self, feeds: Any) -> dict[str, torch.Tensor]:
        """Runs numpy arrays or tensors; returns the outputs in this runner's own type."""
        tensors = {n: torch.as_tensor(v) for n, v in feeds.items() if n != "step"}
        tensors = {n: t.to(self._dtype) if t.is_floating_point() else t for n, t in tensors.items()}
        with torch.no_grad(), self._steps.at(torch.as_tensor(feeds["step"]) if "step" in feeds else None):
            return {self._family.OUTPUT: self._family.call(self._model, tensors)}
