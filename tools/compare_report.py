"""Turns the cells of `compare_methods` into tables, claims and plots."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from scipy.stats import spearmanr

from engines.artifacts import Json, read_json

BEGIN, END = "<!-- compare_methods: begin -->", "<!-- compare_methods: end -->"
SHARED = ("model", "seed", "samples", "images", "torch", "diffusers")  # of requests: alike in one table
ORDER = ("rtn", "search", "learned", "uniform", "kmeans", "gptvq", "vq4dit", "min-max", "one-scale", "smoothquant")
ORDER += ("q-diffusion", "by-step", "dilated", "dilated-by-step", "distilled", "distilled-by-step")
ORDER += ("distilled-dilated", "dilatequant", "dilatequant-by-block")
NAMES = {
    "int8-int8": "INT8 / INT8",
    "fp8-fp8": "FP8 / FP8 (E4M3)",
    "int4-int8": "INT4 / INT8",
    "e2m1-fp8": "FP4 (E2M1) / FP8",
    "e1m2-fp8": "FP4 (E1M2, the integers) / FP8",
    "auto-fp8": "auto 4 bit / FP8",
    "any8-any8": "any 8-bit split / any",
    "any6-any6": "any 6-bit split / any",
    "any4-any4": "any 4-bit split / any",
    "vq2": "2-bit codebook (256 × 4) / float",
    "vq3": "3-bit codebook (64 × 2) / float",
    "vq2-fp8": "2-bit codebook (256 × 4) / FP8",
    "w8a8": "W8A8, attention INT8",
    "w4a8": "W4A8, attention INT8",
    "w4a4": "W4A4, attention INT8",
}
MARKERS = {
    "rtn": "o",
    "search": "s",
    "learned": "^",
    "peer": "x",
    "uniform": "o",
    "kmeans": "s",
    "gptvq": "D",
    "vq4dit": "^",
    "min-max": "o",
    "one-scale": "s",
    "smoothquant": "P",
    "q-diffusion": "D",
    "by-step": "<",
    "dilated": ">",
    "dilated-by-step": "v",
    "distilled": "X",
    "distilled-by-step": "8",
    "distilled-dilated": "p",
    "dilatequant": "^",
    "dilatequant-by-block": "d",
}


def write_report(results: Path, document: Path) -> None:
    """Writes the tables between the document's marks, and a plot of each model beside its cells."""
    models = sorted(folder for folder in results.iterdir() if folder.is_dir())
    parts = []
    for folder in models:
        found = read_cells(folder)
        parts.append(section(folder.name, found))
        plot(folder.name, found, folder / "psnr.png")
        if (grids := folder / "grids.json").exists():
            plot_grids(folder.name, read_json(grids), folder / "grids.png")
    put_between(document, BEGIN, END, "\n".join(parts))


def put_between(document: Path, begin: str, end: str, lines: str) -> None:
    """Replaces what stands between two marks of a document; a document that is not there is made of it."""
    text = document.read_text(encoding="utf-8") if document.exists() else f"{begin}\n{end}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise click.ClickException(f"{document}: has not one line {begin} and after it one {end}; write them")
    before, after = text.partition(begin)[0], text.partition(end)[2]
    document.write_text(f"{before}{begin}\n{lines}{end}{after}", encoding="utf-8")


def read_cells(folder: Path) -> dict[str, Json]:
    """Returns the cells of a model by name, `float` and `grids` among them."""
    found = {path.stem: read_json(path) for path in sorted(folder.glob("*.json"))}
    first = next(iter(found), None)
    for name, cell in found.items():
        for key in SHARED:
            ours, theirs = cell["request"].get(key), found[first]["request"].get(key)  # type: ignore[index]
            if (ours[0] if isinstance(ours, list) else ours) != (theirs[0] if isinstance(theirs, list) else theirs):
                raise click.ClickException(f"{folder}: {name} has {key} {ours}, {first} {theirs}: compute them alike")
    return found


def rows_of(found: Mapping[str, Json]) -> list[Json]:
    """Returns the cells that are rows, in the table's order, peers last."""
    rows = [cell for cell in found.values() if "cell" in cell]
    granularities, settings = ["channel", "tensor"], list(NAMES)

    def place(row: Json) -> tuple[int, ...]:
        cell = row["cell"]
        if cell["method"] not in ORDER:
            return (9, 0, 0)
        return granularities.index(cell["granularity"]), settings.index(cell["setting"]), ORDER.index(cell["method"])

    return sorted(rows, key=place)


