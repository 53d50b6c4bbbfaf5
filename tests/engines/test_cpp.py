"""The C++ library: built with sanitizers and no warning, it gives what the Python runtime gives, and refuses as it does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import zipfile

import bundles
import numpy as np
import onnx
import pytest
from common import ROOT
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save
from test_bundle import link, packed_entry, resign, zipped

import engines
from engines import native
from engines.bundle import FORMAT_VERSION, GOLDEN, pack

SOURCE = ROOT / "engines/cpp"
SANITIZERS = "address,undefined"


def lacking(what):
    """Ends a test that lacks a tool; where continuous integration must have it, that is a failure."""
    (pytest.fail if os.environ.get("EXPORT_ENGINE_CPP") == "required" else pytest.skip)(f"no C++ library: {what}")


def done(*command, **options):
    found = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, **options)
    assert found.returncode == 0, f"{found.stdout[-3000:]}\n{found.stderr[-3000:]}"
    return found.stdout


@pytest.fixture(scope="module")
def onnxruntime_root(tmp_path_factory):
    """A folder as an official release is laid out: headers, and the Python package's library under its soname."""
    import onnxruntime
    from setup_headers import include_folder

    headers = include_folder()
    libraries = sorted((onnxruntime_folder := __import__("pathlib").Path(onnxruntime.__file__).parent).glob("capi/libonnxruntime.so.*"))
    del onnxruntime_folder
    if headers is None or not libraries:
        lacking("ONNX Runtime's headers, or its library, are not there")
    root = tmp_path_factory.mktemp("onnxruntime")
    (root / "include").symlink_to(headers)
    (root / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (root / "lib" / name).symlink_to(libraries[-1])
    return root
