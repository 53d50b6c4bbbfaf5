"""VQ4DiT: mixtures of candidates become choices, codewords train with them, a kill changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from common import TINY
from killing import killed_after
from safetensors.torch import load_file
from torch import nn

from engines.errors import UserError
from exporter import methods, quantized, reconstruct
from exporter import quantize as stage
from exporter import recipe as recipes
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.formats.codebook import Format
from exporter.formats.fp import Format as Fp
from exporter.methods import kmeans, vq4dit
from exporter.metrics import sqnr_db
from exporter.modules import quantized_layer
from exporter.quantize import quantize
from exporter.recipe import WeightSpec
from exporter.specs import LayerSpec, oriented

FORMATS = [Format(4, 256), Format(2, 64), Format(1, 16)]
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=[f"{f.codebook_size}x{f.vector_size}" for f in FORMATS])


def layer_of(fmt=FORMATS[0], *, conv=False, granularity="tensor", activation=None, moments=None, **options):
    """Returns a float layer and the one that trains in its place."""
    torch.manual_seed(0)
    source = nn.Conv2d(16, 64, 3) if conv else nn.Linear(64, 96)
    source.requires_grad_(False)
    spec = LayerSpec(fmt, granularity, 0, activation)
    weight = oriented(source, spec)
    asked = WeightSpec(fmt, granularity, entries=activation)
    start = kmeans.quantize_weight(weight, asked, 0, kmeans.Options(), moments)
    scale = {"activation_scale": torch.tensor(0.01)} if activation else {}
    return source, vq4dit.layer(source, spec, start, scale, vq4dit.Options(**options))


@every_format
@pytest.mark.parametrize("conv", [False, True], ids=["linear", "conv"])
@pytest.mark.parametrize("how", ["tensor", "channel", "fp8"])
def test_what_trains_is_what_ships(fmt, conv, how):
    """The hard layer's output is that of the quantized layer made of its state, whatever was trained."""
    granularity, activation = ("tensor", Fp(4, 3)) if how == "fp8" else (how, None)
    source, layer = layer_of(fmt, conv=conv, granularity=granularity, activation=activation)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.1 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator)
    shipped, state = quantized_layer(source, layer.spec), layer.state()
    shipped.bias = nn.Parameter(state.pop("bias"))
    shipped._buffers |= state
    x = torch.randn((2, 16, 8, 8) if conv else (5, 64), generator=generator)
    with torch.no_grad():
        layer.bias.copy_(shipped.bias)  # ships as fp16 holds it
        assert torch.allclose(layer(x), shipped(x), atol=1e-5, rtol=1e-5)  # fp32 products in another order
    assert torch.equal(shipped.weight_codebook, shipped.weight_codebook.half().float())


@every_format
@pytest.mark.parametrize("how", ["tensor", "fp8"])
def test_untrained_it_is_k_means_and_other_candidates_are_the_nearest_codewords(fmt, how):
    """k-means weighs numbers by the inputs they meet, so its choice is not always the nearest of all."""
    moments = torch.logspace(-2, 2, 64)
    activation = Fp(4, 3) if how == "fp8" else None
    source, layer = layer_of(fmt, moments=moments, activation=activation, candidates=3)
    start = kmeans.quantize_weight(
        source.weight.detach(), WeightSpec(fmt, "tensor", entries=activation), 0, kmeans.Options(), moments
    )
    assert torch.equal(layer.choice(), start.codes.flatten())
    assert torch.equal(layer.state()["weight_codebook"], start.codebook)
    scale = 1.0 if start.scale is None else start.scale
    vectors = source.weight.reshape(-1, fmt.vector_size)
    distances = torch.cdist(vectors, layer.words.detach() * scale)
    others = distances.scatter(1, layer.candidates[:1].T.long(), torch.inf)
    found = distances.gather(1, layer.candidates[1:].T.long())
    assert torch.allclose(found, others.sort(dim=1).values[:, :2], atol=1e-3 * float(vectors.std()))
    assert torch.allclose(layer.ratios().sum(dim=0), torch.ones(len(vectors)))
    assert layer.ratios()[0].min().item() >= 1 / 3 - 1e-6  # k-means' own choice is the likeliest


