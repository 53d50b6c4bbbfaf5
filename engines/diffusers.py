"""The drop-in: `pipeline.transformer = engines.diffusers.denoiser("bundle/")`, or `.unet`.

The one module of this package that imports torch and diffusers: only an application that wants it imports it.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.utils import BaseOutput
from torch.utils.dlpack import from_dlpack

from engines import loading, schedule
from engines.artifacts import Json
from engines.backends import ort
from engines.contract import STEP
from engines.errors import UserError
from engines.loading import Engine

TYPES = {"fp16": torch.float16, "fp32": torch.float32, "int64": torch.int64}
TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
MASKED = -10_000.0  # Source: diffusers, PixArtTransformer2DModel.forward: a mask's zeros, given as what scores gain
NESTED = "added_cond_kwargs"  # the one argument whose entries are inputs, by their own names
# PixArt's pipelines give these by the picture's size, and a network that was not trained on them reads none.
UNREAD = ("resolution", "aspect_ratio")


def denoiser(
    path: Path | str,
    *,
    backend: str | None = None,
    engine: str | Path | None = None,
    threads: int = 0,
    self_test: bool = False,
    nearest: bool = False,
) -> Denoiser:
    """Opens a bundle as `engines.load` does, for a diffusers pipeline to call in its own denoiser's place.

    Where the engine has scales for every step of a schedule, a timestep of another schedule is a UserError; with
    `nearest` it takes the scales of the calibrated step that is nearest, which nothing has validated.
    """
    opened = loading.load(path, backend=backend, engine=engine, threads=threads, self_test=self_test)
    return Denoiser(opened, nearest=nearest)


class Denoiser(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """An engine that takes and gives what the diffusers class does that it was made of, and has its config.

    It computes where the engine lies, in the engine's types. `device` and `dtype` are what `to()` made them: where a
    pipeline keeps its tensors, and of which type, as it would ask of a model.
    """

    config_name = "config.json"

    def __init__(self, engine: Engine, *, nearest: bool = False) -> None:
        super().__init__()
        source = _class_of(engine)
        self.engine, self._nearest = engine, nearest
        self._signature, self._output = inspect.signature(source.forward), output_class(source)
        self.register_to_config(**_config(source, engine.bundle.info["model"]["config"]))
        self.register_buffer("_place", torch.empty(0), persistent=False)  # which `to`, `device` and `dtype` go by
        if width := self.config.get("projection_class_embeddings_input_dim"):
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))  # SDXL's pipeline asks

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled pipeline calls an engine as it is
    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what the diffusers class would, on the latent's device and of its type."""
        given = self._bound(args, kwargs)
        as_object = given.pop("return_dict", True)
        latent = given[self.engine.sampler["latent"]["input"]]
        output = self._run(self._feeds(_flat(given), len(latent)), latent.device)
        output = output.to(latent.device, latent.dtype)
        return self._output(sample=output) if as_object else (output,)

    def _bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a call by name, as the diffusers class takes them."""
        try:
            given = self._signature.bind(self, *args, **kwargs).arguments
        except TypeError as error:
            name = self.engine.bundle.info["model"]["class"]
            raise UserError(
                f"{self.engine.bundle.source}: its model is a {name}, which is not called as this does: {error}",
                fix="put it into a pipeline of its own kind",
            ) from error
        del given["self"]
        return given

    def _feeds(self, given: Mapping[str, Any], rows: int) -> dict[str, torch.Tensor]:
        """Returns the engine's inputs, `rows` rows of each; an argument that it has no input for is refused."""
        entries = {entry["name"]: entry for entry in self.engine.inputs}
        for name in given.keys() - entries.keys():
            self._refuse_unless_idle(name, given[name])
        feeds = {name: torch.as_tensor(given[name]) for name in entries if name in given}
        if MASK in entries and MASK not in feeds and TEXT in feeds:
            feeds[MASK] = torch.ones(feeds[TEXT].shape[:2], device=feeds[TEXT].device)  # every token counts
        feeds = {name: self._typed(_rows(value, entries[name], rows), name) for name, value in feeds.items()}
        if STEP in entries:
            feeds["timestep"] = feeds["timestep"].cpu()
            feeds[STEP] = self._steps(feeds["timestep"], given["timestep"])
        return feeds

    def _refuse_unless_idle(self, name: str, value: Any) -> None:
        """Raises a UserError for an argument that the engine has no input for, unless it changes nothing."""
        tensor = isinstance(value, torch.Tensor)
        ones = tensor and name.endswith("attention_mask") and value.ndim == 2 and bool((value == 1).all())
        if name in UNREAD or ones or (not tensor and not value):
            return
        raise UserError(
            f"{self.engine.name}: the pipeline gives {name!r}, and the engine has no such input: it takes "
            f"{', '.join(entry['name'] for entry in self.engine.inputs)}",
            fix="leave it out (adapters, control nets and skipped layers are not in an engine), or use the float model",
        )

    def _typed(self, value: torch.Tensor, name: str) -> torch.Tensor:
        """Returns whole numbers as int64 where the engine wants such, else fp32."""
        kind = next(entry["dtype"] for entry in self.engine.inputs if entry["name"] == name)
        if kind != "int64":
            return value.to(torch.float32)
        whole = value.to(torch.int64)
        if not torch.equal(whole.to(value.dtype), value):
            raise UserError(
                f"{self.engine.name}: {name} {float(value[whole != value][0]):g} is no whole number",
                fix="use a scheduler whose timesteps are whole, such as DDIMScheduler",
            )
        return whole

    def _steps(self, timesteps: torch.Tensor, given: Any) -> torch.Tensor:
        """Returns each row's step; what was `given` may have been rounded to a pipeline's narrow type before."""
        kind = getattr(given, "dtype", None)
        rounded = torch.finfo(kind).eps if isinstance(kind, torch.dtype) and kind.is_floating_point else 0.0
        graph, tolerance = self.engine.artifact.info["graph"], max(schedule.TOLERANCE, rounded)
        return torch.tensor(schedule.steps_at(graph, timesteps.numpy(), nearest=self._nearest, tolerance=tolerance))

    def _run(self, feeds: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Returns the output, computed on the GPU that the tensors lie on if the engine can, else from host arrays."""
        if device.type == "cuda" and (self.engine.backend != "ort" or ort.device() == "cuda"):
            torch.cuda.current_stream(device).synchronize()  # the engine has a stream of its own
            return self._run_dlpack(feeds, device)
        arrays = {name: value.cpu().numpy() for name, value in feeds.items()}
        return torch.from_numpy(self.engine.run(arrays)[self.engine.output["name"]])

    def _run_dlpack(self, feeds: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        """Returns the output where it was computed; an engine with steps reads them, and timesteps, on the host."""
        hosted = ("timestep", STEP) if STEP in feeds else ()
        own = {}
        for entry in self.engine.inputs:
            value = feeds[entry["name"]].to(TYPES.get(entry["dtype"], TYPES[self.engine.dtype]))
            own[entry["name"]] = (value if entry["name"] in hosted else value.to(device)).contiguous()
        return from_dlpack(self.engine.run_dlpack(own)[self.engine.output["name"]])

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Does nothing: pipelines say with it which call is which, to caches of blocks that an engine has not."""
        yield

    def save_pretrained(self, *_: Any, **__: Any) -> None:
        raise UserError(
            f"{self.engine.bundle.source}: an engine is not saved as a checkpoint",
            fix="copy the bundle; save a pipeline with its own denoiser in place",
        )


def _class_of(engine: Engine) -> Any:
    name = engine.bundle.info["model"]["class"]
    found = getattr(diffusers, name, None)
    if not (isinstance(found, type) and issubclass(found, ModelMixin)):
        raise UserError(
            f"{engine.bundle.source}: its model is a {name!r}, which diffusers {diffusers.__version__} does not have",
            fix="install the version of diffusers in the bundle's manifest",
        )
    return found


def output_class(source: Any) -> Any:
    """Returns what a diffusers class returns with `return_dict`, as its `forward` is annotated."""
    kinds = typing.get_args(typing.get_type_hints(source.forward)["return"])
    return next(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseOutput))


def _config(source: Any, config: Json) -> Json:
    """Returns what the class can be configured with: as the bundle's model is, else by default."""
    parameters = inspect.signature(source.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return {name: config.get(name, default) for name, default in defaults.items()}


def _flat(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments that were given, those within `added_cond_kwargs` by their own names."""
    nested = arguments.get(NESTED) or {}
    found = {name: value for name, value in arguments.items() if name != NESTED} | dict(nested)
    return {name: value for name, value in found.items() if value is not None}


def _rows(value: torch.Tensor, entry: Json, rows: int) -> torch.Tensor:
    """Returns a tensor with the batch axis that the engine's input has: what is given once is the same in every row."""
    if entry["name"] == MASK and value.ndim == 3:  # given as what scores gain
        value = 1 - value[:, 0] / MASKED
    if value.ndim < len(entry["shape"]):
        value = value[None]
    return value.expand(rows, *value.shape[1:]) if len(value) == 1 else value
