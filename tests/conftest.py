"""What the tests share: the shipped model, a tiny one, and the artifacts of each recipe, made once for all tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache

import pytest
from common import ROOT, TINY
from filelock import FileLock

import exporter  # noqa: F401  first of all: it sets how torch's threads wait

LONGEST = ("test_family_unets.py", "test_end_to_end.py", "test_family_transformers.py", "test_resume.py")
LONGEST += ("test_end_to_end_steps.py", "test_cli.py", "test_stepped.py", "test_end_to_end_codebooks.py")
LONGEST += ("test_pipeline.py", "test_diffusers_pipelines.py")


def pytest_collection_modifyitems(items):
    """Puts the longest files first, so that two processes end at about the same time.

    xdist must be told to leave it so: --no-loadscope-reorder. It would put those of the most tests first.
    """
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def cli():
    """Runs the command line in a process of its own; returns the finished process."""

    def run(*arguments: object, timeout: float = 600, **options: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "exporter", *map(str, arguments)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "160"}
        return subprocess.run(
            command, capture_output=True, text=True, timeout=timeout, env=environment, check=False, **options
        )

    return run


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A diffusers folder with a tiny DiT's config and, as diffusers itself saves them, random weights."""
    import torch
    from diffusers import DiTTransformer2DModel

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = {key: value for key, value in TINY.items() if not key.startswith("_")}
    DiTTransformer2DModel(**config).save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="module")
def calibrated_family(tmp_path_factory):
    """Returns a family's small random model and its calibration, made when first asked for."""
    from road import calibrated

    return cache(lambda name: calibrated(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def tiny_recipe(tmp_path):
    """A recipe file that calibrates on two trajectories only."""
    path = tmp_path / "tiny.toml"
    path.write_text(
        """
        [calibration]
        samples = 2
        [[rule]]
        layers = "*"
        scope = "outside_blocks"
        keep = "float"
        [[rule]]
        layers = "*"
        weight = { format = "int", bits = 8 }
        activation = { format = "int", bits = 8 }
        """
    )
    return path


@pytest.fixture(scope="session")
def checkpoint():
    from exporter.checkpoint import open_checkpoint

    return open_checkpoint("digits-dit")


@pytest.fixture(scope="session")
def artifacts_folder(tmp_path_factory):
    """A folder that all test processes share: a stage that one of them ran is up to date for the others."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "artifacts"
    folder.mkdir(exist_ok=True)
    return folder


def once(stage, *arguments, out, **options):
    """Runs a stage into `out`, unless another process is just doing so: then waits, and finds it up to date."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.with_name(f"{out.name}.lock")):
        return stage(*arguments, out=out, **options)


@pytest.fixture(scope="session")
def calibration(checkpoint, artifacts_folder):
    from exporter.calibrate import calibrate

    return once(calibrate, checkpoint, out=artifacts_folder / "calibration", samples=64)


@pytest.fixture(scope="session")
def quantized_of(checkpoint, calibration, artifacts_folder):
    """Returns the Quantized artifact of a recipe, made when first asked for."""
    from exporter.quantize import quantize
    from exporter.recipe import load

    return cache(
        lambda name: once(quantize, checkpoint, load(name), calibration, out=artifacts_folder / name / "quantized")
    )


@pytest.fixture(scope="session")
def graph_of(quantized_of, artifacts_folder):
    """Returns the graph of a recipe in a float type, made when first asked for."""
    from exporter.lower import lower

    return cache(
        lambda name, dtype: once(lower, quantized_of(name), out=artifacts_folder / name / "graph" / dtype, dtype=dtype)
    )


@pytest.fixture(scope="session")
def engine_of(graph_of, artifacts_folder):
    """Returns the engine of a recipe for a backend, in the backend's own float type, made when first asked for."""
    from engines import backends
    from engines.build import build

    @cache
    def get(name: str, backend: str):
        graph = graph_of(name, backends.load(backend).DTYPE)
        return once(build, graph, backend, out=artifacts_folder / name / "engines" / backend, gpu="sm89")

    return get


@pytest.fixture(scope="session")
def run_of(checkpoint, quantized_of, graph_of, engine_of, artifacts_folder):
    """Returns the folder of a recipe's run, built for ONNX Runtime and judged by a few images, made when asked for."""
    from exporter.run import report
    from exporter.run_folder import open_artifacts

    @cache
    def get(name: str):
        folder = artifacts_folder / "runs" / name  # what lies in the artifacts' own folder other tests add to
        made = {
            "quantized": quantized_of(name),
            "graph/fp32": graph_of(name, "fp32"),
            "engines/ort": engine_of(name, "ort"),
        }
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{name}.lock")):
            for place, artifact in made.items():
                if not (folder / place).exists():
                    shutil.copytree(artifact.path, folder / place, copy_function=os.link)
            report(checkpoint, open_artifacts(folder), folder, seed=0, images=8)
        return folder

    return get


@pytest.fixture(scope="session")
def plan_of(engine_of):
    """Returns an engine's plan rows."""
    from engines.plans import read_plan

    return lambda name, backend: read_plan(engine_of(name, backend))


@pytest.fixture(scope="session")
def library():
    """The built library; where continuous integration must have built it, its absence is a failure."""
    from engines import native

    if native.library() is None:
        missing = pytest.fail if os.environ.get("EXPORT_ENGINE_NATIVE") == "required" else pytest.skip
        missing(f"no native kernels: {native.why_not()}")
    return native.library()
