"""`preflight`: what a run will come to, told in seconds: what its GPU cannot do, what it will weigh, take and leave.

No weight is read and nothing is calibrated: shapes say it all.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from engines import backends
from engines import gpu as gpus
from engines.artifacts import Json
from engines.errors import UserError
from engines.memory import total_bytes
from engines.options import Options
from exporter import doctor, dry_run, estimate, installed, progress, sizes, support
from exporter.attention import attention_of, attentions
from exporter.calibrate import BATCH
from exporter.checkpoint import Checkpoint
from exporter.dry_run import DryRun
from exporter.estimate import Estimate, Training, Workload
from exporter.images import IMAGES
from exporter.plan import Plan, plan_layers
from exporter.prove import Proof, prove
from exporter.quantize import REFERENCE_ROWS
from exporter.recipe import Recipe
from exporter.sampling import timesteps
from exporter.support import Kind, Target
from exporter.swap import scopes
from exporter.text import FP32_BYTES, components
from exporter.watch import ROWS
from exporter.weights import read_header


@dataclass(frozen=True)
class Planned:
    """A model without memory, what a recipe makes of it, and what calibration will add to that."""

    checkpoint: Checkpoint
    recipe: Recipe
    model: nn.Module
    plan: Plan

    @cached_property
    def steps(self) -> int:
        return len(timesteps(self.checkpoint))

    @cached_property
    def calibrated(self) -> Plan:
        return sizes.calibrated(self.plan, self.checkpoint.family, self.model, self.steps)

    @cached_property
    def kinds(self) -> dict[Kind, list[str]]:
        return support.kinds_of(self.model, self.calibrated)

    @cached_property
    def stored(self) -> sizes.Held:
        return sizes.stored(self.checkpoint.family, self.calibrated, self.checkpoint.weights.halves())


def planned(checkpoint: Checkpoint, recipe: Recipe) -> Planned:
    """Plans a recipe on a model's shapes."""
    model = checkpoint.skeleton()
    return Planned(checkpoint, recipe, model, plan_layers(model, checkpoint.family, recipe))


def preflight(
    found: Planned,
    targets: Sequence[Target],
    *,
    images: int | None = None,
    out: Path | None = None,
    proved: bool = True,
) -> Json:
    """Returns the report; raises a UserError that names the layer, the target and a recipe that fits if it cannot work.

    With `proved`, every target of a library that builds for GPUs without one is proven by building a small layer of
    each kind.
    """
    support.refuse(found.checkpoint, found.recipe, found.model, found.plan, targets)
    work = workload(found, targets, images or IMAGES)
    told = estimate.estimates(work)
    report: Json = {
        "model": {"name": found.checkpoint.name, "class": found.checkpoint.family.CLASS, "parameters": work.parameters},
        "recipe": {"name": found.recipe.name, "digest": found.recipe.digest},
        "targets": [target.to_json() for target in targets],
        "formats": formats(found, targets),
        "kept": kept(found, work),
        "bytes": _bytes(found, work),
        "stages": [one.to_json() for one in told],
        "disk": disk(told, out),
        "memory_bytes": total_bytes(),
        "rates": {key: estimate.RATES[key] for key in ("machine", "command")},
        "versions": installed.report(),
        "refused": None,
        "proofs": [row for target in targets for row in proofs(found, target)] if proved else [],
        "not_proved": [] if proved else ["no small layer was built (--no-prove)"],
    }
    check_proofs(report["proofs"])
    return report


def check_proofs(rows: Sequence[Json]) -> None:
    """Raises a UserError if a small layer of some kind was refused, with the first layer of that kind."""
    if (row := next((row for row in rows if row["refused"]), None)) is not None:
        raise UserError(
            f"{row['backend']} for {row['gpu']} builds no small layer like {row['layers'][0]!r} ({row['kind']}): "
            f"{row['refused']}",
            fix="keep layers of that kind in float (a rule before theirs), or choose another recipe",
        )


