"""The command line: `export-engine`, one command per stage, and `run` for all of them."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from engines.errors import UserError, unknown
from engines.version import __version__

FOLDER = click.Path(path_type=Path)
OUT = click.option("--out", type=FOLDER, required=True, help="Folder to write.")
IMAGES = click.option(
    "--images", type=click.IntRange(min=2), help="Images to draw and score (default: 256; each three times)."
)
STEPS = click.option("--steps", type=click.IntRange(min=1), help="Sampling steps (default: the model's own).")
SEED = click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
GPU = click.option("--gpu", help="Target of TensorRT backends, e.g. sm89 (default: this machine's, else sm89).")
DECODE = click.option(
    "--decode", type=click.Choice(["run", "load"]),
    help="How ONNX Runtime decodes codebooks: while it runs, compressed in memory (the default), or when it opens.",
)  # fmt: skip
REFIT = click.option("--refit", is_flag=True, help="Let weights be exchanged in the built engine (trt).")
WEIGHT_STREAMING = click.option(
    "--weight-streaming", metavar="auto|BYTES",
    help="Let weights lie in host memory, and how much of them stay on the GPU when it runs (trt, trt-rtx).",
)  # fmt: skip
TIMING_CACHE = click.option(
    "--timing-cache", type=FOLDER, help="File that keeps what trt times, for later builds (default: beside the engine)."
)
PROMPTS = click.option(
    "--prompts", type=FOLDER, help="Your own captions or class labels for calibration, one to a line."
)
DEVICE = click.option(
    "--device", default="cpu", show_default=True, metavar="cpu|cuda|cuda:N",
    help="Where PyTorch samples, searches and trains: the CPU, or a GPU.",
)  # fmt: skip
JSON = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")


class Cli(click.Group):
    """Turns a UserError into a message and exit code 2, and Ctrl-C into 130."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(2)
        except PermissionError as error:  # of a path that may not even be looked at
            told = UserError(f"{error.filename}: {error.strerror}", fix="choose a path that you may read and write")
            click.echo(f"error: {told}", err=True)
            sys.exit(2)
        except KeyboardInterrupt:
            click.echo("stopped; what is finished is kept: the same command goes on from there", err=True)
            sys.exit(130)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="export-engine")
def main() -> None:
    """From a diffusers checkpoint to a quantized engine that is proven to be as good as it claims."""


@main.command()
@click.argument("model")
@click.option("--recipe", required=True, help="A shipped recipe, or a .toml file.")
@OUT
@click.option("--backend", "backends", multiple=True, default=("ort",), show_default=True, help="May be repeated.")
@GPU
@click.option("--dtype", help="Float type of the graphs, fp16 or fp32 (default: each backend's own).")
@DECODE
@REFIT
@WEIGHT_STREAMING
@TIMING_CACHE
@STEPS
@PROMPTS
@click.option("--calibration", type=FOLDER, help="A calibration set to use again, e.g. that of another recipe's run.")
@IMAGES
@DEVICE
@SEED
@JSON
def run(
    model: str,
    recipe: str,
    out: Path,
    backends: tuple[str, ...],
    gpu: str | None,
    dtype: str | None,
    decode: str | None,
    refit: bool,
    weight_streaming: str | None,
    timing_cache: Path | None,
    steps: int | None,
    prompts: Path | None,
    calibration: Path | None,
    images: int | None,
    device: str,
    seed: int,
    as_json: bool,
) -> None:
    """Calibrate, quantize, lower, build and validate MODEL. Resumes where it was stopped."""
    _check_asked(model, recipe, backends, dtype, gpu)
    options = _options(backends, decode, refit, weight_streaming, timing_cache)
    asked, where = _prompts(prompts), _device(device)
    from exporter import run as runs
    from exporter import thresholds

    limits = thresholds.beside(recipe)
    opened = _checkpoint(model, steps, seed)
    report = runs.run(
        opened, _recipe(recipe), out, backend_names=backends, gpu=gpu, dtype=dtype, options=options, seed=seed,
        prompts=asked, calibration=calibration, images=images, device=where,
    )  # fmt: skip
    thresholds.keep(limits, out)
    _report(report, as_json, out)


