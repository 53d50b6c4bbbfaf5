"""Every backend found in its folder holds what the stages ask of it."""

from __future__ import annotations

import pytest

from engines import backends
from engines.errors import UserError


@pytest.mark.parametrize("name", backends.names())
def test_a_backend_holds_the_contract(name):
    backend = backends.load(name)
    assert backend.DTYPE in ("fp16", "fp32")
    assert all(isinstance(value, str) for value in backend.fingerprint().values())
    for function in ("resolve_gpu", "check", "build", "multiplied", "explain", "cannot_run", "open_runner"):
        assert callable(getattr(backend, function))
    reason = backend.cannot_run()
    assert reason is None or reason


def test_names_have_no_underscores_and_shared_code_is_no_backend():
    assert not [name for name in backends.names() if "_" in name or name == "tensorrt"]


def test_an_unknown_backend_lists_the_known():
    with pytest.raises(UserError, match="trt-rtx"):
        backends.load("trt_rtx")
