"""From captions to pictures: each caption its own picture, in the engine's float type, whatever is drawn beside it."""

from __future__ import annotations

import re
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import bundles
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tokenizers import Tokenizer, models, pre_tokenizers

from engines.bundle import open_bundle
from engines.errors import UserError
from engines.pipeline import Pipeline

TOKENS, SHAPE = 3, [1, 2, 2]
CAPTION, SIZES = "class_labels", "timestep"  # inputs that the tiny bundle has, whatever they are called there
VOCABULARY = {"<pad>": 0, "red": 1, "blue": 2, "green": 3, "<unk>": 4}
TYPES = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16}


def encoder(dtype, scale=1.0):
    """Returns a graph: state [batch, tokens] = tokens · scale; in fp16 half a step more, to be told apart."""
    kind = TYPES[dtype]
    nodes = [
        helper.make_node("Cast", ["tokens"], ["floats"], to=kind),
        helper.make_node("Mul", ["floats", "scale"], ["scaled"]),
        helper.make_node("Add", ["scaled", "more"], ["state"]),
    ]
    constants = [
        helper.make_tensor("scale", kind, [1], [scale]),
        helper.make_tensor("more", kind, [1], [0.5 if dtype == "fp16" else 0.0]),
    ]
    tokens = helper.make_tensor_value_info("tokens", TensorProto.INT64, ["batch", TOKENS])
    return model(nodes, tokens, helper.make_tensor_value_info("state", kind, ["batch", TOKENS]), constants)


def decoder():
    """Returns a graph: picture = latent, one row at a time."""
    ends = [helper.make_tensor_value_info(name, TYPES["fp32"], [1, *SHAPE]) for name in ("latent", "picture")]
    return model([helper.make_node("Identity", ["latent"], ["picture"])], *ends, [])


