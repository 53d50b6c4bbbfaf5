"""Compares quantization methods on models: one cell (model × setting × granularity × method) at a time.

    python tools/compare_methods.py digits-dit shapes-unet --methods rtn,search,learned

Every cell quantizes the model, draws images from the same noise as the float model's and writes its scores as JSON into
--results. A cell that is there for the same model, recipe, images and seed is kept: the command goes on where it was
stopped. All that learn rounding have the same iterations. Last it writes tables and plots of every cell found there,
and puts the tables between the marks in --document.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from compare_report import write_report
from safetensors.torch import load_file, save_file
from torch import nn

from engines.artifacts import Artifact, Json, digest_json, read_json, write_json
from engines.errors import UserError
from exporter import formats, metrics, modules, moments, observers, quantized, recipe, specs, tasks
from exporter import quantize as quantizing
from exporter.calibrate import calibrate
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.conditions import Conditions, validation_entries
from exporter.images import SEED_OFFSET
from exporter.methods import fp_search
from exporter.plan import plan_layers
from exporter.progress import note
from exporter.recipe import Recipe, WeightSpec
from exporter.runners import TorchRunner
from exporter.sampling import sample
from exporter.watch import watch_inputs

# Images of every cell, and of those that the bars ask more of: a task score in points needs more than a PSNR does.
IMAGES = {"digits-dit": (512, 2000), "shapes-unet": (256, 512)}
OTHERS = (256, 256)
BARRED = ("fp8-fp8.channel.learned", "int4-int8.channel.rtn")
BATCH = 32
CODEBOOKS = ("uniform", "kmeans", "gptvq", "vq4dit")
INT8, INT4 = {"format": "int", "bits": 8}, {"format": "int", "bits": 4}
E4M3 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}
E2M1 = {"format": "fp", "exponent_bits": 2, "mantissa_bits": 1}
E1M2 = {"format": "fp", "exponent_bits": 1, "mantissa_bits": 2}


def open_split(bits: int) -> dict[str, Any]:
    return {"format": "fp", "bits": bits}


def codebook(vector_size: int, codebook_size: int) -> dict[str, Any]:
    return {"format": "codebook", "vector_size": vector_size, "codebook_size": codebook_size}


@dataclass(frozen=True)
class Setting:
    """Formats of weights and activations (None: float), and what a table holds of it.

    `recipe` is the shipped one whose other rules hold: which layers are kept is alike in all of a weight's width; where
    it says how many trajectories it calibrates on, that is what all of the setting's methods have.
    """

    weight: Mapping[str, Any]
    activation: Mapping[str, Any] | None
    methods: Sequence[str] = ("rtn", "search", "learned")
    granularities: Sequence[str] = ("channel", "tensor")
    recipe: str = "fp4-fp8"
    deployable: bool = True


@dataclass(frozen=True)
class Variant:
    """A method of a table: our method, its options, how activations are observed, and whether it trains as TRAINED."""

    method: str
    options: Mapping[str, Any] = field(default_factory=dict)
    activation: Mapping[str, Any] = field(default_factory=lambda: {"observer": "mse"})
    trained: bool = False


# Of all in DilateQuant's tables that train: blocks each have so many. A quarter of the shipped recipes' rows in all on
# shapes-unet, where those would take an hour of one core for every cell, by preflight's estimate.
TRAINED = {
    "digits-dit": {"iterations": 800, "batch": 64, "rows": 12288},
    "shapes-unet": {"iterations": 400, "batch": 32, "rows": 12288},
}
BY_STEP = {"observer": "mse", "granularity": "step"}
METHODS = {
    "rtn": Variant("rtn"),
    "search": Variant("fp_search"),
    "learned": Variant("fp_rounding"),
    **{name: Variant(name) for name in CODEBOOKS},
    # of DilateQuant and what it is held against; all weights but min-max's and SmoothQuant's start from one search
    "min-max": Variant("rtn", activation={"observer": "absmax"}),
    "one-scale": Variant("fp_search"),
    "smoothquant": Variant("smoothquant"),
    "q-diffusion": Variant("fp_rounding", trained=True),
    "by-step": Variant("fp_search", activation=BY_STEP),
    "dilated": Variant("dilatequant", {"iterations": 0}),
    "dilated-by-step": Variant("dilatequant", {"iterations": 0}, BY_STEP),
    "distilled": Variant("dilatequant", {"dilate": False}, trained=True),
    "distilled-by-step": Variant("dilatequant", {"dilate": False}, BY_STEP, trained=True),
    "distilled-dilated": Variant("dilatequant", trained=True),
    "dilatequant": Variant("dilatequant", activation=BY_STEP, trained=True),
    "dilatequant-by-block": Variant("dilatequant", {"joint": False}, BY_STEP, trained=True),
}
DILATE = ("min-max", "one-scale", "smoothquant", "q-diffusion", "by-step", "dilated", "dilated-by-step")
DILATE += ("distilled", "distilled-by-step", "distilled-dilated", "dilatequant", "dilatequant-by-block")

SETTINGS = {
    "int8-int8": Setting(INT8, INT8, recipe="fp8"),
    "fp8-fp8": Setting(E4M3, E4M3, recipe="fp8"),
    "int4-int8": Setting(INT4, INT8),
    "e2m1-fp8": Setting(E2M1, E4M3),
    "e1m2-fp8": Setting(E1M2, E4M3, ("search",)),  # the integers −7 … 7
    "auto-fp8": Setting({"format": "auto", "bits": 4}, E4M3, ("search", "learned")),
    "any8-any8": Setting(open_split(8), open_split(8), ("search",), ("channel",), "fp8", deployable=False),
    "any6-any6": Setting(open_split(6), open_split(6), ("search",), ("channel",), deployable=False),
    "any4-any4": Setting(open_split(4), open_split(4), ("search",), ("channel",), deployable=False),
    "vq2": Setting(codebook(4, 256), None, CODEBOOKS, recipe="vq-2bit"),
    "vq3": Setting(codebook(2, 64), None, CODEBOOKS, recipe="vq-3bit"),
    "w8a8": Setting(INT8, INT8, DILATE, ("channel",), "dilate-w8a8"),
    "w4a8": Setting(INT4, INT8, DILATE, ("channel",), "dilate-w4a8"),
    "w4a4": Setting(INT4, INT4, DILATE, ("channel",), "dilate-w4a4"),
    "vq2-fp8": Setting(codebook(4, 256), E4M3, ("kmeans", "vq4dit"), ("tensor",), "vq-2bit-fp8"),
}

GRANULARITIES = ("channel", "tensor")


@dataclass(frozen=True)
class Cell:
    """One row of the table."""

    model: str
    setting: str
    granularity: str
    method: str

    @property
    def name(self) -> str:
        return f"{self.setting}.{self.granularity}.{self.method}"


@dataclass(frozen=True)
class Job:
    """What all cells share."""

    seed: int
    samples: int
    images: int
    barred_images: int
    options: Mapping[str, Any]  # of the trained method
    work: Path
    threads: int

    def count(self, name: str) -> int:
        return self.barred_images if name in BARRED else self.images


def cells(
    models: Sequence[str], settings: Sequence[str], granularities: Sequence[str], kinds: Sequence[str]
) -> Iterator[Cell]:
    """Yields the cells asked for."""
    for model in models:
        for setting in settings:
            for granularity in SETTINGS[setting].granularities:
                if granularity in granularities:
                    yield from (
                        Cell(model, setting, granularity, kind) for kind in SETTINGS[setting].methods if kind in kinds
                    )


def recipe_of(cell: Cell, job: Job) -> Recipe:
    """Returns the cell's recipe: its setting's shipped one with another last rule."""
    setting = SETTINGS[cell.setting]
    source = recipe.load(setting.recipe).source
    rule: dict[str, Any] = {"layers": "*", "split_skips": True, "deployable": setting.deployable}
    rule |= {"weight": {**setting.weight, "granularity": cell.granularity}}
    variant = METHODS[cell.method]
    if setting.activation:
        rule |= {"activation": {**setting.activation, **variant.activation}}
    given = job.options if cell.method == "learned" else training(cell.model) if variant.trained else {}
    rule |= {"method": {"name": variant.method, **variant.options, **given}}
    others = [as_observed(one, variant) for one in source["rule"][:-1]]
    calibration = {"samples": job.samples} | source.get("calibration", {})
    return recipe.parse(cell.name, {"calibration": calibration, "rule": [*others, rule]})


def training(model: str) -> Mapping[str, Any]:
    """Returns how long methods train on a model."""
    return TRAINED.get(model, TRAINED["digits-dit"])


def as_observed(rule: Mapping[str, Any], variant: Variant) -> Mapping[str, Any]:
    """Returns a shipped rule of attentions, whose activations are observed as all others in the cell."""
    if rule.get("type") != "attention":
        return rule
    kept = {key: value for key, value in rule["activation"].items() if key not in ("observer", "granularity")}
    return {**rule, "activation": kept | variant.activation}


def request_of(cell: Cell, job: Job, checkpoint: Checkpoint) -> Json:
    """Returns what a cell's result depends on."""
    asked = recipe_of(cell, job)
    method = asked.rules[-1].method
    assert method is not None
    options = asdict(method.options)  # the defaults too: they may change
    made = {"recipe": asked.digest, "method": method.name, "options": options}
    return shared_request(checkpoint, job) | made | {"images": [job.images, job.count(cell.name)]}


