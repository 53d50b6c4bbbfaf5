"""engines.load: the engine that can run here, what it gives, and what is said where none can."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import bundles
import numpy as np
import pytest
from common import ROOT

import engines
from engines import artifacts, gpu
from engines.artifacts import Request
from engines.bundle import open_bundle
from engines.errors import UserError
from engines.zipped import pack


@pytest.fixture
def folder(tmp_path):
    return bundles.tiny_bundle(tmp_path / "tiny")


@pytest.mark.parametrize("step_input", [None, "index", "row"])
def test_an_engine_gives_what_its_network_does(tmp_path, step_input):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", step_input=step_input))
    fed = bundles.feeds(3, 1)
    seen = fed if step_input else {name: value for name, value in fed.items() if name != "step"}
    np.testing.assert_array_equal(engine.run(fed)["sample"], bundles.expected(seen))
    np.testing.assert_array_equal(engine(**fed), bundles.expected(seen))


def test_what_is_said_of_a_zip_names_the_zip(folder):
    pack(folder, folder.with_suffix(".zip"))
    with pytest.raises(UserError, match=r"tiny\.zip: holds no engine for trt-rtx") as caught:
        engines.load(folder.with_suffix(".zip"), backend="trt-rtx")
    assert f"export-engine build {folder}.zip --backend trt-rtx" in caught.value.fix


def test_a_zip_is_loaded_as_its_folder_is(folder):
    pack(folder, folder.with_suffix(".zip"))
    fed = bundles.feeds()
    np.testing.assert_array_equal(engines.load(folder.with_suffix(".zip"))(**fed), engines.load(folder)(**fed))


def test_tensors_by_dlpack_go_in_and_come_out_without_a_copy(folder):
    import torch

    fed = {name: torch.from_numpy(value) for name, value in bundles.feeds().items()}
    found = torch.from_dlpack(engines.load(folder).run_dlpack(fed)["sample"])
    without = {name: value for name, value in bundles.feeds().items() if name != "step"}
    np.testing.assert_array_equal(found.numpy(), bundles.expected(without))


def test_dlpack_tensors_of_another_type_are_refused(folder):
    import torch

    fed = {name: torch.from_numpy(value) for name, value in bundles.feeds().items()}
    with pytest.raises(UserError, match="input 'hidden_states' is tensor"):
        engines.load(folder).run_dlpack(fed | {"hidden_states": fed["hidden_states"].half()})


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ({"requires_grad": True}, "cannot be read where it lies"),
        ({"device": "meta"}, "cannot be read where it lies"),
        ({"dtype": "bfloat16"}, "is tensor.bfloat16"),
    ],
)
def test_dlpack_tensors_that_cannot_be_read_are_refused(folder, kind, told):
    import torch

    kind = {key: getattr(torch, value) if key == "dtype" else value for key, value in kind.items()}
    fed = {name: torch.from_numpy(value) for name, value in bundles.feeds().items()}
    with pytest.raises(UserError, match=told):
        engines.load(folder).run_dlpack(fed | {"hidden_states": torch.zeros(2, 1, 2, 4, **kind)})


def test_dlpack_wants_dense_tensors_and_no_lists(folder):
    import torch

    fed, engine = {name: torch.from_numpy(value) for name, value in bundles.feeds().items()}, engines.load(folder)
    with pytest.raises(UserError, match="cannot be read where it lies") as caught:
        engine.run_dlpack(fed | {"hidden_states": torch.zeros(2, 1, 4, 2).transpose(2, 3)})
    assert "contiguous" in caught.value.fix
    with pytest.raises(UserError, match="is a list, which speaks no DLPack"):
        engine.run_dlpack(fed | {"class_labels": [0, 1]})


@pytest.mark.parametrize("step_input", ["index", "row"])
def test_dlpack_feeds_tell_the_step_too(tmp_path, step_input):
    import torch

    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", step_input=step_input))
    fed = {name: torch.from_numpy(value) for name, value in bundles.feeds(2, 2).items()}
    found = torch.from_dlpack(engine.run_dlpack(fed)["sample"])
    np.testing.assert_array_equal(found.numpy(), bundles.expected(bundles.feeds(2, 2)))
    with pytest.raises(UserError, match="step 3"):
        engine.run_dlpack(fed | {"step": torch.tensor([3, 3])})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"step": np.array([0, 3])}, "step 3"),
        ({"step": None}, "input 'step' is missing"),
        ({"timestep": np.array([900, 500])}, "500"),
    ],
)
def test_a_step_of_another_schedule_is_refused(tmp_path, change, told):
    engine = engines.load(bundles.tiny_bundle(tmp_path / "tiny", step_input="index"))
    fed = {name: value for name, value in (bundles.feeds() | change).items() if value is not None}
    with pytest.raises(UserError, match=told):
        engine.run(fed)


def test_eight_threads_get_what_one_gets(folder):
    engine = engines.load(folder)
    calls = [bundles.feeds(1 + number % 8, number % 3) for number in range(500)]
    alone = [engine(**fed) for fed in calls]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda number: engine(**calls[number % 500]), range(8 * 500)))
    for number, output in enumerate(together):
        np.testing.assert_array_equal(output, alone[number % 500])


def test_loading_and_running_imports_neither_torch_nor_the_tools(folder):
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests")!r})
for name in ("torch", "diffusers", "transformers", "exporter", "onnx", "rich", "click"):
    sys.modules[name] = None
import numpy, engines
engine = engines.load({str(folder)!r}, self_test=True)
latent = numpy.ones((2, 1, 2, 4), numpy.float32)
print(engine.sample(latent, {{"class_labels": numpy.array([0, 1])}}).shape)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(2, 1, 2, 4)"


def test_a_self_test_passes_and_notices_another_network(folder, tmp_path):
    rows = engines.load(folder).self_test()
    assert [row["what"] for row in rows] == ["step 0", "step 2"]

    def worse(info):
        info["golden"]["limits_db"]["fp32"]["2"] = 1e9
        info["engines"]["ort"]["step_input"] = info["graphs"]["fp32"]["info"]["step_input"] = None

    other = bundles.tiny_bundle(tmp_path / "other", edit=worse)
    (other / "unused").parent.mkdir(exist_ok=True)
    assert engines.load(other).self_test()  # equal to the last bit: no limit is too high for it

    def stepped(info):
        info["golden"]["limits_db"] = {"fp32": {"0": 100.0, "2": 100.0}}

    off = bundles.tiny_bundle(tmp_path / "off", edit=stepped, files={"golden.safetensors": _golden_of("index")})
    with pytest.raises(UserError, match="does not give what was recorded: step 2"):
        engines.load(off, self_test=True)


def _golden_of(step_input):
    from safetensors.numpy import save

    return save(bundles.golden(step_input))


def gpu_bundle(tmp_path, **entry):
    def edit(info):
        info["engines"]["trt-rtx-sm89"] = bundles.engine_entry(
            folder="engines/trt-rtx-sm89", file="engine.plan", backend="trt-rtx", gpu="sm89", session=None,
            versions={"tensorrt_rtx": "0.0"},
        ) | entry  # fmt: skip

    return bundles.tiny_bundle(tmp_path / "both", edit=edit, files={"engines/trt-rtx-sm89/engine.plan": b"plan"})


def test_the_engine_that_can_run_here_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "detect", lambda: None)
    assert engines.load(gpu_bundle(tmp_path)).name == "ort"


def test_an_engine_for_another_gpu_is_refused_with_the_command_that_builds_one(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "detect", lambda: "sm120")
    with pytest.raises(UserError, match="it was built for sm89, and this GPU is sm120") as caught:
        engines.load(gpu_bundle(tmp_path), backend="trt-rtx")
    assert "export-engine build" in caught.value.fix
    assert "--backend trt-rtx --gpu sm120" in caught.value.fix


def test_an_engine_of_another_version_of_its_library_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "detect", lambda: "sm89")
    monkeypatch.setattr("engines.backends.trt_rtx.cannot_run", lambda: None)
    with pytest.raises(UserError, match=r"it was built with tensorrt_rtx 0\.0, here is"):
        engines.load(gpu_bundle(tmp_path), backend="trt-rtx")


def test_without_a_gpu_the_fix_is_the_engine_that_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "detect", lambda: None)
    with pytest.raises(UserError, match="no NVIDIA GPU") as caught:
        engines.load(gpu_bundle(tmp_path), engine="trt-rtx-sm89")
    assert caught.value.fix == "ask for the backend ort"


@pytest.mark.parametrize(("engine", "backend"), [("ort", "trt-rtx"), ("trt-rtx-sm89", "ort")])
def test_an_engine_and_a_backend_that_contradict_each_other_are_refused(tmp_path, engine, backend):
    folder = gpu_bundle(tmp_path)
    with pytest.raises(UserError, match="the two contradict each other") as caught:
        engines.load(folder, engine=engine, backend=backend)
    assert "give one of them" in caught.value.fix
    assert engines.load(folder, engine="ort", backend="ort").name == "ort"


@pytest.mark.parametrize("threads", ["2", -1, 1.5])
def test_threads_that_are_no_whole_number_from_zero_are_refused(folder, threads):
    with pytest.raises(UserError, match=f"threads {threads!r}"):
        engines.load(folder, threads=threads)
    assert engines.load(folder, threads=np.int64(1)).name == "ort"


def test_an_engine_says_what_it_is(folder):
    assert repr(engines.load(folder)) == "<engines.Engine ort fp32 of tiny, recipe none>"


def test_the_package_lists_what_it_offers():
    assert {"Engine", "Pipeline", "UserError", "load", "load_pipeline"} <= {*dir(engines)}


def test_a_backend_or_engine_that_is_not_there_is_refused(folder):
    with pytest.raises(UserError, match="holds no engine for trt-rtx"):
        engines.load(folder, backend="trt-rtx")
    with pytest.raises(UserError, match="unknown backend"):
        engines.load(folder, backend="tensorflow")
    with pytest.raises(UserError, match="unknown engine 'or'") as caught:
        engines.load(folder, engine="or")
    assert "did you mean 'ort'" in caught.value.fix


def test_an_engine_that_was_built_from_the_bundle_is_loaded_beside_it(folder, tmp_path):
    from engines.build import build, graph_of

    built = build(graph_of(folder, "ort"), "ort", tmp_path / "mine")
    assert built.manifest["made_from"]["graph"] == open_bundle(folder).graph("fp32").digest
    engine = engines.load(folder, engine=tmp_path / "mine")
    assert engine.name == "mine"
    assert engine.self_test()
    with pytest.raises(UserError, match="the two contradict each other"):
        engines.load(folder, engine=tmp_path / "mine", backend="trt-rtx")


@pytest.mark.parametrize(
    ("here", "fix"),
    [
        (None, "load it on a machine that has this GPU, sm120; here, ask for the backend ort instead"),
        ("sm89", "--backend trt-rtx --gpu sm89"),
    ],
)
def test_a_built_engine_for_a_gpu_that_is_not_here_says_what_it_needs(folder, tmp_path, monkeypatch, here, fix):
    made_from = {"graph": open_bundle(folder).graph("fp32").digest}
    with artifacts.drafting(tmp_path / "mine", Request("engine", made_from, {}, {})) as draft:
        draft.info = {"backend": "trt-rtx", "gpu": "sm120"}
    monkeypatch.setattr(gpu, "detect", lambda: here)
    with pytest.raises(UserError, match="mine: cannot run here") as caught:
        engines.load(folder, engine=tmp_path / "mine")
    assert fix in caught.value.fix
