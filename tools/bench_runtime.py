"""Times the Python runtime against a bare ONNX Runtime session, and against the C++ runtime, on a bundle's own calls.

    python tools/bench_runtime.py BUNDLE
    python tools/bench_runtime.py BUNDLE --cpp build/export-engine-run --json

What is compared is timed in turn, call by call, in one process, the order changing from pair to pair; ratios are of
medians, their 95 % intervals by resampling pairs. Exits with 3 beyond one of the project's bars.
"""

import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

import engines
from engines import golden, schedule
from engines.artifacts import MANIFEST, Json
from engines.backends import ort
from engines.bundle import open_bundle
from engines.errors import UserError
from engines.loading import Engine
from engines.runner import Feeds

# The project's bars, all of medians.
MOST_OVER_BARE = 1.03  # of Engine.run over its own session
MOST_LOADING = 2.0  # of loading, over creating the session and hashing
HASHED = 1e9  # bytes per second at which that hashing is counted
MOST_CPP = 1.0  # of the C++ runtime over this one: the interval must reach down to it
RESAMPLES, WARM_UP, HASH_BYTES = 2000, 10, 64 << 20
Seconds = NDArray[np.float64]


@click.command()
@click.argument("path", type=click.Path(exists=True, path_type=Path))
@click.option("--threads", default=0, show_default=True, help="Of a session; 0 takes all cores, without spinning.")
@click.option("--batch", "batches", multiple=True, default=(1, 8), show_default=True)
@click.option("--calls", default=300, show_default=True, help="Pairs of calls for each batch.")
@click.option("--loads", default=9, show_default=True, help="Pairs of loads.")
@click.option("--workers", default=8, show_default=True, help="Threads that call one engine at once.")
@click.option("--worker-calls", default=500, show_default=True, help="Calls of each.")
@click.option(
    "--cpp", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="The C++ runtime's export-engine-run."
)
@click.option("--rounds", default=9, show_default=True, help="Turns of the C++ and this runtime.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def main(
    path: Path, threads: int, batches: tuple[int, ...], calls: int, loads: int, workers: int, worker_calls: int,
    cpp: Path | None, rounds: int, as_json: bool,
) -> None:  # fmt: skip
    try:
        name, session, engine = opened(path, threads)
        rows = [overhead(engine, session, recorded(engine, batch), calls) for batch in batches]
        rows.append(loading(path, name, threads, loads))
        rows.append(together(engine, workers, worker_calls))
        rows.append(beside_cpp(cpp, path, engine, threads, rounds, calls))
    except UserError as error:
        raise SystemExit(f"error: {error}") from error
    found = {"bundle": str(path), "engine": name, "threads": threads, "machine": machine(), "rows": rows}
    found["passed"] = all(row["passed"] is not False for row in rows)
    click.echo(json.dumps(found, indent=1)) if as_json else show(found)
    if not found["passed"]:
        raise SystemExit(3)


def opened(path: Path, threads: int):
    """Returns the name of a bundle's engine for ONNX Runtime, a session of it, and an Engine that runs just this."""
    bundle = open_bundle(path)
    names = [name for name, entry in bundle.info["engines"].items() if entry["backend"] == "ort"]
    if not names:
        raise UserError(f"{path}: holds no engine for ONNX Runtime", fix="give a bundle that does")
    artifact = bundle.engine(names[0])
    graph = artifact.info["graph"]
    session = ort.open_session(artifact.file("model.onnx"), graph, threads=threads)
    runner = schedule.with_steps(ort.OrtRunner(session), graph, artifact)
    return names[0], session, Engine(bundle, names[0], artifact, runner=runner)


def recorded(engine: Engine, rows: int, step: int | None = None):
    """Returns the first rows of a recorded call."""
    step = engine.bundle.info["golden"]["steps"][0] if step is None else step
    feeds = golden.read(engine.bundle, f"{step}/feeds/")
    if rows > len(feeds["timestep"]):
        raise UserError(f"{rows} rows: {len(feeds['timestep'])} were recorded", fix="ask for a smaller --batch")
    return {name: value[:rows] for name, value in feeds.items()}


def overhead(engine: Engine, session: Any, feeds: Feeds, calls: int):
    """Times Engine.run, which checks and converts, against its session, which is given what that makes of the feeds."""
    types = {value.name: np.float16 if value.type == "tensor(float16)" else None for value in session.get_inputs()}
    given = dict(feeds)
    if schedule.ROW in types:
        steps = len(engine.artifact.info["graph"]["fed_timesteps"])
        given[schedule.ROW] = schedule.read_table(engine.artifact, steps)[feeds["step"]]
    bare = {name: given[name] if kind is None else given[name].astype(kind) for name, kind in types.items()}
    ours, theirs = paired(lambda: engine.run(feeds), lambda: session.run(None, bare), calls)
    what = f"Engine.run over its bare session, {len(feeds['timestep'])} rows"
    return compared(what, ours, theirs, MOST_OVER_BARE)


def loading(path: Path, name: str, threads: int, loads: int):
    """Times engines.load against creating its session, to which the hashing of the bundle's bytes is added."""
    bundle = open_bundle(path)
    artifact = bundle.engine(name)
    size = bundle.artifact.bytes + (bundle.path / MANIFEST).stat().st_size
    ours, created = paired(
        lambda: engines.load(path, engine=name, threads=threads),
        lambda: ort.open_session(artifact.file("model.onnx"), artifact.info["graph"], threads=threads),
        loads,
        warm_up=1,
    )
    row = compared("loading over session and hashing", ours, created + size / HASHED, MOST_LOADING)
    return row | {"bytes": size, "session_ms": 1e3 * float(np.median(created))}


