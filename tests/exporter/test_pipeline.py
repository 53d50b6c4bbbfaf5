"""Whole pipelines in a bundle: graphs that compute what diffusers does, and pictures drawn without it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from common import ROOT
from pipelines import CAPTIONS, STEPS, bundled_pipeline, save_pipeline
from safetensors.torch import load_file, save_file

from engines.backends.ort import OrtRunner, open_session
from engines.bundle import open_bundle
from engines.errors import UserError
from engines.loading import Engine
from engines.pipeline import Pipeline, plain_record
from exporter import pipeline as stage
from exporter import text, vae
from exporter.checkpoint import open_checkpoint
from exporter.metrics import sqnr_db
from exporter.verify import verify

DIFFERENT_DB = 100.0  # two programs' pictures, of the same float network: the order of sums (124.8 dB measured)
WITHOUT = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "diffusers", "transformers", "exporter"):
            raise ImportError(f"{name} is not to be imported")

sys.meta_path.insert(0, Blocked())
import json
import numpy as np
from engines.pipeline import load_pipeline

folder, captions, noise, out = sys.argv[1:]
np.save(out, load_pipeline(folder).draw(json.loads(captions), noise=np.load(noise)))
"""


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("sdxl"), "sdxl")


@pytest.fixture(scope="module")
def bundled(sd, tmp_path_factory):
    return bundled_pipeline(sd, tmp_path_factory.mktemp("run"))


def diffusers_pictures(folder, noise):
    from diffusers import StableDiffusionPipeline

    parts = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    parts.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": STEPS, "guidance_scale": 3.0, "height": 32, "width": 32, "output_type": "pt"}
    return 2 * parts(CAPTIONS, latents=torch.from_numpy(noise), **options).images - 1


