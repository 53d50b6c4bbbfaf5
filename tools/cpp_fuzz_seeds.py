"""Writes a corpus for each fuzzer of the C++ library to start from (engines/cpp/fuzz).

python tools/cpp_fuzz_seeds.py FOLDER
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import bundles  # noqa: E402
import cpp_bundles  # noqa: E402

from engines.zipped import pack  # noqa: E402

SHARED = {"json": "manifest", "safetensors": "safetensors", "npy": "step_table", "onnx": "onnx", "zip": "zip"}


def main(out: Path) -> None:
    """Writes one folder for each fuzzer; what the fuzzing of Python has found is among it."""
    for name in ("json", "manifest", "safetensors", "npy", "onnx", "zip"):
        (out / name).mkdir(parents=True, exist_ok=True)
    info = bundles.info("row", guided=True)
    cpp_bundles.with_pipeline(info)
    for name in ("json", "manifest"):
        (out / name / "info").write_text(json.dumps(info))
    (out / "safetensors/golden").write_bytes(save(bundles.golden("row")))
    np.save(out / "npy/table.npy", np.zeros((3, 2), np.float32))
    (out / "onnx/network").write_bytes(bundles.network("row").SerializeToString())
    (out / "onnx/outside").write_bytes(cpp_bundles.outside())
    with tempfile.TemporaryDirectory() as place:
        pack(bundles.tiny_bundle(Path(place) / "tiny"), out / "zip/tiny.zip")
    cpp_bundles.zipped(out / "zip/link.zip", cpp_bundles.ZIPPED["link.zip"][0])
    for name, shared in SHARED.items():
        for file in (ROOT / "tests/corpus" / shared).glob("*"):
            shutil.copyfile(file, out / name / file.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
