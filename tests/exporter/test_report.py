"""What a person sees of a report: pictures whose differences are as strong as they say."""

from __future__ import annotations

import torch

from exporter import report
from exporter.validate import activation_counts


def drawn(monkeypatch, reference, other, *, in_pixels, tmp_path):
    """Returns the drawn float, quantized and difference images of the first column."""
    seen = []
    original = report.drawable
    monkeypatch.setattr(report, "drawable", lambda image: seen.append(original(image)) or seen[-1])
    report.draw_samples(reference, other, "ort", tmp_path / "samples.png", in_pixels)
    assert (tmp_path / "samples.png").stat().st_size > 0
    return seen[0], seen[len(reference)], seen[2 * len(reference)]


def test_latents_and_their_differences_share_a_unit(monkeypatch, tmp_path):
    reference = torch.full((1, 4, 8, 8), 4.0)
    other = reference.clone()
    other[:, 0, 0, 0] = 4.2  # five hundredths of the largest: half of the range, ten times as strong
    first, second, difference = drawn(monkeypatch, reference, other, in_pixels=False, tmp_path=tmp_path)
    assert torch.allclose(first, torch.ones(8, 8))
    assert torch.allclose(second, torch.ones(8, 8))
    assert abs(float(difference[0, 0]) - 0.75) < 1e-5
    assert torch.allclose(difference[1:], torch.full((7, 8), 0.5))


def test_colours_are_drawn_as_they_are(monkeypatch, tmp_path):
    reference = torch.stack([torch.full((3, 8, 8), value) for value in (-1.0, 0.0)])
    first, _, difference = drawn(monkeypatch, reference, reference + 0.02, in_pixels=True, tmp_path=tmp_path)
    assert first.shape == (8, 8, 3)
    assert torch.equal(first, torch.zeros(8, 8, 3))
    assert torch.allclose(difference, torch.full((8, 8, 3), 0.6))


def test_activations_of_fewer_bits_are_labelled_as_carried_in_int8():
    four, eight = {"format": "int", "bits": 4}, {"format": "int", "bits": 8}
    layer = {"deployable": True, "shifted": False}
    info = {
        "layers": {
            "a": layer | {"activation": four, "steps": 25},
            "b": layer | {"activation": four, "steps": 25},
            "c": layer | {"activation": None, "steps": 0},
        },
        "points": {"d": {"activation": eight, "steps": 0}},
    }
    counts = activation_counts(info)
    assert counts["layers"] == {"int4 in INT8 by step": 2, "float": 1}
    line = report.activations_line(counts)
    assert line == "activations: int4 in INT8 by step (2 layers), float (1 layers), int8 (1 points of attentions)"
