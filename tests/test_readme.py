"""The README's commands and names are those of the code."""

from __future__ import annotations

import re
import shlex

import pytest
from common import ROOT

README = (ROOT / "README.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()


def commands():
    lines = [line.split("#")[0].strip().removeprefix(".venv/bin/") for line in README.splitlines()]
    return [line for line in lines if line.startswith("export-engine run")]


def test_the_demo_is_the_command_the_readme_says():
    (shown,) = [c for c in commands() if c.startswith("export-engine run digits-dit --recipe fp8")]
    made = re.search(r"export-engine run .*", MAKEFILE).group().replace("$(DEMO)", "demo")
    assert shown == made


@pytest.mark.parametrize("command", commands())
def test_every_run_command_parses(command):
    from exporter import cli

    context = cli.run.make_context("run", shlex.split(command)[2:])
    assert context.params["recipe"]
    assert context.params["out"]


def test_the_recipe_in_the_readme_is_valid():
    import tomllib

    from exporter import recipe

    (text,) = re.findall(r"```toml\n(.*?)```", README, re.DOTALL)
    parsed = recipe.parse("readme", tomllib.loads(text))
    assert len(parsed.rules) == 2


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in README
    assert f"\n{target}: " in MAKEFILE


def test_files_the_readme_points_to_exist():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_figures_of_the_model_card_are_those_of_the_files():
    weights = ROOT / "calib_data/models/digits-dit/transformer/diffusion_pytorch_model.safetensors"
    assert weights.stat().st_size <= 12e6
    from exporter.weights import read_header

    card = (ROOT / "calib_data/models/digits-dit/README.md").read_text()
    parameters = sum(__import__("math").prod(entry["shape"]) for entry in read_header(weights).values())
    assert f"{parameters:,}" in card
