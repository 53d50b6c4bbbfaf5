"""Compares the ways in which VQ4DiT's paper and its released code differ, and our own choices, on one model.

    python tools/compare_vq4dit.py digits-dit --jobs 2

Every variant differs from one base, which is the shipped defaults but for BASE, in what it is named after, and has the
same calibration set, images and iterations. Cells are written to --results as JSON and kept there, as `compare_methods`
does; a table of all that are there goes between the marks in --document.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import compare_methods as compare
from compare_report import apart, interval, put_between

from engines.artifacts import Json, read_json
from exporter.checkpoint import open_checkpoint
from exporter.recipe import MethodSpec, Recipe

CELL = "vq2", "tensor", "vq4dit"
BEGIN, END = "<!-- compare_vq4dit: begin -->", "<!-- compare_vq4dit: end -->"
BASE: dict[str, Any] = {"smooth": False}  # the defaults of the day when it was run, and what they became by it
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "equal ratios at first (paper)": {"equal": True},
    "r (1 − r) (code)": {"smooth": True},
    "no regulariser": {"regularizer": 0.0},
    "codebooks after the choices (code)": {"together": False},
    "one candidate": {"candidates": 1},
    "three candidates": {"candidates": 3},
    "block by block": {"joint": False},
}


@click.command()
@click.argument("model")
@click.option("--iterations", type=(int, int), default=(1000, 200), show_default=True, help="of choices, of codewords")
@click.option("--images", default=256, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--jobs", default=1, show_default=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("out/compare"), show_default=True)
@click.option("--results", type=click.Path(path_type=Path), default=Path("docs/vq4dit"), show_default=True)
@click.option("--document", type=click.Path(path_type=Path), default=Path("docs/methods.md"), show_default=True)
def main(
    model: str,
    iterations: tuple[int, int],
    images: int,
    seed: int,
    jobs: int,
    work: Path,
    results: Path,
    document: Path,
) -> None:
    import torch

    job = compare.Job(seed, 64, images, images, {}, work, max(1, torch.get_num_threads() // jobs))
    checkpoint = open_checkpoint(model)
    compare.references(checkpoint, job, images)
    compare.calibration_of(checkpoint, job, recipe_of(model, job, "base", iterations).calibration.samples)
    paths = {name: results / f"{model}.{number}.json" for number, name in enumerate(VARIANTS)}
    todo = [
        (path, variant, (model, job, name, iterations))
        for name, path in paths.items()
        if not path.exists() or read_json(path)["asked"] != asked_of(name, iterations, images, seed)
    ]
    compare.run(todo, jobs)
    put_between(document, BEGIN, END, table(results))


def table(results: Path) -> str:
    """Returns every variant of every model, and what it gains over the base."""
    lines = ["| model | variant | PSNR, dB (95 %) | over the base | SQNR per step, dB | minutes |"]
    lines.append("|---|---|---|---|---|---|")
    rows = [(path.stem.partition(".")[0], read_json(path)) for path in sorted(results.glob("*.json"))]
    for model, row in rows:
        base = next(one for name, one in rows if name == model and one["asked"]["name"] == "base")["psnr_db"]
        ours = row["psnr_db"]
        gain = "" if ours is base else f"{ours['value'] - base['value']:+.1f} dB, {apart(ours, base)}"
        minutes = f"{row['minutes']:.1f}" if row["minutes"] else ""
        cells = (model, row["asked"]["name"], interval(ours, 1), gain, f"{row['step_sqnr_db']:.1f}", minutes)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def asked_of(name: str, iterations: tuple[int, int], images: int, seed: int) -> Json:
    return {
        "name": name,
        "base": BASE,
        **VARIANTS[name],
        "iterations": list(iterations),
        "images": images,
        "seed": seed,
    }


def recipe_of(model: str, job: compare.Job, name: str, iterations: tuple[int, int]) -> Recipe:
    made = compare.recipe_of(compare.Cell(model, *CELL), job)
    *others, rule = made.rules
    assert rule.method is not None
    few = {"iterations": iterations[0], "codebook_iterations": iterations[1]}
    options = replace(rule.method.options, **few, **(BASE | VARIANTS[name]))
    source = {**made.source, "variant": asked_of(name, iterations, job.images, job.seed)}
    return replace(made, source=source, rules=(*others, replace(rule, method=MethodSpec("vq4dit", options))))


def variant(model: str, job: compare.Job, name: str, iterations: tuple[int, int]) -> Json:
    """Quantizes, draws and judges one variant."""
    number = list(VARIANTS).index(name)
    found = compare.measured(open_checkpoint(model), recipe_of(model, job, name, iterations), job, f"variant-{number}")
    return {"asked": asked_of(name, iterations, job.images, job.seed), **found}


if __name__ == "__main__":
    main()
