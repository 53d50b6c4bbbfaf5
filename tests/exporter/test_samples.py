"""The rows that blocks are trained on: even over steps, judged by trajectories apart, and shares that miss nothing."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from exporter import samples
from exporter.samples import Samples, even_share


class Set:
    """A calibration set of so many trajectories; every row says which one it is of, and at which step."""

    def __init__(self, trajectories: int, steps: int, batch: int = 16, *, guided: bool = False) -> None:
        self.steps = list(range(steps))
        self.batches = [range(i, min(i + batch, trajectories)) for i in range(0, trajectories, batch)]
        self.shards = [str(i) for i in range(len(self.batches))]
        self.artifact = SimpleNamespace(info={"samples": trajectories})
        self.guided = guided

    def read(self, shard, steps=None):
        ids = torch.tensor(list(self.batches[int(shard)]))
        ids = torch.cat([ids, ids]) if self.guided else ids
        for step in self.steps if steps is None else steps:
            yield step, {"step": torch.full_like(ids, step), "trajectory": ids}


def halves(found):
    """Returns (step, trajectory) of what is trained on and of what judges."""
    parts = found.chunks[: found.training], found.chunks[found.training :]
    return [
        (torch.cat([c["step"] for c in part]), torch.cat([c["trajectory"] for c in part])) if part else None
        for part in parts
    ]


@pytest.mark.parametrize(
    ("trajectories", "steps", "rows", "guided"),
    [(64, 25, 1024, False), (64, 25, 64, False), (1024, 20, 1024, False), (256, 50, 1024, True), (8, 4, 16, True)],
)
def test_every_step_is_trained_on_and_judged_alike(trajectories, steps, rows, guided):
    trained, judged = halves(Samples(Set(trajectories, steps, guided=guided), rows))
    assert len(trained[0]) == rows
    assert len(judged[0]) == rows // 8
    for found in (trained, judged):
        counts = found[0].bincount(minlength=steps)
        assert counts.max() - counts.min() <= 1
    assert not set(trained[1].tolist()) & set(judged[1].tolist())


def test_one_trajectory_in_eight_judges_even_if_a_shard_has_fewer():
    _, judged = halves(Samples(Set(16, 3, batch=4, guided=True), 48))
    assert set(judged[1].tolist()) <= {7, 15}


def test_too_few_trajectories_are_said_to_be(capsys):
    found = Samples(Set(7, 3), 6)
    assert found.training == len(found.chunks) == 1
    assert "7 trajectories are too few" in capsys.readouterr().err.replace("\n", " ")


def test_fewer_rows_than_asked_for_are_told(capsys):
    found = Samples(Set(16, 3), 1000)
    assert sum(len(chunk["step"]) for chunk in found.chunks[: found.training]) == 42
    assert "training on 42 rows" in capsys.readouterr().err.replace("\n", " ")


def test_one_row_is_one_row_however_many_records_there_are():
    for steps in (49, 98, 103):
        assert len(halves(Samples(Set(8, steps), 1))[0][0]) == 1


def test_chunks_are_in_no_order_of_steps_and_have_the_size_asked_for():
    found = Samples(Set(64, 25), 200, chunk=48)
    assert [len(chunk["step"]) for chunk in found.chunks[: found.training]] == [48, 48, 48, 48, 8]
    assert len(set(found.chunks[0]["step"].tolist())) > 10


@pytest.mark.parametrize(("count", "most"), [(10, 20), (1000, 64), (65536, 1024), (1000003, 4096)])
def test_an_even_share_takes_one_of_every_stretch(count, most):
    found = even_share(count, most, torch.Generator().manual_seed(0))
    assert len(found) == min(count, most)
    assert (found.diff() > 0).all()
    assert found.max() < count
    if count > most:
        stretches = (found.double() * most / count).long()
        assert (stretches - torch.arange(most)).abs().max() <= 1  # fp64 at a stretch's very end


@pytest.mark.parametrize("width", [8, 32, 384, 1280])
def test_an_even_share_sees_every_column(width):
    found = even_share(width * 512, 512 * 8, torch.Generator().manual_seed(0))
    assert len(set((found % width).tolist())) > 0.9 * width


def test_chunk_is_what_the_rest_expects():
    assert samples.CHUNK % 32 == 0  # a batch comes from one chunk
