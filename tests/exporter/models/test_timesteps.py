"""Timestep tables give diffusers' own embeddings, bit for bit, and stay in fp32."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.embeddings import Timesteps

from exporter.models._timesteps import TimestepTable


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("channels", "shift", "scale"), [(256, 1, 1), (320, 0, 1), (64, 1, 1000)])
def test_a_table_gives_the_very_embedding_of_diffusers(channels, shift, scale, flip):
    source = Timesteps(channels, flip, shift, scale)
    timesteps = torch.arange(1000)
    assert torch.equal(TimestepTable(source)(timesteps), source(timesteps))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_table_keeps_fp32_in_a_model_of_another_type(dtype):
    table = TimestepTable(Timesteps(64, True, 1))
    before = table.frequencies.clone()
    model = torch.nn.Sequential(table).to(dtype)
    assert torch.equal(model[0].frequencies, before)
