"""report.html in a browser: no error, no sideways scrolling on a phone, tables that sort, contrast, light and dark."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_data import LAYERS, damaged, pictures, report

from exporter import html_report

HARNESS = (Path(__file__).parent / "page_harness.js").read_text()
PHONE = 360
LEAST_CONTRAST = 4.5  # WCAG 2.2, 1.4.3, level AA
SCHEMES = {"dark": 0, "light": 1}  # as blink's setting numbers them


@pytest.fixture(scope="module")
def browser():
    """Chromium; where continuous integration must have it, its absence is a failure."""
    found = shutil.which("chromium")
    if found is None:
        missing = pytest.fail if os.environ.get("EXPORT_ENGINE_BROWSER") == "required" else pytest.skip
        missing("no chromium on the path")
    return found


@pytest.fixture(scope="module")
def page():
    content = report()
    content["accuracy"]["layers"][2]["sqnr_db"] = -3.5
    runs = {"fp8": content, "int8": report(recipe="int8", psnr=55.0, stored=4_800_000)}
    return html_report.render(content, "out/fp8", pictures(8), runs, damaged())


@pytest.fixture(scope="module", params=SCHEMES)
def seen(request, browser, page, tmp_path_factory):
    """What the harness found on the page, and what the browser logged, in a colour scheme."""
    folder = tmp_path_factory.mktemp(request.param)
    outer = folder / "harness.html"
    outer.write_text(
        '<!doctype html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><pre></pre>'
        f'<iframe width="{PHONE}" height="740" srcdoc="{html.escape(page)}"></iframe><script>{HARNESS}</script>'
    )
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--enable-logging=stderr", "--v=0", f"--blink-settings=preferredColorScheme={SCHEMES[request.param]}"]
    ran = subprocess.run(
        [*command, "--dump-dom", outer.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    (found,) = re.findall(r"<pre>(.*?)</pre>", ran.stdout, re.DOTALL) or [ran.stderr]
    return json.loads(html.unescape(found)) | {"scheme": request.param, "log": ran.stderr}


def test_the_page_opens_without_an_error(seen):
    assert "CONSOLE" not in seen["log"]
    assert seen["pictures"] == 24
    assert seen["unnamed"] == 0


def test_nothing_scrolls_sideways_on_a_phone(seen):
    assert seen["width"] == PHONE
    assert seen["scrollWidth"] <= PHONE


def test_text_is_read_in_light_and_dark(seen):
    assert seen["dark"] == (seen["scheme"] == "dark")
    (channel, *_) = map(int, re.findall(r"\d+", seen["paper"]))
    assert (channel < 128) == seen["dark"]
    assert seen["contrast"][0]["ratio"] >= LEAST_CONTRAST, seen["contrast"]


def test_a_table_sorts_by_numbers_both_ways(seen):
    numbers = seen["numbers"]
    assert numbers["before"] == ["16.00", "40.00", "20.00", "2.00", "5.00", "2.50"]
    assert numbers["once"] == ["ascending", ["2.00", "2.50", "5.00", "16.00", "20.00", "40.00"]]
    assert numbers["twice"] == ["descending", ["40.00", "20.00", "16.00", "5.00", "2.50", "2.00"]]
    assert numbers["marked"] == 1


def test_a_table_sorts_by_text_both_ways(seen):
    names = ["class accuracy lost", "lowering ort step 0 under its floor"]
    assert seen["texts"]["once"] == ["ascending", names]
    assert seen["texts"]["twice"] == ["descending", names[::-1]]


def test_a_heat_map_sorts_by_what_it_shows_and_equal_is_best(seen):
    assert seen["heat"]["before"] == ["40.0", "equal", "40.0"]
    assert seen["heat"]["once"][1] == ["40.0", "40.0", "equal"]
    assert seen["heat"]["twice"][1] == ["equal", "40.0", "40.0"]


def test_arrow_keys_walk_through_a_heat_map(seen):
    walked = seen["walked"]
    assert (walked["row"], walked["column"], walked["stops"]) == (3, 1, 1)
    assert walked["title"] == f"{LAYERS[2]}, step 0: 40.0 dB"
