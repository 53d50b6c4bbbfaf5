"""Codebooks as a format: bits as they are stored, every code there and back, and refusals."""

from __future__ import annotations

import pytest
import torch

from engines.errors import UserError
from exporter import formats
from exporter.formats.codebook import BITS, Format
from exporter.tensors import CodebookTensor, pack, unpack

SIZES = pytest.mark.parametrize("size", list(BITS))


@SIZES
def test_codes_are_stored_at_their_true_width_and_come_back(size):
    fmt = Format(2, size)
    codes = torch.randperm(size).to(torch.uint8).reshape(4, -1)
    stored = pack(codes, fmt)
    assert 8 * stored.nbytes == codes.numel() * BITS[size]
    assert torch.equal(unpack(stored, fmt, torch.empty_like(codes)), codes)


@pytest.mark.parametrize(("size", "vector", "bits"), [(256, 4, 2.0), (64, 2, 3.0), (16, 1, 4.0), (16, 2, 2.0)])
def test_bits_of_a_weight_are_those_of_its_code_over_the_vector(size, vector, bits):
    fmt = Format(vector, size)
    assert fmt.bits / fmt.vector_size == bits
    assert (fmt.learned, fmt.native, fmt.kind, fmt.carrier) == (True, False, "codebook", torch.uint8)


@pytest.mark.parametrize("size", [0, 8, 32, 100, 512])
def test_sizes_that_do_not_pack_are_refused(size):
    with pytest.raises(UserError, match=f"codebook of {size} words") as raised:
        formats.load("codebook", {"vector_size": 2, "codebook_size": size}, "rule 1")
    assert "16, 64, 256" in raised.value.fix


@pytest.mark.parametrize("vector", [0, 17])
def test_vectors_of_no_sensible_size_are_refused(vector):
    with pytest.raises(UserError, match=f"words of {vector} numbers"):
        formats.load("codebook", {"vector_size": vector, "codebook_size": 16}, "rule 1")


@pytest.mark.parametrize("scale", [None, torch.tensor(2.0), torch.tensor([1.0, 2.0, 3.0])])
def test_a_tensor_is_its_codewords_side_by_side_times_the_scale(scale):
    codebook = torch.arange(32.0).reshape(16, 2)
    codes = torch.tensor([[0, 3], [15, 1], [7, 7]], dtype=torch.uint8)
    tensor = CodebookTensor(codes, codebook, scale, Format(2, 16))
    rows = torch.tensor([[0.0, 1, 6, 7], [30, 31, 2, 3], [14, 15, 14, 15]])
    factor = 1.0 if scale is None else scale.reshape(-1, 1) if scale.ndim else scale
    assert torch.equal(tensor.dequantize(), rows * factor)
