"""`doctor`: what is installed, what can be built and run here, and what to do about the rest; imports no torch."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

from engines import backends, gpu, memory, native
from engines.artifacts import Json
from engines.errors import UserError
from engines.version import __version__
from exporter import installed

if TYPE_CHECKING:
    from rich.console import RenderableType


def doctor() -> Json:
    """Returns what is here; `fix` is a command, or None where nothing that is needed is missing."""
    libraries = installed.report()
    return {
        "export_engine": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"count": os.cpu_count(), "int8_sums": _int8_sums()},
        "memory_bytes": memory.total_bytes(),
        "gpu": {"name": gpu.detect(), "driver": gpu.driver()},
        "native_kernels": {"built": native.library() is not None, "why_not": _why_no_kernels()},
        "backends": [backend(name) for name in backends.names()],
        "libraries": libraries,
        "lacking": [row["name"] for row in installed.lacking(libraries)],
        "fix": installed.fix_for(libraries),
    }


def backend(name: str) -> Json:
    """Returns whether a backend can build here and run here, else why not."""
    found: Json = {"name": name, "cannot_build": None, "cannot_run": None, "gpus": []}
    try:
        module = backends.load(name)
        module.fingerprint()
        module.resolve_gpu(None)
        found |= {"cannot_run": module.cannot_run(), "gpus": module.targets()}
    except (UserError, ImportError) as error:
        found |= {"cannot_build": str(error), "cannot_run": str(error)}
    return found


def _int8_sums() -> str | None:
    """Returns how this CPU's fastest INT8 kernels add; None without numpy."""
    try:
        from engines.backends import ort
    except ImportError:
        return None
    return "saturating: slower kernels are asked for, which are exact" if ort.sums_saturate() else "exact"


def _why_no_kernels() -> str | None:
    return None if native.library() else native.why_not()


def tables(found: Json) -> list[RenderableType]:
    """Returns the report as people read it."""
    return [_machine(found), _backends(found), library_table(found["libraries"])]


def _machine(found: Json) -> RenderableType:
    from rich.table import Table

    kernels, card = found["native_kernels"], found["gpu"]
    held = found["memory_bytes"]
    rows = {
        "export-engine": found["export_engine"],
        "Python": f"{found['python']} on {found['platform']}",
        "CPU": f"{found['cpu']['count']} threads; INT8 sums: {found['cpu']['int8_sums'] or 'not known without numpy'}",
        "memory": f"{held / 1e9:.1f} GB" if held else "not known",
        "GPU": f"{card['name'] or 'none that is usable'}; driver {card['driver'] or 'none'}",
        "native kernels": "built" if kernels["built"] else f"not built: {kernels['why_not']}",
    }
    table = Table(title="this machine", show_header=False)
    for row in rows.items():
        table.add_row(*row)
    return table


def _backends(found: Json) -> RenderableType:
    from rich.table import Table

    table = Table("backend", "builds here", "for", "runs here", title="backends")
    for row in found["backends"]:
        able = [f"no: {row[key]}" if row[key] else "yes" for key in ("cannot_build", "cannot_run")]
        table.add_row(row["name"], able[0], ", ".join(row["gpus"]) or "this machine", able[1])
    return table


def library_table(rows: list[Json]) -> RenderableType:
    """Returns found against tested versions; both commands show it."""
    from rich.table import Table

    table = Table("library", "found", "tested with", "", "for", title="libraries")
    for row in rows:
        extra = f"extra '{row['extra']}'" if row["extra"] else ""
        table.add_row(row["name"], row["found"] or "–", row["tested"] or "–", row["state"], extra)
    return table
