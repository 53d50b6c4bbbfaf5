"""`check`: holds a run against a baseline that was kept of an earlier one, and takes a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.artifacts import Json, read_json
from engines.errors import UserError
from exporter import baseline, gate, progress, run_folder
from exporter.baseline import Measured
from exporter.gate import Row
from exporter.losses import NOT_ENOUGH, PASS
from exporter.run_folder import REPORT
from exporter.thresholds import Thresholds


@dataclass(frozen=True)
class Checked:
    """A gate's findings: judged rows, the report's own checks, what differs from the baseline, and what to know."""

    new: Measured
    verdict: str
    limits: Thresholds
    pairs: bool
    rows: Sequence[Row]
    checks: Sequence[Json]
    changes: Sequence[str]
    notes: Sequence[str]

    @property
    def passed(self) -> bool:
        return self.verdict == PASS

    @property
    def failed_checks(self) -> list[str]:
        return failed(self.checks)

    def to_json(self) -> Json:
        return {
            "verdict": self.verdict,
            "passed": self.passed,
            "thresholds": self.limits.source,
            "false_alarm": self.limits.false_alarm,
            "paired": self.pairs,
            "images": self.new.images,
            "scores": [row.to_json() for row in self.rows],
            "failed_checks": self.failed_checks,
            "changed": list(self.changes),
            "notes": list(self.notes),
        }


def check(folder: Path, path: Path, limits: Thresholds, *, other_recipe: bool = False) -> Checked:
    """Judges a run against the baseline at `path`."""
    old = baseline.read(path)
    new, checks = opened(folder)
    refuse_other(old, new, path, other_recipe=other_recipe)
    rows = gate.judge(old, new, limits)
    verdict = gate.overall(rows, failed(checks))
    notes = [*_pairing(old, new), *(f"not judged: {one}" for one in gate.not_judged(old, new, limits))]
    pairs, changes = gate.paired(old, new), baseline.changes(old, new)
    return Checked(new, verdict, limits, pairs, rows, checks, changes, notes)


def opened(folder: Path) -> tuple[Measured, list[Json]]:
    """Opens a run and its report; returns what a gate needs of both, and the report's own checks."""
    run = run_folder.open_artifacts(folder)
    again = f"validate again: export-engine validate {folder}"
    if not (folder / REPORT).is_file():
        raise UserError(f"{folder}: has no {REPORT}", fix=again)
    report = read_json(folder / REPORT, fix=f"remove it and {again}")
    try:
        checks = [{key: one[key] for key in ("name", "value", "unit", "limit", "passed")} for one in report["checks"]]
        return baseline.measured(folder, run, report), checks
    except (KeyError, TypeError, AttributeError, ValueError, ZeroDivisionError) as error:
        raise UserError(
            f"{folder / REPORT}: malformed ({type(error).__name__}: {error})", fix=f"remove it and {again}"
        ) from error


def refuse_other(old: Measured, new: Measured, path: Path, *, other_recipe: bool = False) -> None:
    """Refuses a baseline of another model, or of a recipe by another name.

    A recipe that was edited keeps its name, and to judge the edit is what a gate is for.
    """
    if old.digests["model"] != new.digests["model"]:
        raise UserError(
            f"{path}: is of another model: {_named(old, 'model')}; this run is of {_named(new, 'model')} "
            "(weights, config, scheduler and sampling steps make the digest)",
            fix="give that model's baseline; to start another, remove the file or name a new one, and use --update",
        )
    same = old.recipe == new.recipe or old.digests["recipe"] == new.digests["recipe"]
    if not (same or other_recipe):
        raise UserError(
            f"{path}: is of recipe {_named(old, 'recipe')}; this run is of {_named(new, 'recipe')}",
            fix="give that recipe's baseline; to compare the two recipes, add --other-recipe",
        )


def _named(one: Measured, what: str) -> str:
    return f"{getattr(one, what)!r} ({one.digests[what][:12]})"


def failed(checks: Sequence[Json]) -> list[str]:
    """Returns which of a report's own checks failed, and by what."""
    return [
        f"{one['name']}: {'no number' if one['value'] is None else format(one['value'], '.4g')}"
        f"{' ' if one['unit'] else ''}{one['unit']}, limit {one['limit']}"
        for one in checks
        if not one["passed"]
    ]


def _pairing(old: Measured, new: Measured) -> list[str]:
    """Returns what there is to know about how two runs' images compare."""
    other = [f"another seed ({old.seed} → {new.seed})"] * (old.seed != new.seed)
    other += [f"another number of images ({old.images} → {new.images})"] * (old.images != new.images)
    other += ["other captions"] * (old.captions != new.captions)
    notes = [f"images are not paired: {', '.join(other)}; with the same ones far fewer images tell"] if other else []
    if old.runner != new.runner:
        notes.append(f"images are by {new.runner}, the baseline's by {old.runner}")
    return notes


@dataclass(frozen=True)
class Updated:
    """A baseline that was written, and what is new in it: what, before, now."""

    path: Path
    rows: Sequence[tuple[str, str, str]]
    refusals: Sequence[str]  # why it was not
    warnings: Sequence[str]

    def to_json(self) -> Json:
        keys = ("what", "before", "now")
        rows = [dict(zip(keys, row, strict=True)) for row in self.rows]
        found = {"baseline": str(self.path), "updated": not self.refusals, "refused": list(self.refusals), "new": rows}
        return found | {"warnings": list(self.warnings)}


def update(folder: Path, path: Path, limits: Thresholds, *, other_recipe: bool = False) -> Updated:
    """Writes a run's baseline, unless the run is no good for one; returns what is new against the one before."""
    old = baseline.read(path) if path.exists() else None
    new, checks = opened(folder)
    if old is not None:
        refuse_other(old, new, path, other_recipe=other_recipe)
    refusals = [f"failed check: {one}" for one in failed(checks)]
    if new.images < limits.samples:
        refusals.append(f"{NOT_ENOUGH}: {new.images} images, it takes {limits.samples} or more")
    if refusals:
        return Updated(path, new_rows(old, new), refusals, [])
    baseline.write(new, path)
    warnings = gate.undecided_times(new, limits)
    for one in warnings:
        progress.note(f"warning: {one}")
    return Updated(path, new_rows(old, new), refusals, warnings)


def new_rows(old: Measured | None, new: Measured) -> list[tuple[str, str, str]]:
    """Returns what differs between two baselines, as text."""
    before, now = ({} if one is None else _texts(one) for one in (old, new))
    return [(n, before.get(n, ""), now.get(n, "")) for n in {**before, **now} if before.get(n) != now.get(n)]


def _texts(one: Measured) -> dict[str, str]:
    """Returns all that a baseline holds, by what it is."""
    found = {"model": one.model, "recipe": one.recipe}
    found |= {f"digest of {name}": digest[:12] for name, digest in one.digests.items()}
    found |= {f"version of {name}": version for name, version in one.versions.items()}
    found |= {"machine": one.machine, "images": f"{one.images} by {one.runner}, seed {one.seed}"}
    for name, values in one.scores.items():
        score = gate.SCORES[name]
        found[score.title] = score.told(sum(values) / len(values))
    found |= {f"time of {name}": gate.TIME.told(speed.ratio) for name, speed in one.speeds.items()}
    return found | {f"weights of {name}": gate.WEIGHTS.told(count) for name, count in one.weights.items()}