def model(nodes, given, found, constants):
    graph = helper.make_graph(nodes, "graph", [given], [found], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.ModelProto.SerializeToString(made)


def words():
    raw = Tokenizer(models.WordLevel(VOCABULARY, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.enable_padding(length=TOKENS, pad_id=0, pad_token="<pad>")
    raw.enable_truncation(TOKENS)
    return raw.to_str().encode()


def described(**changes):
    text = {
        "tokenizer": "tokenizer/tokenizer.json", "tokens": TOKENS, "pad": 0, "bos": None, "eos": None,
        "input": "tokens", "more": [], "encoders": {"fp32": "text_encoder/fp32/model.onnx"},
        "outputs": {"state": CAPTION}, "unwanted": "caption", "limits_db": {"fp32": 77.0},
    }  # fmt: skip
    vae = {
        "decoders": {"fp32": "vae_decoder/fp32/model.onnx"}, "input": "latent", "output": "picture",
        "scaling_factor": 4.0, "shift_factor": 0.25, "limits_db": {"fp32": 77.0},
    }  # fmt: skip
    found = {"text": text, "vae": vae, "constants": {}}
    for key, value in changes.items():
        found[key] = value if not isinstance(value, dict) or not found[key] else found[key] | value
    return found


FILES = {
    "tokenizer/tokenizer.json": words(),
    "text_encoder/fp32/model.onnx": encoder("fp32"),
    "text_encoder/fp16/model.onnx": encoder("fp16"),
    "vae_decoder/fp32/model.onnx": decoder(),
}


@dataclass
class Engine:
    """Stands for a denoiser's engine: a sample is its noise and its caption's first token less the unwanted's last."""

    bundle: Any
    guided: bool = False
    dtype: str = "fp32"
    most: int = 4

    def __post_init__(self):
        self.sampler = {"guided": self.guided, "latent": {"shape": SHAPE, "init_noise_sigma": 1.0, "pixels": False}}
        self.axes = {"batch": {"min": 1, "opt": 2, "max": self.most, "multiple": 1}}
        self.calls = []

    def sample(self, noise, wanted, unwanted=None):
        self.calls.append((len(noise), wanted, unwanted))
        assert all(len(value) == len(noise) for value in (*wanted.values(), *(unwanted or {}).values()))
        return noise + wanted[CAPTION][:, 0, None, None, None]


@pytest.fixture
def pipeline(tmp_path):
    def opened(*, guided=False, dtype="fp32", **changes):
        def edit(info):
            info["pipeline"] = described(**changes)

        folder = bundles.tiny_bundle(tmp_path / "bundle", edit=edit, files=FILES)
        return Pipeline(Engine(open_bundle(folder), guided, dtype))

    return opened


def zeros(count):
    return np.zeros((count, *SHAPE), np.float32)


@pytest.mark.parametrize(
    "changes",
    [
        {"text": {"input": "ids"}},
        {"text": {"outputs": {}}},
        {"text": {"outputs": {"other": CAPTION}}},
        {"vae": {"output": "x"}},
    ],
)
def test_graphs_that_are_not_what_the_manifest_says_are_refused(pipeline, changes):
    with pytest.raises(UserError, match="which its manifest does not say"):
        pipeline(**changes)


@pytest.mark.parametrize("guided", [False, True])
def test_every_caption_has_its_own_picture_however_many_there_are(pipeline, guided):
    opened = pipeline(guided=guided, vae=None)
    captions = ["red", "blue", "", "red blue", "green"]
    noise = np.arange(-1, 0.9, 0.1, np.float32)[:5, None, None, None] * np.ones(SHAPE, np.float32) - 2
    drawn = opened.draw(captions, noise=noise)
    alone = [opened.draw([caption], noise=noise[i : i + 1]) for i, caption in enumerate(captions)]
    np.testing.assert_array_equal(drawn, np.concatenate(alone))
    first = np.array([1, 2, 0, 1, 3], np.float32)[:, None, None, None]
    np.testing.assert_allclose(drawn, (noise + first).clip(-1, 1))


def test_a_latent_is_scaled_back_shifted_and_clipped(pipeline):
    opened = pipeline()
    latents = np.array([[0.0, 1.0], [4.0, -8.0]], np.float32)[None, None] * np.ones((3, 1, 1, 1), np.float32)
    np.testing.assert_allclose(opened.decode(latents)[2, 0], [[0.25, 0.5], [1.0, -1.0]])


def test_the_empty_caption_is_what_guidance_goes_away_from(pipeline):
    opened = pipeline(guided=True)
    opened.draw(["red", "blue"], noise=zeros(2))
    np.testing.assert_array_equal(opened.engine.calls[0][2][CAPTION], np.zeros((2, TOKENS)))
    unwanted = opened.conditions(opened.tokens(["blue"]), wanted=False)[CAPTION]
    np.testing.assert_array_equal(unwanted, [[2, 0, 0]])


def test_zeros_are_what_guidance_goes_away_from_where_the_bundle_says_so(pipeline):
    opened = pipeline(guided=True, text={"unwanted": "zeros"})
    np.testing.assert_array_equal(opened.conditions(opened.tokens(["blue"]), wanted=False)[CAPTION], [[0, 0, 0]])


def test_constants_are_fed_with_every_caption(pipeline):
    opened = pipeline(constants={SIZES: [8, 9.5]})
    opened.draw(["red", "blue"], noise=zeros(2))
    np.testing.assert_array_equal(opened.engine.calls[0][1][SIZES], [[8, 9.5], [8, 9.5]])


@pytest.mark.parametrize(("dtype", "state"), [("fp32", 1.0), ("fp16", 1.5)])
def test_an_engine_is_fed_by_graphs_of_its_own_float_type(pipeline, dtype, state):
    both = {name: f"text_encoder/{name}/model.onnx" for name in TYPES}
    opened = pipeline(dtype=dtype, text={"encoders": both, "limits_db": dict.fromkeys(TYPES, 30.0)})
    found = opened.conditions(opened.tokens(["red"]))[CAPTION]
    assert found.dtype == np.float32
    assert found[0, 0] == state


def test_a_graph_that_fp16_cannot_hold_is_taken_in_fp32(pipeline):
    opened = pipeline(dtype="fp16")
    assert opened.conditions(opened.tokens(["red"]))[CAPTION][0, 0] == 1.0


def test_noise_is_every_rows_own(pipeline):
    opened = pipeline()
    noise = opened.noise_of(3, 7)
    assert noise.shape == (3, *SHAPE)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise[:2], opened.noise_of(2, 7))
    assert len({row.tobytes() for row in (*noise, *opened.noise_of(3, 8))}) == 6
    np.testing.assert_array_equal(opened.draw(["red"] * 3, seed=7), opened.draw(["red"] * 3, noise=noise))


def test_every_picture_may_go_away_from_another_caption(pipeline):
    opened = pipeline(guided=True)
    unwanted = {"tokens": np.array([[4, 0, 0], [5, 0, 0], [6, 0, 0]])}
    opened.draw_tokens(opened.tokens(["red"] * 3), unwanted, noise=zeros(3))
    np.testing.assert_array_equal(opened.engine.calls[0][2][CAPTION][:, 0], [4, 5, 6])


def test_threads_draw_what_one_alone_does(pipeline):
    opened = pipeline(guided=True)
    asked = [(["red", "blue green"][: 1 + i % 2], i) for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda one: opened.draw(one[0], seed=one[1]), asked))
    for (captions, seed), picture in zip(asked, drawn, strict=True):
        np.testing.assert_array_equal(picture, opened.draw(captions, seed=seed))


def test_token_ids_need_no_tokenizer(pipeline, monkeypatch):
    opened = pipeline()
    wanted = {"tokens": np.array([[1, 0, 0]], np.int32)}
    expected = opened.draw(["red"], noise=zeros(1))
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    np.testing.assert_array_equal(opened.draw_tokens(wanted, wanted, noise=zeros(1)), expected)


ONE = {"tokens": np.zeros((1, TOKENS), np.int64)}


@pytest.mark.parametrize(
    ("wanted", "unwanted", "told"),
    [
        ({}, ONE, "'tokens': missing"),
        ({"tokens": np.zeros((1, 4), np.int64)}, ONE, r"int64 \[1, 4\]"),
        ({"tokens": np.zeros((1, 3))}, ONE, r"float64 \[1, 3\]"),
        ({"tokens": np.zeros(3, np.int64)}, ONE, r"int64 \[3\]"),
        ({"tokens": np.zeros((0, 3), np.int64)}, ONE, r"int64 \[0, 3\]"),
        (ONE, {"tokens": np.zeros((2, 3), np.int64)}, r"int64 \[2, 3\]"),
    ],
)
def test_other_tokens_are_refused_with_what_is_wanted(pipeline, wanted, unwanted, told):
    with pytest.raises(UserError, match=told) as caught:
        pipeline().draw_tokens(wanted, unwanted)
    assert ", 3]" in caught.value.fix


@pytest.mark.parametrize("seed", [-1, 1.5, "2"])
def test_a_seed_that_is_no_whole_number_from_zero_is_refused(pipeline, seed):
    with pytest.raises(UserError, match=f"seed {seed!r}"):
        pipeline().draw(["red"], seed=seed)


@pytest.mark.parametrize("captions", ["red", []])
def test_captions_come_as_a_list(pipeline, captions):
    with pytest.raises(UserError, match="captions") as caught:
        pipeline().draw(captions)
    assert "a list" in caught.value.fix


def test_an_unknown_word_is_named(pipeline):
    with pytest.raises(UserError, match="knows no 'rde'"):
        pipeline().draw(["rde"])


def test_noise_for_another_number_of_pictures_is_refused(pipeline):
    with pytest.raises(UserError, match="noise for 3 pictures, and 2 captions"):
        pipeline().draw(["red", "blue"], noise=zeros(3))


def test_a_bundle_without_text_half_says_so(tmp_path):
    with pytest.raises(UserError, match="carries no text encoder"):
        Pipeline(Engine(open_bundle(bundles.tiny_bundle(tmp_path / "bundle"))))


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ({"text": {"encoders": {}}}, "no encoders for a fp32 engine"),
        ({"text": {"limits_db": {}}}, "no encoders for a fp32 engine"),
        ({"vae": {"decoders": {"fp16": "x"}}}, "no decoders for a fp32 engine"),
        ({"vae": {"decoders": {"fp32": "../x.onnx"}}}, "pipeline's ../x.onnx is not there"),
        ({"text": {"tokenizer": "tokenizer/other.json"}}, "pipeline's tokenizer/other.json is not there"),
        ({"text": {"outputs": {"state": "other"}}}, "gives 'other', which is no input"),
        ({"constants": {"other": [1]}}, "gives 'other', which is no input"),
        ({"text": {"more": [{}]}}, "info.pipeline.text.more.0 lacks"),
    ],
)
def test_a_pipeline_whose_parts_do_not_go_together_is_refused(tmp_path, part, told):
    def edit(info):
        info["pipeline"] = described(**part)

    with pytest.raises(UserError, match=re.escape(told)):
        open_bundle(bundles.tiny_bundle(tmp_path / "bundle", edit=edit, files=FILES))


def test_recorded_tokens_and_latents_tell_a_wrong_graph(pipeline, monkeypatch):
    opened = pipeline(guided=True)
    recorded = {
        "tokens": np.array([[1, 2, 3], [2, 0, 0]]), "unwanted_tokens": np.array([[4, 0, 0]] * 2),
        "latent": np.ones((2, *SHAPE), np.float32), "picture": np.full((2, *SHAPE), 0.5, np.float32),
        f"wanted/{CAPTION}": np.array([[1, 2, 3], [2, 0, 0]], np.float32),
        f"unwanted/{CAPTION}": np.array([[4, 0, 0]] * 2, np.float32),
    }  # fmt: skip
    monkeypatch.setattr("engines.pipeline.golden.read", lambda bundle, prefix: recorded)
    assert [(row["what"], row["passed"]) for row in opened.self_test()] == [
        ("text encoder, wanted", True), ("text encoder, unwanted", True), ("VAE decoder", True),
    ]  # fmt: skip
    recorded[f"wanted/{CAPTION}"] = recorded[f"wanted/{CAPTION}"] + np.float32(1e-3)
    recorded["picture"] = recorded["picture"] * np.float32(1.001)
    assert [row["passed"] for row in opened.self_test()] == [False, True, False]
