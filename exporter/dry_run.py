"""One call of a denoiser without its memory: what its layers multiply, what its tensors take, what its blocks give.

Tensors are fake: they have shapes and no numbers, so that a model of any size runs in seconds.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from exporter.attention import Point, attentions
from exporter.models import Family
from exporter.specs import FLOAT_LAYERS


@dataclass(frozen=True)
class DryRun:
    """What one call takes.

    `macs`: multiply-accumulates by layer, and by attention, of its two products. `peak_bytes`: of tensors that live at
    once, beside the model; `made_bytes`: of all that are made, as training keeps them; `ops`: how many operations.
    `block_bytes`: what each block gives; `read`: how many numbers each layer, and each point of an attention, is given.
    """

    macs: Mapping[str, int]
    peak_bytes: int
    made_bytes: int
    ops: int
    block_bytes: Mapping[str, int]
    read: Mapping[str, int]


@contextlib.contextmanager
def shapes_only() -> Iterator[None]:
    """Within it tensors have no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def run(model: nn.Module, family: Family, rows: int) -> DryRun:
    """Calls a model that was built of `shapes_only`, within it, on `rows` of the size it was trained at."""
    seen = _Seen({}, {}, {})
    tracker = _Tracker(tree_leaves([*model.parameters(), *model.buffers()]))
    with _watching(model, family, seen), tracker, torch.no_grad():
        family.call(model, feeds(family, rows))
    return DryRun(seen.macs, tracker.peak, tracker.made, tracker.ops, seen.block_bytes, seen.read)


def feeds(family: Family, rows: int) -> dict[str, torch.Tensor]:
    """Returns inputs of the size the model was trained at."""
    axes = {name: axis.opt for name, axis in family.axes().items()} | {"batch": rows}
    return {
        spec.name: torch.zeros(
            [axes[d] if isinstance(d, str) else d for d in spec.shape],
            dtype=torch.int64 if spec.dtype == "int64" else torch.float32,
        )
        for spec in family.inputs()
    }


@dataclass
class _Seen:
    macs: dict[str, int]
    block_bytes: dict[str, int]
    read: dict[str, int]
    inside: list[str] = field(default_factory=list)  # attentions that are under way


@contextlib.contextmanager
def _watching(model: nn.Module, family: Family, seen: _Seen) -> Iterator[None]:
    handles = []
    for path, module in model.named_modules():
        if isinstance(module, FLOAT_LAYERS):
            handles.append(module.register_forward_hook(_count(path, seen)))
        if isinstance(module, (*FLOAT_LAYERS, Point)):
            handles.append(module.register_forward_hook(_read(path, seen)))
    for path in attentions(model):
        attention = model.get_submodule(path)
        handles.append(attention.register_forward_pre_hook(lambda *_, path=path: seen.inside.append(path)))
        handles.append(attention.register_forward_hook(lambda *_: seen.inside.pop() and None))
    for path in family.blocks(model):
        handles.append(model.get_submodule(path).register_forward_hook(_measure(path, seen)))
    try:
        with _Products(seen):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _count(path: str, seen: _Seen) -> Any:
    def look(layer: Any, _inputs: Any, output: torch.Tensor) -> None:
        each = layer.weight[0].numel()  # products to an output
        seen.macs[path] = seen.macs.get(path, 0) + output.numel() * each

    return look


def _read(path: str, seen: _Seen) -> Any:
    def look(_module: Any, inputs: tuple[torch.Tensor], _output: Any) -> None:
        seen.read[path] = seen.read.get(path, 0) + inputs[0].numel()

    return look


def _measure(path: str, seen: _Seen) -> Any:
    def look(_module: Any, _inputs: Any, output: Any) -> None:
        seen.block_bytes[path] = sum(t.nbytes for t in tree_leaves(output) if isinstance(t, torch.Tensor))

    return look


class _Products(TorchFunctionMode):
    """Counts attention's two products: queries by keys, probabilities by values."""

    def __init__(self, seen: _Seen) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args, strict=False)) | dict(kwargs or {})
            query, key, value = named["query"], named["key"], named["value"]
            path = self._seen.inside[-1] if self._seen.inside else ""
            scores = query.shape[:-1].numel() * key.shape[-2]
            found = scores * (query.shape[-1] + value.shape[-1])
            self._seen.macs[path] = self._seen.macs.get(path, 0) + found
        return func(*args, **(kwargs or {}))


class _Tracker(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own __init_subclass__ is not typed
    """Follows the memory of every tensor that an operation makes until it goes."""

    def __init__(self, model: Sequence[torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = self.made = self.ops = 0
        self._known = weakref.WeakSet(tensor.untyped_storage() for tensor in model)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.ops += 1
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._add(storage)
        self.peak = max(self.peak, self.live)
        return output

    def _add(self, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(storage)
        self.live += size
        self.made += size
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self.live -= size
