"""Versions of the libraries that decide what a stage makes, for its request."""

from __future__ import annotations

from importlib.metadata import version

from engines.version import __version__


def versions(*libraries: str) -> dict[str, str]:
    return {"export_engine": __version__, **{name: version(name) for name in libraries}}
