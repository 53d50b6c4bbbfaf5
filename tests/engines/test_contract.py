"""Feeds are checked against a bundle's contract, and the message says what the engine takes."""

from __future__ import annotations

import bundles
import numpy as np
import pytest

from engines.contract import Contract
from engines.errors import UserError

CONTRACT = Contract("ort", bundles.info()["inputs"], bundles.AXES)


def test_feeds_come_out_as_they_are_without_a_copy():
    fed = bundles.feeds()
    checked = CONTRACT.checked(fed)
    assert checked.keys() == fed.keys()
    assert all(np.shares_memory(checked[name], fed[name]) for name in fed)


def test_other_float_and_integer_types_are_converted():
    fed = bundles.feeds()
    fed |= {"hidden_states": fed["hidden_states"].astype(np.float64), "class_labels": [0, 1]}
    checked = CONTRACT.checked(fed)
    assert checked["hidden_states"].dtype == np.float32
    assert checked["class_labels"].dtype == np.int64


def test_a_torch_tensor_is_read_where_it_lies():
    import torch

    tensor = torch.zeros(2, 1, 2, 4)
    checked = CONTRACT.checked({**bundles.feeds(), "hidden_states": tensor})
    assert checked["hidden_states"].__array_interface__["data"][0] == tensor.data_ptr()


def test_a_tensor_that_numpy_cannot_read_is_refused():
    import torch

    for kind in ({"requires_grad": True}, {"device": "meta"}):
        with pytest.raises(UserError, match="numpy cannot read") as caught:
            CONTRACT.checked({**bundles.feeds(), "hidden_states": torch.zeros(2, 1, 2, 4, **kind)})
        assert "tensor.detach().cpu()" in caught.value.fix


def test_a_type_that_numpy_lacks_is_to_be_converted():
    import torch

    with pytest.raises(UserError, match="numpy has no bfloat16") as caught:
        CONTRACT.checked({**bundles.feeds(), "hidden_states": torch.zeros(2, 1, 2, 4, dtype=torch.bfloat16)})
    assert caught.value.fix == "convert it to float32"


@pytest.mark.parametrize("feeds", [[1, 2], None, np.zeros(2)])
def test_feeds_that_are_no_dictionary_are_refused(feeds):
    with pytest.raises(UserError, match=f"the feeds are a {type(feeds).__name__}"):
        CONTRACT.checked(feeds)


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(UserError, match="makes no array"):
        CONTRACT.checked({**bundles.feeds(), "class_labels": [[0], [1, 2]]})


@pytest.mark.parametrize(
    ("change", "told", "fix"),
    [
        (
            {"hidden_states": np.zeros((9, 1, 2, 4), np.float32)},
            r"\[9, 1, 2, 4\]",
            "feed batch 1 … 8 at once: split them",
        ),
        (
            {"hidden_states": np.zeros((2, 1, 2, 5), np.float32)},
            r"\[2, 1, 2, 5\]",
            "feed width 2 … 8 in multiples of 2",
        ),
        (
            {"hidden_states": np.zeros((2, 2, 2, 4), np.float32)},
            r"\[batch, 1, 2, width\]",
            "dimension 1 is 2, and must be 1",
        ),
        ({"hidden_states": np.zeros((2, 8), np.float32)}, r"\[2, 8\]", "feed 4 dimensions, [batch, 1, 2, width]"),
        ({"hidden_states": np.zeros((0, 1, 2, 4), np.float32)}, r"\[0, 1, 2, 4\]", "batch 1 … 8"),
        ({"class_labels": np.zeros(3, np.int64)}, "axis 'batch' is 2 in 'hidden_states' and 3", "as many rows"),
        ({"class_labels": np.zeros(2)}, "of type float64", "whole numbers: class_labels"),
        ({"hidden_states": np.zeros((2, 1, 2, 4), np.int64)}, "of type int64", "floating-point"),
        ({"class_labels": np.array([99, 100])}, "input 'class_labels' holds 100", "feed 0 … 99: class_labels"),
        ({"class_labels": np.array([0, -1])}, "input 'class_labels' holds -1", "feed 0 … 99: class_labels"),
        ({3: np.zeros(2)}, "unknown input '3'", "known:"),
        ({"hidden_state": np.zeros(2)}, "unknown input 'hidden_state'", "did you mean 'hidden_states'"),
    ],
)
def test_what_the_engine_does_not_take_is_refused_with_what_it_takes(change, told, fix):
    with pytest.raises(UserError, match=told) as caught:
        CONTRACT.checked(bundles.feeds() | change)
    assert fix in caught.value.fix


def test_a_missing_input_is_named():
    fed = bundles.feeds()
    del fed["timestep"]
    with pytest.raises(UserError, match="input 'timestep' is missing") as caught:
        CONTRACT.checked(fed)
    assert caught.value.fix == "feed timestep, int64 [batch]: timestep"


def test_step_may_be_left_out_where_no_engine_reads_it():
    fed = bundles.feeds()
    del fed["step"]
    assert "step" not in CONTRACT.checked(fed)
