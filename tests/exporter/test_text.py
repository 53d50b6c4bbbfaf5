"""The text half of a pipeline: opened as transformers does, without foreign code or pickles; unknown words named."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from common import FAMILIES
from families import WORDS, clip_encoder, family, t5_encoder, tokenizer
from safetensors.torch import load_file, save_file

from engines.errors import UserError
from exporter import text
from exporter.checkpoint import open_checkpoint
from exporter.conditions import Conditions

INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.0",
    "scheduler": ["diffusers", "DDIMScheduler"],
    "safety_checker": [None, None],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
    "unet": ["diffusers", "UNet2DConditionModel"],
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A Stable Diffusion folder with a tiny text encoder, a tokenizer of a few words, and a denoiser's config."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "unet").mkdir()
    (folder / "unet" / "config.json").write_text(json.dumps(FAMILIES["sd"]))
    torch.manual_seed(0)
    clip_encoder(64, projected=False).save_pretrained(folder / "text_encoder", safe_serialization=True)
    tokenizer(77, clip=True).save_pretrained(folder / "tokenizer")
    (folder / "model_index.json").write_text(json.dumps(INDEX))
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(saved, tmp_path / "pipeline")


def reindex(folder, **changes):
    (folder / "model_index.json").write_text(json.dumps(INDEX | changes))


def encoded(folder, captions, **options):
    return Conditions(open_checkpoint(f"random:{folder}"), captions).of(range(len(captions)), **options)


def test_embeddings_are_those_that_transformers_computes(saved):
    from transformers import CLIPTextModel, PreTrainedTokenizerFast

    captions = ["a blue circle left of a red square", "a circle"]
    words = PreTrainedTokenizerFast.from_pretrained(saved / "tokenizer")
    ids = words(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        wanted = CLIPTextModel.from_pretrained(saved / "text_encoder").eval()(ids)[0]
    torch.testing.assert_close(encoded(saved, captions)["encoder_hidden_states"], wanted, rtol=1e-6, atol=1e-6)


def test_guidances_other_half_is_the_empty_caption(saved):
    nothing = encoded(saved, ["a circle"], null=True)["encoder_hidden_states"]
    torch.testing.assert_close(nothing, encoded(saved, [""])["encoder_hidden_states"], rtol=1e-6, atol=1e-6)


def test_the_encoder_is_let_go_once_all_is_read(saved):
    conditions = Conditions(open_checkpoint(f"random:{saved}"), ["a circle"])
    before = conditions.of([0])["encoder_hidden_states"]
    assert "_pipeline" in vars(conditions)
    conditions.read(range(3))
    assert "_pipeline" not in vars(conditions)
    assert torch.equal(conditions.of([1])["encoder_hidden_states"], before)


def test_the_text_half_is_listed_without_the_rest(saved, tmp_path):
    assert text.components(saved) == {"text_encoder": "CLIPTextModel", "tokenizer": "PreTrainedTokenizerFast"}
    assert text.components(tmp_path) == {}


def test_a_component_that_is_listed_as_none_is_left_out(folder):
    reindex(folder, text_encoder_2=[None, None], tokenizer_2=[None, None])
    assert set(text.components(folder)) == {"text_encoder", "tokenizer"}


def test_a_component_without_its_folder_is_refused_with_its_name(folder):
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"'tokenizer' \(PreTrainedTokenizerFast\)") as caught:
        open_checkpoint(f"random:{folder}").digest  # noqa: B018  what every command asks for first
    assert "copy the pipeline again" in caught.value.fix


@pytest.mark.parametrize(
    "entry",
    [["transformers", "CLIPTextMode"], ["my_code", "CLIPTextModel"], ["transformers", "AutoModel"], ["transformers"]],
    ids=["a class unknown", "another library", "a class that picks a class", "no class"],
)
def test_a_class_that_is_not_allowed_is_refused_with_those_that_are(folder, entry):
    reindex(folder, text_encoder=entry)
    with pytest.raises(UserError, match="text_encoder: unknown class") as caught:
        text.components(folder)
    assert "CLIPTextModelWithProjection" in caught.value.fix


def test_a_component_outside_the_folder_is_refused(folder):
    reindex(folder, **{"text_encoder/../../elsewhere": ["transformers", "CLIPTextModel"]})
    with pytest.raises(UserError):
        text.components(folder)


def test_pickled_encoders_are_never_read(folder):
    weights = next((folder / "text_encoder").glob("*.safetensors"))
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(UserError, match="holds no safetensors weights") as caught:
        text.open_pipeline(open_checkpoint(str(folder)))
    assert "safe_serialization" in caught.value.fix


def test_a_random_model_without_encoder_weights_reads_no_text(folder, tmp_path):
    next((folder / "text_encoder").glob("*.safetensors")).unlink()
    assert text.open_pipeline(open_checkpoint(f"random:{folder}")) is None
    shutil.copytree(folder / "unet", tmp_path / "bare" / "unet")
    assert text.open_pipeline(open_checkpoint(f"random:{tmp_path / 'bare'}")) is None


def test_code_in_a_model_folder_is_never_run(folder, tmp_path):
    ran = tmp_path / "ran"
    for part, key in (("text_encoder", "AutoModel"), ("tokenizer", "AutoTokenizer")):
        name = "config.json" if part == "text_encoder" else "tokenizer_config.json"
        config = json.loads((folder / part / name).read_text())
        config["auto_map"] = {key: "evil.Evil"}
        (folder / part / name).write_text(json.dumps(config))
        (folder / part / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    assert text.open_pipeline(open_checkpoint(f"random:{folder}")) is not None
    assert not ran.exists()


@pytest.mark.parametrize("file", ["tokenizer/tokenizer.json", "text_encoder/config.json", "text_encoder/weights"])
def test_a_damaged_file_is_refused_with_its_component(folder, file):
    path = next((folder / "text_encoder").glob("*.safetensors")) if file.endswith("weights") else folder / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=file.partition("/")[0]):
        text.open_pipeline(open_checkpoint(f"random:{folder}"))


def test_an_encoder_that_lacks_a_weight_is_refused_not_drawn(folder):
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    lacking = next(name for name in tensors if name.endswith("layers.1.mlp.fc1.weight"))
    del tensors[lacking]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lack.*layers\.1\.mlp\.fc1\.weight"):
        text.open_pipeline(open_checkpoint(f"random:{folder}"))


@pytest.mark.parametrize("kind", ["CLIPTextModelWithProjection", "T5EncoderModel"])
def test_every_kind_of_encoder_opens_whole(tmp_path, kind):
    """A T5's embeddings are stored once and used twice: none is missing."""
    made = clip_encoder(32, projected=True) if kind.startswith("CLIP") else t5_encoder(64)
    made.save_pretrained(tmp_path / "text_encoder", safe_serialization=True)
    opened = text._open(tmp_path / "text_encoder", kind)
    ids = torch.tensor([[1, 4, 5, 2]])
    with torch.no_grad():
        assert torch.equal(opened(ids)[0], made(ids)[0])


