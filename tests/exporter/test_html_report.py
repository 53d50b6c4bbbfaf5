"""report.html: the same text for the same report, whatever is missing, and nothing of what it shows can act."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from itertools import pairwise

import pytest
import torch
from click.testing import CliRunner
from gated import made_run
from report_data import LAYERS, audit_row, damaged, pictures, plan_row, report
from safetensors.torch import save_file

from engines.artifacts import Artifact, digest_file
from engines.errors import UserError
from exporter import html_report, reproduce, thumbnails
from exporter import run as runs
from exporter.cli import main
from exporter.images import IMAGES, SHOWN
from exporter.run_folder import Run
from exporter.versions import versions

MOST_BYTES = 5_000_000
EVIL = '"><script>alert(1)</script><img src=x onerror=alert(2)>'
VOID = {"meta", "img", "path", "circle", "br", "wbr"}


class Outline(HTMLParser):
    """Gathers a page's elements, in order, with their attributes; fails where tags do not match."""

    def __init__(self, page):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def named(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def rendered(content=None, **others):
    content = content or report()
    runs = others.pop("runs", {"fp8": content, "int8": report(recipe="int8", psnr=55.0, stored=4_800_000)})
    page = html_report.render(content, "out/fp8", others.pop("pictures", pictures()), runs, damaged())
    return page.replace("\u00a0", " ").replace("<wbr>", "")


def saved(folder, content=None):
    """Writes a run's report and samples, as far as a page reads them."""
    folder.mkdir(parents=True)
    content = content or report()
    images = torch.zeros(2, 1, 8, 8)
    save_file({"float": images, "ort": images + 0.01}, folder / SHOWN)
    content["shown"] = digest_file(folder / SHOWN)
    (folder / html_report.REPORT).write_text(json.dumps(content))
    return folder


def test_the_verdict_and_its_figures_come_first():
    page = rendered()
    header = page[page.index("<header>") : page.index("</header>")]
    for text in (
        "Passed",
        "4.77 MB",
        "48.1 dB",
        "47.7 … 48.5",
        "99.6 %",
        "0.80×",
        "0.52 × fp16",
        "8.07 bits per weight",
    ):
        assert text in header, text
    assert "--recipe fp8 --backend ort --steps 3 --out out/fp8" in header


def test_a_failed_report_names_the_checks_that_failed():
    content = report()
    content["checks"][1] |= {"value": 0.02, "passed": False}
    content["passed"] = False
    header = rendered(content).split("</header>")[0]
    assert "Failed" in header
    assert "<b>class accuracy lost</b>: 0.02, at most 0.01" in header
    assert "lowering ort" not in header


def test_every_part_of_a_report_is_on_the_page():
    outline = Outline(page := rendered())
    assert sum(img["src"].startswith("data:image/png;base64,") for img in outline.named("img")) == 6
    for text in (
        *LAYERS,
        "sm89_xmma_gemm",
        "no such kernel",
        "Fréchet distance",
        "not fused",
        "equal",
        "int8",
        "a" * 64,
    ):
        assert text in page, text
    for command in ("validate out/fp8", "validate out/fp8 --layers", "bench out/fp8", "report out/fp8"):
        assert f"<code>export-engine {command}</code>" in page
    assert 'href="../int8/report.html"' in page


def test_the_same_report_gives_the_same_page():
    assert rendered() == rendered()


def test_headings_and_landmarks_are_in_order():
    outline = Outline(rendered())
    levels = [int(tag[1]) for tag, _ in outline.elements if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert outline.named("html") == [{"lang": "en"}]
    assert len(outline.named("main")) == len(outline.named("header")) == len(outline.named("nav")) == 1
    ids = [attributes["id"] for _, attributes in outline.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for a in outline.named("a") if a["href"].startswith("#")}
    assert targets <= set(ids)
    assert all(img["alt"] for img in outline.named("img"))


def everywhere(value, text):
    """Returns a report with `text` in every string but the types that the page branches on."""
    if isinstance(value, dict):
        return {f"{key}": everywhere(entry, text) for key, entry in value.items()}
    if isinstance(value, list):
        return [everywhere(entry, text) for entry in value]
    return text + value if isinstance(value, str) else value


def test_names_with_markup_are_inert():
    content = everywhere(report(), EVIL)
    content["activations"] = {"layers": {EVIL: 1}, "attention_points": {EVIL: 1}}
    content["settings"] |= {EVIL: EVIL}
    page = html_report.render(content, EVIL, pictures(), {EVIL: content}, everywhere(damaged(), EVIL))
    outline = Outline(page)
    assert len(outline.named("script")) == 1
    assert "<script>alert" not in page
    assert all("onerror" not in attributes for _, attributes in outline.elements)
    assert not any(name.startswith("on") for _, attributes in outline.elements for name in attributes)


def test_the_page_may_ask_for_nothing_and_runs_no_script_but_its_own():
    outline = Outline(page := rendered())
    policy = outline.named("meta")[1]["content"]
    assert policy.startswith("default-src 'none'; img-src data:; ")
    assert "unsafe" not in policy
    assert "http" not in re.sub(r"http-equiv", "", page)
    assert all("style" not in attributes for _, attributes in outline.elements)


def paths(value, prefix=()):
    """Returns the place of every key of a report, three levels deep."""
    for key, entry in value.items() if len(prefix) < 3 else ():
        yield (*prefix, key)
        if isinstance(entry, dict):
            yield from paths(entry, (*prefix, key))


@pytest.mark.parametrize("path", list(paths(report())), ids=".".join)
def test_a_report_of_an_earlier_version_that_lacks_a_field_is_shown(path):
    content = copy.deepcopy(report())
    place = content
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    assert "</html>" in rendered(content)


@pytest.mark.parametrize("key", ["dtype", "path", "gpu", "decode", "layers", "audit", "bytes", "resident_weight_bytes"])
def test_an_engine_of_an_earlier_version_is_shown(key):
    content = report()
    del content["engines"][0][key]
    assert "</html>" in rendered(content)


def test_what_is_missing_is_said_with_the_command_that_makes_it():
    content = report()
    del content["histograms"], content["accuracy"]["layers"], content["engines"][0]["audit"]
    page = html_report.render(content, "run", {"rows": [], "why": "samples.safetensors is not there"}, {"run": content})
    for text in ("No pictures: samples.safetensors is not there.", "no errors by layer", "no histograms", "no audit"):
        assert text in page, text
    assert "export-engine validate run --layers" in page


def test_a_page_stays_under_its_size_with_thousands_of_layers():
    content = report()
    names = [f"down_blocks.{i}.attentions.1.transformer_blocks.9.attn1.to_out.0" for i in range(3000)]
    content["engines"] = [
        content["engines"][0] | {"layers": [plan_row(n) for n in names], "audit": [audit_row(n) for n in names]}
    ] * 2
    rows = [{"runner": "ort", "layer": n, "step": s, "sqnr_db": 40.0, "not_finite": 0} for n in names for s in range(5)]
    content["accuracy"]["layers"] = rows
    images = torch.rand(6, 3, 192, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1
    page = rendered(content, pictures=thumbnails.rows(images, images.flip(0), in_pixels=True))
    assert len(page.encode()) < MOST_BYTES
    assert "1,800 more rows are in report.json" in page
    assert 6 < page.count("<img") < 18  # noise, which no PNG compresses: some pictures are there all the same


def test_a_difference_keeps_its_strongest_value_when_it_is_reduced():
    reference = torch.zeros(1, 1, 2 * thumbnails.SIDE, 2 * thumbnails.SIDE)
    other = reference.clone()
    other[0, 0, 0, 0], other[0, 0, 3, 3] = 0.05, -0.05
    seen = []
    drawable, thumbnails.drawable = thumbnails.drawable, lambda image: seen.append(image) or drawable(image)
    try:
        thumbnails.rows(reference, other, in_pixels=True)
    finally:
        thumbnails.drawable = drawable
    difference = seen[2][0]
    assert difference.shape == (thumbnails.SIDE, thumbnails.SIDE)
    assert difference[0, 0] == pytest.approx(0.5)
    assert difference[1, 1] == pytest.approx(-0.5)


def test_a_page_is_written_beside_its_report_and_names_no_path_of_the_machine(tmp_path, monkeypatch):
    run = saved(tmp_path / "out" / "fp8")
    saved(tmp_path / "out" / "int8", report(recipe="int8", psnr=55.0))
    saved(tmp_path / "out" / "other", report(name="shapes-unet", recipe="third"))
    monkeypatch.chdir(tmp_path)
    page = html_report.write(run).read_text()
    assert str(tmp_path) not in page
    assert "export-engine validate out/fp8" in page
    assert "../int8/report.html" in page
    assert "third" not in page  # another model's
    assert page.count("<img") == 6
    assert not list(run.glob(".*"))


def test_a_kept_report_gets_its_page(tmp_path):
    folder = tmp_path / "run"
    settings = {"seed": 0, "images": IMAGES, **versions("torch", "diffusers")}
    content = report() | {"made_from": {"quantized": "a" * 64}, "settings": settings}
    (tmp_path / runs.PICTURE).write_bytes(b"a picture")
    content["samples"] = digest_file(tmp_path / runs.PICTURE)
    saved(folder, content)
    (tmp_path / runs.PICTURE).rename(folder / runs.PICTURE)
    run = Run(Artifact(folder / "quantized", {"digest": "a" * 64}), {}, {})
    assert runs.report(None, run, folder, seed=0) == json.loads((folder / html_report.REPORT).read_text())
    assert "export-engine" in (folder / html_report.PAGE).read_text()


def test_a_report_of_another_number_of_images_is_not_replaced_in_silence(tmp_path, monkeypatch, capsys):
    folder = saved(tmp_path / "run", report() | {"settings": {"seed": 0, "images": 256}})
    monkeypatch.setattr(runs, "validate", lambda *arguments, **options: pytest.fail("reached"))
    run = Run(Artifact(folder / "quantized", {"digest": "a" * 64}), {}, {})
    for images, told in ((4, True), (256, False)):
        with pytest.raises(pytest.fail.Exception, match="reached"):
            runs.report(None, run, folder, seed=0, images=images)
        assert ("of 256 images, is replaced by one of 4" in capsys.readouterr().err) == told


def test_layers_of_another_model_are_not_shown(tmp_path):
    run = saved(tmp_path / "run")
    (run / "layers.json").write_text(json.dumps(damaged()))
    assert "with one layer alone" in html_report.write(run).read_text()
    (run / "layers.json").write_text(json.dumps(damaged() | {"quantized": "c" * 64}))
    assert "with one layer alone" not in html_report.write(run).read_text()


def test_pictures_of_another_report_are_not_shown(tmp_path):
    run = saved(tmp_path / "run")
    save_file({"float": torch.ones(2, 1, 8, 8), "ort": torch.ones(2, 1, 8, 8)}, run / SHOWN)
    assert "is not the one this report was written with" in html_report.write(run).read_text()


def test_the_command_writes_the_pages_of_a_run_and_of_a_folder_of_runs(tmp_path):
    for name in ("fp8", "int8"):
        saved(tmp_path / name, report(recipe=name))
    for folder, count in ((tmp_path / "fp8", 1), (tmp_path, 2)):
        found = CliRunner().invoke(main, ["report", str(folder)])
        assert found.exit_code == 0, found.output
        assert len(found.output.splitlines()) == count


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "holds no report.json"),
        ("{", "not valid JSON"),
        ('{"model": {}}', "is no report of a run: it lacks recipe, accuracy, checks"),
        ('{"model": "mine", "recipe": {}, "accuracy": {}, "checks": []}', "malformed"),
    ],
)
def test_a_folder_without_a_report_is_refused(tmp_path, content, words):
    if content is not None:
        (tmp_path / html_report.REPORT).write_text(content)
    with pytest.raises(UserError, match=words):
        [html_report.write(run) for run in html_report.runs_in(tmp_path)]


