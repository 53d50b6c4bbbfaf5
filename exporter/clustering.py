"""k-means of sub-vectors, each coordinate with an importance: what methods of codebooks share.

Distances are computed for CHUNK sub-vectors at a time, so memory does not grow with the weight. Source: Lloyd 1982,
doi 10.1109/TIT.1982.1056489; Arthur and Vassilvitskii 2007, "k-means++: the advantages of careful seeding".
"""

from __future__ import annotations

import torch

CHUNK_NUMBERS = 1 << 18  # distances held at once: 1 MB stays in a core's cache, which is twice as fast as 16
# Sub-vectors that seeding and Lloyd's iterations look at, at most: 256 to each of 256 codewords. With more, codewords
# hardly change, and the time does. Source: faiss, ClusteringParameters, max_points_per_centroid.
SEEN = 1 << 16
SETTLED = 1e-3  # share of sub-vectors that still change their codeword when Lloyd's iterations end


def distances(vectors: torch.Tensor, codebook: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Returns Σ_j h_j (c_j² − 2 w_j c_j), [n, k]: the weighted squared distance but for what no codeword changes."""
    return importance @ codebook.square().T - 2 * (importance * vectors) @ codebook.T


def assign(vectors: torch.Tensor, codebook: torch.Tensor, importance: torch.Tensor) -> torch.Tensor:
    """Returns the nearest codeword of every sub-vector [n, d]: codes [n], int64."""
    step = max(1, CHUNK_NUMBERS // len(codebook))
    parts = zip(torch.split(vectors, step), torch.split(importance, step), strict=True)
    return torch.cat([distances(part, codebook, weights).argmin(dim=1) for part, weights in parts])


def nearest(
    vectors: torch.Tensor, codebook: torch.Tensor, chosen: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns every sub-vector's `chosen` codeword [n] and the nearest others: codes [n, count] uint8, and distances.

    Distances are squared, fp32, none less than that of the chosen one, which may be chosen by another measure.
    """
    codes, found = [], []
    step = max(1, CHUNK_NUMBERS // len(codebook))
    for part, own in zip(torch.split(vectors, step), torch.split(chosen.long(), step), strict=True):
        square = part.square().sum(dim=1, keepdim=True)
        all_ = (square + distances(part, codebook, torch.ones_like(part))).clamp(min=0)
        first = all_.gather(1, own[:, None])
        others = all_.scatter(1, own[:, None], torch.inf).topk(count - 1, dim=1, largest=False)
        codes.append(torch.cat([own[:, None], others.indices], dim=1).to(torch.uint8))
        found.append(torch.cat([first, torch.maximum(others.values, first)], dim=1))
    return torch.cat(codes), torch.cat(found)


def means(
    vectors: torch.Tensor, codes: torch.Tensor, importance: torch.Tensor, codebook: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns every codeword as its sub-vectors' weighted mean, and how many it has; one without keeps its place."""
    weights, sums = torch.zeros_like(codebook), torch.zeros_like(codebook)
    weights.index_add_(0, codes, importance)
    sums.index_add_(0, codes, importance * vectors)
    return torch.where(weights > 0, sums / weights.clamp(min=1e-30), codebook), codes.bincount(minlength=len(codebook))


def seeds(vectors: torch.Tensor, size: int, importance: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns codewords [size, d] by k-means++: each drawn with the odds of its squared distance to those before."""
    chosen = [vectors[int(torch.randint(len(vectors), (), generator=generator))]]
    nearest = ((vectors - chosen[0]).square() * importance).sum(dim=1)
    for _ in range(size - 1):
        odds = nearest if float(nearest.sum()) > 0 else torch.ones_like(nearest)
        chosen.append(vectors[int(torch.multinomial(odds.cpu(), 1, generator=generator))])
        nearest = torch.minimum(nearest, ((vectors - chosen[-1]).square() * importance).sum(dim=1))
    return torch.stack(chosen)


def kmeans(
    vectors: torch.Tensor, size: int, importance: torch.Tensor, iterations: int, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns codewords [size, d] and codes [n] of sub-vectors [n, d] with importances [n, d], all fp32.

    Lloyd's iterations see a share of the sub-vectors that is drawn, the last all of them. A codeword that nobody takes
    goes to the sub-vector that lies worst. Codes are those of the codewords returned.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(vectors) > SEEN:
        among = torch.randperm(len(vectors), generator=generator)[:SEEN]
        codebook, _ = kmeans(vectors[among], size, importance[among], iterations, seed)
        iterations = 1
    else:
        codebook = seeds(vectors, size, importance, generator)
    codes = assign(vectors, codebook, importance)
    for _ in range(iterations):
        codebook, counts = means(vectors, codes, importance, codebook)
        if (empty := (counts == 0).nonzero().flatten()).numel():
            errors = ((vectors - codebook[codes]).square() * importance).sum(dim=1)
            codebook[empty] = vectors[errors.topk(min(len(empty), len(errors))).indices][: len(empty)]
        before, codes = codes, assign(vectors, codebook, importance)
        if float((codes != before).double().mean()) < SETTLED:
            break
    return codebook, codes
