"""What an engine really holds, against what its graph promised: weights that a builder expanded are named."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from engines.errors import UserError
from engines.plans import PlanRow

# What a row may hold beyond the constants of its modules in the graph: those that a builder makes of shapes and scales.
SHARE, SLACK = 0.25, 1 << 14


def check_compression(
    rows: Sequence[PlanRow], layers: Collection[str], promised: Mapping[str, int], where: str
) -> None:
    """Raises a UserError that names the quantized `layers` of the first row that holds more than the graph does.

    `promised`: bytes of the constants that the nodes of a module read in the graph, by module path.
    """
    for row in rows:
        modules = dict.fromkeys(node.rpartition("/")[0] for node in row.onnx_nodes)
        wanted = sum(promised.get(path, 0) for path in modules)
        named = [path for path in modules if path in layers]
        if named and row.constant_bytes > wanted * (1 + SHARE) + SLACK:
            raise UserError(
                f"{where}: {', '.join(map(repr, named))} take {row.constant_bytes:,} bytes in the engine "
                f"({row.kind} {row.name!r}) and {wanted:,} in the graph: weights were expanded",
                fix="use the tested version of the library (constraints.txt), or keep what it names in float (recipe)",
            )
