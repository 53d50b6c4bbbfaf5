"""Every backend found in its folder holds what the stages ask of it."""

from __future__ import annotations

import dataclasses

import pytest

from engines import backends
from engines.errors import UserError
from engines.options import Options, flag


@pytest.mark.parametrize("name", backends.names())
def test_a_backend_holds_the_contract(name):
    backend = backends.load(name)
    assert backend.DTYPE in ("fp16", "fp32")
    assert {*backend.OPTIONS} <= {field.name for field in dataclasses.fields(Options)} - {"decode"}
    assert all(isinstance(value, str) for value in versions(backend).values())
    for function in ("resolve_gpu", "targets", "check", "note", "build", "explain", "cannot_run", "open_runner"):
        assert callable(getattr(backend, function))
    assert callable(backend.multiplied)
    reason = backend.cannot_run()
    assert reason is None or reason


def versions(backend):
    """Returns a backend's fingerprint; one whose library is not here may say how to install it instead."""
    try:
        return backend.fingerprint()
    except UserError as error:
        return {} if "pip install" in error.fix else {"no way out": None}


@pytest.mark.parametrize("name", backends.names())
def test_a_backend_refuses_the_options_that_it_lacks_and_names_one_that_has_them(name):
    for option, value in {"refit": True, "weight_streaming": "auto", "timing_cache": "file"}.items():
        asked = Options(**{option: value})
        if option in backends.load(name).OPTIONS:
            assert getattr(backends.resolve(name, asked), option) == value
            continue
        with pytest.raises(UserError, match=f"{flag(option)}.*{name} has no such option") as raised:
            backends.resolve(name, asked)
        assert "build for trt" in raised.value.fix


def test_names_have_no_underscores_and_shared_code_is_no_backend():
    assert not [name for name in backends.names() if "_" in name or name == "tensorrt"]


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(UserError, match="trt-rtx"):
        backends.load("trt_rtx")
