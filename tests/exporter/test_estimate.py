"""What memory is predicted from: terms that can be counted are counted."""

from __future__ import annotations

import torch

from exporter import formats
from exporter.estimate import ROUNDED
from exporter.straight_through import straight_through


def test_backward_keeps_as_many_bytes_of_a_rounded_number_as_are_counted():
    fmt = formats.load("int", {"bits": 8}, "test")
    x, weight = (torch.randn(shape, requires_grad=True) for shape in ((64, 32), (32, 48)))
    scale = torch.tensor(0.02, requires_grad=True)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        product = straight_through(x * 1, scale, fmt) @ weight
    product.sum().backward()
    there = {tensor.data_ptr() for tensor in (x, weight, scale)}
    assert sum(size for place, size in kept.items() if place not in there) == ROUNDED * x.numel()
