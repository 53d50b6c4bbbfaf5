"""k-means: never worse with more iterations, exact where it can be, and bounded in memory."""

from __future__ import annotations

import pytest
import torch

from exporter import clustering


def cost(vectors, codebook, codes, importance):
    return float(((vectors - codebook[codes]).square() * importance).sum())


def clouds(count=64, each=40, size=4, spread=0.01):
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(count, size, generator=generator)
    return centres, (centres.repeat_interleave(each, 0) + spread * torch.randn(count * each, size, generator=generator))


def test_the_nearest_codeword_is_the_nearest_whatever_the_chunk(monkeypatch):
    vectors, codebook = torch.randn(500, 3), torch.randn(20, 3)
    importance = torch.rand(500, 3) + 0.1
    wanted = ((vectors[:, None] - codebook).square() * importance[:, None]).sum(dim=2).argmin(dim=1)
    for numbers in (1, 64, 1 << 22):
        monkeypatch.setattr(clustering, "CHUNK_NUMBERS", numbers)
        assert torch.equal(clustering.assign(vectors, codebook, importance), wanted)


def test_clouds_that_lie_apart_are_found():
    centres, vectors = clouds()
    codebook, codes = clustering.kmeans(vectors, 64, torch.ones_like(vectors), 50)
    nearest = torch.cdist(codebook, centres).min(dim=1)
    # k-means++ finds nearly all of them; those it misses share a cloud
    assert float((nearest.values < 0.05).double().mean()) > 0.9
    assert torch.equal(codes, clustering.assign(vectors, codebook, torch.ones_like(vectors)))


@pytest.mark.parametrize("weighted", [False, True])
def test_more_iterations_are_never_worse(weighted):
    vectors = torch.randn(4000, 4, generator=torch.Generator().manual_seed(1))
    importance = (
        torch.rand(4000, 4, generator=torch.Generator().manual_seed(2)) ** 4 if weighted else torch.ones(4000, 4)
    )
    costs = [cost(vectors, *clustering.kmeans(vectors, 16, importance, n), importance) for n in (1, 4, 16, 64)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < 0.95 * costs[0]


def test_what_matters_more_is_met_more_exactly():
    vectors = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    importance = torch.tensor([100.0, 0.01]).expand(4000, 2)
    codebook, codes = clustering.kmeans(vectors, 16, importance, 50)
    errors = (vectors - codebook[codes]).square().mean(dim=0)
    assert errors[0] < 0.02 * errors[1]


def test_a_codeword_that_nobody_takes_is_put_to_use():
    vectors = torch.cat([torch.zeros(1000, 2), torch.randn(24, 2) + 5])
    _, codes = clustering.kmeans(vectors, 16, torch.ones_like(vectors), 50)
    assert len(codes.unique()) == 16


def test_fewer_different_vectors_than_codewords_are_met_exactly():
    vectors = torch.randn(5, 3).repeat(30, 1)
    codebook, codes = clustering.kmeans(vectors, 16, torch.ones_like(vectors), 10)
    assert torch.allclose(codebook[codes], vectors, atol=1e-5)  # means of thirty equal numbers, in fp32


def test_the_same_seed_gives_the_same_codebook():
    vectors = torch.randn(1000, 2)
    one, other = (clustering.kmeans(vectors, 16, torch.ones_like(vectors), 5) for _ in range(2))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])
