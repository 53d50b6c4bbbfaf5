"""What an engine really runs and holds, against what was asked and promised: layer by layer, from its plan."""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.artifacts import Artifact, Json
from engines.errors import UserError
from engines.plans import BITS, FLOATS, PlanRow, as_signed, constant_bytes, read_plan

# What an engine may hold beyond the graph's initializers: constants that a builder makes of shapes and scales.
SHARE, SLACK = 0.03, 1 << 12
AS_ASKED, EXPLAINED, ALLOWED, OTHER = "as asked", "explained", "allowed", "other"
POINTS = (("query", "key"), ("probabilities", "value"))  # of an attention's two products


@dataclass(frozen=True)
class AuditRow:
    """One matmul, convolution or attention of the model: types asked and got, and what of the engine computes it.

    `weight` is the type a weight is stored in, `activation` the one that is multiplied. `kernels` are the plan's rows
    that multiply, `merged_with` the layers that the same rows compute, `decoders` the rows that make its weight before,
    `unfused` the Q and DQ nodes around a kernel that reads float all the same, `casts` the layer's Cast nodes.
    `bytes` of its constants: as quantized, in the graph, in the engine; there a row's are shared out as in the graph.
    """

    layer: str
    op: str
    asked: Mapping[str, str | None]
    got: Mapping[str, str | None]
    kernels: tuple[str, ...]
    kinds: tuple[str, ...]
    merged_with: tuple[str, ...]
    decoders: tuple[str, ...]
    unfused: tuple[str, ...]
    casts: tuple[str, ...]
    bytes: Mapping[str, int]
    status: str
    reason: str | None

    def to_json(self) -> Json:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


def audit(engine: Artifact) -> list[AuditRow]:
    """Returns a row for everything that an engine's graph multiplies, in the graph's order."""
    from engines import backends

    graph = engine.info["graph"]
    if "multiplications" not in graph:
        raise UserError(
            f"{engine.path}: is of an earlier version, which did not say what its graph multiplies",
            fix="lower and build it again",
        )
    versions = engine.info.get("versions") or engine.manifest["versions"]  # a bundle's engine, or a folder's
    backend = backends.load(engine.info["backend"])
    return rows_of(read_plan(engine), graph, backend, engine.info["decode"], versions)


def rows_of(
    plan: Sequence[PlanRow],
    graph: Json,
    backend: Any,
    decode: str | None = None,
    versions: Mapping[str, str] | None = None,
) -> list[AuditRow]:
    """Audits a plan against its graph's manifest; `backend` says what a row multiplies in, and why it may.

    `decode` is how codebooks were asked to be decoded: by "load" they are dense in an opened engine, on purpose.
    """
    book = _Book(plan, graph["multiplications"], backend)
    judge = functools.partial(_judged, graph=graph, backend=backend, versions=versions or {})
    return [_row(entry, book, graph, judge, decode) for entry in graph["multiplications"]]


class _Book:
    """A plan by the graph's nodes: which rows compute each, and which of them multiply."""

    def __init__(self, plan: Sequence[PlanRow], entries: Sequence[Json], backend: Any) -> None:
        self._by_node: dict[str, list[PlanRow]] = {}
        for row in plan:
            for node in row.onnx_nodes:
                self._by_node.setdefault(node, []).append(row)
        self._types = {row: backend.multiplied(row) for row in plan}
        self.nodes = set(self._by_node)
        self._multiplied: dict[PlanRow, list[str]] = {}
        self._held: dict[PlanRow, list[str]] = {}
        for entry in entries:
            kernels = self.kernels(entry)
            for row in kernels:
                self._multiplied.setdefault(row, []).append(entry["layer"])
            for row in (*kernels, *self.decoders(entry, kernels)):
                self._held.setdefault(row, []).append(entry["layer"])

    def kernels(self, entry: Json) -> list[PlanRow]:
        """Returns the rows that multiply for an entry, one for each of its nodes; one node may be nowhere.

        What comes before and after a kernel lists the kernel's node too. Where nothing that lists it multiplies by its
        kind, as in a kernel that was generated for a whole stretch, the one of the fewest nodes is taken.
        """
        found = []
        for node in entry["nodes"]:
            rows = self._by_node.get(node, [])
            multiplying = [row for row in rows if self._types[row]]
            if rows:
                found.append(min(multiplying or rows, key=lambda row: len(row.onnx_nodes)))
        return list(dict.fromkeys(found))

    def type_of(self, row: PlanRow) -> str | None:
        """Returns what a row multiplies in, by its kind or else by what it reads."""
        return self._types[row] or next((kind for kind in row.input_types if kind in FLOATS), None)

    def decoders(self, entry: Json, kernels: Collection[PlanRow]) -> list[PlanRow]:
        """Returns the rows beside the kernels that make an entry's weight of constants alone."""
        rows = [row for node in (*entry["decoders"], *entry["nodes"]) for row in self._by_node.get(node, [])]
        return list(dict.fromkeys(row for row in rows if not row.input_types and row not in kernels))

    def others(self, entry: Json, kernels: Iterable[PlanRow]) -> list[str]:
        """Returns the other layers that an entry's kernels compute."""
        found = [layer for row in kernels for layer in self._multiplied[row]]
        return [layer for layer in dict.fromkeys(found) if layer != entry["layer"]]

    def share(self, layer: str, row: PlanRow, held: Mapping[str, int]) -> float:
        """Returns a layer's bytes of a row's constants, which are shared out as in the graph."""
        layers = self._held[row]
        total = sum(held.get(path, 0) for path in layers)
        return row.constant_bytes * (held.get(layer, 0) / total if total else 1 / len(layers))

    def computed(self, nodes: Iterable[str]) -> list[str]:
        return [node for node in nodes if node in self.nodes]


