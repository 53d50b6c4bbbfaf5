"""Metrics against values known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engines.errors import UserError
from exporter.metrics import (
    TaskNet,
    class_accuracy,
    frechet_distance,
    knn_recall,
    load_task_net,
    mean_ci95,
    psnr_db,
    sqnr_db,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def exact_gaussian(count: int, mean: torch.Tensor, deviations: torch.Tensor, seed: int) -> torch.Tensor:
    """Features whose sample mean is `mean` and whose sample covariance is diag(deviations²), to rounding."""
    x = random(count, len(mean), seed=seed)
    x = x - x.mean(dim=0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False).T
    return white * deviations + mean


@pytest.mark.parametrize(("noise", "expected"), [(1.0, 0.0), (0.1, 20.0), (0.001, 60.0), (10.0, -20.0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sqnr_is_the_ratio_of_powers_in_db(noise, expected, dtype):
    reference = torch.tensor([3.0, -4.0, 0.0, 5.0], dtype=dtype)
    found = sqnr_db(reference, reference * (1 + noise))
    assert found == pytest.approx(expected, abs=0.01)  # fp32 rounds 1.001·x to 1e-7: 0.001 dB of 60


def test_sqnr_does_not_depend_on_a_common_factor():
    x, y = random(100), random(100, seed=1)
    assert sqnr_db(x * 1e-12, y * 1e-12) == pytest.approx(sqnr_db(x, y), abs=1e-9)  # fp64 sums


def test_sqnr_of_equal_tensors_is_infinite():
    assert sqnr_db(torch.ones(3), torch.ones(3)) == math.inf
    assert sqnr_db(torch.zeros(3), torch.zeros(3)) == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_sqnr_of_what_is_no_number_is_the_worst_there_is(bad):
    assert sqnr_db(torch.ones(3), torch.tensor([1.0, bad, 1.0])) == -math.inf


def test_sqnr_against_silence_is_far_below_zero():
    assert -math.inf < sqnr_db(torch.zeros(3), torch.ones(3)) < -1000


def test_psnr_is_per_image():
    reference = torch.zeros(3, 1, 4, 4)
    other = reference + torch.tensor([0.2, 0.02, 2.0]).reshape(3, 1, 1, 1)
    found = psnr_db(reference, other, data_range=2.0)
    assert found.tolist() == pytest.approx([20.0, 40.0, 0.0], abs=1e-5)  # fp32's 0.2 is off by 1e-8


def test_psnr_grows_with_the_range():
    reference, other = torch.zeros(1, 3, 2, 2), torch.ones(1, 3, 2, 2)
    assert psnr_db(reference, other, 255.0).item() == pytest.approx(20 * math.log10(255), abs=1e-9)  # fp64 throughout


def test_psnr_of_equal_images_is_capped():
    images = random(2, 1, 4, 4)
    assert psnr_db(images, images, 2.0).tolist() == [120.0, 120.0]
    assert psnr_db(images, images + 1e-9, 2.0).tolist() == [120.0, 120.0]


def test_psnr_of_an_image_with_nan_is_the_worst_there_is_and_spares_the_others():
    reference, other = torch.zeros(2, 1, 2, 2), torch.full((2, 1, 2, 2), 0.2)
    other[0, 0, 0, 0] = math.nan
    found = psnr_db(reference, other, 2.0).tolist()
    assert found[0] == -120.0  # the cap: a mean over images stays a number
    assert found[1] == pytest.approx(20.0, abs=1e-5)  # fp32's 0.2 is off by 1e-8


def test_the_interval_is_1_96_standard_errors_on_each_side():
    mean, (low, high) = mean_ci95(np.array([1.0, 2.0, 3.0, 4.0]))
    half = 1.96 * math.sqrt(5 / 3) / 2  # the sample variance is 5/3
    assert (mean, low, high) == pytest.approx((2.5, 2.5 - half, 2.5 + half), abs=1e-12)  # fp64 rounding


def test_the_interval_of_a_tensor_is_that_of_the_array():
    values = random(50)
    assert mean_ci95(values) == mean_ci95(values.numpy())


def test_one_value_says_nothing_about_its_spread():
    assert mean_ci95(np.array([3.0])) == (3.0, [-math.inf, math.inf])


def test_the_interval_covers_the_true_mean_95_times_in_100():
    draws = random(2000, 40).numpy()
    hits = sum(low <= 0 <= high for _, (low, high) in map(mean_ci95, draws))
    # t with 39 degrees of freedom gives 94.3 %; four standard errors of 2000 draws are 2.1 points
    assert 0.921 < hits / 2000 < 0.965


@pytest.mark.parametrize("dims", [2, 8, 32])
def test_frechet_of_diagonal_gaussians_has_a_closed_form(dims):
    generator = torch.Generator().manual_seed(dims)
    means = torch.randn(2, dims, dtype=torch.float64, generator=generator)
    deviations = torch.rand(2, dims, dtype=torch.float64, generator=generator) + 0.1
    a, b = (exact_gaussian(200, means[i], deviations[i], seed=i) for i in range(2))
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-9)  # eigenvalues in fp64


def test_frechet_of_equal_sets_is_zero():
    a = random(300, 16)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)  # eigenvalues in fp64
    assert frechet_distance(a.float(), a.float()) == pytest.approx(0, abs=1e-9)


def test_frechet_of_equal_sets_smaller_than_their_dimension_is_zero():
    a = random(10, 32)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)  # 23 null eigenvalues of 1e-16, their roots 1e-8 each


def test_frechet_of_shifted_sets_is_the_squared_shift():
    a = random(300, 4)
    assert frechet_distance(a, a + 3.0) == pytest.approx(36.0, rel=1e-9)  # 4 · 3², fp64


def test_frechet_is_symmetric():
    a, b = random(200, 6), random(150, 6, seed=1) @ random(6, 6, seed=2)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)  # fp64


def test_recall_of_equal_sets_is_one():
    assert knn_recall(random(100, 8), random(100, 8)) == 1.0
    assert knn_recall(random(100, 8).float(), random(100, 8).float()) == 1.0


def test_recall_of_far_sets_is_zero():
    assert knn_recall(random(100, 8), random(100, 8, seed=1) + 1000) == 0.0


def test_recall_counts_the_real_points_that_the_generated_ones_cover():
    generated = torch.arange(10, dtype=torch.float64)[:, None]
    real = torch.tensor([[0.5], [4.2], [-2.5], [100.0]], dtype=torch.float64)
    assert knn_recall(real, generated, k=3) == 0.75  # the ball of 0 reaches to 3 on each side
    assert knn_recall(real, generated, k=1) == 0.5


def test_recall_falls_when_a_mode_is_dropped():
    modes = torch.cat([random(50, 4), random(50, 4, seed=1) + 100])
    assert knn_recall(modes, modes[:50]) == 0.5
    assert knn_recall(modes[:50], modes) == 1.0


def test_class_accuracy_is_the_share_of_images_taken_for_their_label():
    torch.manual_seed(0)
    net, images = TaskNet().eval(), random(20, 1, 8, 8).float()
    labels = net(images).argmax(dim=1)
    assert class_accuracy(net, images, labels) == 1.0
    labels[:5] = (labels[:5] + 1) % 10
    assert class_accuracy(net, images, labels) == 0.75
    assert net.features(images).shape == (20, 64)


@pytest.mark.parametrize("content", [None, b"", b"not safetensors at all"])
def test_a_task_network_that_cannot_be_read_is_named_with_a_fix(tmp_path, content):
    path = tmp_path / "features.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"features\.safetensors") as caught:
        load_task_net(path)
    assert caught.value.fix
