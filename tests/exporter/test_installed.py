"""What is installed is told against what was tested; what is missing is named with the command that installs it."""

from __future__ import annotations

import pytest
from common import ROOT

from engines.errors import UserError
from exporter import installed


def test_the_packages_copy_of_the_tested_versions_is_the_repositorys():
    assert installed.TESTED.read_text() == (ROOT / "constraints.txt").read_text()


def test_every_library_that_is_needed_has_a_tested_version():
    needed = [row for row in installed.report() if row["extra"] is None]
    assert {"torch", "diffusers", "onnx", "packaging"} <= {row["name"] for row in needed} | {"packaging"}
    assert all(row["tested"] for row in needed)


@pytest.mark.parametrize(
    ("found", "state", "lacks"),
    [
        ("2.13.0", "ok", False),
        ("2.13.0+cpu", "ok", False),
        ("2.14.1", "other version", False),
        ("2.1.0", "too old", True),
        (None, "missing", True),
    ],
)
def test_a_library_is_judged_by_the_tested_version_and_by_what_is_needed(found, state, lacks, monkeypatch):
    monkeypatch.setattr(installed, "version_of", {"torch": found}.get)
    monkeypatch.setattr(installed, "_requirements", lambda: ["torch>=2.13"])
    (row,) = installed.report()
    assert row["state"] == state
    assert installed.fix_for([row]) == ("pip install 'torch==2.13.0'" if lacks else None)


def test_requirements_of_other_platforms_and_of_developers_are_left_out(monkeypatch):
    asked = ["torch; sys_platform == 'none'", "ruff; extra == 'dev'", "triton; extra == 'gpu'"]
    monkeypatch.setattr(installed, "_requirements", lambda: asked)
    assert [(row["name"], row["extra"]) for row in installed.report()] == [("triton", "gpu")]


def test_what_only_an_older_installation_asks_for_is_left_out(monkeypatch):
    monkeypatch.setattr(installed, "_requirements", lambda: ["polygraphy", "rich", "polygraphy-more; extra == 'gpu'"])
    monkeypatch.setattr(installed, "version_of", lambda name: "0.1")
    assert [(row["name"], row["state"]) for row in installed.report()] == [
        ("rich", "other version"),
        ("polygraphy-more", "not tested"),
    ]


def test_what_an_extra_lacks_is_no_fault(monkeypatch):
    monkeypatch.setattr(installed, "_requirements", lambda: ["tensorrt; extra == 'trt'"])
    monkeypatch.setattr(installed, "version_of", lambda name: None)
    assert installed.fix_for(installed.report()) is None


def test_a_folder_that_is_not_installed_says_how_to_install_it(monkeypatch):
    def lost(name):
        raise installed.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(installed.metadata, "requires", lost)
    with pytest.raises(UserError, match="not installed") as raised:
        installed.report()
    assert "pip install" in raised.value.fix
