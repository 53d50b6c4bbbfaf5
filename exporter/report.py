"""What a person sees of a report: the table on the terminal and samples.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from engines.artifacts import Json, writing_errors

PICTURES = 20  # columns of samples.png


def draw_samples(reference: torch.Tensor, other: torch.Tensor, name: str, path: Path) -> None:
    """Draws the first float samples above the quantized ones, and their difference, ten times as strong."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    count = min(PICTURES, len(reference))
    rows = (("float", reference, 1.0), (f"quantized ({name})", other, 1.0), ("difference ×10", other - reference, 10.0))
    figure = Figure(figsize=(0.6 * count + 1.6, 2.4), layout="constrained")
    axes = figure.subplots(len(rows), count, squeeze=False)
    for row, (label, images, gain) in enumerate(rows):
        for column in range(count):
            axis = axes[row][column]
            axis.imshow(
                images[column, 0].clamp(-1, 1) if gain == 1 else (gain * images[column, 0]).clamp(-1, 1),
                cmap="gray",
                vmin=-1,
                vmax=1,
            )
            axis.set_xticks([])
            axis.set_yticks([])
        axes[row][0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    with writing_errors(path):
        FigureCanvasAgg(figure).print_png(str(path), metadata={"Software": None})


def print_report(report: Json) -> None:
    """Prints the report as tables on stdout."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    weights, model = report["weights"], report["model"]
    ratio = weights["bytes"] / model["float_weight_bytes"]
    console.print(
        f"\n[bold]{model['name']}[/] · recipe [bold]{report['recipe']['name']}[/] · "
        f"{model['parameters']:,} parameters · "
        f"{weights['quantized_layers']} layers quantized, {weights['kept_layers']} kept · "
        f"{_mb(weights['bytes'])} MB, {ratio:.2f} × fp16",
        highlight=False,
    )
    table = Table(
        "engine", "type", "GPU", "weights MB", "file MB", "lowering dB", "floor dB", "ms p50", "ms p95", "× PyTorch"
    )
    speed = {
        row["runner"]: row for row in report.get("throughput", []) if row["batch"] == report["throughput"][0]["batch"]
    }
    base = speed.get("float", {}).get("ms_p50")
    for name in ("float", "quantized"):
        if name in speed:
            table.add_row(f"PyTorch {name}", "fp32", "–", "", "", "", "", *_speed(speed[name], base))
    for engine in report["engines"]:
        rows = [r for r in report["accuracy"]["lowering"] if r["backend"] == engine["backend"]]
        timed = _speed(speed[engine["backend"]], base) if engine["backend"] in speed else ("not run here", "", "")
        table.add_row(
            engine["backend"], engine["dtype"], engine["gpu"] or "–", _mb(engine["weight_bytes"]), _mb(engine["bytes"]),
            _db([r["sqnr_db"] for r in rows]), _db([r["floor_db"] for r in rows]), *timed,
        )  # fmt: skip
    console.print(table)
    images = report["accuracy"]["images"]
    psnr, score = images["psnr_db"], images["task_score"]
    console.print(
        f"images ({images['runner']}, n = {images['n']}, same noise as float): "
        f"PSNR {psnr['mean']:.1f} dB, 95 % [{psnr['ci95'][0]:.1f}, {psnr['ci95'][1]:.1f}]"
        + (f" · class accuracy {score['quantized']:.3f}, float {score['float']:.3f}" if score else ""),
        highlight=False,
    )
    for check in report["checks"]:
        if not check["passed"]:
            value = "no number" if check["value"] is None else f"{check['value']:.4g}"
            console.print(f"[red]failed[/] {check['name']}: {value} {check['unit']}, limit {check['limit']}")
    passed = sum(check["passed"] for check in report["checks"])
    console.print(f"checks: {passed} of {len(report['checks'])} passed", highlight=False)


def _mb(count: float) -> str:
    return f"{count / 1e6:.2f}"


def _db(values: Sequence[float | None]) -> str:
    """The median over steps; an infinite value (equal) is None."""
    if not values:
        return ""
    middle = median(float("inf") if v is None else v for v in values)
    return f"{middle:.1f}"


def _speed(row: Json, base: float | None) -> tuple[str, str, str]:
    ratio = f"{base / row['ms_p50']:.2f}" if base else ""
    return f"{row['ms_p50']:.1f}", f"{row['ms_p95']:.1f}", ratio
