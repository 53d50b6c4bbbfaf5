"""Options of a build: what was asked for is told from what was not, as it is written on the command line."""

from __future__ import annotations

import pytest

from engines.errors import UserError
from engines.options import Options, budget


def test_what_was_asked_for_is_written_as_on_the_command_line():
    assert Options().asked() == {}
    asked = Options(decode="load", refit=True, weight_streaming=0, timing_cache="here").asked()
    assert list(asked.values()) == ["--decode load", "--refit", "--weight-streaming 0", "--timing-cache here"]


def test_json_carries_every_option_and_settings_those_that_decide_an_engine():
    options = Options(decode="run", refit=True, weight_streaming="auto", timing_cache="here")
    assert Options(**options.to_json()) == options
    assert {*options.to_json()} - {*options.settings()} == {"timing_cache"}


@pytest.mark.parametrize(("text", "value"), [(None, None), ("auto", "auto"), ("0", 0), ("1000000", 1_000_000)])
def test_a_budget_is_bytes_or_automatic(text, value):
    assert budget(text) == value


@pytest.mark.parametrize("text", ["-1", "1e9", "2GB", "", "²"])
def test_a_budget_that_is_neither_is_refused(text):
    with pytest.raises(UserError, match="neither auto nor bytes"):
        budget(text)
