"""The audit of compression: weights that a builder expanded are named, with both sizes."""

from __future__ import annotations

import pytest

from engines.audit import check_compression
from engines.errors import UserError
from engines.plans import PlanRow

PROMISED = {"blocks.0.to_q": 100_000, "blocks.0.to_k": 100_000, "blocks.0.ff": 400_000, "pos_embed": 9_000_000}
LAYERS = ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.ff"]


def row(held, *layers, kind="gemm"):
    nodes = tuple(f"{layer}/MatMul" for layer in layers)
    return PlanRow("a row", kind, ("fp16",), ("int8",), held, ("fp16",), nodes)


@pytest.mark.parametrize(
    "rows",
    [
        [row(100_900, "blocks.0.to_q"), row(101_000, "blocks.0.to_k"), row(430_000, "blocks.0.ff")],
        [row(201_000, "blocks.0.to_q", "blocks.0.to_k"), row(0, "blocks.0.ff")],
        [row(30_000_000, "pos_embed"), row(40_000, "blocks.0", "blocks.0.norm", "blocks.0.to_q")],
        [row(9_100_000, "pos_embed", "blocks.0.to_q")],
    ],
    ids=["each by itself", "merged", "what is not quantized", "a table fused in"],
)
def test_weights_as_large_as_the_graphs_pass(rows):
    check_compression(rows, LAYERS, PROMISED, "an engine")


def test_an_expanded_layer_is_named_with_both_sizes():
    rows = [row(100_900, "blocks.0.to_q"), row(800_000, "blocks.0.to_k", kind="kgen")]
    with pytest.raises(UserError, match=r"an engine: 'blocks\.0\.to_k' take 800,000 bytes.*kgen.*100,000") as raised:
        check_compression(rows, LAYERS, PROMISED, "an engine")
    assert "constraints.txt" in raised.value.fix


def test_a_small_layer_that_was_expanded_is_caught():
    """128 × 128 weights of 2 bits, 4 KiB and a codebook, as fp16: 32 KiB."""
    with pytest.raises(UserError, match="'small' take 32,768"):
        check_compression([row(128 * 128 * 2, "small")], ["small"], {"small": 4096 + 2048}, "an engine")


def test_one_of_several_in_a_row_is_caught():
    with pytest.raises(UserError, match=r"'blocks\.0\.to_q', 'blocks\.0\.to_k' take 900,000"):
        check_compression([row(900_000, "blocks.0.to_q", "blocks.0.to_k")], LAYERS, PROMISED, "an engine")
