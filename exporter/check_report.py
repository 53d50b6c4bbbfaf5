"""What a person, or a continuous integration, sees of a check: tables, one line, JUnit XML."""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

from engines.artifacts import refuse_no_folder, replacing
from exporter import progress
from exporter.check import Checked, Updated
from exporter.gate import Row
from exporter.losses import FAIL, NOT_ENOUGH, PASS

COLOURS = {PASS: "green", FAIL: "red", NOT_ENOUGH: "yellow"}
TYPES = {FAIL: "Failed", NOT_ENOUGH: "NotEnoughSamples"}
HEADERS = ("score", "baseline", "now", "lost", "low … high", "limit", "noise", "detects", "verdict")


def print_checked(found: Checked) -> None:
    """Prints a check as a table, notes, what decided it, and a last line with the verdict, on stdout."""
    from rich.table import Table

    console = progress.stdout()
    table = Table(
        title=f"{found.new.model}, recipe {found.new.recipe}, against the baseline: {found.new.images} images, "
        f"{'paired' if found.pairs else 'not paired'}; false alarms of the gate: {found.limits.false_alarm:.0%} at most"
    )
    for header in HEADERS:
        table.add_column(header, justify="left" if header in ("score", "verdict") else "right")
    for row in found.rows:
        table.add_row(*_cells(row))
    console.print(table)
    console.print("noise: standard error between two runs of other noise; detects: the loss that fails 9 times in 10")
    changed = "; ".join(found.changes) or "nothing"
    judged_by = f"thresholds: {found.limits.source}"
    for line in (judged_by, f"changed since the baseline: {changed}", *found.notes, *reasons(found)):
        console.print(line, soft_wrap=True, markup=False)
    console.print(verdict_line(found), soft_wrap=True, markup=False, style=COLOURS[found.verdict])


def _cells(row: Row) -> tuple[str, ...]:
    score = row.score
    values = ["" if value is None else score.told(value) for value in (row.baseline, row.now)]
    lost, limit, noise, detects = (
        "" if value is None else score.told_lost(value) for value in (row.lost, row.limit, row.noise, row.detects)
    )
    interval = " … ".join(score.told_lost(end) for end in row.interval) if row.interval else ""
    return row.name, *values, lost, interval, limit, noise, detects, f"[{COLOURS[row.verdict]}]{row.verdict}[/]"


def reasons(found: Checked) -> list[str]:
    """Returns a line for everything that did not pass: by how much, and what would tell."""
    rows = [f"{row.verdict}: {row.name}: {row.message}" for row in found.rows if row.verdict != PASS]
    return rows + [f"{FAIL}: the report's check {one}" for one in found.failed_checks]


def verdict_line(found: Checked) -> str:
    """Returns the verdict in one line, with the names of what decided it."""
    if found.verdict == PASS:
        return f"check: {PASS}: {len(found.rows)} of {len(found.rows)} within their limits"
    names = [row.name for row in found.rows if row.verdict == found.verdict]
    if count := len(found.failed_checks):
        names.append(f"{count} check{'s' * (count > 1)} of the report")
    return f"check: {found.verdict}: {', '.join(names)}"


def print_updated(found: Updated) -> None:
    """Prints what is new in a baseline, or why it was not written."""
    from rich.table import Table

    console = progress.stdout()
    if found.rows:
        table = Table(title=f"{found.path}: what is new")
        for header in ("what", "before", "now"):
            table.add_column(header)
        for row in found.rows:
            table.add_row(*row)
        console.print(table)
    for refusal in found.refusals:
        console.print(f"not written: {refusal}", soft_wrap=True, markup=False, style="red")
    if not found.refusals:
        said = f"{len(found.rows)} entries are new" if found.rows else "nothing is new"
        console.print(f"{found.path}: written, {said}", soft_wrap=True, markup=False)


def write_junit(found: Checked, path: Path) -> None:
    """Writes a test case for every judged score and for every check of the report."""
    cases = [(row.name, row.verdict, row.message) for row in found.rows]
    failures = dict(zip((one["name"] for one in found.checks if not one["passed"]), found.failed_checks, strict=True))
    for one in found.checks:
        cases.append((one["name"], PASS if one["passed"] else FAIL, failures.get(one["name"], "")))
    suite = ElementTree.Element(
        "testsuite", name="export-engine check", tests=str(len(cases)), errors="0", skipped="0",
        failures=str(sum(verdict != PASS for _, verdict, _ in cases)),
    )  # fmt: skip
    for name, verdict, message in cases:
        case = ElementTree.SubElement(suite, "testcase", classname=f"{found.new.model}.{found.new.recipe}", name=name)
        if verdict != PASS:
            ElementTree.SubElement(case, "failure", type=TYPES[verdict], message=message).text = message
    refuse_no_folder(path)
    with replacing(path) as temporary:
        ElementTree.ElementTree(suite).write(temporary, encoding="utf-8", xml_declaration=True)
