"""Progress: where nobody watches, lines say now and then how far long work is."""

from __future__ import annotations

from exporter import progress


def test_lines_say_how_far_it_is_and_what_it_took(capfd, monkeypatch):
    now = iter([0.0, 30.0, 70.0, 80.0, 140.0, 150.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    assert list(progress.track(iter("abcd"), 6, "training", done=2)) == list("abcd")
    assert capfd.readouterr().err.splitlines() == [
        "training: 4 of 6, about 70 s left",
        "training: 6 in 2 min",
    ]


def test_nothing_to_do_is_not_told(capfd):
    assert list(progress.track([], 0, "training")) == []
    assert capfd.readouterr().err == ""