def _row(entry: Json, book: _Book, graph: Json, judge: Callable[..., Any], decode: str | None) -> AuditRow:
    kernels = book.kernels(entry)
    decoders = book.decoders(entry, kernels)
    asked = _asked(entry, graph)
    got = _got(asked, [book.type_of(row) for row in kernels], [*kernels, *decoders], graph["dtype"])
    apart = book.computed(node for pair in entry["quantizers"] if pair for node in pair)
    in_float = got["activation"] in FLOATS
    unquantized = asked["activation"] not in FLOATS and (None in entry["quantizers"] or (in_float and not apart))
    status, reason = judge(entry, asked, got)
    if decode == "load" and status == OTHER and any("Codebook" in node for node in entry["decoders"]):
        dense = asked | {"weight": got["weight"]}  # judged by what it multiplies alone
        status, reason = judge(entry, dense, got)
        status, reason = (
            (EXPLAINED, "decoded when opened, by --decode load") if status == AS_ASKED else (status, reason)
        )
    if not kernels or unquantized:
        status, reason = OTHER, "nothing quantizes what it multiplies" if kernels else "no row of the plan names it"
    return AuditRow(
        layer=entry["layer"],
        op=entry["op"],
        asked=asked,
        got=got,
        kernels=tuple(row.name for row in kernels),
        kinds=tuple(row.kind for row in kernels),
        merged_with=tuple(book.others(entry, kernels)),
        decoders=tuple(row.name for row in decoders),
        unfused=tuple(apart) if in_float else (),
        casts=tuple(sorted(node for node in book.nodes if node.startswith(f"{entry['layer']}/Cast"))),
        bytes=_bytes(entry["layer"], book, [*kernels, *decoders], graph),
        status=status,
        reason=reason,
    )


def _asked(entry: Json, graph: Json) -> dict[str, str | None]:
    """Returns the types that a recipe asked for; what it keeps is in the graph's own float type."""
    layer, dtype = entry["layer"], graph["dtype"]
    if entry["op"] != "attention":
        kept = {"weight": dtype, "activation": dtype}
        return {key: kind or dtype for key, kind in graph["layers"].get(layer, kept).items()}
    points = {name: graph["points"].get(f"{layer}.products.{name}") for pair in POINTS for name in pair}
    kinds = {kind for kind in points.values() if kind}
    return {"weight": None, "activation": kinds.pop() if len(kinds) == 1 else dtype}


def _got(
    asked: Mapping[str, str | None], multiplied: Sequence[str | None], rows: Sequence[PlanRow], dtype: str
) -> dict[str, str | None]:
    """Returns the types that an engine has: of several kernels' the one that was not asked, if there is one."""
    found = [kind for kind in multiplied if kind]
    other = [kind for kind in found if not _serves(asked["activation"], kind)]
    activation = next(iter(other or found), None)
    if asked["weight"] is None:
        return {"weight": None, "activation": activation}
    held = [kind for row in rows for kind in row.constant_types]
    if any(_serves(asked["weight"], kind) for kind in held):
        return {"weight": asked["weight"], "activation": activation}
    narrow = [as_signed(kind) for kind in held if BITS.get(kind, 64) <= 8 and kind != "bool"]
    return {"weight": next(iter(narrow or held), dtype), "activation": activation}


def _serves(asked: str | None, got: str) -> bool:
    """Whether a type is what was asked: the same number's, or a wider float where float was asked."""
    if asked in FLOATS and got in FLOATS:
        return BITS[got] >= BITS[asked]
    return asked == as_signed(got)


def _judged(
    entry: Json,
    asked: Mapping[str, str | None],
    got: Mapping[str, str | None],
    *,
    graph: Json,
    backend: Any,
    versions: Mapping[str, str],
) -> tuple[str, str | None]:
    """Returns a row's status, and the reason of one that is not as asked."""
    weight = asked["weight"] is None or asked["weight"] == got["weight"]
    if got["activation"] and _serves(asked["activation"], got["activation"]) and weight:
        return AS_ASKED, None
    if reason := backend.explain(entry["op"], asked, got, versions):
        return EXPLAINED, reason
    if graph["allowed"].get(entry["layer"]) == "float" and got["activation"] in FLOATS and weight:
        return ALLOWED, 'allow = "float" in the recipe'
    return OTHER, None


def _bytes(layer: str, book: _Book, rows: Sequence[PlanRow], graph: Json) -> dict[str, int]:
    """Returns the bytes of a layer's constants at every stage."""
    held = graph["module_bytes"]
    engine = round(sum(book.share(layer, row, held) for row in rows))
    return {"quantized": graph["stored_bytes"].get(layer, 0), "graph": held.get(layer, 0), "engine": engine}


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
