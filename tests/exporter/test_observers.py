"""Observers: the same range however the data is cut, and never a worse one than the plain maximum's."""

from __future__ import annotations

import itertools

import pytest
import torch

from exporter import observers
from exporter.formats.fp import Format as Fp
from exporter.formats.int import Format as Int
from exporter.observers import BINS, CLIPS, OBSERVERS, PERCENTILE

COUNT = 4000
FORMATS = [Int(4), Int(8), Fp(4, 3)]

every_observer = pytest.mark.parametrize("name", sorted(OBSERVERS))
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.kind)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """These tensors are so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def gaussian(count: int = COUNT) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def with_outliers(size: float, count: int) -> torch.Tensor:
    return torch.cat([gaussian(count), torch.tensor([size, -size])])


def student(count: int = COUNT) -> torch.Tensor:
    """Student's t with 3 degrees of freedom: heavy tails."""
    draws = torch.randn(4, count, generator=torch.Generator().manual_seed(1))
    return draws[0] / draws[1:].square().mean(dim=0).sqrt()


def cauchy(count: int) -> torch.Tensor:
    draws = torch.randn(2, count, generator=torch.Generator().manual_seed(2))
    return draws[0] / draws[1]


DATA = {
    "gaussian": gaussian,
    "half gaussian": lambda count: gaussian(count).abs(),
    "student": student,
    "cauchy": cauchy,
    "outliers 20": lambda count: with_outliers(20, count),
    "outliers 1000": lambda count: with_outliers(1000, count),
}
every_data = pytest.mark.parametrize("data", DATA)


def observe(name: str, *tensors: torch.Tensor):
    observer = OBSERVERS[name]()
    for x in tensors:
        observer.update(x)
    return observer


def squared_error(x: torch.Tensor, fmt, ranges: float | torch.Tensor) -> torch.Tensor:
    """Σ (rounded − x)² in fp64, for each of `ranges`."""
    scale = torch.as_tensor(ranges, dtype=torch.float64)[..., None] / fmt.max_value
    return (fmt.round(x.double() / scale) * scale - x.double()).square().sum(dim=-1)


@every_observer
@every_data
@pytest.mark.parametrize("fmt", [Int(8), Fp(4, 3)], ids=lambda fmt: fmt.kind)
def test_the_range_does_not_depend_on_how_the_data_is_cut(name, data, fmt):
    x = DATA[data](COUNT)
    whole = observe(name, x).range(fmt)
    ascending = x[x.abs().argsort()]
    cuts = {
        "two": x.tensor_split(2),
        "uneven": x.split([1, 999, 2, 500, len(x) - 1502]),
        "shaped": [x[:1000].reshape(10, 4, 25), x[1000:]],
        "growing": ascending.tensor_split(20),
        "shrinking": ascending.flip(0).tensor_split(20),
        "zeros between": [torch.zeros(1), *x.tensor_split(3)],
    }
    expected = dict.fromkeys(cuts, whole) | {"zeros between": observe(name, torch.zeros(1), x).range(fmt)}
    assert {cut: observe(name, *tensors).range(fmt) for cut, tensors in cuts.items()} == expected


@every_observer
@pytest.mark.parametrize("edge", [1.0, 0.25, 8.0])
def test_powers_of_two_count_the_same_whether_or_not_a_larger_value_came_first(name, edge):
    most, one = torch.full((COUNT * 3,), edge), torch.tensor([edge * 1.5])
    ranges = {observe(name, *tensors).range(Int(8)) for tensors in ([most, one], [one, most], [torch.cat([most, one])])}
    assert len(ranges) == 1


@every_observer
@every_format
def test_signs_do_not_matter(name, fmt):
    x = student()
    assert observe(name, x).range(fmt) == observe(name, -x).range(fmt) == observe(name, x.abs()).range(fmt)


@every_observer
@every_format
def test_nothing_but_zeros_has_range_zero(name, fmt):
    assert observe(name, torch.zeros(3, 4), torch.zeros(5)).range(fmt) == 0.0


@every_observer
@every_format
def test_zeros_before_and_after_other_values_count_alike(name, fmt):
    zeros, x = torch.zeros(100 * COUNT), gaussian()
    before = observe(name, zeros, x).range(fmt)
    assert before == observe(name, x, zeros).range(fmt) == observe(name, torch.cat([zeros, x])).range(fmt)


@every_observer
@every_format
def test_one_magnitude_is_its_own_range(name, fmt):
    found = observe(name, torch.full((100,), 3.0), torch.full((7,), -3.0)).range(fmt)
    # mse may pick a range whose grid holds 3 as well, or a bin's width (4 / 4096) beside it
    if name == "mse":
        assert squared_error(torch.tensor([3.0]), fmt, found) <= (4 / BINS) ** 2
    else:
        assert found == 3.0


def test_absmax_is_the_largest_magnitude():
    x = student()
    assert observe("absmax", *x.split(100)).range(Int(8)) == x.abs().max().item()


