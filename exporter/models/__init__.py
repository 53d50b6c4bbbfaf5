"""Model families: one module per denoiser class. Nothing outside this package knows one model from another.

A family says how its class is built, which inputs it takes, which of their axes are dynamic, what its blocks are,
where a per-channel factor folds exactly, how captions become its inputs, and how a sampler drives it.
"""

from __future__ import annotations

import importlib
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, cast

import torch
from torch import nn

from engines.errors import UserError
from exporter import catalog

Config = Mapping[str, Any]
Tensors = dict[str, torch.Tensor]

# Latent positions of the largest batch, both choices: what an engine reserves memory for, and what is run here at once.
ENGINE_POSITIONS, POSITIONS = 1 << 18, 1 << 14


@dataclass(frozen=True)
class Axis:
    """The sizes of a dynamic axis that an engine is built for; all are multiples of `multiple`."""

    min: int
    opt: int
    max: int
    multiple: int = 1

    def to_json(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of the network; a string in `shape` names a dynamic axis. The first axis is always batch."""

    name: str
    dtype: str  # "float" (the graph's own float type), "fp32" (whatever the graph's), "int64"
    shape: tuple[int | str, ...]
    largest: int | None = None  # of whole numbers that look something up, from 0


@dataclass(frozen=True)
class Fold:
    """Layers that read the same tensor, and the parameters before it that can divide it per channel, exactly.

    Each part is (path, rows, what they produce): of a Linear, "scale" rows produce g in x·(1 + g), "value" rows the
    tensor itself or a term of it; "affine" is a norm's weight and bias.
    """

    consumers: tuple[str, ...]
    parts: tuple[tuple[str, slice, str], ...]

    def divide(self, model: nn.Module, factor: torch.Tensor) -> None:
        """Divides what the consumers read by `factor` [channels].

        Source: methods.md section 2, "Where 1/s goes": γ/s, β/s; W_g/s, (b_g + 1)/s − 1, W_h/s, b_h/s.
        """
        for path, rows, role in self.parts:
            module = cast(nn.Linear, model.get_submodule(path))
            module.weight[rows] /= factor.reshape(-1, *[1] * (module.weight.ndim - 1))
            if module.bias is not None:
                one = 1.0 if role == "scale" else 0.0
                module.bias[rows] = (module.bias[rows] + one) / factor - one


class Family(ABC):
    """One diffusers class, at one config."""

    CLASS: ClassVar[str]
    SCHEDULER: ClassVar[str] = "DDIMScheduler"  # where a folder holds a denoiser alone, with diffusers' own defaults

    def __init__(self, config: Config) -> None:
        """Completes the config with the class's own defaults."""
        import diffusers

        signature = inspect.signature(getattr(diffusers, self.CLASS).__init__).parameters.values()
        defaults = {p.name: p.default for p in signature if p.default is not inspect.Parameter.empty}
        self.config = {**defaults, **config}

    def build(self) -> nn.Module:
        """Builds the module as diffusers does, its timestep frequencies as tables."""
        import diffusers

        from exporter.models._timesteps import use_tables

        return use_tables(getattr(diffusers, self.CLASS).from_config(dict(self.config)))

    @abstractmethod
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @abstractmethod
    def output(self) -> TensorSpec: ...

    @abstractmethod
    def axes(self) -> dict[str, Axis]:
        """Returns the dynamic axes by name, "batch" among them."""

    def size(self) -> tuple[int, int]:
        """Returns the latent's height and width that the model was trained at."""
        size = self.config["sample_size"]
        if size is None:
            raise UserError(f"{self.CLASS}: its config has no sample_size", fix='add "sample_size": the latent\'s side')
        return (size, size) if isinstance(size, int) else tuple(size)

    def latent_shape(self) -> tuple[int, ...]:
        """Returns the shape of one sample's latent, without the batch axis."""
        return (self.config["in_channels"], *self.size())

    @abstractmethod
    def blocks(self, model: nn.Module) -> list[str]:
        """Returns the paths of the blocks, in the order they run."""

    def folds(self, model: nn.Module) -> list[Fold]:
        """Returns where a per-channel factor folds exactly."""
        return []

    def skips(self, model: nn.Module) -> dict[str, int]:
        """Returns the convolutions that read a skip concatenation itself, and the channels of its first part."""
        return {}

    def classes(self) -> int | None:
        """Returns how many classes the model is conditioned on, None where it is not."""
        return None

    def label(self, labels: torch.Tensor) -> tuple[Tensors, Tensors]:
        """Returns the conditioning inputs of class labels [n], and those of no class, a row each."""
        return {}, {}

    def text_pipeline(self) -> str | None:
        """Returns the diffusers pipeline whose `encode_prompt` reads captions for this model, None without captions."""
        return None

    def encode(self, pipeline: Any, prompts: Sequence[str]) -> tuple[Tensors, Tensors]:
        """Returns the conditioning inputs that come from captions, and those of no caption, a row each."""
        return {}, {}

    def constants(self, count: int) -> Tensors:
        """Returns the inputs that are the same for every caption (sizes, positions), `count` rows."""
        return {}

    def tokens(self) -> int:
        """Returns how many positions of a latent the model attends over, which some schedules depend on."""
        return math.prod(side // int(self.config.get("patch_size", 1)) for side in self.size())

    def rows(self, most: int) -> int:
        """Returns how many rows to run at once: at most `most`, fewer of large latents, so that memory is bounded."""
        return max(1, min(most, POSITIONS // self.tokens(), self.axes()["batch"].max))

    def sigmas(self, steps: int) -> list[float] | None:
        """Returns the noise levels that the model's pipeline asks its scheduler for, None where it asks for none."""
        return None

    def laid_out(self, samples: torch.Tensor) -> torch.Tensor:
        """Returns samples [n, *latent_shape] as pictures lie, [n, c, h, w]."""
        return samples

    def guided(self) -> bool:
        """Whether guidance runs the network a second time, without condition."""
        return True

    @abstractmethod
    def feeds(self, latent: torch.Tensor, timestep: torch.Tensor, conditions: Tensors, guidance: float) -> Tensors: ...

    def fed_timesteps(self, schedule: Sequence[float]) -> list[float]:
        """Returns what the model is fed as `timestep` at each of a schedule's, of its own unit, whole where it is."""
        latent = torch.zeros(1, *self.latent_shape())
        return [self.feeds(latent, torch.tensor([t]), {}, 1.0)["timestep"].item() for t in schedule]

    def prediction(self, output: torch.Tensor) -> torch.Tensor:
        """Returns the part of the output that the scheduler steps with (a learned variance is dropped)."""
        return output

    def call(self, model: nn.Module, feeds: Mapping[str, Any]) -> torch.Tensor:
        return cast(torch.Tensor, model(**feeds, return_dict=False)[0])


def batch_axis(latent_positions: int) -> Axis:
    """Returns the batch sizes an engine is built for: 8 serves a typical request with guidance, 64 a calibration."""
    largest = max(4, min(64, ENGINE_POSITIONS // latent_positions))
    return Axis(1, min(8, largest), largest)


def size_axis(size: int, multiple: int) -> Axis:
    """Returns half to twice the size a model was trained at, in multiples of what it halves down to."""
    least = max(multiple, size // 2 // multiple * multiple)
    return Axis(least, size // multiple * multiple, 2 * size // multiple * multiple, multiple)


# diffusers once had one class for both, and published checkpoints still name it. Source: diffusers, LegacyModelMixin.
LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}


def families() -> list[str]:
    return catalog.modules("models")


def family_of(class_name: str, config: Config, where: str) -> Family:
    """Returns the family that serves a diffusers class, at a config."""
    if class_name == "Transformer2DModel":
        class_name = LEGACY.get(str(config.get("norm_type")), class_name)
    known: dict[str, type[Family]] = {}
    for name in families():
        for value in vars(importlib.import_module(f"exporter.models.{name}")).values():
            if isinstance(value, type) and issubclass(value, Family) and "CLASS" in vars(value):
                known[value.CLASS] = value
    if class_name not in known:
        raise UserError(
            f"{where}: its class is {class_name!r}, which no model family serves",
            fix=f"known classes: {', '.join(known)}; to serve another, write exporter/models/<name>.py with its Family",
        )
    return known[class_name](config)