def test_pictures_drawn_without_torch_are_those_of_diffusers(sd, bundled, tmp_path):
    noise = np.random.default_rng(0).standard_normal((len(CAPTIONS), 4, 16, 16), dtype=np.float32)
    np.save(tmp_path / "noise.npy", noise)
    arguments = [bundled, json.dumps(CAPTIONS), tmp_path / "noise.npy", tmp_path / "out.npy"]
    subprocess.run(
        [sys.executable, "-c", WITHOUT, *map(str, arguments)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    drawn, wanted = torch.from_numpy(np.load(tmp_path / "out.npy")), diffusers_pictures(sd, noise)
    assert drawn.shape == (len(CAPTIONS), 3, 32, 32)
    assert sqnr_db(wanted, drawn) >= DIFFERENT_DB
    assert sqnr_db(wanted[:1], drawn[1:2]) < 10  # captions and noise matter


def test_every_recorded_part_is_verified(bundled):
    found = verify(bundled)
    assert found["passed"]
    (engine,) = found["engines"]
    assert [row["what"] for row in engine["rows"]][-4:] == [
        "2 samples", "text encoder, wanted", "text encoder, unwanted", "VAE decoder",
    ]  # fmt: skip


def test_recorded_noise_and_tokens_give_the_recorded_picture(bundled):
    from engines import golden

    opened = open_bundle(bundled)
    recorded = golden.read(opened, "picture/")
    drawn = Pipeline(Engine(opened, "ort", opened.engine("ort"), 1)).draw_tokens(
        {"tokens": recorded["tokens"]}, {"tokens": recorded["unwanted_tokens"]}, noise=recorded["noise"]
    )
    assert sqnr_db(torch.from_numpy(recorded["picture"]), torch.from_numpy(drawn)) >= DIFFERENT_DB


def test_a_changed_vae_is_another_bundle(sd, bundled):
    before = stage.vae_digest(open_checkpoint(str(sd)))
    config = sd / "vae" / "config.json"
    kept = config.read_text()
    config.write_text(kept + "\n")
    assert stage.vae_digest(open_checkpoint(str(sd))) != before
    config.write_text(kept)


def agreement_db(folder, info, checkpoint, dtype):
    """Returns how well a written text graph gives what the family's own pipeline encodes, worst output."""
    pipeline = text.open_pipeline(checkpoint)
    with torch.no_grad():
        wanted, _ = checkpoint.family.encode(pipeline, CAPTIONS)
    session = open_session(folder / info["text"]["encoders"][dtype], plain_record(dtype))
    names = [session_input.name for session_input in session.get_inputs()]
    tokenizers = [part for name, part in pipeline.components.items() if name.startswith("tokenizer") and part]
    length = info["text"]["tokens"]
    padded = {"padding": "max_length", "max_length": length, "truncation": True, "return_tensors": "np"}
    got = OrtRunner(session).run(
        {name: words(CAPTIONS, **padded).input_ids for name, words in zip(names, tokenizers, strict=True)}
    )
    outputs = info["text"]["outputs"]
    assert set(outputs.values()) == wanted.keys()
    return min(sqnr_db(wanted[outputs[name]], torch.from_numpy(value)) for name, value in got.items())


def test_two_encoders_and_a_pooled_output_are_one_graph_in_fp16(sdxl, tmp_path):
    checkpoint = open_checkpoint(str(sdxl))
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    info, golden = stage.write_pipeline(checkpoint, CAPTIONS[:2], latents, ["fp16"], tmp_path)
    assert agreement_db(tmp_path, info, checkpoint, "fp16") >= stage.LEAST_DB["fp16"]
    (second,) = info["text"]["more"]
    assert second["input"] == "tokens_2"
    assert (tmp_path / second["tokenizer"]).is_file()
    assert info["text"]["unwanted"] == "zeros"
    assert info["constants"] == {"time_ids": [128.0, 128.0, 0.0, 0.0, 128.0, 128.0]}
    assert golden.keys() == {"tokens", "tokens_2", "unwanted_tokens", "unwanted_tokens_2", "picture"}
    assert golden["picture"].shape == (2, 3, 32, 32)
    assert golden["picture"].abs().max() <= 1
    assert info["vae"]["decoders"] == {"fp16": "vae_decoder/fp16/model.onnx"}


def test_samples_that_are_pictures_need_no_vae(tmp_path):
    checkpoint = open_checkpoint("shapes-unet")
    captions, latents = ["a small red circle", "a large blue square"], torch.full((2, 3, 32, 32), 1.5)
    info, golden = stage.write_pipeline(checkpoint, captions, latents, ["fp32"], tmp_path)
    assert info["vae"] is None
    assert info["text"]["unwanted"] == "caption"
    assert info["text"]["limits_db"] == {"fp32": stage.KNOWN_DB - stage.MARGIN_DB}
    assert torch.equal(golden["picture"], torch.ones(2, 3, 32, 32))
    assert golden["tokens"].shape == (2, info["text"]["tokens"])
    assert not (tmp_path / "vae_decoder").exists()


def test_a_vae_that_asks_for_fp32_stays_so(sdxl, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage, "_write_graph", lambda *arguments: 120.0)
    monkeypatch.setattr(vae, "open_decoder", lambda root, opened=vae.open_decoder: asking(opened(root)))
    latents = torch.zeros(1, 4, 16, 16)
    info, _ = stage.write_pipeline(open_checkpoint(str(sdxl)), CAPTIONS[:1], latents, ["fp16"], tmp_path)
    assert info["text"]["encoders"].keys() == {"fp16"}
    assert info["vae"]["decoders"].keys() == {"fp32"}
    assert "force_upcast" in capsys.readouterr().err


def asking(decoder):
    decoder.vae.register_to_config(force_upcast=True)
    return decoder


@pytest.mark.parametrize(("dtypes", "held"), [(["fp16"], {"fp32"}), (["fp32", "fp16"], {"fp32"})])
def test_what_overflows_in_fp16_is_written_in_fp32(tmp_path, monkeypatch, capsys, dtypes, held):
    def write(module, axes, feeds, dtype, path):
        path.parent.mkdir(parents=True)
        return -np.inf if dtype == "fp16" else 120.0

    monkeypatch.setattr(stage, "_write_graph", write)
    files, limits = stage._write_graphs(lambda: None, {}, {}, dtypes, tmp_path / "vae_decoder")
    assert files.keys() == limits.keys() == held
    assert [one.name for one in (tmp_path / "vae_decoder").iterdir()] == ["fp32"]
    assert "stays fp32" in capsys.readouterr().err


def test_a_wrong_fp32_graph_is_our_fault(tmp_path, monkeypatch):
    monkeypatch.setattr(stage, "_write_graph", lambda *arguments: 60.0)
    with pytest.raises(AssertionError, match=r"agrees with PyTorch to 60\.0 dB"):
        stage._write_graphs(lambda: None, {}, {}, ["fp32"], tmp_path / "text_encoder")


def edited(folder, source, part, **changes):
    """Returns a copy of a pipeline's small files, one config changed; weights are empty files of their names."""
    for file in source.rglob("*"):
        if file.is_file():
            copy = folder / file.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(b"" if file.suffix == ".safetensors" else file.read_bytes())
    path = folder / part
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return open_checkpoint(str(folder))


@pytest.mark.parametrize(
    ("part", "changes", "told"),
    [
        ("model_index.json", {"vae": None}, "it has no VAE"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "'AutoencoderTiny'; AutoencoderKL is served"),
        ("vae/config.json", {"latents_mean": [0.0] * 4}, "a mean for every channel"),
        ("vae/config.json", {"latent_channels": 16}, r"latents are \[4, 16, 16\], and its VAE decodes 16 channels"),
        ("text_encoder/config.json", {"use_attention_mask": True}, "text_encoder reads a mask"),
        ("model_index.json", {"tokenizer": None}, "1 text encoders and 0 tokenizers"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_not_served_is_told(sd, tmp_path, part, changes, told, capsys):
    checkpoint = edited(tmp_path / "pipeline", sd, part, **changes)
    info, golden = stage.write_pipeline(checkpoint, CAPTIONS, torch.zeros(3, 4, 16, 16), ["fp32"], tmp_path / "out")
    assert (info, golden) == (None, {})
    note = " ".join(capsys.readouterr().err.split())
    assert note.startswith("note: the bundle carries no text encoder and VAE")
    assert re.search(told, note)


def test_a_model_without_captions_carries_no_pipeline(capsys):
    checkpoint = open_checkpoint("digits-dit")
    assert stage.write_pipeline(checkpoint, [], torch.zeros(1, 1, 32, 32), ["fp32"], ROOT) == (None, {})
    assert capsys.readouterr().err == ""


def test_pickled_vae_weights_are_never_read(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "diffusion_pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="holds no safetensors weights"):
        vae.open_decoder(tmp_path)


def test_a_vae_without_all_its_weights_is_refused(sd, tmp_path):
    shutil.copytree(sd / "vae", tmp_path / "vae")
    path = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.conv_out.bias"]
    save_file(tensors, path)
    with pytest.raises(UserError, match="lack 'decoder"):
        vae.open_decoder(tmp_path)


def test_a_decoder_takes_latents_of_any_sides(bundled):
    opened = open_bundle(bundled)
    drawn = Pipeline(Engine(opened, "ort", opened.engine("ort"), 1)).decode(np.zeros((2, 4, 6, 10), np.float32))
    assert drawn.shape == (2, 3, 12, 20)
