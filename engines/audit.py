"""What an engine really holds, against what its graph promised: weights that a builder expanded are named."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from engines.errors import UserError
from engines.plans import PlanRow

# What a row may hold beyond its layers' codes, codebooks and scales: biases, norms' weights and tables fused in.
SHARE, SLACK = 0.25, 1 << 16


def check_compression(rows: Sequence[PlanRow], promised: Mapping[str, int], where: str) -> None:
    """Raises a UserError that names the layers of the first row whose constants are larger than its layers' weights.

    `promised`: bytes of codes, scales and codebook as the graph holds them, by module path.
    """
    for row in rows:
        layers = layers_of(row, promised)
        wanted = sum(promised[path] for path in layers)
        if layers and row.constant_bytes > wanted * (1 + SHARE) + SLACK:
            raise UserError(
                f"{where}: {', '.join(map(repr, layers))} take {row.constant_bytes:,} bytes in the engine "
                f"({row.kind} {row.name!r}) and {wanted:,} in the graph: weights were expanded",
                fix="use the tested version of the library (constraints.txt), or keep what it names in float (recipe)",
            )


def layers_of(row: PlanRow, layers: Mapping[str, int]) -> list[str]:
    """Returns the layers whose nodes, named `<module path>/<op>`, a row computes."""
    return [path for path in dict.fromkeys(node.rpartition("/")[0] for node in row.onnx_nodes) if path in layers]
