"""kill -9 in any stage, then the same command again: it resumes, and the end is that of an undisturbed run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from common import ROOT, TINY

MEASURED = {"timings.json", "report.html"}  # and throughput in report.json, which report.html shows


def command(folder, recipe, out):
    arguments = ["run", f"random:{folder}", "--recipe", recipe, "--steps", "6", "--backend", "ort"]
    return [sys.executable, "-m", "exporter", *map(str, arguments), "--out", str(out)]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def contents(out):
    """Returns every file's bytes but the measured; report.json without its throughput."""
    found = {}
    for path in sorted(p for p in out.rglob("*") if p.is_file() and p.name not in MEASURED and p.name != ".lock"):
        name = path.relative_to(out).as_posix()
        if name == "report.json":
            report = json.loads(path.read_text())
            report.pop("throughput")
            found[name] = json.dumps(report, sort_keys=True).encode()
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of one block: what is resumed is the same with more."""
    path = tmp_path_factory.mktemp("model")
    (path / "config.json").write_text(json.dumps(TINY | {"num_layers": 1}))
    return path


@pytest.fixture(scope="module")
def slow_recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "mine.toml"
    path.write_text(
        """
        [calibration]
        samples = 40
        [[rule]]
        layers = "*"
        scope = "outside_blocks"
        keep = "float"
        [[rule]]
        layers = "*"
        weight = { format = "int", bits = 8 }
        activation = { format = "int", bits = 8, observer = "mse" }
        method = { name = "smoothquant" }
        """
    )
    return path


# What appears on disk while a stage works: the kill comes as soon as it does.
STAGES = {
    "calibrate": ".calibration.partial/shard-00000.safetensors",
    "quantize": ".quantized.partial",
    "lower": "graph/.fp32.partial",
    "build": "engines/.ort.partial",
    "validate": "engines/ort/manifest.json",
}


def test_a_run_killed_in_every_stage_ends_like_an_undisturbed_one(folder, slow_recipe, tmp_path):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    done = subprocess.run(command(folder, slow_recipe, undisturbed), env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr
    for stage, sign in STAGES.items():
        process = subprocess.Popen(
            command(folder, slow_recipe, killed), env=environment(), stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while not (killed / sign).exists():
            assert process.poll() is None, f"ended before {stage} could be killed"
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (killed / "report.json").exists()
    resumed = subprocess.run(command(folder, slow_recipe, killed), env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stderr.count("unchanged, kept") == 4  # all stages but validate
    expected, found = contents(undisturbed), contents(killed)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []


def test_ctrl_c_stops_cleanly_and_what_is_finished_is_kept(folder, slow_recipe, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command(folder, slow_recipe, out),
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    while not (out / STAGES["quantize"]).exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130
    assert "goes on from there" in errors
    assert "Traceback" not in errors
    assert (out / "calibration" / "manifest.json").is_file()


def test_a_second_run_into_the_same_folder_is_refused_while_the_first_works(folder, slow_recipe, tmp_path, cli):
    out = tmp_path / "out"
    first = subprocess.Popen(
        command(folder, slow_recipe, out), env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    try:
        while not (out / ".calibration.partial").exists():
            assert first.poll() is None
            time.sleep(0.002)
        second = cli("run", f"random:{folder}", "--recipe", slow_recipe, "--out", out)
        assert second.returncode == 2
        assert "another run is writing here" in second.stderr
    finally:
        first.kill()
        first.wait()
