"""Builds run in a process of their own: a crash or a refusal there is a message here, and leaves nothing."""

from __future__ import annotations

import os
import signal

import pytest

from engines import build
from engines.artifacts import Artifact
from engines.errors import UserError
from engines.options import Options


@pytest.fixture
def graph(tmp_path):
    return Artifact(tmp_path, {"digest": "0" * 64, "info": {"layers": {}, "points": {}, "dtype": "fp16"}, "files": {}})


def worker(monkeypatch, script):
    """Puts a shell command in the builder's place."""
    monkeypatch.setattr(build.sys, "executable", "/bin/sh")
    popen = build.subprocess.Popen
    monkeypatch.setattr(
        build.subprocess, "Popen", lambda command, **options: popen(["/bin/sh", "-c", script], **options)
    )


def test_a_builder_that_crashes_is_a_message_with_its_signal(graph, monkeypatch, tmp_path):
    worker(monkeypatch, f"kill -{int(signal.SIGSEGV)} $$")
    with pytest.raises(UserError, match=r"trt-rtx builder crashed \(SIGSEGV\)"):
        build.build(graph, "trt-rtx", tmp_path / "engine", gpu="sm89")
    assert not list(tmp_path.iterdir())


def test_a_refusal_in_the_worker_keeps_its_fix(graph, monkeypatch, tmp_path):
    worker(monkeypatch, """echo '{"what": "no such op", "fix": "keep it in float"}'; exit 2""")
    with pytest.raises(UserError, match="no such op") as caught:
        build.build(graph, "ort", tmp_path / "engine")
    assert caught.value.fix == "keep it in float"
    assert not list(tmp_path.iterdir())


def test_a_bug_in_the_worker_is_not_blamed_on_the_user(graph, monkeypatch, tmp_path):
    worker(monkeypatch, "echo Traceback: oh no >&2; exit 1")
    with pytest.raises(RuntimeError, match="oh no"):
        build.build(graph, "ort", tmp_path / "engine")


@pytest.fixture
def worked(graph, monkeypatch):
    """Puts a worker in place that builds for trt at once; returns the options that it was given, by call."""
    asked = []

    def run(backend, graph, folder, gpu, options):
        asked.append(options)
        (folder / "plan.json").write_text("[]")
        return {}, None

    graph.manifest["info"] |= {"module_bytes": {}, "weight_bytes": 0}
    monkeypatch.setattr(build, "_run_worker", run)
    monkeypatch.setattr(build, "check_compression", lambda *arguments: None)
    module = build.backends.load("trt")
    monkeypatch.setattr(module, "resolve_gpu", lambda gpu: "sm89")
    monkeypatch.setattr(module, "fingerprint", lambda: {"tensorrt": "11.4.0"})
    return asked


def test_options_that_decide_an_engine_are_in_its_digest_and_timings_are_not(graph, worked, tmp_path):
    def made(**options):
        return build.build(graph, "trt", tmp_path / "engine", options=Options(**options))

    first = made()
    assert first.manifest["settings"] == {
        "backend": "trt", "gpu": "sm89", "decode": None, "refit": False, "weight_streaming": None,
    }  # fmt: skip
    assert made(timing_cache=str(tmp_path / "elsewhere")).digest == first.digest
    assert len(worked) == 1
    refitted, streamed = made(refit=True), made(weight_streaming=1000)
    assert len({first.digest, refitted.digest, streamed.digest}) == len(worked) == 3
    assert streamed.info["weight_streaming"] == 1000


def test_timings_are_kept_beside_the_engine_or_where_they_are_asked_for(graph, worked, tmp_path):
    build.build(graph, "trt", tmp_path / "one")
    build.build(graph, "trt", tmp_path / "two", options=Options(timing_cache="mine"))
    assert [options.timing_cache for options in worked] == [str(tmp_path / "one.timing_cache"), "mine"]


def test_an_option_that_a_backend_lacks_is_refused_before_anything_is_built(graph, tmp_path):
    with pytest.raises(UserError, match="--refit: ort has no such option"):
        build.build(graph, "ort", tmp_path / "engine", options=Options(refit=True))
    assert not list(tmp_path.iterdir())


def test_the_workers_notes_reach_the_user_and_its_librarys_talk_does_not(graph, monkeypatch, capfd, tmp_path):
    told = """echo 'Internal Error: none of yours' >&2; echo 'note: timings left aside' >&2"""
    worker(monkeypatch, told + """; echo '{"widened": {}, "peak_rss_bytes": 1}'""")
    assert build._run_worker("trt", graph, tmp_path, "sm89", Options()) == ({}, 1)
    assert capfd.readouterr().err == "note: timings left aside\n"


def test_a_worker_ends_with_its_parent(tmp_path):
    """The worker reads a pipe that only its parent holds open, and exits when that ends."""
    read, write = os.pipe()
    child = build.subprocess.Popen(
        [
            build.sys.executable,
            "-c",
            "from engines import build; build._die_with_parent(); import time; time.sleep(60)",
        ],
        stdin=read,
        env=os.environ | {"PYTHONPATH": str(build.Path(build.__file__).parent.parent)},
    )
    os.close(read)
    assert child.poll() is None
    os.close(write)
    assert child.wait(timeout=30) == 1
