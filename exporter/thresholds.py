"""What a gate allows: limits from TOML, data only."""

from __future__ import annotations

import math
import shutil
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from engines.artifacts import writing_errors
from engines.errors import UserError, unknown
from exporter import catalog

SHIPPED = catalog.HERE / "thresholds.toml"
FILE, SUFFIX = "thresholds.toml", ".check.toml"
MAX_BYTES = 1 << 16  # a few lines of text
KEYS: Mapping[str, tuple[str, ...]] = {
    "psnr_db": ("most_lost", "least"),
    "ssim": ("most_lost", "least"),
    "cosine": ("most_lost", "least"),
    "task_score": ("most_lost",),  # of which a report holds, image by image, what was lost alone
    "throughput": ("most_slower",),
    "weights": ("most_larger",),
    "level": ("false_alarm",),
    "samples": ("least",),
}
JUDGED = ("psnr_db", "ssim", "cosine", "task_score", "throughput", "weights")
# Below, the ends of an interval are those of a handful of resamples; above, a gate says nothing.
LEVELS = (0.01, 0.5)
LEAST_SAMPLES = 8


@dataclass(frozen=True)
class Thresholds:
    """Limits by score; one that a score lacks is not judged. `source`: the file that they are from."""

    most_lost: Mapping[str, float]
    least: Mapping[str, float]
    most_slower: float | None = None
    most_larger: float | None = None
    false_alarm: float = 0.05
    samples: int = 32
    source: str = ""


def of_run(folder: Path) -> Path:
    """Returns the file that a run is judged by where none is named: its recipe's own, else what ships."""
    own = folder / FILE
    return own if own.is_file() else SHIPPED


def beside(recipe: str) -> Path | None:
    """Returns the thresholds that lie beside a recipe's file, as NAME.check.toml; ones that are invalid are refused."""
    path = Path(recipe).with_suffix(SUFFIX) if recipe.endswith(".toml") else None
    if path is None or not path.is_file():
        return None
    load(path)
    return path


def keep(path: Path | None, folder: Path) -> None:
    """Puts thresholds into a run's folder, or takes those of an earlier run away."""
    own = folder / FILE
    with writing_errors(own):
        if path is None:
            own.unlink(missing_ok=True)
        else:
            shutil.copyfile(path, own)


def load(where: Path) -> Thresholds:
    """Loads a file of thresholds."""
    try:
        if where.stat().st_size > MAX_BYTES:
            raise UserError(f"thresholds {where}: larger than {MAX_BYTES} bytes", fix="they are a few lines of text")
        source = tomllib.loads(where.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"thresholds {where}: cannot be read ({error.strerror})", fix="check the path") from error
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError is a ValueError
        raise UserError(f"thresholds {where}: not valid TOML ({error})", fix="mend the line it names") from error
    return replace(parse(source, f"thresholds {where}"), source=str(where))


def parse(source: Mapping[str, Any], where: str) -> Thresholds:
    """Builds thresholds from parsed TOML; an unknown key, or a value out of range, is an error."""
    for section, table in source.items():
        if section not in KEYS:
            raise unknown("section", section, KEYS, where)
        if not isinstance(table, dict):
            raise UserError(f"{where}: {section} = {table!r}", fix=f"write a section: [{section}]")
        for key, value in table.items():
            if key not in KEYS[section]:
                raise unknown("key", key, KEYS[section], f"{where}, [{section}]")
            _check(section, key, value, f"{where}, [{section}]")
    if not any(source.get(section) for section in JUDGED):
        raise UserError(f"{where}: limits nothing", fix="write at least one limit: [psnr_db] most_lost = 0.5")
    return Thresholds(
        most_lost={name: table["most_lost"] for name, table in source.items() if "most_lost" in table},
        least={name: source[name]["least"] for name in JUDGED if "least" in source.get(name, {})},
        most_slower=source.get("throughput", {}).get("most_slower"),
        most_larger=source.get("weights", {}).get("most_larger"),
        **source.get("level", {}),
        **({"samples": source["samples"]["least"]} if source.get("samples") else {}),
    )


def _check(section: str, key: str, value: object, where: str) -> None:
    """Refuses a value that is no number, or one of no meaning."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise UserError(f"{where}: {key} = {value!r} is no number", fix=f"write a number: {key} = 0.5")
    if key == "false_alarm" and not LEVELS[0] <= value <= LEVELS[1]:
        raise UserError(f"{where}: {key} = {value}", fix=f"give a share, {LEVELS[0]} … {LEVELS[1]}")
    if section == "samples" and (not isinstance(value, int) or value < LEAST_SAMPLES):
        raise UserError(f"{where}: {key} = {value}", fix=f"give a whole number, {LEAST_SAMPLES} or more")
    if key.startswith("most_") and value < 0:
        raise UserError(f"{where}: {key} = {value} is negative", fix="give what may be lost at most, 0 or more")
