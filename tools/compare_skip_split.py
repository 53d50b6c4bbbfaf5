"""Compares quantizing skip concatenations whole and split, in int8, on a U-Net: a table, and whether split ever loses.

    python tools/compare_skip_split.py --out out/split

Each shortcut convolution alone, all of them together, and the whole `int8` recipe: the SQNR of the denoiser's output
against the float model at the reference steps, with one quantizer for the concatenation and with one for each half.
"""

import json
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from engines.artifacts import Artifact
from exporter import quantized, recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.damage import mean_db
from exporter.metrics import sqnr_db
from exporter.quantize import quantize, reference_steps

INT8 = {
    "weight": {"format": "int", "bits": 8},
    "activation": {"format": "int", "bits": 8, "observer": "mse"},
}
REST = {"layers": "*", "keep": "float"}


@click.command()
@click.option("--model", default="shapes-unet", show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--samples", default=16, show_default=True, help="trajectories to calibrate on")
@click.option("--seed", default=0, show_default=True)
def main(model: str, out: Path, samples: int, seed: int) -> None:
    checkpoint = open_checkpoint(model)
    calibration = calibrate(checkpoint, out / "calibration", samples=samples, seed=seed)
    skips = checkpoint.family.skips(checkpoint.skeleton())
    cases = {path: [{"layers": path, **INT8}] for path in skips}
    cases["all of them"] = [{"layers": path, **INT8} for path in skips]
    rows = []
    for name, rules in cases.items():
        source = {"rule": [*rules, REST]}
        rows.append({"quantized": name, **both(checkpoint, source, calibration, out / name.replace(" ", "-"))})
    whole = dict(recipe.load("int8").source)
    rows.append({"quantized": "recipe int8", **both(checkpoint, whole, calibration, out / "int8")})
    show(rows)
    click.echo(json.dumps({"model": model, "samples": samples, "rows": rows}, indent=1))


def both(checkpoint: Checkpoint, source: dict, calibration: Artifact, out: Path) -> dict[str, object]:
    """Returns the SQNR at every reference step, whole and split, and split − whole: of all steps, and the least."""
    found = {}
    for name, split in (("whole", False), ("split", True)):
        rules = [rule if "keep" in rule else rule | {"split_skips": split} for rule in source["rule"]]
        made = quantize(checkpoint, recipe.parse(f"{name}", {**source, "rule": rules}), calibration, out / name)
        reference = load_file(made.file(quantized.REFERENCE))
        steps = reference_steps(reference)
        found[name] = [sqnr_db(reference[f"{s}/float"], reference[f"{s}/quantized"]) for s in steps]
    gains = [b - a for a, b in zip(*found.values(), strict=True)]
    gain = mean_db(found["split"]) - mean_db(found["whole"])
    return {"steps": steps, **found, "gain_db": gain, "least_gain_db": min(gains)}


def show(rows: list[dict]) -> None:
    table = Table("quantized", *(f"step {s}" for s in rows[0]["steps"]), "gain", "least gain")
    table.title = "SQNR dB: whole → split; gain over all steps together, and at the step that gains least"
    for row in rows:
        cells = [f"{a:.1f} → {b:.1f}" for a, b in zip(row["whole"], row["split"], strict=True)]
        table.add_row(row["quantized"], *cells, f"{row['gain_db']:+.2f}", f"{row['least_gain_db']:+.2f}")
    Console(stderr=True, width=160).print(table)


if __name__ == "__main__":
    main()
