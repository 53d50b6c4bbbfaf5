"""The Quantized artifact: how a quantized model lies on disk, and how it is read back bit for bit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from calib_data.tensors import save_tensors
from engines.artifacts import Artifact, Json
from engines.errors import UserError
from exporter import scaling
from exporter.attention import PointSpec, add_points, attention_of, quantize_points
from exporter.checkpoint import Checkpoint, open_checkpoint, parameters_on_meta, set_parameter
from exporter.formats import Format
from exporter.models import Family, family_of
from exporter.modules import DERIVED, QuantizedLayer, float_layer, put, quantized_layer, split_inputs
from exporter.specs import FLOAT_LAYERS, LayerSpec
from exporter.tensors import pack, unpack
from exporter.weights import read_header

SHARD_BYTES = 512 << 20  # what one file holds, and so what is in memory while it is written
STORED = ("weight_codes", "weight_scale", "weight_codebook")  # what a layer stores for its weight
REFERENCE = "reference.safetensors"


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    return {path: module for path, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields everything the model holds, by name, as it is stored: 4-bit codes packed, scales in fp16.

    Kept tensors are stored in fp16 where that is exact, as it is for those of an fp16 checkpoint, else in fp32.
    Buffers (position tables) are among them, so that lowering needs no float model.
    """
    layers = quantized_layers(model)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if leaf in DERIVED:
            continue
        layer = layers.get(owner)
        if layer is not None and leaf == "weight_codes":
            yield name, pack(tensor, layer.spec.weight)
        elif layer is not None and leaf.endswith(("_scale", "_codebook")):
            yield name, tensor.to(torch.float16)
        else:
            yield name, narrowed(tensor.detach())


