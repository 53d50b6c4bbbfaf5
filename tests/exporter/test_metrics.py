"""Metrics against values known in closed form."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from engines.errors import UserError
from exporter.metrics import (
    bootstrap_ci95,
    bootstrap_ci95_of,
    cosine,
    frechet_distance,
    knn_precision,
    knn_recall,
    psnr_db,
    sqnr_db,
    ssim,
)

AGREEMENT = 1e-6  # relative, of two libraries' fp64


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


def test_precision_counts_the_generated_points_that_the_real_ones_cover():
    real = torch.arange(10, dtype=torch.float64)[:, None]
    generated = torch.tensor([[0.5], [4.2], [-2.5], [100.0]], dtype=torch.float64)
    assert knn_precision(real, generated, k=3) == 0.75


def test_precision_falls_when_samples_are_out_of_the_world_and_recall_does_not():
    real = random(100, 4)
    generated = torch.cat([real, real + 100])
    assert knn_precision(real, generated) == 0.5
    assert knn_recall(real, generated) == 1.0


@pytest.mark.parametrize("score", [knn_recall, knn_precision])
def test_too_few_features_for_k_neighbours_are_refused(score):
    with pytest.raises(UserError, match="more than 3 features") as caught:
        score(random(3, 2), random(3, 2))
    assert caught.value.fix


@pytest.mark.parametrize(
    ("shape", "seed"), [((4, 1, 8, 8), 0), ((3, 3, 32, 32), 1), ((2, 4, 11, 17), 2), ((2, 1, 6, 6), 3)]
)
def test_ssim_and_psnr_are_those_of_torchmetrics(shape, seed):
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    a = random(*shape, seed=seed).clamp(-1, 1)
    b = (a + 0.3 * random(*shape, seed=seed + 10)).clamp(-1, 1)
    expected = structural_similarity_index_measure(a, b, data_range=2.0, reduction="none")
    assert ssim(a, b, 2.0).tolist() == pytest.approx(expected.tolist(), rel=AGREEMENT)
    expected = peak_signal_noise_ratio(a, b, data_range=2.0, reduction="none", dim=(1, 2, 3))
    assert psnr_db(b, a, 2.0).tolist() == pytest.approx(expected.tolist(), rel=AGREEMENT)


@pytest.mark.parametrize("size", [3, 4, 5, 9])
def test_ssim_of_any_size_is_that_of_scipys_windows(size):
    from scipy.ndimage import gaussian_filter

    a, b = (random(1, 1, size, size, seed=seed)[0, 0].numpy() for seed in (0, 1))

    def mean(x):
        return gaussian_filter(x, 1.5, mode="mirror", radius=min(5, size - 1))

    variance_a, variance_b, covariance = (mean(x * y) - mean(x) * mean(y) for x, y in ((a, a), (b, b), (a, b)))
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mean(a) * mean(b) + c1) * (2 * covariance + c2)
    similarity /= (mean(a) ** 2 + mean(b) ** 2 + c1) * (variance_a + variance_b + c2)
    found = ssim(torch.from_numpy(a)[None, None], torch.from_numpy(b)[None, None], 1.0)
    assert found.item() == pytest.approx(similarity.mean(), rel=AGREEMENT)


def test_ssim_is_one_for_equal_images_and_less_for_others():
    a = random(3, 3, 16, 16)
    assert ssim(a, a, 2.0).tolist() == pytest.approx([1.0] * 3, abs=1e-12)  # fp64
    noisy = [float(ssim(a, a + noise * random(3, 3, 16, 16, seed=1), 2.0).mean()) for noise in (0.1, 0.5, 2.0)]
    assert 1 > noisy[0] > noisy[1] > noisy[2] > -1


def test_the_cosine_is_that_of_scikit_learn_image_by_image():
    from sklearn.metrics.pairwise import cosine_similarity

    a, b = random(3, 4, 5), random(3, 4, 5, seed=1)
    expected = cosine_similarity(a.flatten(1), b.flatten(1)).diagonal()
    assert cosine(a, b).tolist() == pytest.approx(expected.tolist(), rel=AGREEMENT)
    assert cosine(1e-12 * a, 1e12 * b).tolist() == pytest.approx(expected.tolist(), rel=AGREEMENT)


def test_the_cosine_of_known_angles():
    x = torch.tensor([[3.0, 4.0]])
    assert cosine(x, 2 * x).item() == pytest.approx(1, abs=1e-15)
    assert cosine(x, -x).item() == pytest.approx(-1, abs=1e-15)
    assert cosine(x, torch.tensor([[-4.0, 3.0]])).item() == 0
    assert cosine(x, torch.zeros(1, 2)).item() == 0


@pytest.mark.parametrize("dims", [3, 16])
def test_frechet_is_that_of_scipys_matrix_root(dims):
    from scipy.linalg import sqrtm

    a, b = random(200, dims), random(300, dims, seed=1) @ random(dims, dims, seed=2) + 0.3
    cov_a, cov_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    mean = np.square(a.mean(0).numpy() - b.mean(0).numpy()).sum()
    expected = mean + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=AGREEMENT)


def test_frechet_is_that_of_torchmetrics_on_features_of_ones_own():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(torch.nn.Flatten):
        num_features = 12

    a, b = random(100, 3, 2, 2), random(80, 3, 2, 2, seed=1) * 1.5 + 0.2
    metric = FrechetInceptionDistance(feature=Flat(), normalize=True)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a.flatten(1), b.flatten(1)) == pytest.approx(metric.compute().item(), rel=AGREEMENT)


@pytest.mark.parametrize("k", [1, 3, 5])
def test_precision_and_recall_are_those_of_scikit_learns_neighbours(k):
    from sklearn.neighbors import NearestNeighbors

    real, generated = random(150, 4).numpy(), (random(100, 4, seed=1) * 0.8 + 0.4).numpy()

    def covered(points, centers):
        radii = NearestNeighbors(n_neighbors=k + 1).fit(centers).kneighbors(centers)[0][:, -1]
        return np.mean([(np.linalg.norm(centers - point, axis=1) <= radii).any() for point in points])

    found = knn_recall(torch.from_numpy(real), torch.from_numpy(generated), k)
    assert found == pytest.approx(covered(real, generated), rel=AGREEMENT)
    found = knn_precision(torch.from_numpy(real), torch.from_numpy(generated), k)
    assert found == pytest.approx(covered(generated, real), rel=AGREEMENT)


def test_the_bootstrap_is_that_of_scipy():
    from scipy.stats import bootstrap

    values = random(60).numpy()
    mean, (low, high) = bootstrap_ci95(values, resamples=5000)
    expected = bootstrap((values,), np.mean, n_resamples=5000, method="percentile", rng=1).confidence_interval
    # two draws of 5,000: each end is known to about 3 % of the width
    assert (low, high) == pytest.approx(tuple(expected), abs=0.06 * (high - low))
    assert mean == values.mean()


def test_the_bootstrap_of_equal_scores_is_a_point_and_never_leaves_their_range():
    assert bootstrap_ci95(np.ones(20)) == (1.0, [1.0, 1.0])
    _, (low, high) = bootstrap_ci95(np.array([1.0] * 19 + [0.0]))
    assert 0 <= low < high <= 1


def test_intervals_repeat_with_their_seed():
    values, others = random(30, 2), random(40, 2, seed=1)
    assert bootstrap_ci95(values[:, 0], seed=3) == bootstrap_ci95(values[:, 0], seed=3)
    assert bootstrap_ci95(values[:, 0], seed=3) != bootstrap_ci95(values[:, 0], seed=4)
    first, again, other = (bootstrap_ci95_of(frechet_distance, values, others, resamples=20, seed=s) for s in (3, 3, 4))
    assert first == again
    assert first[1] != other[1]
    assert first[0] == frechet_distance(values, others)


def coverage(interval, draw, truth: float, times: int) -> float:
    inside = [low <= truth <= high for low, high in (interval(*draw(seed), seed) for seed in range(times))]
    return sum(inside) / times


@pytest.mark.parametrize(
    "interval",
    [
        lambda values, seed: bootstrap_ci95(values, resamples=150, seed=seed)[1],
        lambda values, seed: bootstrap_ci95_of(lambda x: float(x.mean()), values, resamples=150, seed=seed)[1],
    ],
    ids=["resampled", "halves"],
)
def test_the_interval_of_a_mean_covers_the_truth_95_times_in_100(interval):
    def draw(seed):  # scores 0 … 1, skewed as those of mostly right images are
        return (torch.from_numpy(np.random.default_rng(seed).beta(8, 2, 60)),)

    assert coverage(interval, draw, 0.8, times=200) == pytest.approx(0.95, abs=0.06)  # 4 deviations of 200 draws


@pytest.mark.parametrize("statistic", [frechet_distance, knn_recall])
def test_the_interval_of_a_set_score_covers_what_such_sets_score_on_average(statistic):
    def draw(seed):
        return random(60, 4, seed=2 * seed), random(60, 4, seed=2 * seed + 1) * 0.8 + 0.5

    truth = float(np.mean([statistic(*draw(seed)) for seed in range(10_000, 10_200)]))

    def interval(real, generated, seed):
        return bootstrap_ci95_of(statistic, real, generated, resamples=80, seed=seed)[1]

    assert coverage(interval, draw, truth, times=60) >= 0.84  # 4 deviations of 60 draws


def test_a_set_compared_with_itself_by_rows_that_belong_together_has_no_spread():
    x = random(50, 3)
    pairs = torch.stack([x, x], dim=1)
    value, interval = bootstrap_ci95_of(lambda rows: frechet_distance(rows[:, 0], rows[:, 1]), pairs, resamples=20)
    assert (value, *interval) == pytest.approx((0, 0, 0), abs=1e-9)  # eigenvalues in fp64
