"""Builds run in a process of their own: a crash or a refusal there is a message here, and leaves nothing."""

from __future__ import annotations

import os
import signal

import pytest

from engines import build
from engines.artifacts import Artifact
from engines.errors import UserError


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