def test_a_sibling_that_cannot_be_read_is_left_out(tmp_path):
    run = saved(tmp_path / "fp8")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / html_report.REPORT).write_text("{")
    assert set(html_report.siblings(run, html_report.read(run))) == {"fp8"}


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        ("digits-dit", "digits-dit"), ("models/mine", "models/mine"), ("/home/me/mine", "mine"),
        ("random:/home/me/sdxl", "random:sdxl"), ("random:sdxl", "random:sdxl"),
    ],
)  # fmt: skip
def test_a_model_is_named_without_its_absolute_path(model, shown):
    assert reproduce.without_path(model) == shown


def test_the_command_of_a_run_has_the_options_of_its_engines():
    content = report()
    theirs = {"backend": "trt", "decode": None, "gpu": "sm89", "refit": True, "weight_streaming": 700}
    content["engines"].append(content["engines"][0] | theirs)
    words = reproduce.commands(content, "run")["run"]
    assert "--backend ort --backend trt" in words
    assert "--gpu sm89 --refit --weight-streaming 700" in words
    assert "--decode" not in words


@pytest.mark.parametrize(("images", "written"), [(256, False), (16, True)])
def test_a_number_of_images_that_is_not_the_default_is_in_the_commands_that_draw_them(images, written):
    content = report()
    content["settings"]["images"] = images
    found = reproduce.commands(content, "run")
    assert {name for name, words in found.items() if "--images 16" in words} == (
        {"run", "validate", "layers"} if written else set()
    )
    assert not any("--images 256" in words for words in found.values())


def test_a_report_of_other_artifacts_is_known_and_one_that_stands_alone_is_taken(tmp_path):
    run = made_run(tmp_path / "run")
    assert not html_report.is_stale(saved(tmp_path / "alone"))
    content = json.loads((run / html_report.REPORT).read_text())
    page = report() | {"made_from": content["made_from"]}
    (run / html_report.REPORT).write_text(json.dumps(page))
    assert not html_report.is_stale(run)
    page["made_from"]["engine ort"] = "0" * 64
    (run / html_report.REPORT).write_text(json.dumps(page))
    assert html_report.is_stale(run)
