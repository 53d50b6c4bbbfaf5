"""Checkpoints: what MODEL on the command line stands for, and how its torch module is filled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib_data import shipped
from engines.artifacts import Json, digest_file, digest_json, inside, read_json
from engines.errors import UserError, unknown
from exporter.models import Family, family_of
from exporter.weights import RandomWeights, SafetensorsWeights, Weights

# Used where a folder holds only a denoiser. diffusers' own DDIM defaults; printed when they are taken.
DEFAULT_SCHEDULER: Json = {"_class_name": "DDIMScheduler"}
DEFAULT_STEPS = 25
DENOISERS = ("transformer", "unet")  # the folders a diffusers pipeline keeps its denoiser in


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk, or one to be drawn: its config, family, sampler settings and weights."""

    name: str
    root: Path
    folder: Path  # of the denoiser: root, or a folder in it
    config: Json
    family: Family
    scheduler: Json
    sampler: Json
    weights_seed: int | None
    notes: tuple[str, ...]

    @cached_property
    def weights(self) -> Weights:
        if self.weights_seed is None:
            return SafetensorsWeights(self.folder)
        shapes = {n: tuple(p.shape) for n, p in self.skeleton().named_parameters()}
        return RandomWeights(self.config, shapes, self.weights_seed)

    @cached_property
    def digest(self) -> str:
        from exporter import text

        return digest_json(
            {
                "class": self.family.CLASS,
                "config": self.config,
                "text": text.digest(self.root),
                "scheduler": self.scheduler,
                "sampler": self.sampler,
                "weights": self.weights.digest,
                "task_net": digest_file(self.task_net) if self.task_net else None,
            }
        )

    @property
    def task_net(self) -> Path | None:
        """The network whose features this model's images are compared by, if it ships one."""
        name = self.sampler.get("task_net")
        return inside(self.root, name) if name else None

    @property
    def in_pixels(self) -> bool:
        """Whether samples are images in [−1, 1] (no VAE decodes them)."""
        return bool(self.sampler.get("pixels", False))

    def skeleton(self) -> nn.Module:
        """Builds the module with its buffers real and its parameters without memory."""
        with parameters_on_meta(), config_errors(self.folder / "config.json", "no model can be built from it"):
            return self.family.build().eval()

    def load(self) -> nn.Module:
        """Builds the fp32 module, one tensor at a time."""
        model = self.skeleton()
        parameters = dict(model.named_parameters())
        if missing := sorted(parameters.keys() - self.weights.names()):
            raise UserError(
                f"{self.folder}: its weights lack {missing[0]!r}"
                + (f" and {len(missing) - 1} more" * (len(missing) > 1)),
                fix="config.json and the weights are of different models: copy both again",
            )
        for name, parameter in parameters.items():
            tensor = self.weights.read(name, tuple(parameter.shape)).to(torch.float32)
            set_parameter(model, name, tensor)
        return model.requires_grad_(False)


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Lets modules be built without memory for parameters; buffers, which no checkpoint may hold, stay real."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None:
            param = nn.Parameter(param.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


# What diffusers and torch raise for values that they cannot build with; NotImplementedError is a RuntimeError.
CONFIG_FAULTS = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RuntimeError)


@contextlib.contextmanager
def config_errors(where: Path | str, why: str) -> Iterator[None]:
    """Turns what the values of a config lead to into an error with a fix."""
    try:
        yield
    except CONFIG_FAULTS as error:
        raise UserError(
            f"{where}: {why} ({error})",
            fix="compare its numbers and names with a config that diffusers saved for this class",
        ) from error


INDEX = "model_index.json"  # of a pipeline
COPY = "mend it, or copy the model again"


def open_checkpoint(spec: str, *, seed: int = 0, steps: int | None = None) -> Checkpoint:
    """Opens a shipped name, a local diffusers folder, or `random:FOLDER`; `steps` overrides the sampler's."""
    if spec.startswith("random:"):
        return _open(Path(spec.removeprefix("random:")), spec, steps, seed)
    if spec in shipped.names():
        return _open(shipped.folder(spec), spec, steps, None)
    return _open(Path(spec), spec, steps, None)


def _open(root: Path, name: str, steps: int | None, weights_seed: int | None) -> Checkpoint:
    folder = next((root / part for part in DENOISERS if (root / part / "config.json").is_file()), root)
    if not (folder / "config.json").is_file():
        listed = read_json(root / INDEX, fix=COPY) if (root / INDEX).is_file() else {}
        if missing := [part for part in DENOISERS if part in listed]:
            raise UserError(
                f"{root}: its {INDEX} lists {missing[0]!r}, but there is no {missing[0]}/config.json",
                fix="copy the pipeline again, with all its folders",
            )
        raise UserError(
            f"model {name!r}: {root} has no config.json, nor {' or '.join(f'{d}/config.json' for d in DENOISERS)}",
            fix="give a folder written by diffusers' save_pretrained",
        )
    config = read_json(folder / "config.json", fix=COPY)
    class_name = config.get("_class_name")
    if not isinstance(class_name, str):
        raise UserError(f"{folder / 'config.json'}: has no _class_name", fix="give a diffusers model's config")
    config = {k: v for k, v in config.items() if not k.startswith("_")}
    family = family_of(class_name, config, str(folder / "config.json"))
    with config_errors(folder / "config.json", "no inputs follow from it"):
        for shapes in (family.inputs, family.output, family.axes, family.latent_shape):
            shapes()
    scheduler, sampler, notes = _sampling(root, steps)
    return Checkpoint(name, root, folder, config, family, scheduler, sampler, weights_seed, notes)


def _sampling(root: Path, steps: int | None) -> tuple[Json, Json, tuple[str, ...]]:
    notes: list[str] = []
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        scheduler: Any = read_json(path, fix=COPY)
    else:
        scheduler = dict(DEFAULT_SCHEDULER)
        notes.append(f"{root} has no scheduler/: DDIM with diffusers' defaults is used")
    sampler: Json = {"steps": DEFAULT_STEPS, "guidance_scale": 1.0}
    if (root / "sampler.json").is_file():
        sampler |= _checked_sampler(root / "sampler.json")
    if steps is not None:
        sampler["steps"] = steps
    if not (root / "sampler.json").is_file():
        notes.append(f"{root} has no sampler.json: {sampler['steps']} steps (--steps) without guidance are used")
    return scheduler, sampler, tuple(notes)


SAMPLER_KEYS = {
    "steps": (int,),
    "guidance_scale": (int, float),
    "pixels": (bool,),
    "task": (str,),
    "task_net": (str,),
    "prompts": (str,),
    "validation_prompts": (str,),
}


def _checked_sampler(path: Path) -> Json:
    found = read_json(path)
    for key, value in found.items():
        if key not in SAMPLER_KEYS:
            raise unknown("key", key, SAMPLER_KEYS, str(path))
        if type(value) not in SAMPLER_KEYS[key]:
            kinds = " or ".join(kind.__name__ for kind in SAMPLER_KEYS[key])
            raise UserError(f"{path}: {key} = {value!r}", fix=f"write a value of type {kinds}")
    return found