def section(model: str, found: Mapping[str, Json]) -> str:
    """Returns a model's part of the document, in Markdown."""
    lines = [f"### {model}", "", *table(found), ""]
    lines += [f"![PSNR against bits per weight, {model}](methods/{model}/psnr.png)", ""]
    lines += [
        "**Held against the bars**, which were set before anything was measured:",
        "",
        *(f"- {claim}" for claim in claims(model, found)),
        "",
    ]
    if "grids" in found:
        lines += ["**Which grid suits which layer.**", "", *grid_lines(found["grids"])]
        lines += ["", f"![kurtosis against the float grid's gain, {model}](methods/{model}/grids.png)", ""]
    return "\n".join(lines) + "\n"


def table(found: Mapping[str, Json]) -> list[str]:
    head = [
        "weights / activations",
        "ranges",
        "method",
        "bits per weight",
        "PSNR, dB (95 %)",
        "task score lost, points (95 %)",
    ]
    head += ["Fréchet distance (95 %)", "SQNR per step, dB", "images", "minutes", "peak memory"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    if "float" in found:
        other, task = found["float"]["other_noise"], found["float"]["other_noise"]["task"]
        lines.append(
            f"| FP32, another noise | | | 32 | {interval(other['psnr_db'], 1)} | {interval(task['lost'], 2, 100)} | "
            f"{interval(other['frechet'], 3)} | | {other['images']} | | |"
        )
    lines += [f"| {' | '.join(cells_of(row))} |" for row in rows_of(found)]
    if "float" in found:
        lines += ["", f"{task['name']} of the float model: {100 * task['float']:.1f} %."]
    return lines


def cells_of(row: Json) -> list[str]:
    cell, minutes, peak = row["cell"], row.get("minutes"), row.get("peak_rss_bytes")
    simulated = "" if row.get("deployable", True) else " (simulated)"
    return [
        NAMES.get(cell["setting"], cell["setting"]) + simulated,
        cell["granularity"],
        cell["method"],
        f"{row['bits_per_weight']:.2f}" if row.get("bits_per_weight") else "",
        interval(row["psnr_db"], 1),
        interval(row["task"]["lost"], 2, 100),
        interval(row["frechet"], 3),
        f"{row['step_sqnr_db']:.1f}" if row.get("step_sqnr_db") else "",
        str(row["images"]),
        f"{minutes:.1f}" if minutes else "",
        f"{peak / 1e9:.1f} GB" if peak else "",
    ]


def interval(score: Json, digits: int, factor: float = 1.0) -> str:
    value, (low, high) = factor * score["value"], (factor * end for end in score["ci95"])
    return f"{value:.{digits}f} ({low:.{digits}f} … {high:.{digits}f})"


def claims(model: str, found: Mapping[str, Json]) -> list[str]:
    """Returns what the project asks of its methods, each line with its figures and whether it holds."""
    told = []
    for granularity in ("channel", "tensor"):
        cells = {
            name.removesuffix(f".{granularity}.{m}") + f" {m}": cell
            for m in ORDER
            for name, cell in found.items()
            if name.endswith(f".{granularity}.{m}")
        }
        told += [f"{text} ({granularity} ranges)" for text in _claims(cells)]
    told += [line for setting in BARS for line in _codebook_claims(found, setting)]
    return told + [line for setting in ("w8a8", "w4a8", "w4a4") for line in _dilate_claims(model, found, setting)]


# What the issue of DilateQuant asks of it: PSNR, dB.
DILATE_BARS = {("digits-dit", "w4a8"): 38.0, ("digits-dit", "w4a4"): 30.0}


def _dilate_claims(model: str, found: Mapping[str, Json], setting: str) -> list[str]:
    """Returns how DilateQuant does against each other way, and what its parts alone add."""
    prefix = f"{setting}.channel."
    rows = {name.removeprefix(prefix): cell["psnr_db"] for name, cell in found.items() if name.startswith(prefix)}
    ours = rows.pop("dilatequant", None)
    if ours is None:
        return []
    best = max(rows, key=lambda name: rows[name]["value"], default=None)
    told = []
    if (bar := DILATE_BARS.get((model, setting))) is not None:
        low = ours["ci95"][0]
        told.append(f"{holds(low >= bar)}: {setting} dilatequant: {low:.1f} dB PSNR at least (bar {bar:g})")
    if best is not None:
        ahead, intervals = ours["value"] - rows[best]["value"], apart(ours, rows[best])
        told.append(
            f"{holds(ahead >= 0 or intervals == 'overlap')}: {setting} dilatequant {ours['value']:.1f} dB, best or "
            f"within its interval of best ({best}, {ahead:+.2f} dB, the intervals {intervals})"
        )
    if "one-scale" in rows:
        start = rows["one-scale"]
        told += [
            f"{setting} {name} against one scale: {rows[name]['value'] - start['value']:+.2f} dB, the intervals "
            f"{apart(rows[name], start)}"
            for name in ("by-step", "dilated", "dilated-by-step", "distilled")
            if name in rows
        ]
    if (name := "dilatequant-by-block") in rows:
        ahead, intervals = ours["value"] - rows[name]["value"], apart(ours, rows[name])
        told.append(
            f"{setting} dilatequant, all blocks jointly, against {name}: {ahead:+.2f} dB, the intervals {intervals}"
        )
    if "distilled" in rows:
        start = rows["distilled"]
        told += [
            f"{setting} {name} against distilled alone: {rows[name]['value'] - start['value']:+.2f} dB, the intervals "
            f"{apart(rows[name], start)}"
            for name in ("distilled-by-step", "distilled-dilated")
            if name in rows
        ]
    return told


# What the issue of codebooks asks of VQ4DiT: PSNR, dB, and gain over k-means, dB; task score lost, points.
BARS = {"vq2": (28.0, 9.0), "vq3": (32.0, 6.0)}
LOST = 1.0


def _codebook_claims(found: Mapping[str, Json], setting: str) -> list[str]:
    """Returns how VQ4DiT does against the other codebooks of as many bits, each by the better of its granularities."""
    best: dict[str, Json] = {}
    for method in ORDER:
        rows = [cell for name, cell in found.items() if name.startswith(f"{setting}.") and name.endswith(f".{method}")]
        if rows:
            best[method] = max(rows, key=lambda row: row["psnr_db"]["value"])
    if not {"kmeans", "vq4dit"} <= best.keys():
        return []
    ours, (least, gain) = best.pop("vq4dit"), BARS[setting]
    psnr, lost = ours["psnr_db"], 100 * ours["task"]["lost"]["ci95"][1]
    told = [
        f"{holds(psnr['ci95'][0] >= least)}: {setting} vq4dit: {psnr['ci95'][0]:.1f} dB PSNR at least (bar {least:g})",
        f"{holds(lost <= LOST)}: {setting} vq4dit loses at most {lost:.2f} points of the task score (bar {LOST:g})",
    ]
    for method, row in best.items():
        bits = ours["bits_per_weight"] - row["bits_per_weight"]
        apart_in = [name for name in ("psnr_db", "frechet") if apart(ours[name], row[name]) == "apart"]
        ahead = psnr["value"] - row["psnr_db"]["value"]
        bar = gain if method == "kmeans" else 0.0
        held = ahead >= bar and len(apart_in) == 2 and ours["frechet"]["value"] < row["frechet"]["value"]
        told.append(
            f"{holds(held and abs(bits) <= 0.1)}: {setting} vq4dit against {method}: {ahead:+.2f} dB PSNR "
            f"(bar {bar:g}), Fréchet distance {ours['frechet']['value']:.3f} against {row['frechet']['value']:.3f}, "
            f"intervals apart in {' and '.join(apart_in) or 'neither'}, {bits:+.2f} bits per weight"
        )
    return told


def _claims(cells: Mapping[str, Json]) -> list[str]:
    told = []
    worst, ours = cells.get("int4-int8 rtn"), cells.get("fp8-fp8 learned")
    if worst and ours:
        worst, ours = worst.get("many", worst), ours.get("many", ours)
        lost, other = (100 * cell["task"]["lost"]["ci95"][1] for cell in (ours, worst))
        ratio = ours["frechet"]["value"] / worst["frechet"]["value"]
        detected = worst["frechet"]["ci95"][0] > ours["frechet"]["ci95"][1]
        told.append(
            f"{holds(lost <= 1 and ratio <= 0.1)}: FP8/FP8 learned loses at most {lost:.2f} points of the task score "
            f"(upper 95 % bound; bar 1), its Fréchet distance is {100 * ratio:.1f} % of INT4/INT8 round-to-nearest's "
            f"(bar 10 %), {ours['images']} images"
        )
        told.append(
            f"{holds(detected)}: the same test detects INT4/INT8 round-to-nearest: the Fréchet intervals are "
            f"{'apart' if detected else 'not apart'}; it loses at most {other:.2f} points"
        )
    told += [
        _gain(cells, "auto-fp8 learned", "e2m1-fp8 rtn", 2.0),
        _gain(cells, "e2m1-fp8 learned", "e2m1-fp8 rtn", 2.0),
        _gain(cells, "auto-fp8 learned", "int4-int8 rtn", 0.0),
        _gain(cells, "auto-fp8 search", "e2m1-fp8 search", 0.0),
        _gain(cells, "auto-fp8 search", "e1m2-fp8 search", 0.0),
    ]
    for method in ("rtn", "search", "learned"):
        for eight in (True, False):
            fp, integer = ("fp8-fp8", "int8-int8") if eight else ("e2m1-fp8", "int4-int8")
            told.append(_against(cells, f"{fp} {method}", f"{integer} {method}"))
    return [line for line in told if line]


def _gain(cells: Mapping[str, Json], ours: str, theirs: str, bar: float) -> str:
    if ours not in cells or theirs not in cells:
        return ""
    a, b = cells[ours]["psnr_db"], cells[theirs]["psnr_db"]
    gain = a["value"] - b["value"]
    told = holds(gain >= bar and (bar == 0 or apart(a, b) == "apart"))
    return f"{told}: {ours} against {theirs}: {gain:+.2f} dB PSNR (bar {bar:g}), the intervals {apart(a, b)}"


def _against(cells: Mapping[str, Json], fp: str, integer: str) -> str:
    if fp not in cells or integer not in cells:
        return ""
    a, b = cells[fp]["psnr_db"], cells[integer]["psnr_db"]
    who = "floating point" if a["value"] > b["value"] else "integers"
    return f"{fp} against {integer}: {a['value'] - b['value']:+.2f} dB PSNR, {who} ahead, the intervals {apart(a, b)}"


def holds(value: bool) -> str:
    return "holds" if value else "**does not hold**"


def apart(a: Json, b: Json) -> str:
    separate = a["ci95"][0] > b["ci95"][1] or b["ci95"][0] > a["ci95"][1]
    return "apart" if separate else "overlap"


def advantages(grids: Json, granularity: str) -> list[tuple[float, float]]:
    """Returns per layer the kurtosis of its weight and what E2M1 has over the integers −7 … 7, dB."""
    rows = measured(grids)
    errors = [row["weight_db"][granularity] for row in rows]
    return [(row["kurtosis"][granularity], e["e2m1"] - e["e1m2"]) for row, e in zip(rows, errors, strict=True)]


def measured(grids: Json) -> list[Json]:
    """Returns the layers that have a figure of everything: not those in groups, nor such as hold or read only zeros."""
    whole = [row for row in grids["layers"] if "weight_db" in row and None not in row["kurtosis"].values()]
    figures = [
        (row, [*row["input_db"].values(), *(e for g in row["weight_db"].values() for e in g.values())]) for row in whole
    ]
    return [row for row, values in figures if None not in values]


def grid_lines(grids: Json) -> list[str]:
    """Returns on how many layers each 4-bit grid wins, and how that goes with the tails."""
    lines = []
    for granularity in ("channel", "tensor"):
        rows = measured(grids)
        winners: dict[str, list[float]] = {}
        for row in rows:
            errors = {name: row["weight_db"][granularity][name] for name in ("e1m2", "e2m1", "e3m0")}
            winners.setdefault(max(errors, key=lambda name: errors[name]), []).append(row["kurtosis"][granularity])
        won = ", ".join(
            f"{name.upper()} in {len(k)} (median kurtosis {statistics.median(k):.1f})"
            for name, k in sorted(winners.items())
        )
        pairs = advantages(grids, granularity)
        rank = spearmanr([k for k, _ in pairs], [gain for _, gain in pairs])
        gains = sorted(gain for _, gain in pairs)
        spread = (
            f"{gains[0]:+.2f} … {gains[-1]:+.2f} dB over the integers −7 … 7 (median {statistics.median(gains):+.2f})"
        )
        lines.append(
            f"- 4-bit weights, {granularity} ranges, by the output's error, {len(rows)} layers: {won}. "
            f"E2M1 has {spread}; rank correlation with the kurtosis {rank.statistic:.2f} (p = {rank.pvalue:.1g})"
        )
    inputs = measured(grids)
    gains = [row["input_db"]["e4m3"] - row["input_db"]["int8"] for row in inputs]
    rank = spearmanr([row["input_kurtosis"] for row in inputs], gains)
    lines.append(
        f"- 8-bit inputs, one static range: E4M3 ahead of INT8 in {sum(g > 0 for g in gains)} of {len(inputs)} layers, "
        f"{min(gains):+.1f} … {max(gains):+.1f} dB (median {statistics.median(gains):+.1f}); rank correlation with the "
        f"kurtosis {rank.statistic:.2f} (p = {rank.pvalue:.1g})"
    )
    best = sorted(
        ((row, row["weight_db"]["channel"]) for row in measured(grids)),
        key=lambda r: r[1]["e2m1"] - r[1]["e1m2"],
    )
    lines += [
        "",
        "| layer | kurtosis: weight, its channels, input | E2M1 over integers, dB: channel, tensor | "
        "E4M3 over INT8, input, dB |",
        "|---|---|---|---|",
    ]
    shown = best if len(best) <= 12 else [*best[:6], *best[-6:]]
    for row, errors in shown:
        whole = row["weight_db"]["tensor"]
        tails = f"{row['kurtosis']['tensor']:.1f}, {row['kurtosis']['channel']:.1f}, {row['input_kurtosis']:.1f}"
        gained = f"{errors['e2m1'] - errors['e1m2']:+.2f}, {whole['e2m1'] - whole['e1m2']:+.2f}"
        inputs_gained = f"{row['input_db']['e4m3'] - row['input_db']['int8']:+.1f}"
        lines.append(f"| `{row['layer']}` | {tails} | {gained} | {inputs_gained} |")
    lines += ["", f"(The {len(shown)} layers at the two ends; all are in `grids.json`.)"]
    return lines


def plot(model: str, found: Mapping[str, Json], path: Path) -> None:
    """Draws PSNR over bits per weight, a mark for each method, with 95 % intervals."""
    figure, axes = _figure()
    colours: dict[str, str] = {}
    for row in rows_of(found):
        cell = row["cell"]
        if not row.get("bits_per_weight"):
            continue
        label = NAMES.get(cell["setting"], cell["setting"])
        colour = colours.setdefault(label, f"C{len(colours) % 10}")
        low, high = row["psnr_db"]["ci95"]
        value, bits = row["psnr_db"]["value"], row["bits_per_weight"]
        filled = colour if cell["granularity"] == "channel" else "none"
        axes.errorbar(
            bits, value, yerr=[[value - low], [high - value]], marker=MARKERS.get(cell["method"], "x"), color=colour,
            markerfacecolor=filled, label=f"{label}, {cell['granularity']}, {cell['method']}", linestyle="none",
        )  # fmt: skip
    axes.set(
        title=f"{model}: images against the float model's, same noise", xlabel="bits per weight", ylabel="PSNR, dB"
    )
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def plot_grids(model: str, grids: Json, path: Path) -> None:
    """Draws what the float grid has over the integer grid against the kurtosis, a point for each layer."""
    figure, axes = _figure()
    for granularity, marker in (("channel", "o"), ("tensor", "x")):
        pairs = advantages(grids, granularity)
        axes.plot([k for k, _ in pairs], [gain for _, gain in pairs], marker, label=f"{granularity} ranges")
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.set(
        title=f"{model}: 4-bit weights, error of each layer's output", xlabel="kurtosis of the weight (3: normal)",
        ylabel="E2M1 over integers −7 … 7, dB", xscale="log",
    )  # fmt: skip
    axes.legend()
    _save(figure, path)


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot.subplots(figsize=(9, 5))


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=100, bbox_inches="tight", metadata={"Software": None})
    figure.clear()