def test_ratios_may_start_equal():
    _, layer = layer_of(candidates=4, equal=True)
    assert torch.allclose(layer.ratios(), torch.full_like(layer.ratios(), 0.25))


def test_gradients_of_the_mixture_are_those_of_the_formula():
    _, layer = layer_of(candidates=3)
    layer.hard = False
    gradient = torch.randn(64, 96, generator=torch.Generator().manual_seed(2))
    (layer._weight(torch.float32) * gradient).sum().backward()
    logits, words = (p.detach().clone().requires_grad_(True) for p in (layer.logits, layer.words))
    mixed = (logits.softmax(dim=0)[:, :, None] * words[layer.candidates.long()]).sum(dim=0)
    (mixed.reshape(96, 64).T * gradient).sum().backward()
    for ours, theirs in ((layer.logits.grad, logits.grad), (layer.words.grad, words.grad)):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=1e-4)  # fp32 sums in another order


def test_a_choice_that_is_all_but_made_is_made_for_good():
    _, layer = layer_of()
    with torch.no_grad():
        layer.logits[:, 0], layer.logits[:, 1] = torch.tensor([0.0, 5.0]), torch.tensor([0.0, 4.0])  # 99.3 %, 98.2 %
    layer.settle()
    assert torch.equal(layer.ratios()[:, 0], torch.tensor([0.0, 1.0]))
    assert 0.98 < layer.ratios()[1, 1].item() < 0.99
    layer.hard = False
    layer._weight(torch.float32).square().sum().backward()
    assert not layer.logits.grad[:, 0].any()
    assert layer.logits.grad[:, 1].any()


@pytest.mark.parametrize("smooth", [False, True])
def test_the_regulariser_is_least_where_all_choices_are_made(smooth):
    _, layer = layer_of(smooth=smooth, regularizer=2.0, warmup=0.5, equal=True)
    (choices, _) = vq4dit.phases([layer], vq4dit.Options(smooth=smooth, regularizer=2.0, warmup=0.5))
    assert choices.regularizer(0.49) == 0
    assert choices.regularizer(0.5).item() == pytest.approx(0.5 if smooth else 2.0)
    with torch.no_grad():
        layer.logits[0] = vq4dit.APART
    assert choices.regularizer(1.0).item() == 0


@pytest.mark.parametrize("together", [True, False])
def test_codewords_train_with_the_choices_or_after_them(together):
    _, layer = layer_of()
    choices, words = vq4dit.phases([layer], vq4dit.Options(together=together))
    trained = {id(p) for group, _ in choices.groups() for p in group}
    assert (id(layer.words) in trained, id(layer.bias) in trained) == (together, together)
    assert {id(p) for group, _ in words.groups() for p in group} == {id(layer.words), id(layer.bias)}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY | {"num_layers": 2, "out_channels": 2}))
    checkpoint = open_checkpoint(f"random:{folder}", steps=4)
    return checkpoint, calibrate(checkpoint, folder / "calibration", samples=32)


SHORT = {"iterations": 40, "codebook_iterations": 20, "rows": 112, "batch": 32}


def quantized_with(tiny, folder, method, *, more=(), activation=None, **options):
    checkpoint, calibration = tiny
    weight = {"format": "codebook", "vector_size": 2, "codebook_size": 64}
    rule = {"layers": "*", "weight": weight, "method": {"name": method, **options}}
    if activation:
        rule["activation"] = activation
    kept = {"layers": "*", "scope": "outside_blocks", "keep": "float"}
    return quantize(checkpoint, recipes.parse("test", {"rule": [kept, *more, rule]}), calibration, folder)


def quality(source):
    reference = load_file(source.file(quantized.REFERENCE))
    return sum(sqnr_db(reference[f"{step}/float"], reference[f"{step}/quantized"]) for step in range(4)) / 4


@pytest.fixture(scope="module")
def trained(tiny, tmp_path_factory):
    return quantized_with(tiny, tmp_path_factory.mktemp("trained") / "quantized", "vq4dit", **SHORT)


