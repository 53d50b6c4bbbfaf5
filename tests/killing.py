"""A training that is killed, for the tests of methods that train."""

from __future__ import annotations

import contextlib

import pytest

from exporter import reconstruct


@contextlib.contextmanager
def killed_after(saves, monkeypatch):
    """Interrupts what trains within as soon as it has saved its state so many times: it does after every iteration."""
    count, original = 0, reconstruct._Saved.save

    def save(*arguments):
        nonlocal count
        original(*arguments)
        count += 1
        if count == saves:
            raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(reconstruct, "SAVE_SECONDS", 0.0)
        context.setattr(reconstruct, "SAVE_SHARE", float("inf"))
        context.setattr(reconstruct._Saved, "save", save)
        with pytest.raises(KeyboardInterrupt):
            yield
