"""Holds what `export-engine preflight` predicts against what the stages took and wrote.

    python tools/measure_preflight.py --out out/preflight                        shipped models and DiT-XL/2
    python tools/measure_preflight.py --out out/preflight --model digits-dit     one of them

Each stage runs in a process of its own (`tools/measure_rates.py`); what lies in `--out` is kept. Calibration is kept
short: few trajectories, few iterations, for DiT-XL/2 one trajectory of two steps. Exit code 3 if bytes are off by more
than 3 % or peak memory by more than 25 %.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click
from bench_dit_xl_codebooks import CONFIG
from measure_rates import RECIPE, measured, work_of

from exporter import catalog, estimate

BYTES, MEMORY = 0.03, 0.25  # how far predictions may be off
DILATE = 'name = "dilatequant"', 'name = "dilatequant", iterations = 20, rows = 256'
XL = "dit-xl-2"
CASES = {
    "digits-dit": ("fp8", "int4", "dilate-w8a8"),
    "shapes-unet": ("fp8", "int4", "dilate-w8a8"),
    XL: ("fp8-once",),
}

LAST = {("digits-dit", "fp8"): "validate", ("shapes-unet", "dilate-w8a8"): "quantize"}  # stage; of others "build"


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--model", "models", multiple=True, type=click.Choice(list(CASES)), default=list(CASES))
@click.option("--recipe", "recipes", multiple=True, help="Only these.")
def main(out: Path, models: tuple[str, ...], recipes: tuple[str, ...]) -> None:
    rows = []
    for name in models:
        for recipe in CASES[name]:
            if not recipes or recipe in recipes:
                rows += case(out, name, recipe)
    for row in rows:
        click.echo(
            f"{row['model']:<12} {row['recipe']:<12} {row['what']:<20} {row['predicted']:>14,} {row['measured']:>14,} "
            f"{row['error']:>+7.1%}{'' if row['passed'] else '  OUT OF BOUNDS'}"
        )
    (out / "preflight.json").write_text(json.dumps(rows, indent=1))
    if not all(row["passed"] for row in rows):
        sys.exit(3)


def case(out: Path, name: str, recipe: str) -> list[dict]:
    """Returns a row for each size and each stage's peak memory of one model and recipe."""
    model, steps = name, None
    file = written(out, recipe)
    if name == XL:
        (out / XL).mkdir(exist_ok=True)
        (out / XL / "config.json").write_text(json.dumps(CONFIG | {"num_layers": 28}))
        model, steps = f"random:{out / XL}", 2
    found = measured(
        model, str(file), out / f"run-{name}-{recipe}", steps=steps, last=LAST.get((name, recipe), "build")
    )
    work = work_of(model, str(file), steps)
    sizes = {"quantized": work.stored_bytes}
    for backend, dtype in work.dtypes.items():
        sizes |= {f"graph {dtype}": work.graphs[dtype], f"graph {dtype} files": estimate.file_bytes(work, dtype)}
        sizes[f"engine {backend}"] = work.engines[backend]
    stages = {one.stage: one.memory for one in estimate.estimates(work) if one.stage in found["stages"]}
    sizes = {what: size for what, size in sizes.items() if what in found["sizes"]}
    rows = [judged(name, recipe, what, size, found["sizes"][what], BYTES) for what, size in sizes.items()]
    return rows + [
        judged(name, recipe, stage, peak, found["stages"][stage]["peak_rss_bytes"], MEMORY)
        for stage, peak in stages.items()
    ]


def judged(model: str, recipe: str, what: str, predicted: int, found: int, most: float) -> dict:
    error = predicted / found - 1
    return {
        "model": model, "recipe": recipe, "what": what, "predicted": predicted, "measured": found, "error": error,
        "passed": abs(error) <= most,
    }  # fmt: skip


def written(out: Path, recipe: str) -> Path:
    """Writes a recipe with a short calibration; returns its file."""
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{recipe}.toml"
    text = RECIPE
    if recipe in catalog.recipes():
        shipped = (catalog.HERE / "recipes" / f"{recipe}.toml").read_text(encoding="utf-8")
        rules = shipped[shipped.index("[[rule]]") :].replace(*DILATE)
        text = f"[calibration]\nsamples = 16\n{rules}"
    file.write_text(text, encoding="utf-8")
    return file


if __name__ == "__main__":
    main()