def targets(names: Sequence[str], gpu: str | None, dtype: str | None) -> list[Target]:
    """Returns the engines asked for; without names, those of every backend that can build here."""
    found = names or [name for name in backends.names() if _builds(name, gpu)]
    made = [
        support.target_of(name, gpu if names or backends.load(name).targets() else None, dtype, Options())
        for name in dict.fromkeys(found)
    ]
    if gpu is not None and not names and not any(target.gpu for target in made):
        raise UserError(
            f"--gpu {gpu}: no backend that builds for a GPU is installed",
            fix="export-engine doctor says what is here, and what to install",
        )
    return made


def _builds(name: str, gpu: str | None) -> bool:
    row = doctor.backend(name)
    reason = row["cannot_build"]
    if reason is None and gpu is not None and row["gpus"] == [gpus.detect()] != [gpu]:
        reason = f"it builds for {row['gpus'][0]} alone, the GPU at hand"
    if reason is not None:
        progress.note(f"note: {name} is left out: {reason}")
    return reason is None


def formats(found: Planned, targets: Sequence[Target]) -> list[Json]:
    """Returns a row for each kind of layer: its types, how many there are, and why which GPU cannot run it."""
    gpus = {name: backends.load(name).targets() for name in dict.fromkeys(target.backend for target in targets)}
    return [
        {
            "what": kind.what,
            "weight": kind.weight,
            "activation": kind.activation,
            "engine_types": kind.types,
            "layers": len(paths),
            "first": paths[0],
            "gpus": {
                name: {gpu: support.why_not(kind, paths[0], name, gpu) for gpu in known} for name, known in gpus.items()
            },
        }
        for kind, paths in found.kinds.items()
    ]


def kept(found: Planned, work: Workload) -> Json:
    """Returns the layers, and the attentions' products, that stay float, with their shares of weights and of work."""
    macs, plan = work.plain.macs, found.plan
    weights = {path: found.model.get_submodule(path).weight.numel() for path in plan.rules}  # type: ignore[operator]
    each = {path: sizes.macs_of(path, found.model, macs) for path in plan.rules}
    quantized = {attention_of(path) for path in plan.products}
    products = {path: macs[path] for path in attentions(found.model) if path in macs}
    total = sum(each.values()) + sum(products.values())
    left = {path: (weights[path], each[path]) for path in plan.rules if path not in plan.specs}
    left |= {f"{path} (products)": (0, count) for path, count in products.items() if path not in quantized}
    rows = [
        {
            "layer": layer,
            "weights": count,
            "macs": computed,
            "share_of_weights": count / sum(weights.values()),
            "share_of_macs": computed / total,
        }
        for layer, (count, computed) in left.items()
    ]
    return {
        "layers": rows,
        "share_of_weights": sum(row["share_of_weights"] for row in rows),
        "share_of_macs": sum(row["share_of_macs"] for row in rows),
        "macs": total,
    }


def _bytes(found: Planned, work: Workload) -> Json:
    return {
        "float_fp16": 2 * work.parameters,
        "quantized": found.stored.bytes,
        "bits_per_weight": found.stored.bits_per_weight,
        "graphs": {
            dtype: {"weights": size, "files": estimate.file_bytes(work, dtype)} for dtype, size in work.graphs.items()
        },
        "engines": dict(work.engines),
    }


