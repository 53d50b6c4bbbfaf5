"""Finds 2-bit codebooks for every linear of DiT-XL/2's blocks, random weights, and prints time, memory and sizes.

    python tools/bench_dit_xl_codebooks.py --out out/xl

k-means of 256 × 4 in models of 14 and of 28 blocks, each quantized in a process of its own: `seconds` and `peak_rss_gb`
are of the stage `quantize`, `above_weights_gb` is its peak over the fp32 weights, `two_over_one` 28 blocks' time over
14's. `codes_mib` is what codes alone take. Nothing is calibrated but one step of one trajectory.
"""

import json
import multiprocessing
from multiprocessing.connection import Connection
from pathlib import Path

import click

from engines.artifacts import TIMINGS, Artifact, read_json
from exporter import recipe
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.quantize import quantize

# Source: Peebles and Xie, arXiv 2212.09748, table 1; facebook/DiT-XL-2-256's config.
CONFIG = {
    "_class_name": "DiTTransformer2DModel",
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "out_channels": 8,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
}


def rules(iterations: int) -> dict:
    codebook = {"format": "codebook", "vector_size": 4, "codebook_size": 256}
    kmeans = {"name": "kmeans", "importance": False, "iterations": iterations}
    return {
        "calibration": {"samples": 1},
        "rule": [
            {"layers": "*", "scope": "outside_blocks", "keep": "float"},
            {"layers": "*.norm1.emb.*", "keep": "float"},
            {"layers": "*", "weight": codebook, "method": kmeans},
        ],
    }


@click.command()
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--blocks", type=(int, int), default=(14, 28), show_default=True)
@click.option("--iterations", default=10, show_default=True, help="of Lloyd's, at most")
def main(out: Path, blocks: tuple[int, int], iterations: int) -> None:
    rows = []
    for count in blocks:
        folder = out / str(count)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(CONFIG | {"num_layers": count}))
        rows.append({"blocks": count, **measured(folder, iterations)})
        click.echo(json.dumps(rows[-1]), err=True)
    ratio = rows[1]["seconds"] / rows[0]["seconds"]
    click.echo(json.dumps({"rows": rows, "two_over_one": round(ratio, 2)}, indent=1))


def measured(folder: Path, iterations: int) -> dict:
    """Quantizes in a fresh process, whose peak memory is the stage's own."""
    checkpoint = open_checkpoint(f"random:{folder}", steps=1)
    data = calibrate(checkpoint, folder / "calibration", samples=1)
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_quantize, args=(folder, data, iterations, sender))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def run_quantize(folder: Path, data: Artifact, iterations: int, sender: Connection) -> None:
    checkpoint = open_checkpoint(f"random:{folder}", steps=1)
    made = quantize(checkpoint, recipe.parse("kmeans", rules(iterations)), data, folder / "quantized")
    took = read_json(made.path / TIMINGS)  # of when it was made, which may have been before
    if took["resumed"]:
        raise SystemExit(f"{made.path}: was stopped and gone on with, so its time is not known: remove it")
    seconds, peak = took["seconds"], took["peak_rss_bytes"]
    info = made.info
    floats = 4 * info["model"]["parameters"]
    codebook = info["weights"]["by_format"]["codebook"]
    overhead = codebook["layers"] * 256 * 4 * 2  # one codebook each, fp16
    sender.send(
        {
            "layers": codebook["layers"],
            "seconds": round(seconds, 1),
            "weights_gb": round(floats / 1e9, 2),
            "peak_rss_gb": round(peak / 1e9, 2),
            "above_weights_gb": round((peak - floats) / 1e9, 2),
            "codes_mib": round((codebook["bytes"] - overhead) / 2**20, 2),
            "bits_per_weight": round(codebook["bits_per_weight"], 4),
        }
    )


if __name__ == "__main__":
    main()