def test_an_unknown_word_is_named_with_close_ones(saved):
    with pytest.raises(UserError, match="'circel'") as caught:
        encoded(saved, ["a blue circle", "a red circel"])
    assert "a red circel" in caught.value.what
    assert "'circle'" in caught.value.fix


def test_an_unknown_word_is_found_before_anything_is_encoded_though_no_sample_asks_for_it(saved):
    with pytest.raises(UserError, match="'zzz'") as caught:
        Conditions(open_checkpoint(f"random:{saved}"), ["a circle", "zzz"]).of([0])
    assert len(caught.value.fix) < 200  # a vocabulary is not recited


def test_a_tokenizer_that_knows_every_word_lets_all_pass():
    words = tokenizer(77, clip=True)
    words.unk_token = words.eos_token  # as CLIP's does, which falls back on bytes
    pipeline = type("Pipeline", (), {"components": {"tokenizer": words, "vae": None, "tokenizer_2": None}})
    text.check_words(pipeline, ["anything at all"], "here")
    words.unk_token = "<unk>"
    with pytest.raises(UserError, match="'anything'"):
        text.check_words(pipeline, ["anything at all"], "here")
    text.check_words(pipeline, WORDS, "here")


def test_a_models_digest_covers_its_text_half(folder):
    before = open_checkpoint(f"random:{folder}").digest
    assert text.digest(folder).keys() >= {"text_encoder/config.json", "text_encoder/model.safetensors"}
    path = folder / "tokenizer" / "tokenizer.json"
    path.write_text(path.read_text() + "\n")
    assert open_checkpoint(f"random:{folder}").digest != before


@pytest.mark.parametrize("name", ["sd", "sdxl", "pixart-sigma", "sd3", "flux-dev"])
def test_stand_ins_have_the_shapes_of_what_they_stand_for(name):
    found = family(name)
    wanted, unwanted = text.drawn(found, ["a fox", "a bowl"])
    specs = {spec.name: spec for spec in found.inputs()[1:] if spec.name not in {"timestep", *found.constants(1)}}
    for rows in (wanted, unwanted):
        assert rows.keys() == specs.keys()
        for key, value in rows.items():
            sizes = [found.axes()[d].opt if isinstance(d, str) else d for d in specs[key].shape[1:]]
            assert value.shape == (2, *sizes)
            assert value.dtype == torch.float32
    assert all(bool((v == 1).all()) for k, v in wanted.items() if k.endswith("mask"))


def test_encoders_without_the_index_that_names_them_are_an_error(folder):
    (folder / "model_index.json").unlink()
    with pytest.raises(UserError, match=r"has a text_encoder/, but no model_index\.json"):
        text.components(folder)


def test_a_denoiser_that_the_index_lists_and_the_folder_lacks_is_named(folder):
    shutil.rmtree(folder / "unet")
    with pytest.raises(UserError, match=r"lists 'unet', but there is no unet/config\.json"):
        open_checkpoint(f"random:{folder}")


@pytest.mark.parametrize("zeros", [True, False, None])
def test_whether_guidance_goes_away_from_zeros_is_what_the_index_says(zeros, saved, tmp_path):
    index = {"_class_name": "StableDiffusionXLPipeline"}
    index |= {name: ["transformers", kind] for name, kind in (
        ("text_encoder", "CLIPTextModel"), ("text_encoder_2", "CLIPTextModelWithProjection"),
        ("tokenizer", "PreTrainedTokenizerFast"), ("tokenizer_2", "PreTrainedTokenizerFast"),
    )}  # fmt: skip
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps(FAMILIES["sdxl"]))
    torch.manual_seed(0)
    for name in ("tokenizer", "tokenizer_2"):
        tokenizer(77, clip=True).save_pretrained(tmp_path / name)
    clip_encoder(32, projected=False).save_pretrained(tmp_path / "text_encoder", safe_serialization=True)
    clip_encoder(32, projected=True).save_pretrained(tmp_path / "text_encoder_2", safe_serialization=True)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    before = text.digest(tmp_path)
    if zeros is not None:
        (tmp_path / "model_index.json").write_text(json.dumps(index | {text.ZEROS: zeros}))
    pipeline = text.open_pipeline(open_checkpoint(f"random:{tmp_path}"))
    assert pipeline.config[text.ZEROS] is (zeros is not False)
    assert (text.digest(tmp_path) == before) is (zeros is not False)
