"""`preflight`'s report as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from engines.artifacts import Json
from exporter.doctor import library_table

if TYPE_CHECKING:
    from rich.console import RenderableType

SHOWN = 12  # kept layers, the ones that compute most; --json lists all
OK = "ok"  # a library's state
GPU = "{gpu}"  # in a sentence, the place of a GPU's name


def tables(report: Json) -> Iterator[RenderableType]:
    """Yields tables and lines, in the order of the questions that they answer."""
    model = report["model"]
    yield f"{model['name']}: {model['class']}, {model['parameters']:,} parameters; recipe {report['recipe']['name']}"
    yield from _formats(report["formats"])
    yield from _proofs(report["proofs"], report["not_proved"])
    yield _kept(report["kept"])
    yield _bytes(report["bytes"])
    yield from _stages(report)
    yield from _versions(report["versions"])


def _formats(rows: Sequence[Json]) -> Iterator[RenderableType]:
    from rich.table import Table

    gpus = [(name, gpu) for name, known in (rows[0]["gpus"] if rows else {}).items() for gpu in known]
    table = Table("layers", "weights", "activations", "count", *(gpu for _, gpu in gpus), title="formats and GPUs")
    for row in rows:
        able = ["no" if row["gpus"][name][gpu] else "yes" for name, gpu in gpus]
        table.add_row(row["what"], row["weight"], row["activation"], str(row["layers"]), *able)
    yield table
    for row in rows:
        for known in row["gpus"].values():
            yield from _refusals(known)


def _refusals(known: Mapping[str, str | None]) -> Iterator[str]:
    """Yields why GPUs cannot run a kind of layer: what is said of each alike is said once."""
    alike: dict[str, list[str]] = {}
    for gpu, reason in known.items():
        if reason:
            alike.setdefault(reason.replace(gpu, GPU), []).append(gpu)
    for reason, gpus in alike.items():
        yield reason.replace(GPU, ", ".join(gpus))


def _proofs(rows: Sequence[Json], left_out: Sequence[str]) -> Iterator[str]:
    for row in rows:
        kernels = ", ".join(row["kernels"]) or "no kernel of its own"
        yield f"built for {row['gpu']} ({row['backend']}): {row['kind']} → {kernels}"
    yield from left_out


def _kept(kept: Json) -> RenderableType:
    from rich.table import Table

    title = (
        f"left in float: {kept['share_of_weights']:.1%} of the layers' weights, {kept['share_of_macs']:.1%} of "
        f"{kept['macs'] / 1e9:,.2f} G multiply-accumulates (one row)"
    )
    table = Table("layer", "weights", "of all", "multiply-accumulates", "of all", title=title)
    rows = sorted(kept["layers"], key=lambda row: row["macs"], reverse=True)
    for row in rows[:SHOWN]:
        table.add_row(
            row["layer"], f"{row['weights']:,}", f"{row['share_of_weights']:.2%}", f"{row['macs']:,}",
            f"{row['share_of_macs']:.2%}",
        )  # fmt: skip
    if rest := rows[SHOWN:]:
        shares = (f"{sum(row[key] for row in rest):.2%}" for key in ("share_of_weights", "share_of_macs"))
        table.add_row(f"{len(rest)} more", "", next(shares), "", next(shares))
    return table


def _bytes(sizes: Json) -> RenderableType:
    from rich.table import Table

    table = Table("what", "bytes", "of fp16", title="sizes")
    bits = f" ({sizes['bits_per_weight']:.3g} bits to a quantized weight)" if sizes["bits_per_weight"] else ""
    rows = {"checkpoint as fp16": sizes["float_fp16"], f"quantized model{bits}": sizes["quantized"]}
    for dtype, graph in sizes["graphs"].items():
        rows |= {f"{dtype} graph, weights": graph["weights"], f"{dtype} graph, files": graph["files"]}
    rows |= {f"{name} engine, constants": size for name, size in sizes["engines"].items()}
    for name, size in rows.items():
        table.add_row(name, f"{size:,}", f"{size / sizes['float_fp16']:.2f}")
    return table


def _stages(report: Json) -> Iterator[RenderableType]:
    from rich.table import Table

    table = Table("stage", "peak memory", "of that", "time", "on disk", title="what the stages take, each by itself")
    for row in report["stages"]:
        most = max(row["held"], key=lambda name: row["held"][name])
        table.add_row(
            row["stage"], f"{row['peak_rss_bytes'] / 1e9:.2f} GB", f"{most} {row['held'][most] / 1e9:.2f}",
            _spelled(row["seconds"]), f"{row['disk_bytes'] / 1e6:,.0f} MB",
        )  # fmt: skip
    yield table
    peak, there = max(row["peak_rss_bytes"] for row in report["stages"]), report["memory_bytes"]
    if there and peak > there:
        yield f"this machine has {there / 1e9:.1f} GB of memory: the run wants {peak / 1e9:.1f}"
    disk = report["disk"]
    free = "" if disk["free_bytes"] is None else f", {disk['free_bytes'] / 1e9:,.1f} GB are free there"
    yield f"disk: {disk['needed_bytes'] / 1e9:,.2f} GB{free}; times are those of {report['rates']['machine']}"


def _spelled(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _versions(rows: Sequence[Json]) -> Iterator[RenderableType]:
    others = [row for row in rows if row["state"] != OK and (row["extra"] is None or row["found"])]
    needed = sum(row["extra"] is None for row in rows)
    if others:
        yield library_table(others)
    else:
        yield f"libraries: all {needed} are the tested versions"
