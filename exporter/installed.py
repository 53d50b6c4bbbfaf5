"""The libraries that are installed, against the versions that everything was tested with.

The package carries constraints.txt for that; a test holds the copy against the one in the repository's root.
"""

from __future__ import annotations

import re
from importlib import metadata
from pathlib import Path

from engines.artifacts import Json
from engines.errors import UserError

TESTED = Path(__file__).with_name("constraints.txt")
PACKAGE = "export-engine"
DEVELOPMENT = "dev"  # an extra that only tests and linters need
OK, OTHER, OLD, MISSING, UNTESTED = "ok", "other version", "too old", "missing", "not tested"


def tested() -> dict[str, str]:
    """Returns the tested version of each library, by its normalized name."""
    lines = TESTED.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if "==" in line and not line.startswith("#")]
    return {_normalized(name): version.strip() for name, version in pairs}


def report() -> list[Json]:
    """Returns a row for each library that is needed here, or by an extra: found, tested, and what that means."""
    from packaging.requirements import Requirement

    known, rows = tested(), dict[str, Json]()
    for requirement in map(Requirement, _requirements()):
        extra = _extra(str(requirement.marker or ""))
        if extra == DEVELOPMENT or (requirement.marker and not requirement.marker.evaluate({"extra": extra or ""})):
            continue
        name = _normalized(requirement.name)
        if name in rows:  # needed, and in an extra too
            continue
        if extra is None and name not in known:  # of an older version's installation: all that is needed was tested
            continue
        found = version_of(name)
        state = MISSING if found is None else OTHER if name in known else UNTESTED
        if found is not None and not requirement.specifier.contains(found, prereleases=True):
            state = OLD
        elif found is not None and _public(found) == known.get(name):
            state = OK
        rows[name] = {
            "name": requirement.name, "needs": str(requirement.specifier), "found": found, "tested": known.get(name),
            "state": state, "extra": extra,
        }  # fmt: skip
    return sorted(rows.values(), key=lambda row: (row["extra"] or "", row["name"]))


def lacking(rows: list[Json]) -> list[Json]:
    """Returns the rows of what is needed, not in an extra alone, and is missing or too old."""
    return [row for row in rows if row["extra"] is None and row["state"] in (MISSING, OLD)]


def fix_for(rows: list[Json]) -> str | None:
    """Returns the command that installs what is lacking, None where nothing is."""
    names = [f"'{row['name']}=={row['tested']}'" if row["tested"] else f"'{row['name']}'" for row in lacking(rows)]
    return f"pip install {' '.join(names)}" if names else None


def version_of(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _requirements() -> list[str]:
    try:
        return metadata.requires(PACKAGE) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(
            f"{PACKAGE} runs from a folder, and is not installed: nobody can tell what it needs",
            fix="pip install --constraint constraints.txt --editable . (in that folder)",
        ) from error


def _extra(marker: str) -> str | None:
    found = re.search(r"extra == ['\"]([^'\"]+)['\"]", marker)
    return found.group(1) if found else None


def _public(version: str) -> str:
    """Returns a version without what a build added, as in 2.13.0+cpu."""
    return version.partition("+")[0]


def _normalized(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
