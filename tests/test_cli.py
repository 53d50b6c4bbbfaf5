"""Wrong input at the command line: exit code 2, a message with the thing and the fix, no traceback, no leavings."""

from __future__ import annotations

import errno
import json
import resource
import shutil
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from common import FAMILIES, ROOT, TINY
from safetensors.torch import load_file, save_file

from engines import artifacts
from exporter import images
from exporter.cli import main

RECIPE = """
[calibration]
samples = 2
{extra}
[[rule]]
layers = "{layers}"
weight = {{ format = "int", bits = 4, granularity = "block", block_size = {block_size} }}
{rule_extra}
[[rule]]
layers = "*"
keep = "float"
"""


def assert_refused(process, *words):
    """Asserts a refusal that says all `words`, with a fix."""
    assert process.returncode == 2, process.stderr
    assert "Traceback" not in process.stderr
    assert "fix:" in process.stderr
    for word in words:
        assert word in process.stderr, (word, process.stderr)
    assert process.stdout == ""


def assert_nothing_left(folder):
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("digit-dit", "--recipe", "fp8"), ("digit-dit", "digits-dit")),
        (("digits-dit", "--recipe", "fp9"), ("recipe 'fp9'", "'fp8'")),
        (("digits-dit", "--recipe", "fp8", "--backend", "tensorrt"), ("backend 'tensorrt'", "did you mean 'trt-rtx'?")),
        (("digits-dit", "--recipe", "fp8", "--backend", "trt-rtx", "--gpu", "sm98"), ("'sm98'", "sm89")),
        (("digits-dit", "--recipe", "fp8", "--dtype", "fp61"), ("'fp61'", "fp16")),
        (("digits-dit", "--recipe", "fp8", "--steps", "5000"), ("5000", "1000")),
        (("./no-such-folder", "--recipe", "fp8"), ("no-such-folder",)),
        (("digits-dit", "--recipe", "fp8", "--weight-streaming", "2GB"), ("2GB", "auto nor bytes")),
        (("digits-dit", "--recipe", "fp8", "--refit"), ("--refit", "ort has no such option", "build for trt")),
    ],
    ids=["model", "recipe", "backend", "gpu", "dtype", "steps", "folder", "budget", "option"],
)
def test_unknown_names_are_refused_with_close_ones(arguments, words, cli, tmp_path):
    assert_refused(cli("run", *arguments, "--out", tmp_path / "out"), *words)
    assert_nothing_left(tmp_path / "out")


def test_fp8_for_a_gpu_without_it_names_the_layer_and_the_gpus_that_have_it(cli, tmp_path):
    process = cli(
        "run", "digits-dit", "--recipe", "fp8", "--backend", "trt-rtx", "--gpu", "sm80", "--out", tmp_path / "o"
    )
    assert_refused(process, "transformer_blocks.0", "fp8", "sm80", "sm89", "sm120")
    assert_nothing_left(tmp_path / "o")


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy of the tiny model that a test may damage."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def weights_file(model):
    return model / "diffusion_pytorch_model.safetensors"


def test_a_folder_without_config_is_refused(cli, model, tiny_recipe, tmp_path):
    (model / "config.json").unlink()
    assert_refused(cli("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out"), "config.json", str(model))


def test_a_folder_without_weights_is_refused(cli, model, tiny_recipe, tmp_path):
    weights_file(model).unlink()
    assert_refused(
        cli("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out"), "weights", str(model), "random:"
    )


def test_pickled_weights_are_never_read(cli, model, tiny_recipe, tmp_path):
    weights_file(model).rename(model / "diffusion_pytorch_model.bin")
    assert_refused(
        cli("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out"), "pickle", "safe_serialization"
    )


