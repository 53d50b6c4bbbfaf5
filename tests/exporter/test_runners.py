"""PyTorch as a runner: fp16 products are summed in fp32, `step` reaches quantizers, other feeds' types are kept."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from engines.errors import UserError
from exporter import steps
from exporter.checkpoint import open_checkpoint
from exporter.runners import TorchRunner, WideSums


def test_fp16_sums_are_fp32_sums_rounded_once():
    x, w = torch.randn(4, 512).half(), torch.randn(8, 512).half()
    with WideSums():
        assert torch.equal(F.linear(x, w), F.linear(x.float(), w.float()).half())
        q = torch.randn(1, 2, 16, 8).half()
        wide = F.scaled_dot_product_attention(q.float(), q.float(), q.float())
        assert torch.equal(F.scaled_dot_product_attention(q, q, q), wide.half())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_other_types_are_left_alone(dtype):
    x, w = torch.randn(4, 64, dtype=dtype), torch.randn(8, 64, dtype=dtype)
    plain = F.linear(x, w)
    with WideSums():
        assert torch.equal(F.linear(x, w), plain)


def test_the_step_reaches_quantizers_for_one_call_only(tiny_folder):
    tiny, seen = open_checkpoint(str(tiny_folder)), []
    model = tiny.load()
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen.append(steps.now().step))
    feeds = {
        "hidden_states": torch.zeros(2, 1, 8, 8).numpy(),
        "timestep": torch.tensor([9, 9]).numpy(),
        "class_labels": torch.tensor([0, 1]).numpy(),
        "step": torch.tensor([4, 4]).numpy(),
    }
    TorchRunner("float", model, tiny.family).run(feeds)
    assert seen[0].tolist() == [4, 4]
    with pytest.raises(UserError, match="called without one"):
        steps.now()


def test_outputs_are_fp32_arrays_whatever_the_model_computes_in(tiny_folder):
    tiny = open_checkpoint(str(tiny_folder))
    model = nn.Module.to(tiny.load(), torch.float16)
    feeds = {
        "hidden_states": torch.zeros(1, 1, 8, 8).numpy(),
        "timestep": torch.tensor([9]).numpy(),
        "class_labels": torch.tensor([0]).numpy(),
    }
    output = TorchRunner("half", model, tiny.family, dtype=torch.float16).run(feeds)["sample"]
    assert output.dtype == "float32"
    assert output.shape == (1, 1, 8, 8)
