"""The C++ library: built with sanitizers and no warning, it gives and refuses what the Python runtime does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import cpp_bundles
import numpy as np
import onnxruntime
import pytest
from common import ROOT
from safetensors.numpy import load_file

import engines

SOURCE = ROOT / "engines/cpp"
SANITIZERS = "address,undefined"
HEADERS = [ROOT / "build/ort-headers/usr/include/onnxruntime", Path("/usr/include/onnxruntime")]


def done(*command, **options):
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert found.returncode == 0, f"{found.stdout[-4000:]}\n{found.stderr[-4000:]}"
    return found.stdout


@pytest.fixture(scope="module")
def headers():
    """The folder of ONNX Runtime's headers; where continuous integration must have them, their absence is a failure."""
    named = os.environ.get("EXPORT_ENGINE_ORT_INCLUDE")
    places = [place for place in ([Path(named)] if named else HEADERS) if (place / "onnxruntime_c_api.h").is_file()]
    if not places or not shutil.which("cmake"):
        missing = pytest.fail if os.environ.get("EXPORT_ENGINE_CPP") == "required" else pytest.skip
        missing(f"no C++ library: it needs cmake, and ONNX Runtime's headers in {' or '.join(map(str, HEADERS))}")
    return places[0]


@pytest.fixture(scope="module")
def release(headers, tmp_path_factory):
    """A folder laid out as ONNX Runtime's releases are: headers, and the Python package's library by its soname."""
    root = tmp_path_factory.mktemp("onnxruntime")
    (library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    (root / "include").symlink_to(headers)
    (root / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(library)
    return root


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    root = tmp_path_factory.mktemp("good")
    cpp_bundles.good(root)
    return root


@pytest.fixture(scope="module")
def built(release, good, tmp_path_factory):
    """Where the library, its tests and examples were built; a warning fails it."""
    folder = tmp_path_factory.mktemp("cpp")
    settings = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS_DEBUG": "-g1",  # line numbers alone: a quarter less to compile
        "CMAKE_CXX_FLAGS": "-Werror",
        "CMAKE_C_FLAGS": "-Werror",
        "EXPORT_ENGINE_SANITIZE": SANITIZERS,
        "CMAKE_INSTALL_PREFIX": folder / "installed",
        "ONNXRUNTIME_ROOT": release,
        "EXPORT_ENGINE_TESTS": "ON",
        "EXPORT_ENGINE_TEST_BUNDLES": good,
    }
    done("cmake", "-S", SOURCE, "-B", folder, *(f"-D{name}={value}" for name, value in settings.items()))
    done("cmake", "--build", folder, "--parallel", "2")
    return folder


def test_the_librarys_own_tests_pass(built):
    told = done("ctest", "--test-dir", built, "--output-on-failure", "--no-tests=error")
    assert "100% tests passed" in told


@pytest.fixture(scope="module")
def refused(built, tmp_path_factory):
    """What the library says of each bundle that it must refuse."""
    root = tmp_path_factory.mktemp("bad") / "bundles"  # what some would write outside of it, they would beside it
    root.mkdir()
    names = list(cpp_bundles.bad(root))
    told = done(built / "tests/refusals", *(root / name for name in names)).splitlines()
    assert not list(root.parent.glob("**/out"))
    return dict(zip(names, told, strict=True))


@pytest.mark.parametrize(("name", "told"), cpp_bundles.TOLD.items(), ids=list(cpp_bundles.TOLD))
def test_what_is_no_whole_bundle_is_refused_with_what_and_where(refused, name, told):
    assert told in refused[name]
    assert refused[name].partition(" | ")[2], "says how to mend it"


def outputs_of(built, folder, out, *options):
    done(built / "examples/export-engine-run", folder, "--out", out, *options)
    return load_file(out)


def python_outputs(folder):
    engine, golden = engines.load(folder), load_file(folder / "golden.safetensors")
    rows = engine.axes["batch"]["opt"]
    for step in engine.bundle.info["golden"]["steps"]:
        prefix = f"{step}/feeds/"
        feeds = {name.removeprefix(prefix): v[:rows] for name, v in golden.items() if name.startswith(prefix)}
        yield f"{step}/output", engine.run(feeds)[engine.output["name"]]


def assert_same_bits(folder, found):
    for name, output in python_outputs(folder):
        np.testing.assert_array_equal(found[name].view(np.int32), output.view(np.int32))


@pytest.mark.parametrize("recipe", ["fp8", "int8"])
def test_a_recipes_bundle_gives_what_python_gives_and_draws_the_same_digits(built, run_of, recipe, tmp_path):
    from exporter.bundle import bundle

    folder = bundle(run_of(recipe), tmp_path / recipe).path
    found = outputs_of(built, folder, tmp_path / "out.safetensors", "--sample", "--self-test")
    assert_same_bits(folder, found)
    golden = load_file(folder / "golden.safetensors")
    labels = {"class_labels": golden["picture/wanted/class_labels"]}
    drawn = engines.load(folder).sample(golden["picture/noise"], labels)
    assert 10 * np.log10(4 / max(1e-30, np.square(drawn - found["picture/latent"]).mean())) >= 60
    done(built / "examples/draw_digits", folder, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_a_small_stable_diffusion_is_drawn_from_token_ids_as_python_draws_it(built, tmp_path):
    from pipelines import bundled_pipeline, save_pipeline

    folder = bundled_pipeline(save_pipeline(tmp_path / "sd"), tmp_path)
    found = outputs_of(built, folder, tmp_path / "out.safetensors", "--draw", "--self-test")
    assert_same_bits(folder, found)
    golden = load_file(folder / "golden.safetensors")
    pipeline = engines.load_pipeline(folder)
    tokens, nothing = ({"tokens": golden[f"picture/{half}tokens"]} for half in ("", "unwanted_"))
    pictures = {
        "Python's": pipeline.draw_tokens(tokens, nothing, noise=golden["picture/noise"]),
        "recorded": golden["picture/picture"],
    }
    for drawn in pictures.values():
        error = float(np.square(drawn - found["picture/picture"]).mean())
        assert 10 * np.log10(4 / max(1e-30, error)) >= 60  # float sums' order is all that differs: about 120 dB


def test_codebooks_run_by_the_same_kernels(built, library, tmp_path):
    folder = cpp_bundles.codebook_bundle(tmp_path / "codebook")
    assert_same_bits(folder, outputs_of(built, folder, tmp_path / "out.safetensors"))


def test_calls_are_timed_one_by_one(built, good):
    found = json.loads(done(built / "examples/export-engine-run", good / "tiny", "--bench", "3"))
    assert found["engine"] == "ort"
    assert len(found["ms"]) == 3 and min(found["ms"]) > 0


def ran(built, *arguments):
    return subprocess.run(
        [built / "examples/export-engine-run", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "no BUNDLE"),
        (["TINY", "--bench"], "--bench wants a value"),
        (["TINY", "--bench", "x"], "--bench x: not a whole number"),
        (["TINY", "--threads", "4294967296"], "--threads 4294967296: not a whole number"),
        (["TINY", "--bench", "0"], "--bench 0: times nothing"),
        (["TINY", "--step", "2"], "there is no --bench"),
        (["TINY", "--step", "7", "--bench", "5"], "--step 7: no call was recorded there\n  fix: give one of 0, 2"),
        (["TINY", "--sample"], "--sample: nothing says where to write"),
        (["TINY", "--backend", "abacus"], "backend 'abacus': unknown to this library; the bundle has ort (ort)"),
        (["TINY", "--engine", "bad"], "engine 'bad': unknown; the bundle has ort"),
        (["TINY", "--out", "/no folder/x"], "/no folder/x: cannot be written (No such file or directory)\n  fix: name"),
        (["TINY", "--sample", "--out", "out"], "no picture/noise\n  fix: leave out --sample"),
        (["no such bundle"], "no such bundle: cannot be opened"),
        (["TINY", "--other"], "--other: unknown\nusage: "),
    ],
)
def test_the_runner_says_what_it_cannot_do(built, good, arguments, told):
    found = ran(built, *(good / "tiny" if word == "TINY" else word for word in arguments))
    assert found.returncode == 2 and not found.stdout
    assert found.stderr.startswith("error: ") and told in found.stderr


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_the_runner_tells_its_usage(built, word):
    assert done(built / "examples/export-engine-run", word).startswith("usage: export-engine-run BUNDLE")


def test_the_runner_says_what_it_opened_and_wrote(built, good, tmp_path):
    said = "tiny, recipe none, by its engine ort (fp32, ort)\n"
    assert ran(built, good / "tiny").stdout == f"{good / 'tiny'}: opened: {said}"
    out = tmp_path / "out.safetensors"
    assert ran(built, good / "tiny", "--out", out).stdout == f"{out}: 2 arrays of {said}"


def test_the_runners_self_test_is_of_the_whole_pipeline(built, good):
    told = done(built / "examples/export-engine-run", good / "pipeline", "--self-test")
    whats = ["step 0", "step 2", "2 samples", "text encoder, wanted", "text encoder, unwanted", "VAE decoder"]
    assert [line.split(": ")[1] for line in told.splitlines()] == whats
    assert ran(built, good / "other_pictures", "--self-test").returncode == 3


def test_what_a_zip_was_unpacked_into_goes_where_the_runner_fails(built, good, tmp_path):
    program = built / "examples/export-engine-run"
    found = subprocess.run(
        [program, good / "tiny.zip", "--step", "7", "--bench", "1"],
        env=os.environ | {"TMPDIR": str(tmp_path)},
        check=False,
    )
    assert found.returncode == 2
    assert not list(tmp_path.glob("export-engine-*"))


def test_a_seed_that_is_no_number_is_refused(built, good, tmp_path):
    command = [built / "examples/draw_digits", good / "tiny", tmp_path / "x.png", "x"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr.startswith("error: seed x: no whole number")


def test_an_installed_package_is_found_by_another_project(built, good, tmp_path):
    done("cmake", "--install", built)
    settings = [f"-DCMAKE_PREFIX_PATH={built / 'installed'}", f"-DCMAKE_CXX_FLAGS=-fsanitize={SANITIZERS}"]
    done("cmake", "-S", SOURCE / "tests/consumer", "-B", tmp_path, *settings)
    done("cmake", "--build", tmp_path)
    assert done(tmp_path / "consumer", good / "tiny.zip") == "tiny\n"