def narrowed(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the tensor as fp16 if that loses nothing."""
    if tensor.dtype == torch.float32 and torch.equal((half := tensor.to(torch.float16)).float(), tensor):
        return half.contiguous()
    return tensor.contiguous()


def save(model: nn.Module, folder: Path) -> None:
    """Writes weights-00000.safetensors and so on, each at most SHARD_BYTES unless one tensor is larger."""
    held: dict[str, torch.Tensor] = {}
    number = 0
    for name, tensor in stored_tensors(model):
        if held and sum(t.nbytes for t in held.values()) + tensor.nbytes > SHARD_BYTES:
            save_tensors(held, folder / f"weights-{number:05d}.safetensors")
            held, number = {}, number + 1
        held[name] = tensor
    save_tensors(held, folder / f"weights-{number:05d}.safetensors")


class Tensors(Protocol):
    """Tensors by name, as they are stored."""

    def __contains__(self, name: str) -> bool: ...

    def raw(self, name: str) -> torch.Tensor: ...


class StoredTensors:
    """Reads the tensors of a Quantized artifact by name, one at a time."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._files: dict[str, Path] = {}
        for file in artifact.files("weights-"):
            with safe_open(artifact.file(file), framework="pt") as handle:
                self._files |= dict.fromkeys(handle.keys(), artifact.file(file))

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def raw(self, name: str) -> torch.Tensor:
        """Returns the tensor as stored."""
        if name not in self._files:
            raise UserError(f"{self._artifact.path}: holds no tensor {name!r}", fix="quantize the model again")
        with safe_open(self._files[name], framework="pt") as handle:
            tensor: torch.Tensor = handle.get_tensor(name)
        return tensor


def family(artifact: Artifact) -> Family:
    model = artifact.info["model"]
    return family_of(model["class"], model["config"], str(artifact.path))


def checkpoint_of(source: Artifact) -> Checkpoint:
    """Opens the checkpoint a Quantized artifact was made of, and makes sure that it is still the same."""
    model = source.info["model"]
    found = open_checkpoint(model["name"], seed=model["weights_seed"] or 0, steps=source.info["sampler"]["steps"])
    if found.digest != source.manifest["made_from"]["model"]:
        raise UserError(
            f"model {model['name']!r} changed since {source.path} was made from it",
            fix="run again, so that engines and reference are of the same model",
        )
    return found


def specs(artifact: Artifact) -> dict[str, LayerSpec]:
    """Returns how each quantized layer is quantized."""
    where = str(artifact.path)
    return {path: LayerSpec.from_json(value, where) for path, value in artifact.info["layers"].items()}


def points(artifact: Artifact) -> dict[str, PointSpec]:
    """Returns how each point of an attention is quantized."""
    where = str(artifact.path)
    return {path: PointSpec.from_json(value, where) for path, value in artifact.info["points"].items()}


def skeleton(artifact: Artifact) -> nn.Module:
    """Builds the quantized module without memory for parameters; codes and scales are there, not filled."""
    with parameters_on_meta():
        return build(artifact)


def build(artifact: Artifact) -> nn.Module:
    """Builds the quantized module in the tensors that are the default around it: on meta, or fake."""
    return assemble(family(artifact), artifact.info["splits"], specs(artifact), points(artifact))


def assemble(
    family: Family, splits: Mapping[str, int], specs: Mapping[str, LayerSpec], points: Mapping[str, PointSpec]
) -> nn.Module:
    """Builds a quantized module, whose codes and scales are not filled."""
    model = family.build().eval()
    split_inputs(model, splits)
    for path, spec in specs.items():
        put(model, path, quantized_layer(float_layer(model, path), spec))
    add_points(model, list(dict.fromkeys(attention_of(path) for path in points)))
    quantize_points(model, points)
    return model


def factors(artifact: Artifact) -> dict[str, torch.Tensor]:
    """Returns the factors that were moved between activations and weights before quantization."""
    if scaling.FILE not in artifact.files():
        return {}
    return load_file(artifact.file(scaling.FILE))


def load(artifact: Artifact) -> nn.Module:
    """Reads the quantized fp32 model back; its codes, scales and outputs equal those that were saved."""
    model, stored = skeleton(artifact), StoredTensors(artifact)
    layers = quantized_layers(model)
    for name, parameter in list(model.named_parameters()):
        set_parameter(model, name, stored.raw(name).to(torch.float32).reshape(parameter.shape))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        if leaf not in DERIVED:
            model.get_submodule(owner)._buffers[leaf] = _restored(stored.raw(name), buffer, layers.get(owner), leaf)
    return model.requires_grad_(False)


def load_layer(stored: StoredTensors, path: str, spec: LayerSpec, source: nn.Module) -> QuantizedLayer:
    """Reads one quantized layer, whose geometry is that of the float layer it stands for."""
    assert isinstance(source, FLOAT_LAYERS), path
    layer = quantized_layer(source, spec)
    for leaf, buffer in list(layer.named_buffers()):
        if leaf not in DERIVED:
            layer._buffers[leaf] = _restored(stored.raw(f"{path}.{leaf}"), buffer, layer, leaf)
    if layer.bias is not None and f"{path}.bias" in stored:  # of the halves of a split convolution one has none
        layer.bias = nn.Parameter(stored.raw(f"{path}.bias").float(), requires_grad=False)
    return layer


def _restored(raw: torch.Tensor, like: torch.Tensor, layer: QuantizedLayer | None, leaf: str) -> torch.Tensor:
    if layer is None:
        if leaf == "activation_scale":  # of a point
            _check_stored(raw, like.shape, leaf, "a point of an attention")
        return raw.to(like.dtype)
    what = f"a quantized layer of {tuple(layer.weight_shape)}"
    if leaf == "weight_codes":
        return read_codes(raw, layer.spec.weight, like, what)
    _check_stored(raw, like.shape, leaf, what)
    return raw.to(like.dtype)


def read_codes(raw: torch.Tensor, fmt: Format, like: torch.Tensor, what: str) -> torch.Tensor:
    """Returns stored codes in the shape and type of `like`; others than the format's own are an error."""
    wanted = pack(torch.empty_like(like), fmt)
    _check_stored(raw, wanted.shape, "weight_codes", what)
    if raw.dtype != wanted.dtype:
        raise UserError(
            f"{what} holds weight_codes of type {raw.dtype}, and its format wants {wanted.dtype}",
            fix="quantize the model again",
        )
    return unpack(raw, fmt, like)


def _check_stored(raw: torch.Tensor, wanted: torch.Size, leaf: str, what: str) -> None:
    if raw.shape != wanted:
        raise UserError(
            f"{what} holds {leaf} {tuple(raw.shape)}, and its format wants {tuple(wanted)}",
            fix="quantize the model again",
        )
    numbers = raw.is_floating_point() and raw.itemsize > 1  # float8 are codes
    if numbers and not raw.isfinite().all():
        raise UserError(f"{what} holds {leaf} with NaN or infinity", fix="quantize it again")


def stored_bytes(artifact: Artifact) -> dict[str, int]:
    """Returns the bytes that each layer, quantized or kept, takes in the artifact's files."""
    found: dict[str, int] = {}
    for file in artifact.files("weights-"):
        for name, entry in read_header(artifact.file(file)).items():
            first, last = entry["data_offsets"]
            owner = name.rpartition(".")[0]
            found[owner] = found.get(owner, 0) + last - first
    return found


def storage(model: nn.Module) -> Json:
    """Counts what the model stores: the `weights` part of a report.

    bits_per_weight counts everything the quantized layers store for their weights (codes and scales as stored),
    divided by their weights; biases and activation scales are in `bytes` alone.
    """
    layers = quantized_layers(model)
    formats: dict[str, dict[str, Any]] = {}
    total = weight_bytes = weights = 0
    for name, tensor in stored_tensors(model):
        owner, _, leaf = name.rpartition(".")
        total += tensor.nbytes
        if (layer := layers.get(owner)) is None or leaf not in STORED:
            continue
        entry = formats.setdefault(layer.spec.weight.kind, {"layers": 0, "bytes": 0, "weights": 0})
        entry["bytes"] += tensor.nbytes
        weight_bytes += tensor.nbytes
        if leaf == "weight_codes":
            count = torch.Size(layer.weight_shape).numel()
            entry["layers"] += 1
            entry["weights"] += count
            weights += count
    for entry in formats.values():
        entry["bits_per_weight"] = 8 * entry["bytes"] / entry.pop("weights")
    return {
        "bytes": total,
        "bits_per_weight": 8 * weight_bytes / weights if weights else None,
        "quantized_layers": len(layers),
        "by_format": formats,
    }
