"""A call without memory counts what a real one computes and holds."""

from __future__ import annotations

import json

import pytest
from bench_dit_xl_codebooks import CONFIG
from bench_real_unets import CONFIGS
from common import TINY

from exporter import dry_run
from exporter.attention import POINTS, add_points
from exporter.models import family_of


def run(config, rows=1):
    family = family_of(config["_class_name"], config, "test")
    with dry_run.shapes_only():
        return dry_run.run(family.build().eval().requires_grad_(False), family, rows)


def test_a_tiny_dits_macs_are_those_counted_by_hand():
    width, tokens = 32, 16  # 2 heads of 16; 8 × 8 in patches of 2
    found = run(TINY).macs
    block = "transformer_blocks.1"
    assert found["pos_embed.proj"] == tokens * width * 4  # 1 channel, 2 × 2
    assert found[f"{block}.norm1.linear"] == 6 * width * width  # of the condition: one token
    assert found[f"{block}.norm1.emb.timestep_embedder.linear_1"] == 256 * width
    assert found[f"{block}.attn1.to_q"] == tokens * width * width
    assert found[f"{block}.attn1"] == 2 * tokens * tokens * width  # queries by keys, probabilities by values
    assert found[f"{block}.ff.net.0.proj"] == tokens * width * 4 * width
    assert found["proj_out_2"] == tokens * width * 4


def test_what_layers_and_points_of_attentions_read_is_counted():
    width, tokens = 32, 16
    family = family_of(TINY["_class_name"], TINY, "test")
    with dry_run.shapes_only():
        model = family.build().eval().requires_grad_(False)
        add_points(model, ["transformer_blocks.0.attn1"])
        found = dry_run.run(model, family, 2).read
    assert found["transformer_blocks.0.attn1.to_q"] == 2 * tokens * width
    assert found["transformer_blocks.0.ff.net.2"] == 2 * tokens * 4 * width
    points = {name: found[f"transformer_blocks.0.attn1.products.{name}"] for name in POINTS}
    each = 2 * tokens * width
    assert points == {"query": each, "key": each, "probabilities": 2 * 2 * tokens * tokens, "value": each}


def test_macs_and_memory_grow_with_the_rows():
    one, two = run(TINY, 1), run(TINY, 2)
    assert two.macs == {layer: 2 * count for layer, count in one.macs.items()}
    assert two.peak_bytes == pytest.approx(2 * one.peak_bytes, rel=0.05)
    assert two.block_bytes == {block: 2 * size for block, size in one.block_bytes.items()}


def test_tensors_that_live_at_once_are_a_part_of_all_that_are_made():
    found = run(TINY)
    assert max(found.block_bytes.values()) < found.peak_bytes < found.made_bytes / 4


def test_dit_xl_2_computes_what_its_paper_says():
    """118.6 G multiply-accumulates. Source: Peebles and Xie, arXiv 2212.09748, table 4."""
    assert sum(run(CONFIG | {"num_layers": 28}).macs.values()) == pytest.approx(118.6e9, rel=0.01)


def test_sdxl_takes_no_memory():
    """Its weights alone are 10 GB, more than a test may take."""
    found = run(json.loads(json.dumps(CONFIGS["sdxl"])))
    assert sum(found.macs.values()) > 2e12
    assert found.peak_bytes < 1e9
