"""The commands and names of the README, and of what it sends its readers to, are those of the code."""

from __future__ import annotations

import math
import re
import shlex

import pytest
from common import ROOT

README = (ROOT / "README.md").read_text()
RECIPES = (ROOT / "docs" / "recipes.md").read_text()
MAKEFILE = (ROOT / "Makefile").read_text()
WORKFLOW = (ROOT / "docs" / "check-workflow.yml").read_text()


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


@pytest.mark.parametrize(
    "command", re.findall(r"(?:run: |^# +|^)export-engine (\w+ .*)", WORKFLOW + README, re.MULTILINE)
)
def test_every_command_of_the_workflow_parses(command):
    from exporter import cli

    name, *arguments = shlex.split(command, comments=True)
    context = cli.main.commands[name].make_context(name, arguments)
    assert context.params


def test_the_workflow_keeps_what_its_gate_writes():
    (junit,) = re.findall(r"--junit (\S+)", WORKFLOW)
    (out,) = set(re.findall(r"--out (\S+)", WORKFLOW))
    assert f"            {junit}\n            {out}/report.json\n" in WORKFLOW
    assert "\t" not in WORKFLOW


def test_the_recipes_in_the_documentation_are_valid():
    import tomllib

    from exporter import recipe

    texts = re.findall(r"```toml\n(.*?)```", RECIPES, re.DOTALL)
    assert [len(recipe.parse("recipes", tomllib.loads(text)).rules) for text in texts] == [3, 3]


@pytest.mark.parametrize("target", ["demo", "test", "lint"])
def test_make_targets_of_the_readme_exist(target):
    assert f"make {target}" in README
    assert f"\n{target}: " in MAKEFILE


def test_every_method_and_each_of_its_options_is_explained():
    from dataclasses import fields

    from exporter import methods

    _, text = RECIPES.split("## Methods and their options")
    for name in methods.names():
        assert f"`{name}`" in text
        for option in fields(methods.load(name).Options):
            assert f"`{option.name}`" in text, f"{name}: {option.name}"


@pytest.mark.parametrize("document", ["README.md", *sorted(f"docs/{one.name}" for one in (ROOT / "docs").glob("*.md"))])
def test_files_and_headings_that_documents_point_to_exist(document):
    path = ROOT / document
    for link, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]*))?\)", path.read_text()):
        target = path.parent / link if link else path
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", one).lower().replace(" ", "-") for one in headings}, anchor


CARDS = {
    "digits-dit": (12e6, ["transformer/diffusion_pytorch_model"]),
    "shapes-unet": (15e6, ["unet/diffusion_pytorch_model", "text_encoder/model"]),
}


@pytest.mark.parametrize("model", CARDS)
def test_figures_of_a_model_card_are_those_of_the_files(model):
    from exporter.weights import read_header

    folder, (limit, stems) = ROOT / "calib_data/models" / model, CARDS[model]
    files = [folder / f"{stem}.safetensors" for stem in stems]
    assert sum(file.stat().st_size for file in files) <= limit
    card = (folder / "README.md").read_text()
    for file in files:
        assert f"{sum(math.prod(entry['shape']) for entry in read_header(file).values()):,}" in card
