"""Checkpoints: what MODEL on the command line stands for, and how its torch module is filled."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from calib_data import shipped
from engines.artifacts import Json, digest_file, digest_json, inside, read_json
from engines.errors import UserError, unknown
from exporter import catalog
from exporter.models import Family, family_of
from exporter.weights import RandomWeights, SafetensorsWeights, Weights

DEFAULT_STEPS = 25
DENOISERS = ("transformer", "unet")  # the folders a diffusers pipeline keeps its denoiser in
# What attentions of old U-Nets are called in their files. Source: diffusers, ModelMixin._fix_state_dict_keys_on_load.
OLD_ATTENTION = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
OTHER_MODELS = "config.json and the weights are of different models: copy both again"


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
        """Builds the fp32 module, one tensor at a time; buffers are read where the weights hold them."""
        model = self.skeleton()
        parameters, stored = dict(model.named_parameters()), _stored_as(model, self.weights.names())
        if missing := sorted(parameters.keys() - stored.keys()):
            raise UserError(f"{self.folder}: its weights lack {_first(missing)}", fix=OTHER_MODELS)
        if unplaced := _unplaced(model, self.weights.names() - set(stored.values())):
            raise UserError(
                f"{self.folder}: its weights hold {_first(unplaced)}, for which its config.json has no place",
                fix=OTHER_MODELS,
            )
        for name, parameter in parameters.items():
            set_parameter(model, name, self.weights.read(stored[name], tuple(parameter.shape)).to(torch.float32))
        for name in stored.keys() - parameters.keys():
            buffer = model.get_buffer(name)
            buffer.copy_(self.weights.read(stored[name], tuple(buffer.shape)))
        return model.requires_grad_(False)


def _stored_as(model: nn.Module, names: Collection[str]) -> dict[str, str]:
    """Returns the names under which weights hold a module's parameters and persistent buffers, where they do."""
    old = {
        f"{path}.{new}.": f"{path}.{before}."
        for path, module in model.named_modules()
        if getattr(module, "_from_deprecated_attn_block", False)
        for new, before in OLD_ATTENTION.items()
    }
    found = {}
    for name in model.state_dict():
        before = next((there + name.removeprefix(here) for here, there in old.items() if name.startswith(here)), name)
        if stored := next((one for one in (name, before) if one in names), None):
            found[name] = stored
    return found


def _unplaced(model: nn.Module, names: Collection[str]) -> list[str]:
    """Returns what of the names a module has no place for, but for what its class says that old files may hold."""
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    return sorted(name for name in names if not any(re.search(pattern, name) for pattern in ignored))


def _first(names: Sequence[str]) -> str:
    return f"{names[0]!r}" + f" and {len(names) - 1} more" * (len(names) > 1)


def set_parameter(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Lets modules be built without memory for parameters; buffers stay real, for most checkpoints hold none."""
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
    index = read_json(root / INDEX, fix=COPY) if (root / INDEX).is_file() else {}
    if index.get("requires_aesthetics_score"):
        raise UserError(
            f"{root}: is SDXL's refiner, which reads an aesthetic score and a picture: it is not served",
            fix="served is the base model, stabilityai/stable-diffusion-xl-base-1.0 and what is fine-tuned from it",
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
    scheduler, sampler, notes = _sampling(root, steps, family)
    return Checkpoint(name, root, folder, config, family, scheduler, sampler, weights_seed, notes)


def _sampling(root: Path, steps: int | None, family: Family) -> tuple[Json, Json, tuple[str, ...]]:
    notes: list[str] = []
    path = root / "scheduler" / "scheduler_config.json"
    if path.is_file():
        scheduler: Any = read_json(path, fix=COPY)
    else:
        scheduler = {"_class_name": family.SCHEDULER}
        notes.append(f"{root} has no scheduler/: {family.SCHEDULER} with diffusers' defaults is used")
    sampler: Json = {"steps": DEFAULT_STEPS, "guidance_scale": 1.0}
    if (root / "sampler.json").is_file():
        sampler |= _checked_sampler(root / "sampler.json")
    if steps is not None:
        sampler["steps"] = steps
    if not (root / "sampler.json").is_file():
        notes.append(f"{root} has no sampler.json: {sampler['steps']} steps (--steps) without guidance are used")
    fed = any(spec.name == "guidance" for spec in family.inputs())
    if sampler["guidance_scale"] != 1.0 and not family.guided() and not fed:
        notes.append(f"guidance_scale = {sampler['guidance_scale']:g} says nothing to {family.CLASS}: it is not guided")
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
    for key in ("task_net", "prompts", "validation_prompts"):
        if key in found and not inside(path.parent, found[key], links=True).is_file():
            raise UserError(
                f"{path}: {key} = {found[key]!r} is no file beside it", fix="copy it there, or drop the key"
            )
    if "task" in found and found["task"] not in catalog.modules("tasks"):
        raise unknown("task", found["task"], catalog.modules("tasks"), str(path))
    return found
