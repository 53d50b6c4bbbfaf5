"""What an engine really holds, against what its graph promised: weights that a builder expanded are named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from engines.errors import UserError
from engines.plans import PlanRow, constant_bytes

# What an engine may hold beyond the graph's initializers: constants that a builder makes of shapes and scales.
SHARE, SLACK = 0.03, 1 << 12


def check_compression(
    rows: Sequence[PlanRow], layers: Collection[str], promised: Mapping[str, int], total: int, where: str
) -> int:
    """Returns the bytes of all constants; raises a UserError if that is more than the graph's `total`.

    It names the quantized `layers` of the worst row.

    `promised`: bytes of the constants that the nodes of a module read in the graph, by module path. A row alone proves
    nothing: TensorRT-RTX joins the weights of matmuls that read one tensor, and names but one of them.
    """
    held = constant_bytes(rows)
    if held <= total * (1 + SHARE) + SLACK:
        return held
    excess = {row: row.constant_bytes - sum(promised.get(path, 0) for path in modules_of(row)) for row in rows}
    named = [row for row in rows if any(path in layers for path in modules_of(row))]
    worst = max(named or rows, key=lambda row: excess[row])
    paths = [path for path in modules_of(worst) if path in layers] or modules_of(worst)
    raise UserError(
        f"{where}: weights take {held:,} bytes and {total:,} in the graph: they were expanded, most of all "
        f"{', '.join(map(repr, paths))}, {worst.constant_bytes:,} bytes in the engine ({worst.kind} {worst.name!r}) "
        f"and {worst.constant_bytes - excess[worst]:,} in the graph",
        fix="use the tested version of the library (constraints.txt), or keep what it names in float (recipe)",
    )


def modules_of(row: PlanRow) -> list[str]:
    """Returns the modules whose nodes, named `<module path>/<op>`, a row computes."""
    return list(dict.fromkeys(node.rpartition("/")[0] for node in row.onnx_nodes))