def test_a_truncated_weight_file_is_refused(cli, model, tiny_recipe, tmp_path):
    whole = weights_file(model).read_bytes()
    weights_file(model).write_bytes(whole[: len(whole) // 2])
    process = cli("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out")
    assert_refused(process, "diffusion_pytorch_model.safetensors", str(len(whole) // 2), "truncated")
    assert_nothing_left(tmp_path / "out")


def test_a_weight_with_nan_is_named(cli, model, tiny_recipe, tmp_path):
    tensors = load_file(weights_file(model))
    tensors["transformer_blocks.1.ff.net.2.weight"][3, 5] = torch.nan
    save_file(tensors, weights_file(model))
    process = cli("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out")
    assert_refused(process, "transformer_blocks.1.ff.net.2.weight", "1 values that are NaN")
    assert_nothing_left(tmp_path / "out")


def test_a_class_no_family_serves_is_refused(cli, model, tiny_recipe, tmp_path):
    (model / "config.json").write_text(json.dumps(TINY | {"_class_name": "MysteryModel"}))
    process = cli("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out")
    assert_refused(process, "MysteryModel", "DiTTransformer2DModel")


def invoke(*arguments):
    """Runs the command line in this process, which spares the imports; an exception is a traceback there."""
    finished = CliRunner().invoke(main, list(map(str, arguments)))
    assert finished.exception is None or isinstance(finished.exception, SystemExit), finished.exception
    return SimpleNamespace(returncode=finished.exit_code, stdout=finished.stdout, stderr=finished.stderr)


@pytest.fixture
def prompts(tmp_path):
    """Writes a prompt list of any bytes."""

    def write(content):
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", ("holds no prompt",)),
        (b"# none yet\n", ("holds no prompt",)),
        (b"3\n4\n\xff\xfe\n", ("line 3", "0xff", "UTF-8")),
        (b"3\n10\n", ("'10' is no class", "0 … 9")),
        (b"a cat\n", ("'a cat' is no class", "0 … 9")),
    ],
    ids=["empty", "comments alone", "not UTF-8", "a class that is not there", "a caption"],
)
@pytest.mark.parametrize("command", ["calibrate", "run"])
def test_a_prompt_list_that_does_not_serve_is_refused(command, content, words, prompts, tiny_folder, tmp_path):
    recipe = ("--recipe", "fp8") if command == "run" else ()
    process = invoke(command, tiny_folder, *recipe, "--prompts", prompts(content), "--out", tmp_path / "out")
    assert_refused(process, *words)
    assert_nothing_left(tmp_path / "out")


def test_a_prompt_list_that_is_not_there_is_refused(tiny_folder, tmp_path):
    process = invoke("calibrate", tiny_folder, "--prompts", tmp_path / "gone.txt", "--out", tmp_path / "out")
    assert_refused(process, "gone.txt", "cannot be read")


@pytest.fixture
def random_folder(tmp_path):
    """Writes a config alone, for a model of drawn weights."""

    def write(name):
        (tmp_path / "random").mkdir()
        (tmp_path / "random" / "config.json").write_text(json.dumps(FAMILIES[name]))
        return f"random:{tmp_path / 'random'}"

    return write


def test_prompts_for_a_model_that_reads_none_are_refused(random_folder, prompts, tmp_path):
    process = invoke(
        "calibrate", random_folder("unet"), "--prompts", prompts(b"a fox\n"), "--out", tmp_path / "out", "--steps", 2
    )
    assert_refused(process, "without prompt or label", "--prompts")
    assert_nothing_left(tmp_path / "out")


def test_own_labels_are_calibrated_on(tiny_folder, prompts, tmp_path):
    out = tmp_path / "out"
    labels = prompts(b"# two of ten\n7\n2\n")
    process = invoke("calibrate", tiny_folder, "--prompts", labels, "--out", out, "--steps", 2, "--samples", 3)
    assert process.returncode == 0, process.stderr
    assert json.loads((out / "manifest.json").read_text())["info"]["entries"] == ["7", "2"]
    assert load_file(out / "shard-00000.safetensors")["0/class_labels"].tolist() == [7, 2, 7]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--samples", 3), ("samples 3 against 2", "--calibration")),
        (("--samples", 2, "--seed", 1), ("seed 1 against 0", "--calibration")),
    ],
    ids=["samples", "seed"],
)
def test_a_calibration_set_of_something_else_is_not_used(flags, words, tiny_folder, tiny_recipe, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    assert invoke("calibrate", tiny_folder, "--out", data, "--steps", 2, *flags).returncode == 0
    process = invoke("run", tiny_folder, "--recipe", tiny_recipe, "--steps", 2, "--calibration", data, "--out", out)
    assert_refused(process, *words)
    assert_nothing_left(out)


def test_an_artifact_that_is_no_calibration_set_is_not_used(tiny_folder, tiny_recipe, tmp_path):
    process = invoke(
        "run", tiny_folder, "--recipe", tiny_recipe, "--calibration", tmp_path / "gone", "--out", tmp_path / "out"
    )
    assert_refused(process, "gone")
    assert_nothing_left(tmp_path / "out")


def sharded(model):
    """Splits a model's weights in two files with an index, as diffusers does; returns the index."""
    tensors = load_file(weights_file(model))
    weights_file(model).unlink()
    names = sorted(tensors)
    parts = {"a.safetensors": names[: len(names) // 2], "b.safetensors": names[len(names) // 2 :]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, model / file)
    return {
        "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
        "weight_map": {name: file for file, held in parts.items() for name in held},
    }


def write_index(model, index):
    (model / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def test_weights_in_shards_are_read(model, tmp_path):
    before = load_file(weights_file(model))
    write_index(model, sharded(model))
    from exporter.checkpoint import open_checkpoint

    loaded = open_checkpoint(str(model)).load()
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda model, index: (model / "b.safetensors").unlink(), ("lacks b.safetensors", "shards")),
        (
            lambda model, index: index["weight_map"].update({"pos_embed.proj.weight": "b.safetensors"}),
            ("b.safetensors", "lacks tensor", "pos_embed.proj.weight"),
        ),
        (lambda model, index: index["metadata"].update(total_size=1 << 40), (str(1 << 40), "bytes")),
        (lambda model, index: index.update(weight_map=["a.safetensors"]), ("weight_map",)),
        (
            lambda model, index: index["weight_map"].update({"pos_embed.proj.weight": "../b.safetensors"}),
            ("../b.safetensors", "leaves the folder"),
        ),
        (lambda model, index: index["weight_map"].pop("pos_embed.proj.weight"), ("pos_embed.proj.weight",)),
    ],
    ids=[
        "a shard is not there",
        "a tensor in another shard",
        "bytes",
        "no map",
        "outside the folder",
        "a tensor left out",
    ],
)
def test_shards_that_do_not_add_up_are_refused(damage, words, model, tiny_recipe, tmp_path):
    index = sharded(model)
    damage(model, index)
    if index["metadata"]["total_size"] < 1 << 40 and "pos_embed.proj.weight" not in index["weight_map"]:
        del index["metadata"]  # not every index tells
    write_index(model, index)
    assert_refused(invoke("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out"), *words)
    assert_nothing_left(tmp_path / "out")


def test_a_pickle_is_refused_with_how_to_convert_it(model, tiny_recipe, tmp_path):
    weights_file(model).unlink()
    torch.save({}, model / "diffusion_pytorch_model.bin")
    process = invoke("run", model, "--recipe", tiny_recipe, "--out", tmp_path / "out")
    assert_refused(process, "diffusion_pytorch_model.bin", "pickle", "safe_serialization=True")
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (["transformers", "CLIPTextModel"], ("'text_encoder'", "CLIPTextModel", "text_encoder/")),
        (["my_pipeline", "MyEncoder"], ("'MyEncoder'", "CLIPTextModel")),
    ],
    ids=["its folder is not there", "a class of its own"],
)
def test_a_pipeline_whose_component_cannot_be_opened_is_refused(entry, words, random_folder, tmp_path):
    spec = random_folder("sd")
    (tmp_path / "random" / "model_index.json").write_text(
        json.dumps({"_class_name": "StableDiffusionPipeline", "text_encoder": entry})
    )
    process = invoke("run", spec, "--recipe", "int8", "--out", tmp_path / "out", "--steps", 2)
    assert_refused(process, *words)
    assert_nothing_left(tmp_path / "out")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"extra": "sample = 3"}, ("'sample'", "'samples'", "[calibration]")),
        ({"rule_extra": "methd = 3"}, ("'methd'", "'method'", "rule 1")),
        ({"layers": "transformer_block.*"}, ("transformer_block.*", "rule 1", "matches none")),
        ({"block_size": "48"}, ("transformer_blocks.0", "block_size 48", "32 inputs", "16 or 32")),
    ],
    ids=["calibration key", "rule key", "no match", "block size"],
)
def test_recipe_faults_name_the_rule_and_the_layer(fields, words, cli, tiny_folder, tmp_path):
    values = {"extra": "", "rule_extra": "", "layers": "transformer_blocks.*.ff.*", "block_size": "16"} | fields
    if fields.get("block_size"):
        values["layers"] = "transformer_blocks.*.ff.*"
    recipe = tmp_path / "mine.toml"
    recipe.write_text(RECIPE.format(**values))
    assert_refused(cli("run", tiny_folder, "--recipe", recipe, "--out", tmp_path / "out"), *words)
    assert_nothing_left(tmp_path / "out")


