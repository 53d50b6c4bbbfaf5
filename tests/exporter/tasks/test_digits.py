"""The digits task: images are right or wrong, by a classifier."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from calib_data import shipped
from engines.errors import UserError
from exporter import tasks
from exporter.tasks.digits import Digits, TaskNet

WEIGHTS = shipped.folder("digits-dit") / "features.safetensors"


def noise(count: int = 20) -> torch.Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def drawn() -> TaskNet:
    torch.manual_seed(0)
    return TaskNet().eval()


def test_an_image_is_right_where_it_is_taken_for_the_digit_asked_for():
    net = drawn()
    taken = net(noise()).argmax(dim=1)
    asked = [str(label) for label in taken.tolist()]
    asked[:5] = [str((label + 1) % 10) for label in taken[:5].tolist()]
    found = Digits(net).scores(noise(), asked)
    assert found.tolist() == [0.0] * 5 + [1.0] * 15
    assert found.dtype == torch.float64


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_an_image_without_numbers_is_no_digit_and_spares_the_others(bad):
    net, images = drawn(), noise(3)
    asked = [str(label) for label in net(images).argmax(dim=1).tolist()]
    images[0, 0, 4, 4] = bad
    assert all(Digits(net).scores(images[:1], [digit]).item() == 0 for digit in map(str, range(10)))
    assert Digits(net).scores(images, asked).tolist() == [0.0, 1.0, 1.0]


def test_the_shipped_network_knows_real_digits():
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images / 8 - 1).float()[:, None]
    scores = tasks.load("digits", WEIGHTS).scores(images, [str(label) for label in digits.target])
    assert scores.mean() > 0.99  # it was trained on four fifths of them, and is right on 99 % of the rest


def test_features_are_64_and_have_no_gradient():
    found = tasks.load("digits", WEIGHTS).features(noise().double())
    assert found.shape == (20, 64)
    assert not found.requires_grad


def test_weights_of_half_the_width_are_read(tmp_path):
    net = drawn()
    save_file({key: value.half() for key, value in net.state_dict().items()}, tmp_path / "half.safetensors")
    found = tasks.load("digits", tmp_path / "half.safetensors").features(noise())
    assert torch.allclose(found, Digits(net).features(noise()), atol=2e-2)  # fp16 weights: 5e-4 each


@pytest.mark.parametrize("asked", ["10", "-1", "seven", "", "²"])
def test_what_is_no_digit_is_refused(asked):
    with pytest.raises(UserError, match="is not a digit"):
        Digits(drawn()).scores(noise(1), [asked])


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
@pytest.mark.parametrize("task", tasks.names())
def test_weights_that_cannot_be_read_are_named_with_a_fix(task, content, tmp_path):
    path = tmp_path / "features.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"features\.safetensors") as caught:
        tasks.load(task, path)
    assert caught.value.fix


def test_weights_of_another_network_are_refused(tmp_path):
    with pytest.raises(UserError, match="not the weights of a task network"):
        tasks.load("shapes", WEIGHTS)


def test_digits_without_weights_are_refused():
    with pytest.raises(UserError, match="no weights were given"):
        tasks.load("digits", None)


def test_an_unknown_task_is_named_with_those_known():
    with pytest.raises(UserError, match="unknown task 'shape'") as caught:
        tasks.load("shape", None)
    assert "did you mean 'shapes'" in caught.value.fix
