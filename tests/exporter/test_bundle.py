"""A validated run becomes a bundle that an application loads; one that was not, or failed, does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import engines
from engines import artifacts, golden
from engines.artifacts import Request
from engines.bundle import open_bundle
from engines.errors import UserError
from exporter.bundle import bundle, bundle_zip, check_places
from exporter.images import SHOWN
from exporter.run_folder import open_run
from exporter.verify import contract_lines, verify


@pytest.fixture(scope="module")
def run(run_of):
    return run_of("int8")


@pytest.fixture(scope="module")
def made(run, tmp_path_factory):
    return bundle(run, tmp_path_factory.mktemp("bundle") / "int8").path


def copy_of(run, folder):
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.lock"))
    return folder


def edit_report(folder, **changes):
    path = folder / "report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_engine_passes_its_golden_test_and_draws_the_recorded_samples(made):
    rows = engines.load(made).self_test()
    assert [row["what"] for row in rows] == ["step 0", "step 6", "step 12", "step 18", "step 24", "4 samples"]
    assert rows[-1]["value_db"] >= rows[-1]["limit_db"]


def test_the_contract_names_every_input_with_its_unit(made):
    info = open_bundle(made).info
    assert [entry["name"] for entry in info["inputs"]] == ["hidden_states", "timestep", "class_labels"]
    assert all(entry["means"] != entry["name"] for entry in info["inputs"])
    assert info["sampler"]["timesteps"] == info["sampler"]["schedule"]
    assert len(info["sampler"]["portable"]["steps"]) == 25


def test_the_graph_of_an_engine_lies_there_once(made):
    found = open_bundle(made)
    assert found.info["graphs"]["fp32"]["folder"] == found.info["engines"]["ort"]["folder"]
    assert sum(name.endswith(".onnx") for name in found.artifact.files()) == 1


def test_recipe_card_and_checks_go_along(made, run):
    found = open_bundle(made)
    recipe = json.loads(found.file("recipe.json").read_text())
    assert artifacts.digest_json(recipe) == found.info["recipe"]["digest"]
    assert found.file("README.md").read_text().startswith("# digits-dit")
    report = json.loads((run / "report.json").read_text())
    assert found.info["checks"] == report["checks"]
    assert found.info["scores"]["psnr_db"]["mean"] == report["accuracy"]["images"]["psnr_db"]["mean"]


def test_it_is_written_once_for_the_same_run(run, made):
    before = (made / "manifest.json").stat().st_mtime_ns
    bundle(run, made)
    assert (made / "manifest.json").stat().st_mtime_ns == before


def test_the_zip_is_the_same_bundle(run, made, tmp_path):
    bundle_zip(run, tmp_path / "int8.zip")
    packed, folder = open_bundle(tmp_path / "int8.zip"), open_bundle(made)
    assert packed.artifact.digest == folder.artifact.digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["int8.zip"]
    feeds = golden.read(folder, "0/feeds/")
    few = {name: value[:2] for name, value in feeds.items()}
    ours, theirs = (engines.load(path).run(few)["sample"] for path in (tmp_path / "int8.zip", made))
    np.testing.assert_array_equal(ours, theirs)


def test_a_run_that_was_not_validated_is_refused(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    (folder / "report.json").unlink()
    with pytest.raises(UserError, match="was not validated") as caught:
        bundle(folder, tmp_path / "out")
    assert "export-engine validate" in caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_report_of_other_engines_is_refused(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    edit_report(folder, made_from={"quantized": "0" * 64})
    with pytest.raises(UserError, match="of other engines"):
        bundle(folder, tmp_path / "out")


@pytest.mark.parametrize("change", ["other", "missing"])
def test_samples_that_the_report_did_not_judge_are_refused(change, run, tmp_path):
    """As a validation leaves them that was stopped before it wrote its report."""
    folder = copy_of(run, tmp_path / "run")
    (folder / SHOWN).unlink()
    if change == "other":
        save_file({"ort": torch.zeros(1, 1, 8, 8)}, folder / SHOWN)
    with pytest.raises(UserError, match=r"is not what report\.json judged, or is missing") as caught:
        bundle(folder, tmp_path / "out")
    assert "export-engine validate" in caught.value.fix


def test_samples_must_be_nearer_than_another_seeds(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    accuracy = json.loads((folder / "report.json").read_text())["accuracy"]
    before = bundle(folder, tmp_path / "before").info["golden"]["picture"]["limits_db"]["fp32"]
    accuracy["images"]["psnr_db"]["noise_floor"] = before + 1  # as of a model whose pictures are much alike
    edit_report(folder, accuracy=accuracy)
    after = bundle(folder, tmp_path / "after").info["golden"]["picture"]["limits_db"]["fp32"]
    assert after == pytest.approx(before + 4)


def test_a_failed_check_of_an_engine_excuses_it_from_nothing(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    before = bundle(folder, tmp_path / "good").info["golden"]["limits_db"]
    accuracy = json.loads((folder / "report.json").read_text())["accuracy"]
    for row in accuracy["lowering"]:
        row["sqnr_db"] = 3.0
    edit_report(folder, passed=False, accuracy=accuracy, checks=[{"name": "lowering", "passed": False}])
    after = bundle(folder, tmp_path / "failed", failed=True).info["golden"]["limits_db"]
    assert all(limit >= before["fp32"][step] for step, limit in after["fp32"].items())


def test_a_failed_run_is_bundled_only_when_asked_for(run, tmp_path):
    folder = copy_of(run, tmp_path / "run")
    failed = {"name": "lowering ort step 0", "value": 9, "unit": "dB", "limit": 3, "passed": False, "detail": None}
    edit_report(folder, passed=False, checks=[failed])
    with pytest.raises(UserError, match="1 of its checks failed: lowering ort step 0") as caught:
        bundle(folder, tmp_path / "out")
    assert "--failed" in caught.value.fix
    found = bundle(folder, tmp_path / "out", failed=True)
    assert found.info["checks"] == [failed]
    told = verify(tmp_path / "out")
    assert told["failed_checks"] == ["lowering ort step 0"]
    assert "failed  lowering ort step 0" in contract_lines(found.info)


def engine_for(run, folder, graph, gpu):
    """Writes what `build` would for a GPU, with a plan of a few bytes."""
    info = artifacts.open_artifact(run / "engines/ort", "engine").info
    with artifacts.drafting(folder, Request("engine", {"graph": graph}, {}, {"tensorrt_rtx": "1.7"})) as draft:
        (draft.path / "engine.plan").write_bytes(b"a plan")
        draft.info = info | {"backend": "trt-rtx", "gpu": gpu}
    return folder


def test_a_further_engine_of_the_runs_graph_goes_in_and_one_of_another_does_not(run, tmp_path):
    graph = artifacts.open_artifact(run / "graph/fp32", "graph").digest
    further = engine_for(run, tmp_path / "sm120", graph, "sm120")
    found = bundle(run, tmp_path / "out", engines=[further])
    assert sorted(found.info["engines"]) == ["ort", "trt-rtx-sm120"]
    assert found.info["engines"]["trt-rtx-sm120"]["versions"] == {"tensorrt_rtx": "1.7"}
    with pytest.raises(UserError, match="built of another graph"):
        bundle(run, tmp_path / "other", engines=[engine_for(run, tmp_path / "foreign", "0" * 64, "sm120")])


@pytest.mark.parametrize("place", ["quantized", "engines/ort", "graph/fp32/inside"])
def test_the_run_that_is_read_is_not_written_over(run, tmp_path, place):
    folder = copy_of(run, tmp_path / "run")
    with pytest.raises(UserError, match=r"which a bundle would replace|lies within"):
        bundle(folder, folder / place)
    assert open_run(folder)


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_a_zip_is_written_over_nothing_but_another_of_ours(run, tmp_path, kind):
    out = tmp_path / "mine.zip"
    if kind == "folder":
        out.mkdir()
    else:
        (tmp_path / "precious").write_text("precious")
        out.symlink_to("precious") if kind == "link" else out.write_text("precious")
    with pytest.raises(UserError, match="is there, and no bundle of ours"):
        bundle_zip(run, out)
    assert kind == "folder" or out.read_text() == "precious"


def test_a_zip_replaces_an_earlier_one(run, tmp_path):
    for _ in range(2):
        assert bundle_zip(run, tmp_path / "int8.zip").digest


@pytest.mark.parametrize(
    ("out", "packed", "triton", "told"),
    [
        (None, False, None, "nowhere to write"),
        (None, True, "models", "nowhere to write"),
        ("a.zip", False, None, "would be a folder by that name"),
        ("same", False, "same", "one lies in the other"),
        ("models/b", False, "models", "one lies in the other"),
        ("b", False, "b/models", "one lies in the other"),
    ],
)
def test_places_that_are_in_each_others_way_are_refused(tmp_path, out, packed, triton, told):
    with pytest.raises(UserError, match=told):
        check_places(out and tmp_path / out, packed, triton and tmp_path / triton)


def test_an_engine_is_built_from_a_zip(run, tmp_path):
    from engines.build import build, graph_of

    made = bundle_zip(run, tmp_path / "int8.zip")
    built = build(graph_of(made.path, "ort"), "ort", tmp_path / "mine")
    assert engines.load(made.path, engine=built.path).name == "mine"
