"""What a person sees of a report: the table on the terminal and samples.png."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from engines.artifacts import Json, replacing
from exporter import audits, progress
from exporter.page_tables import comparable

if TYPE_CHECKING:
    from rich.table import Table

NOISY = 2  # p95 over p50: a choice; on an idle machine the two lie within half of each other
PICTURES = 20  # columns of samples.png


def draw_samples(reference: torch.Tensor, other: torch.Tensor, name: str, path: Path, in_pixels: bool) -> None:
    """Draws the first float samples above the quantized ones, and their difference, ten times as strong.

    Latents, which are no pictures, are drawn in grey: their first channel, all in units of the float one's largest.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(PICTURES, len(reference))
    rows = (("float", reference, 1.0), (f"quantized ({name})", other, 1.0), ("difference ×10", other - reference, 10.0))
    figure = Figure(figsize=(0.6 * count + 1.6, 2.4), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (label, images, gain) in enumerate(rows):
        for column in range(count):
            axis = axes[row][column]
            unit = 1.0 if in_pixels else float(reference[column].abs().amax().clamp(min=1e-6))
            axis.imshow(drawable(gain / unit * images[column]), cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    with replacing(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary), metadata={"Software": None})


def drawable(image: torch.Tensor) -> torch.Tensor:
    """Returns [h, w] or [h, w, 3] in 0 … 1, of values in [−1, 1]: colours as they are, else the first channel."""
    image = ((image.float().nan_to_num() + 1) / 2).clamp(0, 1)
    if image.ndim == 2:  # a row per token
        return image
    return image.permute(1, 2, 0) if len(image) == 3 else image[0]


def print_report(report: Json) -> None:
    """Prints the report as a table and a few lines on stdout."""
    console = progress.stdout()
    weights, model = report["weights"], report["model"]
    console.print(
        f"\n[bold]{model['name']}[/], recipe [bold]{report['recipe']['name']}[/]: {model['parameters']:,} parameters, "
        f"{weights['quantized_layers']} layers quantized, {weights['kept_layers']} kept, {_mb(weights['bytes'])} MB "
        f"({weights['bytes'] / model['float_weight_bytes']:.2f} × fp16)",
        soft_wrap=True,
    )
    for line in method_lines(report["recipe"]["methods"], report["training"]):
        console.print(line, soft_wrap=True)
    if "activations" in report:  # one of an earlier version may be kept
        console.print(activations_line(report["activations"]), soft_wrap=True)
    console.print(_table(report))
    for engine in report["engines"]:
        if "audit" in engine:
            console.print(f"{engine['backend']} runs {'; '.join(audits.summary(engine['audit']))}", soft_wrap=True)
    console.print(_images_table(report["accuracy"]["images"]))
    if line := _images_line(report["accuracy"]["images"]):
        console.print(line)
    excused = Counter(check["detail"] for check in report["checks"] if check["passed"] and check.get("detail"))
    for detail, count in excused.items():
        console.print(f"{count} under the floor, and let pass: {detail}", soft_wrap=True)
    for check in report["checks"]:
        if not check["passed"]:
            value = "no number" if check["value"] is None else f"{check['value']:.4g}"
            told = f"; {check['detail']}" if check.get("detail") else ""
            console.print(f"[red]failed[/] {check['name']}: {value} {check['unit']}, limit {check['limit']}{told}")
    times = report.get("throughput", [])
    noisy = [f"{r['runner']} at batch {r['batch']}" for r in times if r["ms_p95"] > NOISY * r["ms_p50"]]
    if noisy:
        console.print(
            f"times of {', '.join(noisy)} are noisy (p95 over {NOISY} × p50: was the machine busy?); "
            "`export-engine bench DIR` takes them anew, and prints them",
            soft_wrap=True,
        )
    passed = sum(check["passed"] for check in report["checks"])
    console.print(f"checks: {passed} of {len(report['checks'])} passed")


def method_lines(methods: Sequence[Json], training: Mapping[str, Json]) -> list[str]:
    """Returns what quantized the weights, and what training came to where there was any."""
    found = [", ".join(f"{one['name']} ({one['layers']} layers)" for one in methods)]
    for phase in dict.fromkeys(name for record in training.values() for name in record):
        rows = [record[phase] for record in training.values() if phase in record]
        before, after = (_mean([row[f"error_{when}"] for row in rows]) for when in ("before", "after"))
        kept = sum(row["kept"] for row in rows)
        found.append(
            f"training of {phase}: relative error {before} → {after} on trajectories kept apart, "
            f"kept in {kept} of {len(rows)}"
        )
        if least := sum(row.get("scales_at_the_least", 0) for row in rows):
            found[-1] += f"; {least} scales of activations ended at the least there is"
    return found


def _mean(errors: Sequence[float | None]) -> str:
    finite = [error for error in errors if error is not None]
    return f"{sum(finite) / len(finite):.3g}" if len(finite) == len(errors) else "not finite"


def activations_line(counts: Mapping[str, Mapping[str, int]]) -> str:
    """Returns how activations are quantized: in layers, and in attentions' products."""
    told = [f"{kind} ({count} layers)" for kind, count in counts["layers"].items()]
    told += [f"{kind} ({count} points of attentions)" for kind, count in counts["attention_points"].items()]
    return f"activations: {', '.join(told) or 'float'}"


def _table(report: Json) -> Table:
    from rich.table import Table

    rows = report.get("throughput", [])
    batch = rows[0]["batch"] if rows else 0
    speed = {row["runner"]: row for row in rows if row["batch"] == batch}
    base = speed.get("float")
    table = Table(title=f"lowering: engine against PyTorch, median over steps; time: one call, batch {batch}")
    for header in ("runner", "weights", "lowering", "floor", "ms p50", "ms p95", "speed"):
        table.add_column(header, justify="left" if header == "runner" else "right")
    for name in ("float", "quantized"):
        table.add_row(f"PyTorch {name}", "", "", "", *_speed(speed.get(name), base))
    for engine in report["engines"]:
        lowering = [r for r in report["accuracy"]["lowering"] if r["backend"] == engine["backend"]]
        table.add_row(
            " ".join(filter(None, (engine["backend"], engine["dtype"], engine["gpu"]))),
            _weights(engine),
            _median_db([row["sqnr_db"] for row in lowering]) if lowering else "not run",
            _median_db([row["floor_db"] for row in lowering]) if lowering else "",
            *_speed(speed.get(engine["backend"]), base),
        )
    return table


def _images_table(images: Json) -> Table:
    from rich.table import Table

    table = Table(title=f"{images['n']} images by {images['runner']} against float, same noise")
    for header in ("score", "value", "95 %", "two float runs"):
        table.add_column(header, justify="left" if header == "score" else "right")

    def row(name: str, entry: Json, digits: int, unit: str = "") -> None:
        value = entry["mean"] if "mean" in entry else entry["value"]
        low, high, floor = (f"{v:.{digits}f}" for v in (*entry["ci95"], entry["noise_floor"]))
        table.add_row(name, f"{value:.{digits}f}{unit}", f"{low} … {high}", floor)

    row("PSNR", images["psnr_db"], 1, " dB")
    row("SSIM", images["ssim"], 4)
    row("cosine", images["cosine"], 4)
    for name, entry in images.get("sets", {}).items():
        row(name.replace("_", " ").replace("frechet", "Fréchet"), entry, 3)
    if score := images["task_score"]:
        percent = {k: [100 * x for x in v] if isinstance(v, list) else 100 * v for k, v in score["lost"].items()}
        row(f"{score['name']} lost, points", percent, 2)
    return table


def _images_line(images: Json) -> str:
    score = images["task_score"]
    return f"{score['name']}: {100 * score['quantized']:.1f}%, float {100 * score['float']:.1f}%" if score else ""


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _weights(engine: Json) -> str:
    """Returns the bytes of an engine's weights as stored, and in memory where opening it expands them."""
    stored, resident = engine["weight_bytes"], engine["resident_weight_bytes"]
    held = f", {_mb(resident)} in memory" if resident > stored else ""
    return f"{_mb(stored)} MB{held}"


def _median_db(values: Sequence[float | None]) -> str:
    """Returns the median over steps; None, two equal tensors, counts as infinite."""
    return f"{median(float('inf') if value is None else value for value in values):.1f} dB"


def _speed(row: Json | None, base: Json | None) -> tuple[str, str, str]:
    if row is None:
        return "", "", ""
    against = comparable(base, row)
    ratio = f"{against['ms_p50'] / row['ms_p50']:.2f}×" if against else ""
    return f"{row['ms_p50']:.1f}", f"{row['ms_p95']:.1f}", ratio
