"""What runs without torch: bundles, artifacts, engine backends and their runners. An application embeds this package.

`engines.load("bundle/")` is the way in, and `engines.load_pipeline("bundle/")` to a pipeline that draws from captions.
Into a pipeline of diffusers it is `engines.diffusers.denoiser("bundle/")`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.errors import UserError
    from engines.loading import Engine, load
    from engines.pipeline import Pipeline, load_pipeline

__all__ = ["Engine", "Pipeline", "UserError", "load", "load_pipeline"]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Imports what an application asks for when it does, so that the tools' start stays quick."""
    if name in ("Engine", "load"):
        from engines import loading

        return getattr(loading, name)
    if name in ("Pipeline", "load_pipeline"):
        from engines import pipeline

        return getattr(pipeline, name)
    if name == "UserError":
        from engines.errors import UserError

        return UserError
    if name == "diffusers":
        import importlib

        return importlib.import_module("engines.diffusers")
    raise AttributeError(f"module 'engines' has no attribute {name!r}")
