"""The loop that methods train in: harm is taken back, rows are kept apart, and a kill changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from common import TINY
from torch import nn

from calib_data.store import CalibrationSet
from engines.errors import UserError
from exporter import devices, reconstruct
from exporter.calibrate import calibrate
from exporter.checkpoint import open_checkpoint
from exporter.reconstruct import BlockCalls, Calls, ModelCalls, Phase, train
from exporter.samples import Samples


class Held(Calls):
    """Rows in memory; those of the last chunk judge, where there are several."""

    def __init__(self, block, *chunks):
        self.block, self.held, self._device = block, chunks, devices.CPU
        self._chunks, self._rows, self._training = len(chunks), len(chunks[0]["x"]), max(1, len(chunks) - 1)

    def read(self, chunk):
        return self.held[chunk]

    def loss(self, rows):
        return reconstruct.relative_error(self.block(rows["x"]), [rows["y"]])


class Fit(Phase):
    """Fits the block's weight, and nothing else."""

    name = "fit"
    iterations = 100

    def __init__(self, block, rate=0.05):
        self.block, self.rate = block, rate

    def groups(self):
        return [([self.block.weight], self.rate)]


class Worse(Fit):
    """A phase that does harm."""

    iterations = 3

    def regularizer(self, done):
        return -1e6 * self.block.weight.square().sum()  # away from anything useful


def problem(*, noise=False, rows=(64,)):
    """Returns a linear block, rows of another one's outputs, or of noise, and the block's own weight."""
    torch.manual_seed(0)
    block, other = nn.Linear(8, 8), nn.Linear(8, 8)
    inputs = [torch.randn(count, 8) for count in rows]
    chunks = [{"x": x, "y": torch.randn(len(x), 8) if noise else other(x).detach()} for x in inputs]
    return block, chunks, block.weight.detach().clone()


def test_a_phase_that_does_harm_is_taken_back(tmp_path):
    block, chunks, before = problem()
    train(Held(block, *chunks), [Worse(block, 10.0)], 16, "test", tmp_path)
    assert torch.equal(block.weight, before)


def test_a_loss_that_is_no_number_stops_the_training_and_says_where(tmp_path):
    block, chunks, _ = problem()
    with pytest.raises(UserError, match="test: fit: the loss is nan at iteration 2 of 3") as caught:
        train(Held(block, *chunks), [Worse(block, float("inf"))], 16, "test", tmp_path)
    assert caught.value.keeps  # what other blocks have is not lost


def test_a_phase_that_only_fits_what_it_trained_on_is_taken_back(tmp_path):
    block, chunks, before = problem(noise=True, rows=(6, 64))
    train(Held(block, chunks[0]), [Fit(block)], 16, "test", tmp_path)
    assert not torch.equal(block.weight, before)  # noise is fitted where nothing judges
    block.weight.data.copy_(before)
    train(Held(block, *chunks), [Fit(block)], 16, "test", tmp_path)
    assert torch.equal(block.weight, before)


def test_a_batch_is_drawn_from_as_many_chunks_as_it_takes_one_at_a_time():
    rows = torch.arange(40.0).reshape(40, 1)
    calls = Held(nn.Identity(), *({"x": part, "y": part} for part in rows.split(8)))
    drawn = list(calls.batch(20, torch.Generator().manual_seed(0)))
    assert [len(part["x"]) for part in drawn] == [7, 7, 6]
    assert all(torch.equal(part["x"], part["y"]) for part in drawn)
    assert max(float(part["x"].max()) for part in drawn) < 32  # none of the chunk that judges
    assert [len(part["x"]) for part in calls.batch(64, torch.Generator().manual_seed(0))] == [8] * 4  # all there are
    assert [len(part["x"]) for part in calls.batch(8, torch.Generator().manual_seed(0))] == [8]


def test_rates_hold_for_half_of_the_iterations_and_then_fall_to_zero(tmp_path, monkeypatch):
    block, chunks, _ = problem()
    rates = []
    original = torch.optim.Adam.step
    monkeypatch.setattr(
        torch.optim.Adam, "step", lambda self, *a: (rates.append(self.param_groups[0]["lr"]), original(self, *a))
    )
    train(Held(block, *chunks), [Fit(block, 0.5)], 16, "test", tmp_path)
    assert rates[:51] == [0.5] * 51
    assert rates[75] == pytest.approx(0.25)
    assert rates[99] == pytest.approx(0.01)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 57, 99, 130, 200])
