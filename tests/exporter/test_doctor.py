"""The doctor says what is here without what is heavy, and what is missing does not stop it."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from common import ROOT

from engines import backends
from exporter import doctor, installed
from exporter.cli import main


@pytest.fixture
def without(monkeypatch):
    """Makes a library one that is not installed."""

    def hide(name):
        monkeypatch.setitem(sys.modules, name, None)
        found = installed.version_of
        monkeypatch.setattr(
            installed, "version_of", lambda one: None if one.replace("-", "_").startswith(name) else found(one)
        )

    return hide


def test_json_is_one_document_with_every_backend_and_library():
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert [row["name"] for row in found["backends"]] == backends.names()
    assert {"torch", "onnxscript"} <= {row["name"] for row in found["libraries"]}
    assert found["cpu"]["count"] >= 1
    assert found["memory_bytes"] > 1 << 28
    assert found["fix"] is None


def test_a_backend_whose_library_is_missing_says_so_and_what_to_install(without):
    without("tensorrt_rtx")
    row = doctor.backend("trt-rtx")
    assert "cannot be imported" in row["cannot_build"]
    assert "pip install tensorrt-rtx-cu13" in row["cannot_build"]
    assert doctor.backend("ort")["cannot_build"] is None


def test_tensorrt_is_said_to_build_where_there_is_a_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "pip install tensorrt" in doctor.backend("trt")["cannot_build"]
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
    assert "this machine has none" in doctor.backend("trt")["cannot_build"]
    monkeypatch.setattr(doctor.gpu, "detect", lambda: "sm89")
    monkeypatch.setitem(sys.modules, "cuda", None)
    row = doctor.backend("trt")
    assert (row["cannot_build"], row["gpus"]) == (None, ["sm89"])
    assert "cuda-python" in row["cannot_run"]


def test_a_required_library_that_is_missing_ends_the_command_with_its_fix(without):
    without("torch")
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 2
    assert json.loads(result.stdout)["lacking"] == ["torch"]
    assert "pip install 'torch==2.13.0'" in result.stderr


def test_the_tables_name_what_is_missing(without):
    without("diffusers")
    result = CliRunner().invoke(main, ["doctor"], env={"COLUMNS": "200"})
    assert result.exit_code == 2
    assert any("diffusers" in line and "missing" in line for line in result.stdout.splitlines())


def test_nothing_heavy_is_imported():
    heavy = "torch", "diffusers", "transformers", "onnx", "scipy"
    code = f"import sys; from exporter import doctor; doctor.doctor(); print([m for m in {heavy} if m in sys.modules])"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]"
