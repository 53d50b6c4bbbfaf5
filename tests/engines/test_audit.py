"""The audit of compression: weights that a builder expanded are named, with both sizes."""

from __future__ import annotations

import pytest

from engines.audit import check_compression
from engines.errors import UserError
from engines.plans import PlanRow

PROMISED = {"blocks.0.to_q": 100_000, "blocks.0.to_k": 100_000, "blocks.0.ff": 400_000, "pos_embed": 900_000}
LAYERS = ["blocks.0.to_q", "blocks.0.to_k", "blocks.0.ff"]
TABLE = "pos_embed"


def row(held, *modules, kind="gemm"):
    nodes = tuple(f"{module}/MatMul" for module in modules)
    return PlanRow(f"of {held}", kind, ("fp16",), ("int8",), held, ("fp16",), nodes)


def audit(*rows):
    return check_compression(rows, LAYERS, PROMISED, sum(PROMISED.values()), "an engine")


@pytest.mark.parametrize(
    "rows",
    [
        [
            row(100_900, "blocks.0.to_q"),
            row(101_000, "blocks.0.to_k"),
            row(410_000, "blocks.0.ff"),
            row(900_000, TABLE),
        ],
        [row(201_000, "blocks.0.to_q"), row(400_000, "blocks.0.ff"), row(900_000, TABLE)],  # to_k is in to_q's
        [row(1_540_000, "blocks.0.to_q", "blocks.0.to_k", "blocks.0.ff", TABLE)],
    ],
    ids=["each by itself", "joined under one name", "all in one"],
)
def test_weights_as_large_as_the_graphs_pass(rows):
    assert audit(*rows) == sum(one.constant_bytes for one in rows)


def test_an_expanded_layer_is_named_with_both_sizes():
    rest = row(500_000, "blocks.0.to_q", "blocks.0.ff"), row(900_000, TABLE)
    with pytest.raises(UserError, match=r"most of all 'blocks\.0\.to_k', 800,000 bytes.*kgen.*100,000") as raised:
        audit(*rest, row(800_000, "blocks.0.to_k", kind="kgen"))
    assert "2,200,000 bytes and 1,500,000 in the graph" in raised.value.what
    assert "constraints.txt" in raised.value.fix


def test_one_of_several_in_a_row_is_caught():
    with pytest.raises(UserError, match=r"'blocks\.0\.to_q', 'blocks\.0\.to_k', 900,000"):
        audit(row(900_000, "blocks.0.to_q", "blocks.0.to_k"), row(400_000, "blocks.0.ff"), row(900_000, TABLE))


def test_what_is_kept_is_named_where_no_quantized_layer_is():
    with pytest.raises(UserError, match=r"most of all 'pos_embed', 3,000,000"):
        audit(row(3_000_000, TABLE))
