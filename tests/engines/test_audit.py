"""The audits: of types, asked and got, by plans of plain rows; of compression, where expanded weights are named."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engines.audit import ALLOWED, AS_ASKED, EXPLAINED, OTHER, check_compression, rows_of
from engines.errors import UserError
from engines.plans import PlanRow, multiplied_as

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


class Backend:
    """Multiplies in what its gemms read; excuses FP8 in float."""

    @staticmethod
    def multiplied(row):
        return multiplied_as(row) if row.kind == "gemm" else None

    @staticmethod
    def explain(op, asked, got, versions):
        return "no FP8 kernels" if asked["activation"] == "fp8" else None


def entry(layer, op="matmul", quantized=True):
    pair = [f"{layer}/QuantizeLinear", f"{layer}/DequantizeLinear_1"]
    return {
        "layer": layer, "op": op, "nodes": [f"{layer}/MatMul"], "decoders": [f"{layer}/DequantizeLinear"],
        "quantizers": [pair if quantized else None],
    }  # fmt: skip


def graph(*entries, layers, allowed=None, points=None):
    sizes = {one["layer"]: 100 * (i + 1) for i, one in enumerate(entries)}
    return {
        "multiplications": list(entries), "layers": layers, "points": points or {}, "allowed": allowed or {},
        "dtype": "fp16", "module_bytes": sizes, "stored_bytes": sizes,
    }  # fmt: skip


INT8 = {"weight": "int8", "activation": "int8"}
Q = PlanRow("quantize", "kgen", ("fp16",), (), 0, ("int8",), ("a/QuantizeLinear",))
GEMM = PlanRow("gemm a", "gemm", ("int8",), ("int8",), 100, ("fp16",), ("a/MatMul", "a/DequantizeLinear_1"))
AFTER = PlanRow("after", "kgen", ("fp16",), ("fp16",), 8, ("fp16",), ("a/MatMul", "a/Add", "a/Cast"))
FLOAT = PlanRow("gemm a", "gemm", ("fp16",), ("int8",), 100, ("fp16",), ("a/MatMul", "a/DequantizeLinear_1"))


def statuses(plan, manifest):
    return [(row.status, row.reason) for row in rows_of(plan, manifest, Backend)]


def test_what_multiplies_is_judged_and_not_what_comes_after_it():
    (row,) = rows_of([Q, GEMM, AFTER], graph(entry("a"), layers={"a": INT8}), Backend)
    assert (row.status, row.kernels, row.unfused, row.casts) == (AS_ASKED, ("gemm a",), (), ("a/Cast",))
    assert row.bytes == {"quantized": 100, "graph": 100, "engine": 100}


def test_a_kernel_that_reads_float_all_the_same_is_named_with_its_unfused_pair():
    (row,) = rows_of([Q, FLOAT], graph(entry("a"), layers={"a": INT8}), Backend)
    assert (row.status, row.got["activation"]) == (OTHER, "fp16")
    assert row.unfused == ("a/QuantizeLinear", "a/DequantizeLinear_1")


def test_a_recipe_may_allow_float_and_a_backend_may_explain_it():
    allowed = graph(entry("a"), layers={"a": INT8}, allowed={"a": "float"})
    assert statuses([Q, FLOAT], allowed) == [(ALLOWED, 'allow = "float" in the recipe')]
    fp8 = graph(entry("a"), layers={"a": {"weight": "int8", "activation": "fp8"}})
    assert statuses([Q, FLOAT], fp8) == [(EXPLAINED, "no FP8 kernels")]


def test_nothing_excuses_a_layer_that_nothing_quantizes():
    for manifest, plan in (
        (graph(entry("a", quantized=False), layers={"a": INT8}, allowed={"a": "float"}), [FLOAT]),
        (
            graph(entry("a"), layers={"a": {"weight": "int8", "activation": "fp8"}}),
            [replace(FLOAT, onnx_nodes=("a/MatMul",))],
        ),
    ):
        assert statuses(plan, manifest) == [(OTHER, "nothing quantizes what it multiplies")]


def test_a_layer_that_no_row_names_is_no_success():
    assert statuses([Q], graph(entry("a"), layers={"a": INT8})) == [(OTHER, "no row of the plan names it")]


def test_an_expanded_weight_is_not_as_asked():
    dense = replace(GEMM, constant_types=("fp16",), input_types=("fp16",))
    weight_only = graph(entry("a", quantized=False), layers={"a": {"weight": "int8", "activation": None}})
    ((row),) = rows_of([dense], weight_only, Backend)
    assert (row.status, row.got) == (OTHER, {"weight": "fp16", "activation": "fp16"})


def test_a_kept_layer_may_run_in_a_wider_float_and_in_nothing_narrower():
    kept = graph(entry("a", quantized=False), layers={})
    wide = PlanRow("gemm a", "gemm", ("fp32",), ("fp32",), 100, ("fp16",), ("a/MatMul",))
    assert statuses([wide], kept) == [(AS_ASKED, None)]
    assert statuses([replace(wide, input_types=("fp8",), constant_types=("fp8",))], kept) == [(OTHER, None)]


def test_bytes_of_rows_that_layers_share_are_given_out_as_in_the_graph():
    nodes = ("a/MatMul", "b/MatMul")
    merged = PlanRow("gemm a+b", "gemm", ("int8",), ("int8",), 330, ("fp16",), nodes)
    rows = rows_of([merged, Q], graph(entry("a"), entry("b"), layers={"a": INT8, "b": INT8}), Backend)
    assert [row.bytes["engine"] for row in rows] == [110, 220]
    assert [row.merged_with for row in rows] == [("b",), ("a",)]


def test_an_attention_is_one_row_of_both_its_products():
    two = {"layer": "attn", "op": "attention", "nodes": ["attn/MatMul", "attn/MatMul_1"], "decoders": []}
    first = PlanRow("qk", "gemm", ("int8", "int8"), (), 0, ("fp16",), ("attn/MatMul",))
    second = PlanRow("pv", "gemm", ("fp16", "fp16"), (), 0, ("fp16",), ("attn/MatMul_1",))
    pairs = {"quantizers": [["attn/QuantizeLinear", "attn/DequantizeLinear"]] * 4}
    points = {f"attn.products.{name}": "int8" for name in ("query", "key", "probabilities", "value")}
    quantized = graph(two | pairs, layers={}, points=points)
    marks = PlanRow("q", "kgen", ("fp16",), (), 0, ("int8",), ("attn/QuantizeLinear",))
    (row,) = rows_of([first, second, marks], quantized, Backend)
    assert (row.status, row.asked["activation"], row.got["activation"]) == (OTHER, "int8", "fp16")
    kept = graph(two | {"quantizers": [None] * 4}, layers={})
    (row,) = rows_of([replace(second, onnx_nodes=("attn/MatMul", "attn/MatMul_1"))], kept, Backend)
    assert (row.status, row.kernels) == (AS_ASKED, ("pv",))