def test_an_output_path_beneath_a_file_is_refused(cli, tiny_folder, tiny_recipe, tmp_path):
    (tmp_path / "file").write_text("mine")
    process = cli("run", tiny_folder, "--recipe", tiny_recipe, "--out", tmp_path / "file" / "out")
    assert_refused(process, str(tmp_path / "file"), "is a file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_other_things_is_not_written_over(cli, tiny_folder, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    assert_refused(cli("calibrate", tiny_folder, "--out", tmp_path / "out", "--samples", 1), "holds other things")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_engines_of_an_earlier_run_with_another_recipe_are_removed(tiny_recipe, tmp_path, monkeypatch):
    """A folder holds one run: an engine of another model must not stand in its report."""
    monkeypatch.setattr(images, "IMAGES", 2)
    monkeypatch.setattr(images, "TRAJECTORIES", 2)
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"num_layers": 1}))
    folder, out = f"random:{tmp_path}", tmp_path / "out"
    first = invoke("run", folder, "--recipe", tiny_recipe, "--steps", 2, "--backend", "trt-rtx", "--out", out)
    assert first.returncode in (0, 3), first.stderr
    other = tmp_path / "other.toml"
    other.write_text(tiny_recipe.read_text().replace("bits = 8", "bits = 7", 1))
    second = invoke("run", folder, "--recipe", other, "--steps", 2, "--out", out)
    assert second.returncode in (0, 3), second.stderr
    assert "engines/trt-rtx: of an earlier run" in second.stderr
    assert sorted(path.name for path in (out / "engines").iterdir()) == ["ort"]
    assert [row["backend"] for row in json.loads((out / "report.json").read_text())["engines"]] == ["ort"]
    shutil.copytree(out / "engines" / "ort", tmp_path / "kept")
    third = invoke("run", folder, "--recipe", tiny_recipe, "--steps", 2, "--out", out)
    assert third.returncode in (0, 3), third.stderr
    shutil.rmtree(out / "engines" / "ort")
    shutil.copytree(tmp_path / "kept", out / "engines" / "ort")
    assert_refused(invoke("validate", out), "engines/ort", "another model")


