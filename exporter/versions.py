"""Versions of the libraries that decide what a stage makes, for its request."""

from __future__ import annotations

from importlib.metadata import version

from engines.version import code_version


def versions(*libraries: str) -> dict[str, str]:
    return {"export_engine": code_version(), **{name: version(name) for name in libraries}}