def workload(found: Planned, targets: Sequence[Target], images: int = IMAGES) -> Workload:
    """Returns what there is to do, `images` to judge by included."""
    checkpoint, family, plan = found.checkpoint, found.checkpoint.family, found.calibrated
    calibration = found.recipe.calibration
    guided = 2 if float(checkpoint.sampler["guidance_scale"]) != 1.0 and family.guided() else 1
    recorded = len(calibration.record_steps) if calibration.record_steps else found.steps
    parameters = {name: p.numel() for name, p in found.model.named_parameters()}
    layers = {path: found.model.get_submodule(path).weight.numel() for path in plan.specs}  # type: ignore[operator]
    plain, watched = _dry_runs(found)
    wide = sizes.on_meta(family, plan, torch.float64)
    wide_bytes = sum(t.nbytes for t in (*wide.parameters(), *wide.buffers()))
    codes = sum(t.numel() for name, t in wide.named_buffers() if name.endswith(sizes.CODES))
    with dry_run.shapes_only():
        feed = sum(t.nbytes for t in dry_run.feeds(family, 1).values())
    graphs = {target.dtype: sizes.graph_bytes(family, plan, target.dtype) for target in targets}
    return Workload(
        parameters=sum(parameters.values()), weights=layers, largest=max(layers.values(), default=0),
        columns=_columns(found, plain), text_bytes=text_bytes(checkpoint), feed_bytes=feed, guided=guided,
        samples=calibration.samples, steps=found.steps, recorded=recorded, plain=plain, planned=watched,
        wide_bytes=wide_bytes, latent=math.prod(family.latent_shape()),
        code_bytes=codes, stored_bytes=found.stored.bytes, graphs=graphs,
        engines={target.backend: graphs[target.dtype] for target in targets},
        dtypes={target.backend: target.dtype for target in targets},
        quantizers=sum(spec.activation is not None for spec in plan.specs.values()) + len(plan.points),
        rows={most: family.rows(most) for most in (BATCH, REFERENCE_ROWS, ROWS)},
        images=images, trainings=trainings(found, layers, watched),
    )  # fmt: skip


def _columns(found: Planned, plain: DryRun) -> int:
    """Returns how many numbers the patches of the largest convolution are, for one row."""
    convolutions = {path: m for path, m in found.checkpoint.skeleton().named_modules() if isinstance(m, nn.Conv2d)}
    return max((plain.macs.get(path, 0) // conv.out_channels for path, conv in convolutions.items()), default=0)


def _dry_runs(found: Planned) -> tuple[DryRun, DryRun]:
    """Returns a call of the float model as it is, and as it is observed: skips split, attention's products apart."""
    family = found.checkpoint.family
    with dry_run.shapes_only():
        model = family.build().eval().requires_grad_(False)
        plain = dry_run.run(model, family, 1)
        if not (found.plan.products or found.plan.splits):
            return plain, plain
        plan_layers(model, family, found.recipe)
        return plain, dry_run.run(model, family, 1)


def trainings(found: Planned, weights: Mapping[str, int], observed: DryRun) -> list[Training]:
    """Returns what is trained together."""
    made = []
    for scope in scopes(found.model, found.checkpoint.family, found.plan):
        rounded = [*(path for path in scope.paths if found.plan.specs[path].activation), *scope.points]
        count = sum(observed.read[path] for path in rounded)
        made.append(Training(sum(weights[path] for path in scope.paths), count, scope.blocks, scope.options))
    return made


def text_bytes(checkpoint: Checkpoint) -> int:
    """Returns the bytes that a pipeline's text encoders take in memory, as their files' headers say."""
    return sum(
        _encoder_bytes(list((checkpoint.root / name).glob("*.safetensors")))
        for name in components(checkpoint.root)
        if name.startswith("text_encoder")
    )


def _encoder_bytes(files: Sequence[Path]) -> int:
    stored = sum(file.stat().st_size for file in files)
    if stored > FP32_BYTES:
        return stored  # it is computed in as it is stored
    return sum(4 * math.prod(entry["shape"]) for file in files for entry in read_header(file).values())


def disk(told: Sequence[Estimate], out: Path | None) -> Json:
    """Returns what the artifacts need, and what is free where they are to lie."""
    needed = sum(one.disk for one in told)
    if out is None:
        return {"needed_bytes": needed, "free_bytes": None}
    place = next(place for place in (out.absolute(), *out.absolute().parents) if place.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise UserError(
            f"{out}: the run leaves {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free there",
            fix="free some, or choose an --out on a larger disk",
        )
    return {"needed_bytes": needed, "free_bytes": free}


def proofs(found: Planned, target: Target) -> list[Json]:
    """Returns what came of building one small layer of each kind; nothing for a backend that builds for no GPU."""
    if target.gpu is None:
        return []
    rows: list[Proof] = prove(list(found.kinds), target.backend, target.gpu, target.dtype)
    return [
        {
            "backend": target.backend,
            "gpu": target.gpu,
            "kind": str(one.kind),
            "layers": found.kinds[one.kind],
            "refused": one.refused,
            "kernels": list(one.kernels),
        }
        for one in rows
    ]