@main.command()
@click.argument("model")
@click.option("--recipe", required=True, help="A shipped recipe, or a .toml file.")
@click.option("--backend", "backends", multiple=True, help="May be repeated (default: all that can build here).")
@GPU
@click.option("--dtype", help="Float type of the graphs, fp16 or fp32 (default: each backend's own).")
@STEPS
@IMAGES
@click.option("--out", type=FOLDER, help="Where the run would write: its disk is looked at.")
@click.option("--no-prove", is_flag=True, help="Do not build a small layer of each kind.")
@JSON
def preflight(
    model: str,
    recipe: str,
    backends: tuple[str, ...],
    gpu: str | None,
    dtype: str | None,
    steps: int | None,
    images: int | None,
    out: Path | None,
    no_prove: bool,
    as_json: bool,
) -> None:
    """Say in seconds whether a run of MODEL can work, and what it will weigh and take."""
    with _refusal_in_json({"model": {"name": model}, "recipe": {"name": recipe}} if as_json else None):
        _check_asked(model, recipe, backends, dtype, gpu)
        from exporter import preflight as stage

        found = stage.planned(_checkpoint(model, steps, 0), _recipe(recipe))
        asked = stage.targets(backends, gpu, dtype)
        report = stage.preflight(found, asked, images=images, out=out, proved=not no_prove)
    if as_json:
        click.echo(json.dumps(report, indent=1))
        return
    from exporter.preflight_tables import tables

    _print(tables(report))


@main.command()
@JSON
def doctor(as_json: bool) -> None:
    """Say what is installed, and what can be built and run here."""
    from exporter import doctor as stage

    found = stage.doctor()
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        _print(stage.tables(found))
    if found["fix"]:
        raise UserError(f"{', '.join(found['lacking'])}: missing, or too old", fix=found["fix"])


@main.command()
@click.argument("model")
@OUT
@STEPS
@click.option("--samples", type=click.IntRange(min=1), default=64, show_default=True, help="Trajectories to record.")
@PROMPTS
@DEVICE
@SEED
def calibrate(
    model: str, out: Path, steps: int | None, samples: int, prompts: Path | None, device: str, seed: int
) -> None:
    """Record MODEL's inputs at every step of its own sampling."""
    _check_model(model)
    asked, where = _prompts(prompts), _device(device)
    from exporter.calibrate import calibrate as stage

    _done(stage(_checkpoint(model, steps, seed), out, samples=samples, seed=seed, prompts=asked, device=where))


