"""Times learned rounding on transformer blocks of DiT-B/2's size: width 768, 256 tokens.

    python tools/bench_learned_rounding.py --out out/rounding

Random weights, FP4 beside FP8, batch 32: a model of one block and one of two are each trained for few and for more
iterations of the rounding; the difference is the iterations' own time. Prints JSON; `two_over_one` is two blocks' time
over one's.
"""

import json
from pathlib import Path

import click
from bench_wide_dit import CONFIG, cpu

from engines.artifacts import Artifact, read_json
from engines.memory import peak_rss_bytes
from exporter import recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import Checkpoint, open_checkpoint
from exporter.quantize import quantize


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--iterations", type=(int, int), default=(4, 24), show_default=True, help="few, and more")
def main(out: Path, iterations: tuple[int, int]) -> None:
    few, more = iterations
    rows = []
    for blocks in (1, 2):
        model = out / f"{blocks}" / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text(json.dumps(CONFIG | {"num_layers": blocks}))
        checkpoint = open_checkpoint(f"random:{model}", steps=4)
        calibration = calibrate(checkpoint, out / f"{blocks}" / "calibration", samples=16)
        took = [seconds(checkpoint, calibration, n, out / f"{blocks}" / f"{n}") for n in (few, more)]
        rows.append({"blocks": blocks, "seconds_per_1000_iterations": 1000 * (took[1] - took[0]) / (more - few)})
    two_over_one = rows[1]["seconds_per_1000_iterations"] / rows[0]["seconds_per_1000_iterations"]
    found = {"cpu": cpu(), "batch": 32, "tokens": 256, "width": 768, "rows": rows, "two_over_one": two_over_one}
    click.echo(json.dumps(found | {"peak_rss_bytes": peak_rss_bytes()}, indent=1))


def seconds(checkpoint: Checkpoint, calibration: Artifact, iterations: int, out: Path) -> float:
    """Returns how long the stage took."""
    source = recipe.load("fp4-fp8-learned").source
    method = {"name": "fp_rounding", "iterations": iterations, "activation_iterations": 0, "output": False, "rows": 64}
    rules = [*source["rule"][:-1], source["rule"][-1] | {"method": method}]
    made = quantize(checkpoint, recipe.parse(f"{iterations}", {"rule": rules}), calibration, out)
    took = read_json(made.path / "timings.json")
    if took["resumed"]:
        raise SystemExit(f"{made.path}: was stopped and gone on with, so its time is not known: remove it")
    return float(took["seconds"])


if __name__ == "__main__":
    main()