def together(engine: Engine, workers: int, calls: int):
    """Has threads call one engine at once; returns how many outputs are other than those of one thread."""
    steps = engine.bundle.info["golden"]["steps"]
    fed = [recorded(engine, rows, step) for step in steps for rows in (1, 2, 3)]
    alone = [engine.run(feeds) for feeds in fed]

    def differs(number: int) -> bool:
        output = engine.run(fed[number % len(fed)])
        return any(not np.array_equal(value, alone[number % len(fed)][name]) for name, value in output.items())

    started = time.perf_counter()
    with ThreadPoolExecutor(workers) as pool:
        wrong = sum(pool.map(differs, range(workers * calls)))  # an error in one of them ends it all
    return {
        "what": f"outputs that differ, {workers} threads of {calls} calls", "value": wrong, "interval": None,
        "limit": 0, "passed": wrong == 0, "detail": f"{time.perf_counter() - started:.1f} s, no error",
    }  # fmt: skip


def beside_cpp(program: Path | None, path: Path, engine: Engine, threads: int, rounds: int, calls: int):
    """Times the C++ runtime's program and this runtime in turn, each for so many calls a round."""
    what = "C++ over Python"
    if program is None:
        why = "not timed: give --cpp"
        return {"what": what, "value": None, "interval": None, "limit": MOST_CPP, "passed": None, "detail": why}
    asked = {"--engine": engine.name, "--threads": threads, "--bench": calls}
    command = [str(program.resolve()), str(path), *(str(part) for pair in asked.items() for part in pair)]
    theirs, ours = [], []
    for _ in range(rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"{' '.join(command)}: ended with {done.returncode}: {done.stderr.strip()}", fix="mend it")
        found = json.loads(done.stdout)
        theirs.append(np.median(found["ms"]) / 1e3)
        feeds = recorded(engine, found["rows"])
        ours.append(np.median(timed(lambda feeds=feeds: engine.run(feeds), calls)))
    row = compared(f"{what}, {found['rows']} rows", np.array(theirs), np.array(ours), MOST_CPP)
    return row | {"passed": row["interval"][0] <= MOST_CPP}


def paired(one: Callable, other: Callable, count: int, warm_up: int = WARM_UP):
    """Returns the seconds that each took, [count] and [count], called in turn, in an order that changes."""
    for _ in range(warm_up):
        one(), other()
    seconds = np.empty((count, 2))
    for i in range(count):
        for which in (0, 1) if i % 2 else (1, 0):
            started = time.perf_counter()
            (one, other)[which]()
            seconds[i, which] = time.perf_counter() - started
    return seconds[:, 0], seconds[:, 1]


def timed(call: Callable, count: int) -> Seconds:
    return paired(call, lambda: None, count)[0]


def compared(what: str, ours: Seconds, theirs: Seconds, limit: float):
    """Returns a row: the ratio of the medians of pairs [n], and its interval."""
    picks = np.random.default_rng(0).integers(len(ours), size=(RESAMPLES, len(ours)))
    ratios = np.median(ours[picks], axis=1) / np.median(theirs[picks], axis=1)
    value, (low, high) = float(np.median(ours) / np.median(theirs)), np.quantile(ratios, [0.025, 0.975])
    times = " against ".join(f"{1e3 * np.median(seconds):.3f} ms" for seconds in (ours, theirs))
    return {
        "what": what, "value": value, "interval": [float(low), float(high)], "limit": limit, "passed": value <= limit,
        "detail": f"{times}, {len(ours)} pairs",
    }  # fmt: skip


def machine():
    """Returns what decides how fast hashing is, and how fast it is."""
    data = np.random.default_rng(0).bytes(HASH_BYTES)
    hashlib.sha256(data[: HASH_BYTES // 8])
    started = time.thread_time()  # what a core takes, however many others want it
    hashlib.sha256(data)
    speed = HASH_BYTES / (time.thread_time() - started)
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8") if info.is_file() else ""
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "cpu": model or platform.processor(), "cores": os.cpu_count(), "sha_instructions": " sha_ni" in text,
        "sha256_bytes_per_second": speed,
    }  # fmt: skip


def show(found: Json) -> None:
    from rich.console import Console
    from rich.table import Table

    about = found["machine"]
    table = Table(title=f"{found['bundle']}, engine {found['engine']}, threads {found['threads'] or 'all'}")
    for column in ("what", "value", "95 %", "at most", "", "detail"):
        table.add_column(column)
    for row in found["rows"]:
        value = "" if row["value"] is None else f"{row['value']:.3f}" if row["interval"] else str(row["value"])
        interval = "{:.3f} … {:.3f}".format(*row["interval"]) if row["interval"] else ""
        result = {True: "passed", False: "FAILED", None: ""}[row["passed"]]
        table.add_row(row["what"], value, interval, f"{row['limit']:g}", result, row["detail"])
    console = Console(width=None if os.isatty(1) else 160)
    console.print(table)
    instructions = "with" if about["sha_instructions"] else "without"
    console.print(
        f"{about['cpu']}, {about['cores']} cores; sha256 {about['sha256_bytes_per_second'] / 1e9:.2f} GB/s a core, "
        f"{instructions} SHA instructions"
    )


if __name__ == "__main__":
    main()
