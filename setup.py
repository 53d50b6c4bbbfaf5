"""Builds the native kernels of engines/native where it can; an install never fails for want of them.

They need a C++17 compiler (GCC or Clang) and ONNX Runtime's C++ headers, of version 1.21 or later: the folder that
EXPORT_ENGINE_ORT_INCLUDE names, what ci/ort_headers.sh fetched, or the system's. Nothing is linked: the library gets
ONNX Runtime's functions from the process that loads it.
"""

import os
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).parent
HEADER = "onnxruntime_cxx_api.h"
PLACES = (
    ROOT / "build/ort-headers/usr/include/onnxruntime",
    Path("/usr/include/onnxruntime"),
    Path("/usr/local/include"),
)


def include_folder() -> Path:
    named = os.environ.get("EXPORT_ENGINE_ORT_INCLUDE")
    places = (Path(named),) if named else PLACES
    for place in places:
        if (place / HEADER).is_file():
            return place
    raise BaseError(f"no {HEADER} in {' or '.join(map(str, places))}")


class BuildOptional(build_ext):
    """Builds the library under its plain name, or says why it could not."""

    def run(self) -> None:
        # known here alone: `run` clears `inplace`; a wheel leaves the kernels of an editable install as they are
        self.into_source = bool(self.inplace or self.editable_mode)
        super().run()

    def get_ext_filename(self, name: str) -> str:
        return f"{name.replace('.', os.sep)}.so"

    def build_extension(self, extension: Extension) -> None:
        built = Path(self.get_ext_fullpath(extension.name))
        places = {built.with_name("why_not.txt")}
        if self.into_source:
            places.add(ROOT / "engines/native/why_not.txt")
        for place in places:
            place.unlink(missing_ok=True)
            place.with_name(built.name).unlink(missing_ok=True)  # one of older sources must not stay in use
        try:
            extension.include_dirs = [str(include_folder())]
            super().build_extension(extension)
        except (BaseError, CCompilerError) as error:
            for place in places:
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_text(f"{error}\n", encoding="utf-8")
            self.warn(f"no native kernels for ONNX Runtime, the portable path will run: {error}")


setup(
    cmdclass={"build_ext": BuildOptional},
    ext_modules=[
        Extension(
            "engines.native.codebook_ops",
            ["engines/native/codebook_ops.cpp"],
            depends=["engines/native/kernels.inc"],
            extra_compile_args=["-std=c++17", "-O3", "-fvisibility=hidden", "-g0"],
            language="c++",
            optional=True,  # the rest of the install goes on without its file
        )
    ],
)
