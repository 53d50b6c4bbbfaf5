"""Measures what codebook weights take in the file and in TensorRT-RTX's engine: a DiT of width 768, random weights.

    python tools/measure_codebook_compression.py --out out/vq-size

For 2 and 3 bits, and 2 bits beside FP8 activations, it makes models of 4 and of 12 blocks by one iteration of k-means
(sizes do not depend on the codes) and prints JSON: bits per weight of the codebook layers, the constants in the
compiled plan over the graph's, the engine's growth over that of the codes, and the types that matmuls read. Exits with
3 if one is beyond its limit. Engines are built for sm89; nothing runs.
"""

import json
from pathlib import Path

import click
from bench_wide_dit import CONFIG

from engines.build import build
from engines.plans import read_plan
from exporter import recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.lower import lower
from exporter.quantize import quantize

FP8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3}
CASES = {"2 bits": (4, 256, None), "3 bits": (2, 64, None), "2 bits, FP8": (4, 256, FP8)}
# The project's bars: bits per weight at width 768, constants of the plan over the file's, growth over the codes'.
LIMITS = {"bits_per_weight": {"2 bits": 2.1, "3 bits": 3.1, "2 bits, FP8": 2.1}, "constants": 1.03, "growth": 0.1}


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--width", default=768, show_default=True)
@click.option("--blocks", type=(int, int), default=(4, 12), show_default=True)
def main(out: Path, width: int, blocks: tuple[int, int]) -> None:
    rows = []
    for name, case in CASES.items():
        made = [measured(out, width, count, *case) for count in blocks]
        few, more = made
        codes = more["codes_bytes"] - few["codes_bytes"]
        row = {"case": name, "width": width, "blocks": list(blocks), "models": made}
        row["growth_over_codes"] = round((more["codebook_constants"] - few["codebook_constants"]) / codes, 4)
        row["engine_growth_over_weights"] = round(
            (more["engine_bytes"] - few["engine_bytes"]) / (more["weight_bytes"] - few["weight_bytes"]), 4
        )
        row["passed"] = (
            all(one["bits_per_weight"] <= LIMITS["bits_per_weight"][name] for one in made)
            and all(one["constants_over_graph"] <= LIMITS["constants"] for one in made)
            and abs(row["growth_over_codes"] - 1) <= LIMITS["growth"]
            and (case[2] is None or all(one["matmul_inputs"] == ["fp8"] for one in made))
        )
        rows.append(row)
        click.echo(f"{name}: {'passed' if row['passed'] else 'NOT passed'}", err=True)
    click.echo(json.dumps(rows, indent=1))
    if not all(row["passed"] for row in rows):
        raise SystemExit(3)


def measured(out: Path, width: int, blocks: int, vector_size: int, codebook_size: int, activation: dict | None) -> dict:
    """Makes one model and its engine; returns what they take, in bytes."""
    model = out / f"model-{blocks}"
    model.mkdir(parents=True, exist_ok=True)
    size = {"num_attention_heads": width // 64, "num_layers": blocks, "sample_size": 16}
    (model / "config.json").write_text(json.dumps(CONFIG | size))
    checkpoint = open_checkpoint(f"random:{model}", steps=1)
    calibration = calibrate(checkpoint, out / f"calibration-{blocks}", samples=1)
    folder = out / f"{blocks}-{vector_size}-{'fp8' if activation else 'float'}"
    source = quantize(checkpoint, rules(vector_size, codebook_size, activation), calibration, folder / "quantized")
    graph = lower(source, folder / "graph", dtype="fp16")
    engine = build(graph, "trt-rtx", folder / "engine", gpu="sm89")
    plan = read_plan(engine)
    layers = [path for path, layer in source.info["layers"].items() if layer["weight"]["format"] == "codebook"]
    decoders = [row for row in plan if any(node.partition("/Codebook")[0] in layers for node in row.onnx_nodes)]
    matmuls = [row for row in plan if row.kind == "gemm" and named(row.onnx_nodes, layers)]
    stored = source.info["weights"]["by_format"]["codebook"]
    books = len(layers) * 2 * vector_size * codebook_size
    return {
        "blocks": blocks,
        "layers": len(layers),
        "bits_per_weight": round(stored["bits_per_weight"], 4),
        "codes_bytes": stored["bytes"] - books,
        "weight_bytes": graph.info["weight_bytes"],
        "engine_bytes": engine.file("engine.plan").stat().st_size,
        "constants_over_graph": round(engine.info["weight_bytes"] / graph.info["weight_bytes"], 4),
        "codebook_constants": sum(row.constant_bytes for row in decoders),
        "matmul_inputs": sorted({kind for row in matmuls for kind in row.input_types}),
    }


def named(nodes: tuple[str, ...], layers: list[str]) -> bool:
    return any(node.rpartition("/")[0] in layers for node in nodes)


def rules(vector_size: int, codebook_size: int, activation: dict | None) -> recipe.Recipe:
    weight = {"format": "codebook", "vector_size": vector_size, "codebook_size": codebook_size}
    rule = {"layers": "*", "weight": weight, "method": {"name": "kmeans", "importance": False, "iterations": 1}}
    rule |= {"activation": activation} if activation else {}
    kept = [{"layers": "*", "scope": "outside_blocks", "keep": "float"}, {"layers": "*.norm1.emb.*", "keep": "float"}]
    return recipe.parse("kmeans", {"calibration": {"samples": 1}, "rule": [*kept, rule]})


if __name__ == "__main__":
    main()