def shared_request(checkpoint: Checkpoint, job: Job) -> Json:
    """Returns what all cells of a model depend on; cells that differ in it are never shown in one table."""
    libraries = {name: version(name) for name in ("torch", "diffusers")}
    return {"model": checkpoint.digest, "seed": job.seed, "samples": job.samples, "images": job.images, **libraries}


def calibration_of(checkpoint: Checkpoint, job: Job, samples: int | None = None) -> Artifact:
    count = samples or job.samples
    return calibrate(checkpoint, job.work / checkpoint.name / f"calibration-{count}", samples=count, seed=job.seed)


@dataclass(frozen=True)
class References:
    """The float model's images for a model's captions: of the noise that all cells share, and of another."""

    asked: Sequence[str]
    images: torch.Tensor
    again: torch.Tensor

    def first(self, count: int) -> References:
        return References(self.asked[:count], self.images[:count], self.again[:count])


def references(checkpoint: Checkpoint, job: Job, count: int) -> References:
    """Draws the float model's images, or reads them where they are drawn already; returns the first `count`."""
    most = max(job.images, job.barred_images)
    conditions, indices = conditions_of(checkpoint, job, most)
    asked = {"images": [job.images, most], "seed": job.seed, "entries": conditions.entries}
    path = job.work / checkpoint.name / f"float-{digest_json({'model': checkpoint.digest, **asked})[:16]}.safetensors"
    if not path.exists():
        runner = TorchRunner("float", checkpoint.load(), checkpoint.family)
        drawn = {
            "images": draw(runner, checkpoint, conditions, indices, job.seed),
            "again": draw(runner, checkpoint, conditions, indices[: job.images], job.seed + 1),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(drawn, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)
    drawn = load_file(path)
    return References(conditions.asked(indices[:count]), drawn["images"][:count], drawn["again"][:count])


def conditions_of(checkpoint: Checkpoint, job: Job, count: int) -> tuple[Conditions, list[int]]:
    """Returns what images are asked to show, and their indices: none of the calibration's noise is among them."""
    calibration = calibration_of(checkpoint, job)
    conditions = Conditions(checkpoint, validation_entries(checkpoint, calibration.info["entries"]))
    indices = [SEED_OFFSET + i for i in range(count)]
    conditions.read(indices)
    return conditions, indices


def draw(
    runner: TorchRunner, checkpoint: Checkpoint, conditions: Conditions, indices: Sequence[int], seed: int
) -> torch.Tensor:
    chunks = [indices[i : i + BATCH] for i in range(0, len(indices), BATCH)]
    return torch.cat([sample(runner, checkpoint, conditions, chunk, seed) for chunk in chunks])


def judge(checkpoint: Checkpoint, images: torch.Tensor, floats: References) -> Json:
    """Returns the scores of images against the float model's from the same noise, with 95 % intervals."""
    data_range = 2.0 if checkpoint.in_pixels else float(floats.images.max() - floats.images.min())
    finite = images.nan_to_num()
    psnr = metrics.bootstrap_ci95(metrics.psnr_db(floats.images, finite, data_range))
    found: Json = {"images": len(images), "not_finite": int((~images.isfinite()).sum()), "psnr_db": _with_ci(*psnr)}
    task = tasks.load(checkpoint.sampler["task"], checkpoint.task_net)
    ours, theirs = (task.scores(x, floats.asked) for x in (images, floats.images))
    found["task"] = {
        "name": task.NAME_OF_SCORE,
        "float": float(theirs.mean()),
        "quantized": float(ours.mean()),
        "lost": _with_ci(*metrics.bootstrap_ci95(theirs - ours)),
    }
    pair = torch.cat([task.features(x).double() for x in (floats.images, finite)], dim=1)
    width = pair.shape[1] // 2
    frechet = metrics.bootstrap_ci95_of(lambda both: metrics.frechet_distance(both[:, :width], both[:, width:]), pair)
    return found | {"frechet": _with_ci(*frechet)}


def _with_ci(value: float, interval: Sequence[float]) -> Json:
    return {"value": value, "ci95": list(interval)}


def compute(cell: Cell, job: Job) -> Json:
    """Quantizes, draws and judges one cell."""
    checkpoint = open_checkpoint(cell.model)
    found = measured(checkpoint, recipe_of(cell, job), job, cell.name)
    request = request_of(cell, job, checkpoint)
    return {"cell": asdict(cell), "request": request, "deployable": SETTINGS[cell.setting].deployable, **found}


def measured(checkpoint: Checkpoint, asked: Recipe, job: Job, name: str) -> Json:
    """Quantizes a model by a recipe, draws and judges its images."""
    torch.set_num_threads(job.threads)
    calibration, count = calibration_of(checkpoint, job, asked.calibration.samples), job.count(name)
    floats = references(checkpoint, job, count)
    source = quantizing.quantize(checkpoint, asked, calibration, job.work / checkpoint.name / name)
    timings = read_json(source.path / "timings.json")
    started = time.monotonic()
    model = quantized.load(source)
    for layer in quantized.quantized_layers(model).values():
        layer.decode_once()
    conditions, indices = conditions_of(checkpoint, job, count)
    runner = TorchRunner("quantized", model, checkpoint.family)
    images = draw(runner, checkpoint, conditions, indices, job.seed)
    found = judge(checkpoint, images[: job.images], floats.first(job.images))
    if count > job.images:
        found["many"] = judge(checkpoint, images, floats)
    weights = source.info["weights"]
    layers = source.info["layers"]
    main = [one for one in layers.values() if one["activation"] or one["weight"]["format"] == "codebook"]
    return {
        "trajectories": asked.calibration.samples,
        "bits_per_weight": weights["bits_per_weight"],
        "by_format": weights["by_format"],
        "weight_formats": _counted(layer["weight"] for layer in main),
        "activation_formats": _counted(layer["activation"] for layer in main if layer["activation"]),
        "layers": len(main),
        **found,
        "step_sqnr_db": step_sqnr(source),
        # of a run that went on after a kill the clock saw only the last part
        "minutes": None if timings["resumed"] else timings["seconds"] / 60,
        "judge_minutes": (time.monotonic() - started) / 60,
        "peak_rss_bytes": timings["peak_rss_bytes"],
    }


def _counted(found: Iterator[Mapping[str, Any]]) -> dict[str, int]:
    names = [spelled(one) for one in found]
    return {name: names.count(name) for name in sorted(set(names))}


def spelled(fmt: Mapping[str, Any]) -> str:
    if fmt["format"] == "codebook":
        return f"{fmt['codebook_size']} × {fmt['vector_size']}"
    return f"E{fmt['exponent_bits']}M{fmt['mantissa_bits']}" if fmt["format"] == "fp" else f"INT{fmt['bits']}"


def step_sqnr(source: Artifact) -> float:
    """Returns the SQNR of the denoiser's output against the float model's, dB, the mean over reference steps."""
    reference = load_file(source.file(quantized.REFERENCE))
    steps = quantizing.reference_steps(reference)
    return sum(metrics.sqnr_db(reference[f"{s}/float"], reference[f"{s}/quantized"]) for s in steps) / len(steps)


def float_row(model: str, job: Job) -> Json:
    """Judges the float model against itself from another noise: what a score cannot tell apart."""
    torch.set_num_threads(job.threads)
    checkpoint = open_checkpoint(model)
    floats = references(checkpoint, job, job.images)
    parameters = quantizing.checkpoint_parameters(checkpoint)
    found = judge(checkpoint, floats.again, floats)
    return {"request": shared_request(checkpoint, job), "parameters": parameters, "other_noise": found}


def grids(model: str, job: Job) -> Json:
    """Compares number grids layer by layer: each weight's least output error on every 4- and 8-bit grid, its kurtosis
    beside it, and each input's least error in INT8 and E4M3.
    """
    torch.set_num_threads(job.threads)
    checkpoint = open_checkpoint(model)
    calibration = calibration_of(checkpoint, job)
    asked = recipe_of(Cell(model, "auto-fp8", "channel", "search"), job)
    data = quantizing.CalibrationSet(calibration)
    net, family = checkpoint.load(), checkpoint.family
    plan = plan_layers(net, family, asked)
    paths = [path for path, spec in plan.specs.items() if spec.activation]
    rows = {path: {"layer": path, **weight_tails(modules.float_layer(net, path))} for path in paths}
    for group in moments.groups(net, [path for path in paths if moments.width(net, path)]):
        seen = moments.Moments(net, group)
        watch_inputs(net, family, group, data, seen.see, "inputs' second moments")
        for path in group:
            rows[path] |= grid_errors(modules.float_layer(net, path), plan.specs[path], seen.mean(path))
    for path, row in input_errors(net, family, paths, data).items():
        rows[path] |= row
    return {"request": shared_request(checkpoint, job), "layers": list(rows.values())}


def weight_tails(layer: specs.FloatLayer) -> Json:
    """Returns the kurtosis (3 for a normal distribution) of a weight as a whole, and the mean of its channels' own."""
    weight = layer.weight.detach().double().flatten(1)
    return {"kurtosis": {"tensor": kurtosis(weight.flatten()[None]), "channel": kurtosis(weight)}}


def kurtosis(rows: torch.Tensor) -> float | None:
    """Returns E[(x − E x)⁴] / E[(x − E x)²]² of rows [n, values], averaged; constant rows count for nothing."""
    centred = rows - rows.mean(dim=1, keepdim=True)
    second, fourth = centred.square().mean(dim=1), centred.pow(4).mean(dim=1)
    live = second > 0
    return float((fourth[live] / second[live].square()).mean()) if live.any() else None


GRIDS = {"int4": ("int", {"bits": 4}), "int8": ("int", {"bits": 8})} | {
    f"e{e}m{m}": ("fp", {"exponent_bits": e, "mantissa_bits": m}) for e, m in ((1, 2), (2, 1), (3, 0), (4, 3))
}


def grid_errors(layer: specs.FloatLayer, spec: specs.LayerSpec, second: torch.Tensor) -> Json:
    """Returns the output's SQNR, dB, of the weight's best ranges on every grid."""
    found: Json = {"weight_db": {}}
    for granularity in GRANULARITIES:
        of = replace(spec, granularity=granularity)
        weight, axis = specs.oriented(layer, of), specs.channel_axis(layer, of)
        signal = float(fp_search.part_errors(weight, WeightSpec(spec.weight, "tensor"), axis, second))
        errors = {}
        for name, (kind, options) in GRIDS.items():
            fmt = formats.load(kind, options, name)
            error, _ = fp_search.best_ranges(weight, WeightSpec(fmt, granularity), fmt, axis, second)
            errors[name] = db(signal, float(error.sum()))
        found["weight_db"][granularity] = errors
    return found


def db(signal: float, noise: float) -> float | None:
    """Returns 10·log10(signal / noise); nothing where one of them is zero."""
    return 10 * math.log10(signal / noise) if signal > 0 and noise > 0 else None


def input_errors(net: nn.Module, family: Any, paths: Sequence[str], data: Any) -> dict[str, Json]:
    """Returns each input's SQNR, dB, at its best static range in INT8 and in E4M3, and its kurtosis about zero."""
    seen = {path: observers.Mse() for path in paths}
    watch_inputs(net, family, paths, data, lambda path, x, steps: seen[path].update(x), "inputs")
    found = {}
    for path, observer in seen.items():
        histogram = observer.histogram
        counts, values = histogram.counts, histogram.means
        second, fourth = ((counts * values.pow(power)).sum() for power in (2, 4))
        signal, errors = float(second), {}
        for name in ("int8", "e4m3"):
            kind, options = GRIDS[name]
            errors[name] = db(signal, observer.fit(formats.load(kind, options, name))[1])
        tails = float(fourth * counts.sum() / second.square()) if signal else None
        found[path] = {"input_db": errors, "input_kurtosis": tails}
    return found


def _names(known: Sequence[str]) -> Any:
    def parse(_context: click.Context, _parameter: click.Parameter, value: str) -> list[str]:
        names = value.split(",") if value else list(known)
        if wrong := [name for name in names if name not in known]:
            raise click.BadParameter(f"{wrong[0]!r} is none of {', '.join(known)}")
        return names

    return parse


@click.command()
@click.argument("models", nargs=-1, required=True)
@click.option("--methods", "kinds", callback=_names(list(METHODS)), help=f"[default: {','.join(METHODS)}]")
@click.option("--settings", callback=_names(list(SETTINGS)), help=f"[default: {','.join(SETTINGS)}]")
@click.option("--granularities", callback=_names(GRANULARITIES), help=f"[default: {','.join(GRANULARITIES)}]")
@click.option(
    "--iterations", type=click.IntRange(min=1), help="of all that learn rounding, per block (default: its own)"
)
@click.option("--images", type=click.IntRange(min=16), help=f"of every cell [default: {IMAGES}]")
@click.option(
    "--samples", type=click.IntRange(min=1), default=64, show_default=True, help="trajectories to calibrate on"
)
@click.option("--seed", default=0, show_default=True)
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="cells at a time, each with its share of the cores",
)
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/compare"), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("docs/methods"), show_default=True)
@click.option("--document", type=click.Path(path_type=Path), default=Path("docs/methods.md"), show_default=True)
def main(
    models: tuple[str, ...], kinds: list[str], settings: list[str], granularities: list[str], iterations: int | None,
    images: int | None, samples: int, seed: int, jobs: int, work: Path, results: Path, document: Path,
) -> None:  # fmt: skip
    threads = max(1, torch.get_num_threads() // jobs)
    options = {"iterations": iterations} if iterations else {}
    todo: list[tuple[Path, Any, tuple[Any, ...]]] = []
    for model in models:
        counts = (images, images) if images else IMAGES.get(model, OTHERS)
        job = Job(seed, samples, *counts, options, work, threads)
        checkpoint = _opened(model)
        references(checkpoint, job, job.images)
        asked = [recipe_of(cell, job) for cell in cells([model], settings, granularities, kinds)]
        for count in sorted({one.calibration.samples for one in asked}):  # before cells ask for one at a time
            calibration_of(checkpoint, job, count)
        wanted: list[tuple[str, Json, Any, tuple[Any, ...]]] = [
            (name, shared_request(checkpoint, job), function, (model, job))
            for name, function in (("float", float_row), ("grids", grids))
        ]
        for cell in cells([model], settings, granularities, kinds):
            wanted.append((cell.name, request_of(cell, job, checkpoint), compute, (cell, job)))
        for name, request, function, arguments in wanted:
            path = results / model / f"{name}.json"
            if not path.exists() or read_json(path)["request"] != request:
                todo.append((path, function, arguments))
    note(f"{len(todo)} cells to compute")
    run(todo, jobs)
    write_report(results, document)


def _opened(model: str) -> Checkpoint:
    try:
        return open_checkpoint(model)
    except UserError as error:
        raise click.ClickException(str(error)) from error


def run(todo: Sequence[tuple[Path, Any, tuple[Any, ...]]], jobs: int) -> None:
    """Computes cells, each in a process of its own, whose peak memory is the cell's; writes each when it is done."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(function, *arguments): path for path, function, arguments in todo}
        started = time.monotonic()
        try:
            for number, future in enumerate(as_completed(futures), 1):
                path = futures[future]
                path.parent.mkdir(parents=True, exist_ok=True)
                write_json(path, future.result())
                spent = time.monotonic() - started
                left = spent / number * (len(futures) - number)
                note(f"{number} of {len(futures)}: {path}, {spent / 60:.1f} minutes, about {left / 60:.0f} left")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