@pytest.mark.parametrize("count", [COUNT, 50_000])
def test_percentile_is_the_quantile_of_magnitudes_within_a_bin(count):
    x = torch.randn(count, generator=torch.Generator().manual_seed(3))
    found = observe("percentile", *x.tensor_split(3)).range(Int(8))
    magnitudes = x.abs().sort().values
    exact = magnitudes[min(int(count * PERCENTILE / 100), count - 1)].item()
    # the largest value lies in the upper half of the bins, so a bin is at most 2·largest/BINS wide;
    # ranks are whole: the neighbour below may be the one that the histogram counts to
    below = magnitudes[int(count * PERCENTILE / 100) - 2].item()
    assert below - 1e-6 <= found <= exact + 2 * magnitudes[-1].item() / BINS


def test_percentile_leaves_rare_outliers_out():
    x = torch.cat([torch.rand(30_000, generator=torch.Generator().manual_seed(4)), torch.tensor([50.0])])
    assert observe("percentile", x).range(Int(8)) <= 1 + 64 / BINS  # one bin of [0, 64) beyond the bulk


def test_percentile_never_exceeds_the_largest_magnitude():
    assert observe("percentile", torch.tensor([0.3, 0.7])).range(Int(8)) == pytest.approx(0.7, rel=1e-6)  # fp32's 0.7


@every_format
@every_data
def test_mse_is_as_good_as_trying_the_same_clips_on_the_data_itself(data, fmt):
    x = DATA[data](COUNT).abs()  # signs are not observed: that integers have one more code below zero is left unused
    best = squared_error(x, fmt, CLIPS.double() * x.max()).min()
    found = squared_error(x, fmt, observe("mse", *x.split(300)).range(fmt))
    assert found <= 1.02 * best  # 2 %: what replacing a value by its bin's center may cost


@every_format
@every_data
def test_mse_is_never_worse_than_absmax(data, fmt):
    x = DATA[data](100_000)
    found = squared_error(x, fmt, observe("mse", x).range(fmt))
    # 1 %: ranges that differ by less than that are equal to a histogram of bins
    assert found <= 1.01 * squared_error(x, fmt, observe("absmax", x).range(fmt))


def test_mse_clips_where_a_few_outliers_would_cost_all_others_their_steps():
    assert observe("mse", with_outliers(20, COUNT)).range(Int(4)) < 10


@every_observer
def test_ranges_grow_with_the_data(name):
    observer = OBSERVERS[name]()
    ranges = []
    for size in (1e-3, 1.0, 1e3, 1e6):
        observer.update(gaussian() * size)
        ranges.append(observer.range(Int(8)))
    assert all(later > 100 * earlier for earlier, later in itertools.pairwise(ranges))


@every_observer
def test_small_values_after_a_large_one_leave_the_largest_in_place(name):
    observer = observe(name, torch.full((1000,), 100.0), torch.full((10,), 1e-3))
    assert observer.range(Int(8)) == pytest.approx(100, rel=0.01)


@every_observer
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_are_seen_as_their_fp32_values(name, dtype):
    x = gaussian().to(torch.bfloat16).to(torch.float16)  # exact in all of them
    assert observe(name, x.to(dtype)).range(Int(8)) == observe(name, x.float()).range(Int(8))


@every_data
@pytest.mark.parametrize("fmt", [Int(8), Fp(4, 3), Fp(3, 2), Fp(2, 1)], ids=str)
def test_the_error_that_mse_reports_is_that_of_its_range(data, fmt):
    x = DATA[data](COUNT)
    found, error = observe("mse", x).fit(fmt)
    # the histogram stands for its values by the means of bins 0.4 % wide
    assert error == pytest.approx(float(squared_error(x, fmt, found)), rel=0.05)


def test_of_a_large_tensor_a_part_is_counted_and_the_largest_value_is_that_of_all(monkeypatch):
    monkeypatch.setattr(observers, "COUNTED", 1000)
    x = gaussian(COUNT)
    x[1] = 50.0  # between two of those that are counted
    part = observe("mse", x)
    assert part.histogram.counts.sum() == 1000
    assert part.histogram.largest == 50.0
    x[1] = 0.0
    clipped, whole = observe("percentile", x), observe("percentile", *x.split(1000))
    assert clipped.range(Int(8)) == pytest.approx(whole.range(Int(8)), rel=0.25)  # the tail of 1,000 draws, of all


def test_of_channels_all_are_counted_whatever_the_sizes(monkeypatch):
    monkeypatch.setattr(observers, "COUNTED", 1024)
    ranges = []
    for channel in range(8):  # 8,192 values, one in 8: a stride would see one channel alone
        x = gaussian(8192).reshape(1024, 8)
        x[:, channel] *= 30
        ranges.append(observe("mse", x).range(Int(8)))
    assert max(ranges) < 2 * min(ranges)  # a stride would give 30 times