@pytest.mark.parametrize("joint", [True, False])
def test_training_brings_the_model_nearer_to_the_float_one(tiny, trained, tmp_path, joint):
    ours = trained if joint else quantized_with(tiny, tmp_path / "ours", "vq4dit", joint=False, **SHORT)
    theirs = quantized_with(tiny, tmp_path / "kmeans", "kmeans")
    assert quality(ours) > quality(theirs) + 1.0
    assert ours.info["weights"]["bits_per_weight"] == theirs.info["weights"]["bits_per_weight"]


def test_beside_fp8_activations_too(tiny, tmp_path):
    fp8 = {"format": "fp", "exponent_bits": 4, "mantissa_bits": 3, "observer": "mse"}
    ours = quantized_with(tiny, tmp_path / "ours", "vq4dit", activation=fp8, **SHORT)
    theirs = quantized_with(tiny, tmp_path / "kmeans", "kmeans", activation=fp8)
    assert quality(ours) > quality(theirs) + 1.0
    for layer in quantized.quantized_layers(quantized.load(ours)).values():
        assert torch.equal(Fp(4, 3).round(layer.weight_codebook), layer.weight_codebook)


def test_layers_of_other_methods_in_the_blocks_are_quantized_before(tiny, tmp_path):
    other = {"layers": "*.norm1.emb.*", "weight": {"format": "int", "bits": 8, "granularity": "channel"}}
    made = quantized_with(tiny, tmp_path / "made", "vq4dit", more=[other], **SHORT)
    kinds = {path: layer.spec.weight.kind for path, layer in quantized.quantized_layers(quantized.load(made)).items()}
    assert {kind for path, kind in kinds.items() if ".norm1.emb." in path} == {"int8"}
    assert {kind for path, kind in kinds.items() if ".norm1.emb." not in path} == {"codebook"}


@pytest.mark.parametrize("at", [25, 50])
def test_a_killed_run_ends_where_it_would_have(tiny, trained, tmp_path, monkeypatch, at):
    """Killed in the choices' iterations, and in the codewords'."""
    with killed_after(at, monkeypatch):
        quantized_with(tiny, tmp_path / "quantized", "vq4dit", **SHORT)
    assert (tmp_path / ".quantized.partial" / ".blocks" / "jointly" / "training.safetensors").exists()
    resumed = quantized_with(tiny, tmp_path / "quantized", "vq4dit", **SHORT)
    assert resumed.digest == trained.digest


def test_a_run_killed_after_the_training_does_not_train_again(tiny, trained, tmp_path, monkeypatch):
    def killed(*_arguments, **_options):
        raise KeyboardInterrupt

    with monkeypatch.context() as context:
        context.setattr(stage, "_add_quantized_outputs", killed)
        with pytest.raises(KeyboardInterrupt):
            quantized_with(tiny, tmp_path / "quantized", "vq4dit", **SHORT)
    monkeypatch.setattr(reconstruct, "train", killed)
    assert quantized_with(tiny, tmp_path / "quantized", "vq4dit", **SHORT).digest == trained.digest


def test_a_layer_read_by_itself_has_the_bias_that_was_trained(tiny, trained):
    checkpoint, _ = tiny
    model, stored, specs = checkpoint.load(), quantized.StoredTensors(trained), quantized.specs(trained)
    shipped = quantized.quantized_layers(quantized.load(trained))
    changed = 0
    for path, spec in specs.items():
        source = model.get_submodule(path)
        layer = quantized.load_layer(stored, path, spec, source)
        assert torch.equal(layer.bias, shipped[path].bias)
        changed += not torch.equal(layer.bias, source.bias)
    assert changed == len(specs)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("candidates", 0),
        ("candidates", 17),
        ("iterations", -1),
        ("batch", 0),
        ("rows", 1.5),
        ("warmup", 1.0),
        ("rate", -0.1),
        ("codebook_rate", 5000),
        ("hold_mb", -1),
    ],
)
def test_options_without_sense_are_refused(key, value):
    with pytest.raises(UserError, match=key):
        methods.options("vq4dit", {key: value}, "test")