def test_inspecting_a_run_names_the_artifacts_in_it(cli, tmp_path):
    (tmp_path / "run" / "quantized").mkdir(parents=True)
    (tmp_path / "run" / "quantized" / "manifest.json").write_text("{}")
    assert_refused(cli("inspect", tmp_path / "run"), "folder of artifacts", "quantized")


def test_a_path_that_may_not_be_looked_at_is_told(monkeypatch):
    """Tests may run as root, who may look anywhere: so the refusal is planted."""

    def refused(_path):
        raise PermissionError(errno.EACCES, "Permission denied", "/closed/run")

    monkeypatch.setattr(artifacts, "kind_of", refused)
    result = CliRunner().invoke(main, ["inspect", "/closed/run"])
    assert result.exit_code == 2
    assert "error: /closed/run: Permission denied" in result.stderr
    assert "fix:" in result.stderr


def test_a_folder_that_is_no_artifact_is_told_what_one_is(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path, why in ((tmp_path, "holds no manifest.json"), (tmp_path / "gone", "no such folder")):
        assert_refused(invoke("inspect", path), f"{path}: is no artifact: ", why, "RUN/quantized")
    assert_refused(invoke("inspect", tmp_path / "file"), "no zip that can be read")


@pytest.mark.parametrize("name", ["config.json", "sampler.json", "model_index.json", "scheduler/scheduler_config.json"])
def test_a_file_of_a_model_that_is_no_json_is_for_its_owner_to_mend(name, model, tmp_path):
    (model / name).parent.mkdir(exist_ok=True)
    (model / name).write_text("{")
    process = invoke("calibrate", model, "--out", tmp_path / "out", "--samples", 1, "--steps", 2)
    assert_refused(process, f"{model / name}: not valid JSON", "mend it, or")
    assert "artifact" not in process.stderr


def test_a_run_into_a_folder_with_other_things_is_refused(cli, tiny_folder, tiny_recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    process = cli("run", tiny_folder, "--recipe", tiny_recipe, "--out", tmp_path / "out")
    assert_refused(process, "holds other things", str(tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_stage_given_another_stages_folder_names_both_kinds(cli, graph_of, tmp_path):
    process = cli("lower", graph_of("int8", "fp32").path, "--out", tmp_path / "out")
    assert_refused(process, "'graph'", "'quantized'")


@pytest.mark.parametrize("limit", [4_000, 120_000])
def test_a_full_disk_is_a_message_and_leaves_nothing_half_written(limit, cli, tiny_folder, tiny_recipe, tmp_path):
    """A file-size limit stands in for the disk: one stops calibrate, which keeps whole shards, the other quantize."""
    process = cli(
        "run",
        tiny_folder,
        "--recipe",
        tiny_recipe,
        "--steps",
        "5",
        "--out",
        tmp_path / "out",
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert_refused(process, "could not be written", "File too large", "ulimit")
    partial = [path for path in (tmp_path / "out").rglob("*") if "partial" in path.name]
    assert partial == ([tmp_path / "out" / ".calibration.partial"] if limit == 4_000 else [])
    for file in (tmp_path / "out").rglob("*.safetensors"):
        assert load_file(file)


def test_a_graph_that_changed_after_it_was_made_is_refused(cli, graph_of, tmp_path):
    graph = shutil.copytree(graph_of("int8", "fp32").path, tmp_path / "graph")
    data = bytearray((graph / "model.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (graph / "model.onnx").write_bytes(data)
    process = cli("build", graph, "--backend", "ort", "--out", tmp_path / "engine")
    assert_refused(process, "model.onnx", "sha256", "make it again")
    assert_nothing_left(tmp_path / "engine")


def test_json_is_one_document_and_nothing_else(cli, graph_of):
    process = cli("inspect", graph_of("int8", "fp32").path, "--json")
    assert process.returncode == 0
    assert json.loads(process.stdout)["kind"] == "graph"


@pytest.mark.parametrize(("passed", "code"), [(True, 0), (False, 3)])
def test_a_report_that_failed_exits_with_3(passed, code, monkeypatch, tmp_path):
    from exporter import run

    monkeypatch.setattr(run, "run", lambda *arguments, **options: {"passed": passed})
    arguments = ["run", "digits-dit", "--recipe", "fp8", "--out", str(tmp_path / "out"), "--json"]
    finished = CliRunner().invoke(main, arguments)
    assert finished.exit_code == code
    assert json.loads(finished.stdout) == {"passed": passed}


@pytest.mark.parametrize("what", ["models", "recipes", "formats", "methods", "backends"])
def test_list_names_the_files_found(what, cli):
    process = cli("list", what)
    assert process.returncode == 0
    expected = {
        "models": {"digits-dit"},
        "recipes": {"fp16", "fp8", "int8", "int4", "fp4-fp8"},
        "formats": {"fp", "int"},
        "methods": {"rtn", "smoothquant"},
        "backends": {"ort", "trt", "trt-rtx"},
    }[what]
    assert expected <= set(process.stdout.split())


def test_a_listed_recipe_is_a_file_to_start_from():
    from exporter import recipe

    for name in recipe.names():
        result = CliRunner().invoke(main, ["list", "recipes", name])
        assert recipe.parse(name, tomllib.loads(result.stdout), name) == recipe.load(name)


def test_one_name_of_a_list_is_looked_up():
    assert CliRunner().invoke(main, ["list", "methods", "rtn"]).stdout.startswith("rtn\n    Round to nearest")
    refused = CliRunner().invoke(main, ["list", "recipes", "fp8x"])
    assert refused.exit_code == 2
    assert "unknown recipe 'fp8x'" in refused.stderr
    assert "did you mean 'fp8'? known: " in refused.stderr


def test_backends_are_listed_with_where_they_build_and_run(cli):
    lines = cli("list", "backends").stdout.splitlines()
    assert lines[::2] == ["ort", "trt", "trt-rtx"]
    assert all(line.startswith("    ") and "run on" in line for line in lines[1::2])


HEAVY = {"torch", "diffusers", "onnx", "onnxruntime", "tensorrt_rtx", "matplotlib", "numpy"}


def imported(statement):
    code = f"import sys\n{statement}\nprint(' '.join(sys.modules))"
    return set(subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split())


def test_the_command_line_imports_nothing_heavy():
    assert not HEAVY & imported("import exporter.cli")


def test_engines_need_neither_torch_nor_exporter():
    statement = "import engines.build, engines.backends as b\nfor n in b.names(): b.load(n)"
    assert not {"torch", "diffusers", "exporter", "calib_data"} & imported(statement)
