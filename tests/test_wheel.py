"""The wheel: what it holds, that the tools run from it, and that an application runs bundles from it without torch."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import bundles
import pytest
from common import ROOT

from exporter.bundle import bundle

PACKAGES = ("exporter", "engines", "calib_data")
HEADERS = ROOT / "build/ort-headers/usr/include/onnxruntime"  # where ci/ort_headers.sh puts them
BUILT = ("*.pyc", "__pycache__", "*.so", "why_not.txt")  # what the working tree holds of other builds
KERNELS = ("codebook_ops.so", "why_not.txt")
RUNTIME = ("numpy", "onnxruntime", "safetensors")  # all that docs/bundle.md asks an application to install


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of a copy of the tree, with native kernels where their headers are."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, source / name)
    headers = {"EXPORT_ENGINE_ORT_INCLUDE": str(HEADERS)} if HEADERS.is_dir() else {}
    for name in KERNELS:  # as an editable install of that tree has
        (source / "engines/native" / name).write_text("of an editable install")
    pip("wheel", source, "--no-deps", "--no-build-isolation", "--wheel-dir", place, environment=headers)
    (made,) = place.glob("*.whl")
    return made


def test_a_wheel_that_is_built_leaves_the_kernels_of_an_editable_install_alone(wheel):
    for name in KERNELS:
        assert (wheel.parent / "source/engines/native" / name).read_text() == "of an editable install"


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder into which the wheel alone is installed."""
    folder = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--no-deps", "--no-compile", "--target", folder)
    return folder


@pytest.fixture(scope="module")
def bare(installed, tmp_path_factory):
    """The Python of a virtual environment that has the wheel, and of its dependencies those of the runtime alone."""
    folder = tmp_path_factory.mktemp("bare") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (packages,) = folder.glob("lib/python3*/site-packages")
    for part in (*(part for name in RUNTIME for part in parts_of(name)), *installed.iterdir()):
        (packages / part.name).symlink_to(part)
    return folder / "bin/python"


def pip(*arguments, environment=None):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | (environment or {}))
    assert done.returncode == 0, done.stdout + done.stderr


def parts_of(name):
    """Returns what an installed package put beside other packages: its folder, and that of its libraries."""
    folder = Path(importlib.util.find_spec(name).origin).parent
    return [path for path in (folder, folder.with_name(f"{name}.libs")) if path.is_dir()]


def run(python, script, *arguments, cwd):
    """Runs a script with nothing but its own environment's packages."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [str(python), "-c", script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_holds_the_packages_their_data_and_nothing_else(wheel):
    own = {
        path.relative_to(ROOT).as_posix()
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and path.suffix not in (".pyc", ".so") and path.name != "why_not.txt"
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    (native,) = held & {"engines/native/codebook_ops.so", "engines/native/why_not.txt"}
    assert native.endswith(".so") or not HEADERS.is_dir()
    assert {"exporter/recipes/fp8.toml", "exporter/templates/config.pbtxt.j2", "exporter/rates.json"} <= held
    assert "calib_data/models/digits-dit/transformer/diffusion_pytorch_model.safetensors" in held
    assert held == {name for name in own if not name.startswith("engines/cpp/")} | {native}


def test_the_tools_run_from_it(installed, tmp_path):
    script = """
import os, sys
sys.path.insert(0, sys.argv.pop(1))
import exporter
print(os.path.dirname(os.path.dirname(exporter.__file__)))
from exporter.cli import main
main(["doctor"], prog_name="export-engine")
"""
    told = run(sys.executable, script, installed, cwd=tmp_path)
    assert told.splitlines()[0] == str(installed)
    assert "this machine" in told
    assert "not built" not in told or not HEADERS.is_dir()


def test_an_application_needs_no_torch(bare, tmp_path):
    """Nor anything else but what it is told to install."""
    folder = bundles.tiny_bundle(tmp_path / "tiny", step_input="index")
    script = """
import importlib.util, sys
import numpy, engines
engine = engines.load(sys.argv[1], self_test=True)
latent = engine.sample(numpy.ones((2, 1, 2, 4), numpy.float32), {"class_labels": numpy.array([0, 1])})
assert engines.__file__.startswith(sys.prefix)
print(latent.shape, [name for name in sys.argv[2:] if importlib.util.find_spec(name)])
"""
    others = ("torch", "diffusers", "transformers", "onnx", "rich", "click", "packaging", "pip")
    assert run(bare, script, folder, *others, cwd=tmp_path) == "(2, 1, 2, 4) []"


def test_an_application_draws_digits_without_torch(bare, run_of, tmp_path):
    made = bundle(run_of("int8"), tmp_path / "int8").path
    script = """
import sys
import numpy, engines
engine = engines.load(sys.argv[1])
noise = numpy.random.default_rng(0).standard_normal((2, 1, 8, 8), numpy.float32)
drawn = engine.sample(noise, {"class_labels": numpy.array([3, 8])})
print(drawn.shape, numpy.abs(drawn).max() < 2, engine.self_test()[-1]["what"])
"""
    assert run(bare, script, made, cwd=tmp_path) == "(2, 1, 8, 8) True 4 samples"
