"""A runner executes a model, a graph or an engine: named arrays in, named arrays out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Feeds = Mapping[str, NDArray[Any]]


class Runner(Protocol):
    """Runs one network; feeds and outputs are fp32 or integer arrays whatever the network computes in."""

    name: str

    def run(self, feeds: Feeds) -> dict[str, NDArray[np.float32]]: ...