def test_training_that_was_killed_ends_where_it_would_have(at, tmp_path, monkeypatch):
    """Two phases of 100 iterations, killed after `at` of them; what a phase trained before is kept too."""
    monkeypatch.setattr(reconstruct, "SAVE_SECONDS", 0.0)
    monkeypatch.setattr(reconstruct, "SAVE_SHARE", float("inf"))

    def run(folder, *, kill=None):
        block, chunks, _ = problem(rows=(64, 64, 64))
        count = 0

        class Counting(Fit):
            def settle(self):
                nonlocal count
                if count == kill:
                    raise Killed
                count += 1

        class Bias(Counting):
            def groups(self):
                return [([self.block.bias], self.rate), ([], 1.0)]

        train(Held(block, *chunks), [Counting(block, 0.01), Bias(block, 0.02)], 16, "test", folder)
        return block, count

    whole, count = run(tmp_path / "whole")
    assert count == 200
    with pytest.raises(Killed) if at < 200 else pytest.MonkeyPatch.context():
        run(tmp_path / "killed", kill=at)
    resumed, left = run(tmp_path / "killed")
    assert left == 200 - at
    assert torch.equal(resumed.weight, whole.weight)
    assert torch.equal(resumed.bias, whole.bias)
    assert (tmp_path / "whole" / reconstruct.STATE).exists()  # until the result is safe
    reconstruct.forget_state(tmp_path / "whole")
    assert not (tmp_path / "whole" / reconstruct.STATE).exists()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "config.json").write_text(json.dumps(TINY | {"num_layers": 2, "out_channels": 2}))
    checkpoint = open_checkpoint(f"random:{folder}", steps=4)
    calibration = calibrate(checkpoint, folder / "calibration", samples=32)
    model, samples = checkpoint.load(), Samples(CalibrationSet(calibration), 100)
    blocks = checkpoint.family.blocks(model)
    reconstruct.record_targets(model, checkpoint.family, [*blocks, reconstruct.OUTPUT], samples, folder / "work")
    return model, checkpoint.family, blocks, samples, folder / "work"


def test_calls_read_from_disk_are_those_held_in_memory(tiny):
    model, family, blocks, samples, work = tiny
    held, stored = (BlockCalls(model, family, blocks[1], samples, work, hold=size) for size in (1 << 30, 0))
    assert len(list((work / blocks[1]).glob("call-*"))) == len(samples.chunks) == 3
    assert held.error() == stored.error() < 1e-10  # the float block gives the float targets
    (one,), (other,) = (calls.batch(8, torch.Generator().manual_seed(3)) for calls in (held, stored))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_jointly_every_block_and_the_output_count(tiny):
    model, family, blocks, samples, work = tiny
    calls = ModelCalls(model, family, blocks, samples, work)
    assert calls.error() < 1e-10  # the float model gives its own targets
    weight = model.get_submodule(blocks[1]).ff.net[2].weight
    before = weight.detach().clone()
    weight.requires_grad_(True)
    try:
        (rows,) = calls.batch(8, torch.Generator().manual_seed(3))
        with torch.no_grad():
            weight.mul_(1.5)
            first = BlockCalls(model, family, blocks[0], samples, work, hold=1 << 30)
            second = BlockCalls(model, family, blocks[1], samples, work, hold=1 << 30)
            assert first.error() < 1e-10 < second.error()
        loss = calls.loss(rows)
        loss.backward()
        assert loss.item() > second.error() / len(blocks)  # and the output's own
        assert float(weight.grad.abs().sum()) > 0
    finally:
        with torch.no_grad():
            weight.copy_(before)
        weight.requires_grad_(False)


def test_a_damaged_state_is_named_with_what_to_remove(tmp_path):
    state = tmp_path / "training.safetensors"
    state.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"training\.safetensors: cannot be read") as caught:
        reconstruct.train(None, [Fit(torch.nn.Linear(2, 2))], 4, "training", tmp_path)
    assert "remove it" in caught.value.fix
    assert caught.value.keeps  # what other blocks have is not lost
