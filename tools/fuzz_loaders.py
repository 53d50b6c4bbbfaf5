"""Fuzzes what reads files that others made: every input is read, or refused with a message; anything else is a fault.

`python tools/fuzz_loaders.py zip --runs 1000000 --out out/fuzz` runs atheris (pip install '.[fuzz]'),
guided by coverage, from the corpus in tests/corpus; what it finds lies in --out, and belongs into the corpus, as
fault-NAME, once it is mended. `--cpp build/fuzz/fuzz/fuzz_zip` runs a fuzzer of the C++ library instead, and
`--table` prints what all in --out gave. docs/fuzzing.md says more.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

try:
    import atheris
except ImportError:
    atheris = None
sys.path[:0] = [str(Path(__file__).parent)]
watched = ["engines", "exporter", "zipfile", "tomllib"]
with atheris.instrument_imports(include=watched) if atheris else contextlib.nullcontext():
    import fuzz_targets

CORPUS = fuzz_targets.ROOT / "tests/corpus"
MAX_RSS_GROWTH = 256 << 20  # bytes beyond what the first thousand inputs needed: the fuzzer's own corpus lies in memory
SECONDS = 20  # that one input may take, on a busy machine


class Watch:
    """Feeds a target, counts, and writes its result once it is through."""

    def __init__(self, target: str, runs: int, out: Path, place: fuzz_targets.Place) -> None:
        self.target, self.runs, self.out, self.place = target, runs, out, place
        self.done, self.started, self.rss = 0, time.monotonic(), 0

    def one(self, data: bytes) -> None:
        fuzz_targets.once(self.target, self.place, data)
        self.done += 1
        if self.done == min(1000, self.runs):
            self.rss = _peak_rss()
        if self.done == self.runs:
            self._write()
            shutil.rmtree(self.place.path)  # libFuzzer ends the process where it stands

    def _write(self) -> None:
        write(self.out, self.target, self.done, time.monotonic() - self.started, _peak_rss() - self.rss)


def write(out: Path, target: str, runs: int, seconds: float, growth: int) -> None:
    """Writes a target's result, unless memory grew, which is a fault as well."""
    if growth > MAX_RSS_GROWTH:
        raise MemoryError(f"memory grew by {growth} bytes")
    result = {"target": target, "runs": runs, "seconds": round(seconds, 1), "rss_growth_bytes": growth}
    (out / f"{target}.json").write_text(json.dumps(result) + "\n", encoding="utf-8")


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_cpp(program: Path, runs: int, out: Path) -> None:
    """Runs a fuzzer of the C++ library from its whole inputs and the corpus that it shares with Python's."""
    import cpp_fuzz_seeds

    name = program.name.removeprefix("fuzz_")
    corpus = out / f"cpp-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    (out / f"{corpus.name}.json").unlink(missing_ok=True)  # of a run before: this one may find a fault
    cpp_fuzz_seeds.main(out / "cpp-seeds")
    options = [f"-runs={runs}", f"-timeout={SECONDS}", "-print_final_stats=1", f"-artifact_prefix={corpus}-"]
    command, started = [program, corpus, out / "cpp-seeds" / name, *options], time.monotonic()
    environment = os.environ | {
        "ASAN_OPTIONS": "quarantine_size_mb=16"
    }  # else what was freed is held, and looks leaked
    done = subprocess.run(
        list(map(str, command)), stderr=subprocess.PIPE, text=True, errors="replace", check=False, env=environment
    )
    if done.returncode:
        sys.exit(done.stderr[-8000:])
    executed = re.findall(r"number_of_executed_units: (\d+)", done.stderr)
    used = [int(megabytes) << 20 for megabytes in re.findall(r" rss: (\d+)Mb", done.stderr)]
    write(out, corpus.name, int(executed[0]), time.monotonic() - started, max(used) - used[0])


def table(folder: Path) -> str:
    """Returns what the runs of a folder gave, in Markdown; faults are those that the corpus holds, mended.

    C++'s fuzzers add theirs to the corpora of Python's, whose rows count them.
    """
    lines = ["| target | executions | seconds | faults mended | memory growth, MB |", "|---|---|---|---|---|"]
    for file in sorted(folder.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        own = CORPUS / found["target"]
        faults = len(list(own.glob("fault-*"))) if own.is_dir() else "–"
        lines.append(
            f"| `{found['target']}` | {found['runs']:,} | {found['seconds']:,.0f} | {faults} | "
            f"{found['rss_growth_bytes'] / 1e6:.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", choices=list(fuzz_targets.TARGETS))
    parser.add_argument("--runs", type=int, default=1_000_000)
    parser.add_argument("--cpp", type=Path, metavar="PROGRAM", help="Run this fuzzer of the C++ library.")
    parser.add_argument("--table", action="store_true", help="Print the results in --out instead.")
    parser.add_argument("--out", type=Path, required=True, help="Folder of the growing corpus, and of what is found.")
    arguments = parser.parse_args()
    if arguments.table:
        print(table(arguments.out))
        return
    if arguments.cpp is not None:
        run_cpp(arguments.cpp, arguments.runs, arguments.out)
        return
    if arguments.target is None or atheris is None:
        sys.exit("name a target" if atheris else "atheris is not installed\n  fix: pip install '.[fuzz]'")
    warnings.simplefilter("ignore")  # of numbers that overflow: they are the input's
    corpus = arguments.out / arguments.target
    corpus.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"{arguments.target}.json").unlink(missing_ok=True)  # of a run before: this one may find a fault
    for name, content in fuzz_targets.seeds(arguments.target).items():
        (corpus / f"seed-{name}").write_bytes(content)
    for file in (CORPUS / arguments.target).glob("*"):
        shutil.copyfile(file, corpus / file.name)
    options = [f"-atheris_runs={arguments.runs}", f"-timeout={SECONDS}", f"-artifact_prefix={corpus}-"]
    with fuzz_targets.Place() as place:
        fuzz_targets.once(arguments.target, place, b"")  # libraries that are imported when first needed take long
        watch = Watch(arguments.target, arguments.runs, arguments.out, place)
        atheris.Setup([sys.argv[0], *options, str(corpus)], watch.one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
