"""The table of an engine's audit: no name or number is cut, whatever the terminal's width."""

from __future__ import annotations

import pytest

from exporter import audits, progress

ROW = {
    "layer": "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1", "op": "matmul", "status": "as asked",
    "asked": {"weight": "int8", "activation": "int8"}, "got": {"weight": "int8", "activation": "int8"},
    "kinds": ["gemm", "castgemm"], "merged_with": ["transformer_blocks.0.norm1.emb.timestep_embedder.linear_2"],
    "decoders": ["decode"], "unfused": [], "casts": [], "reason": None,
    "bytes": {"quantized": 1234567, "graph": 2234567, "engine": 3234567},
}  # fmt: skip


@pytest.mark.parametrize("columns", ["40", "300"])
def test_names_break_at_their_dots_and_numbers_are_whole(columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", columns)
    progress.print_whole(audits.table([ROW]))
    words = capsys.readouterr().out.replace("│", " ").replace("┃", " ").split()
    for word in ("transformer_blocks.0.norm1.", "emb.timestep_embedder.", "linear_1", "linear_2", "castgemm"):
        assert word in words
    assert {"1,234,567", "2,234,567", "3,234,567", "verdict"} <= set(words)