@main.command()
@click.argument("model")
@click.option("--recipe", required=True, help="A shipped recipe, or a .toml file.")
@click.option("--calibration", type=FOLDER, required=True)
@OUT
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps (default: the calibration set's).")
@DEVICE
@SEED
def quantize(model: str, recipe: str, calibration: Path, out: Path, steps: int | None, device: str, seed: int) -> None:
    """Turn MODEL's weights into codes and scales, as RECIPE says."""
    from engines.artifacts import open_artifact
    from exporter.quantize import quantize as stage

    where, data = _device(device), open_artifact(calibration, "calibration")
    checkpoint = _checkpoint(model, steps or data.info["sampler"]["steps"], seed)
    _done(stage(checkpoint, _recipe(recipe), data, out, device=where))


@main.command()
@click.argument("quantized", type=FOLDER)
@OUT
@click.option("--dtype", default="fp32", show_default=True, help="Float type of the graph, fp16 or fp32.")
@click.option(
    "--step-input",
    default="index",
    show_default=True,
    help="What tells the graph which of a scale for every step is meant: the step's index, or the table's row.",
)
def lower(quantized: Path, out: Path, dtype: str, step_input: str) -> None:
    """Write the ONNX graph of a quantized model."""
    from engines.artifacts import open_artifact
    from exporter.lower import lower as stage

    _done(stage(open_artifact(quantized, "quantized"), out, dtype=dtype, step_input=step_input))


@main.command()
@click.argument("graph", type=FOLDER)
@click.option("--backend", required=True)
@OUT
@GPU
@DECODE
@REFIT
@WEIGHT_STREAMING
@TIMING_CACHE
def build(
    graph: Path,
    backend: str,
    out: Path,
    gpu: str | None,
    decode: str | None,
    refit: bool,
    weight_streaming: str | None,
    timing_cache: Path | None,
) -> None:
    """Build an engine from a GRAPH, or from a bundle's."""
    from engines import backends
    from engines.build import build as stage
    from engines.build import graph_of
    from exporter import progress

    options = backends.resolve(backend, _options((backend,), decode, refit, weight_streaming, timing_cache))
    opened = graph_of(graph, backend)
    if note := backends.load(backend).note(opened.info, options):
        progress.note(f"note: {note}")
    made = stage(opened, backend, out, gpu=gpu, options=options)
    _done(made)
    click.echo(_held(made.info))


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--layers", is_flag=True, help="Also rank layers and steps by the damage each does alone.")
@IMAGES
@DEVICE
@SEED
@JSON
def validate(run: Path, layers: bool, images: int | None, device: str, seed: int, as_json: bool) -> None:
    """Hold the engines of RUN against PyTorch again."""
    from exporter import run as runs
    from exporter import run_folder

    where = _device(device)
    checkpoint, opened = run_folder.open_run(run)
    with run_folder.locked(run):
        report = runs.report(checkpoint, opened, run, seed=seed, images=images, device=where)
        found = runs.layers(checkpoint, opened, run) if layers else None
    if found is not None and not as_json:
        from exporter.layers import print_layers

        print_layers(found)
    _report(report | ({"layers": found} if found else {}), as_json, run)


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--baseline", type=FOLDER, required=True, help="What a good run was kept as.")
@click.option(
    "--thresholds",
    type=FOLDER,
    help="What may be lost, in TOML (default: NAME.check.toml beside the recipe as `run` took it, else what ships).",
)
@click.option("--update", is_flag=True, help="Keep RUN as the baseline, and show what is new in it.")
@click.option("--other-recipe", is_flag=True, help="Allow a baseline of a recipe by another name.")
@click.option("--junit", type=FOLDER, help="JUnit XML to write.")
@JSON
def check(
    run: Path, baseline: Path, thresholds: Path | None, update: bool, other_recipe: bool, junit: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Hold the report of RUN against a baseline: exit code 3 if more was lost than may be, or if nobody can tell."""
    if update and junit:
        raise UserError("--update judges nothing that --junit could tell", fix="leave out one of the two")
    from exporter import check as checks
    from exporter import check_report
    from exporter.thresholds import load, of_run

    limits = load(thresholds or of_run(run))
    if update:
        written = checks.update(run, baseline, limits, other_recipe=other_recipe)
        _say(written.to_json(), as_json, lambda: check_report.print_updated(written))
        sys.exit(3 if written.refusals else 0)
    found = checks.check(run, baseline, limits, other_recipe=other_recipe)
    if junit:
        check_report.write_junit(found, junit)
    _say(found.to_json(), as_json, lambda: check_report.print_checked(found))
    sys.exit(0 if found.passed else 3)


@main.command()
@click.argument("folder", type=FOLDER)
@click.option("--batch", "batches", type=click.IntRange(min=1), multiple=True, help="May be repeated.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads (default: all cores).")
@JSON
def bench(folder: Path, batches: tuple[int, ...], threads: int | None, as_json: bool) -> None:
    """Time a RUN, GRAPH or ENGINE folder."""
    from exporter import bench as timing

    rows = timing.throughput(timing.targets_of(folder), batches or timing.BATCHES, threads)
    if as_json:
        click.echo(json.dumps(rows, indent=1))
        return
    for row in rows:
        click.echo(
            f"{row['runner']:>12}  batch {row['batch']:>3}  p50 {row['ms_p50']:8.2f} ms  p95 {row['ms_p95']:8.2f} ms  "
            f"{row['runs']} runs"
        )


@main.command()
@click.argument("run", type=FOLDER)
@click.option("--out", type=FOLDER, help="Bundle to write.")
@click.option("--zip", "packed", is_flag=True, help="Write one uncompressed file, --out, instead of a folder.")
@click.option("--triton", type=FOLDER, help="Model repository to write for Triton Inference Server.")
@click.option(
    "--triton-ops",
    help="Where that server will find the native codebook kernels, e.g. /models/NAME/codebook_ops.so (default: none; "
    "graphs then look codes up by their own nodes).",
)
@click.option(
    "--engine", "engines", type=FOLDER, multiple=True, help="A further engine of RUN's graphs; may be repeated."
)
@click.option("--failed", is_flag=True, help="Bundle a run all the same whose checks failed.")
def bundle(
    run: Path, out: Path | None, packed: bool, triton: Path | None, triton_ops: str | None,
    engines: tuple[Path, ...], failed: bool,
) -> None:  # fmt: skip
    """Write what RUN holds as an application loads it, as a server does, or both.

    A bundle holds engines, graph, contract, recorded feeds and outputs; a model repository what Triton serves of them.
    """
    from exporter import bundle as stage
    from exporter.verify import failed_checks

    stage.check_places(out, packed, triton)
    if out is not None:
        write = stage.bundle_zip if packed else stage.bundle
        made = write(run, out, engines=engines, failed=failed)
        _done(made)
        for name in failed_checks(made.info):
            click.echo(f"note: it failed a check of its run: {name}", err=True)
    if triton is not None:
        from exporter import triton as serving

        with stage.opened(run, out, near=triton, engines=engines, failed=failed) as source:
            made = serving.triton(source, triton, native_ops=triton_ops)
        serving.tell(made)
        _done(made)


@main.command()
@click.argument("bundle", type=FOLDER)
@click.option("--backend", help="Test engines of one backend alone.")
@JSON
def verify(bundle: Path, backend: str | None, as_json: bool) -> None:
    """Check every file of BUNDLE, and run on its engines what it has recorded: exit code 3 if one is off."""
    from exporter import verify as stage

    found = stage.verify(bundle, backend)
    _say(found, as_json, lambda: _print(stage.tables(found)))
    sys.exit(0 if found["passed"] else 3)


@main.command()
@click.argument("folder", type=FOLDER)
def report(folder: Path) -> None:
    """Write report.html of a RUN, or of every run in a folder, from what is there."""
    from exporter import html_report

    for run in html_report.runs_in(folder):
        if html_report.is_stale(run):
            click.echo(f"note: {run}: its report is of other artifacts than lie there: validate it again", err=True)
        click.echo(html_report.write(run))


@main.command()
@click.argument("artifact", type=FOLDER)
@JSON
def inspect(artifact: Path, as_json: bool) -> None:
    """Check an artifact's files and show what it is and what it was made of."""
    from engines import artifacts, bundle

    kind = bundle.KIND if artifact.is_file() else artifacts.kind_of(artifact)
    whole = kind == bundle.KIND
    opened = bundle.open_bundle(artifact).artifact if whole else artifacts.open_artifact(artifact, kind)
    manifest = opened.manifest
    if as_json:
        if manifest["kind"] == "quantized":
            from exporter import ranges

            manifest = manifest | {"ranges": ranges.read(opened)}
        if manifest["kind"] == "engine":
            from engines.audit import audit

            manifest = manifest | {"audit": [row.to_json() for row in audit(opened)]}
        click.echo(json.dumps(manifest, indent=1))
        return
    click.echo(f"{artifact}: {manifest['kind']}, digest {opened.digest}")
    for key in ("made_from", "settings", "versions"):
        for name, value in manifest[key].items():
            if value is None:  # it has none: a GPU, for an engine that runs on any machine
                continue
            click.echo(f"  {key.replace('_', ' ')}  {name}: {value}")
    for name, entry in manifest["files"].items():
        click.echo(f"  {entry['bytes']:>12,} bytes  {name}  sha256 {entry['sha256'][:16]}…")
    if whole:
        from exporter.verify import contract_lines

        for line in contract_lines(opened.info):
            click.echo(f"  {line}")
    if manifest["kind"] == "engine":
        from engines.audit import audit
        from exporter import audits, progress

        click.echo(f"  {_held(manifest['info'])}")
        rows = [row.to_json() for row in audit(opened)]
        progress.print_whole(audits.table(rows))
        for line in audits.summary(rows):
            click.echo(f"  {line}")
    if manifest["kind"] == "quantized":
        from exporter import progress, ranges, scaling
        from exporter.report import method_lines

        for line in method_lines(opened.info["recipe"]["methods"], opened.info["training"]):
            click.echo(f"  {line}")
        progress.stdout().print(ranges.table(ranges.read(opened), opened.info["layers"]))
        if opened.info["factors"]:
            progress.stdout().print(scaling.table(opened.info["factors"]))


@main.command(name="list")
@click.argument("what", type=click.Choice(["models", "recipes", "formats", "methods", "backends"]))
@click.argument("name", required=False)
def list_(what: str, name: str | None) -> None:
    """List what ships, by name; recipes and backends with what they are, methods with their options.

    With NAME that one alone; of a recipe the whole file, to start your own from.
    """
    from exporter import catalog

    names = _names(what)
    if name is not None and name not in names:
        raise unknown(what.removesuffix("s"), name, names)
    if name is not None and what == "recipes":
        click.echo(catalog.text(name), nl=False)
        return
    for found in names if name is None else [name]:
        click.echo(found)
        if what == "recipes":
            click.echo(f"    {catalog.comment(found)}")
        if what == "methods":
            from exporter import methods

            click.echo("\n".join(f"    {line}" for line in methods.about(found)))
        if what == "backends":
            from engines import backends

            click.echo(f"    {backends.about(found)}")


def _names(what: str) -> list[str]:
    if what == "models":
        from calib_data import shipped

        return shipped.names()
    if what == "backends":
        from engines import backends

        return backends.names()
    from exporter import catalog

    if what == "formats":
        return [*catalog.modules(what), "auto"]  # which leaves the choice to a method
    return catalog.recipes() if what == "recipes" else catalog.modules(what)


def _checkpoint(model: str, steps: int | None, seed: int) -> Any:
    from exporter import progress

    _check_model(model)
    from exporter.checkpoint import open_checkpoint

    opened = open_checkpoint(model, steps=steps, seed=seed)
    for note in opened.notes:
        progress.note(f"note: {note}")
    return opened


def _device(name: str) -> Any:
    from exporter.devices import resolve

    return resolve(name)


@contextlib.contextmanager
def _refusal_in_json(about: dict[str, Any] | None) -> Iterator[None]:
    """Prints a refusal as a JSON document on stdout too, with what it is about; without that, on stderr alone."""
    try:
        yield
    except UserError as error:
        if about is not None:
            click.echo(json.dumps(about | {"refused": {"what": error.what, "fix": error.fix}}, indent=1))
        raise


def _check_asked(model: str, recipe: str, backends: Iterable[str], dtype: str | None, gpu: str | None) -> None:
    """Refuses names that nobody knows, and backends that cannot build here, at once: before torch is imported."""
    from engines.backends import load
    from exporter.lower import check_dtype

    _check_model(model)
    _check_recipe(recipe)
    for name in backends:
        load(name).resolve_gpu(gpu)
    if dtype is not None:
        check_dtype(dtype)


def _check_model(model: str) -> None:
    """Refuses a name that is neither shipped nor a folder at once, before torch is imported."""
    from calib_data import shipped
    from engines.errors import unknown

    folder = Path(model.removeprefix("random:"))
    if model.startswith("random:") and not folder.is_dir():
        raise UserError(f"model {model!r}: no such folder: {folder}", fix="give one that holds a diffusers config.json")
    if model not in shipped.names() and not folder.is_dir():
        error = unknown("model", model, shipped.names())
        raise UserError(f"{error.what}, and no such folder", fix=f"{error.fix}; or give a diffusers folder")


def _options(
    backends: Sequence[str], decode: str | None, refit: bool, weight_streaming: str | None, timing_cache: Path | None
) -> Any:
    """Returns what was asked of builds; refuses what none of the backends has."""
    from engines.backends import check_taken
    from engines.options import Options, budget

    cache = str(timing_cache.resolve()) if timing_cache else None
    check_taken(backends, options := Options(decode, refit, budget(weight_streaming), cache))
    return options


def _prompts(path: Path | None) -> list[str] | None:
    from calib_data.prompts import read_list

    return None if path is None else read_list(path)


def _check_recipe(name: str) -> None:
    from engines.errors import unknown
    from exporter import catalog

    if not name.endswith(".toml") and name not in catalog.recipes():
        raise unknown("recipe", name, catalog.recipes())


def _recipe(name: str) -> Any:
    from exporter import recipe

    return recipe.load(name)


def _done(artifact: Any) -> None:
    click.echo(f"{artifact.path}: {artifact.manifest['kind']}, digest {artifact.digest[:16]}, {artifact.bytes:,} bytes")


def _print(parts: Iterable[Any]) -> None:
    from exporter import progress

    console = progress.stdout()
    for part in parts:
        console.print(part, markup=False)


def _held(engine: dict[str, Any]) -> str:
    return f"weights: {engine['weight_bytes']:,} bytes in the file, {engine['resident_weight_bytes']:,} in memory"


def _say(content: dict[str, Any], as_json: bool, tell: Callable[[], None]) -> None:
    if as_json:
        click.echo(json.dumps(content, indent=1))
    else:
        tell()


def _report(report: dict[str, Any], as_json: bool, folder: Path) -> None:
    from exporter.report import print_report

    if as_json:
        click.echo(json.dumps(report, indent=1))
    else:
        print_report(report)
        click.echo(", ".join(str(folder / name) for name in ("report.html", "report.json", "samples.png")))
    if not report["passed"]:
        sys.exit(3)
