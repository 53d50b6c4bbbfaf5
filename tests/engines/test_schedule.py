"""Steps: which one an engine is called at, for its own schedule, for another, and for no step there is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from engines import schedule
from engines.errors import UserError

TIMESTEPS = [900.0, 600.0, 300.0, 0.0]
GRAPH = {"timesteps": TIMESTEPS, "fed_timesteps": TIMESTEPS, "step_input": "index"}


def fed(steps):
    return {"step": np.array(steps), "timestep": np.array([TIMESTEPS[i] for i in steps])}


class Echo:
    name = "echo"

    def run(self, feeds):
        return dict(feeds)


def test_its_own_schedule_is_taken_step_by_step_whatever_the_last_bits():
    assert schedule.steps_of(GRAPH, [900.0001, 600.0, 300.0, 0.0]) == [0, 1, 2, 3]


def test_another_number_of_steps_is_an_error_that_names_both():
    with pytest.raises(UserError, match=r"2 steps.*4 steps") as caught:
        schedule.steps_of(GRAPH, [900.0, 300.0])
    assert "--steps 2" in caught.value.fix
    assert "nearest=True" in caught.value.fix


def test_as_many_steps_elsewhere_are_an_error_too():
    with pytest.raises(UserError, match=r"timesteps 999 … 249"):
        schedule.steps_of(GRAPH, [999.0, 749.0, 499.0, 249.0])


def test_an_engine_without_steps_says_that_it_takes_none():
    with pytest.raises(UserError, match="this engine takes no step"):
        schedule.steps_of(GRAPH | {"step_input": None}, [998])


def test_timesteps_that_are_no_numbers_are_refused():
    with pytest.raises(UserError, match="timesteps are of type <U"):
        schedule.steps_of(GRAPH, ["900"])


def test_fewer_steps_may_take_the_nearest_that_was_calibrated():
    assert schedule.steps_of(GRAPH, [880.0, 310.0, 20.0], nearest=True) == [0, 2, 3]


def test_single_timesteps_take_the_step_that_they_are_of_in_any_order():
    assert schedule.steps_at(GRAPH, [300.0, 900.0001, 0.0]) == [2, 0, 3]
    assert schedule.steps_at(GRAPH | {"fed_timesteps": [0.9, 0.6]}, np.float32(0.6)) == [1]  # in the model's unit
    assert schedule.steps_at(GRAPH | {"fed_timesteps": [9.0, 9.0, 1.0]}, [9.0, 1.0]) == [0, 2]


def test_a_timestep_that_is_not_calibrated_is_an_error_unless_the_nearest_will_do():
    with pytest.raises(UserError, match=r"timestep 880 .* 4 steps, timesteps 900 … 0") as caught:
        schedule.steps_at(GRAPH, [900.0, 880.0])
    assert "num_inference_steps=4" in caught.value.fix
    assert schedule.steps_at(GRAPH, [900.0, 880.0], nearest=True) == [0, 0]
    assert schedule.steps_at(GRAPH, [900.0, 880.0], tolerance=0.03) == [0, 0]


def test_a_graph_without_steps_is_left_alone():
    runner = Echo()
    assert schedule.with_steps(runner, {"step_input": None}, None) is runner


@pytest.mark.parametrize("bad", [-1, 4])
def test_a_step_out_of_range_is_an_error_that_names_it(bad):
    runner = schedule.with_steps(Echo(), GRAPH, None)
    assert runner.run(fed([0, 3]))["step"].tolist() == [0, 3]
    with pytest.raises(UserError, match=rf"step {bad}, .* 0 … 3"):
        runner.run(fed([0, 3]) | {"step": np.array([0, bad])})


def test_steps_of_another_schedule_are_an_error_that_names_both():
    runner = schedule.with_steps(Echo(), GRAPH, None)
    with pytest.raises(
        UserError, match=r"timestep 310 at step 1, whose scales are for timestep 600.* 4 steps"
    ) as caught:
        runner.run({"step": np.array([0, 1]), "timestep": np.array([900, 310])})
    assert "nearest=True" in caught.value.fix


def test_steps_that_are_nearest_to_another_schedules_timesteps_are_taken():
    runner = schedule.with_steps(Echo(), GRAPH, None)
    asked = [880.0, 310.0, 20.0]
    steps = schedule.steps_of(GRAPH, asked, nearest=True)
    assert runner.run({"step": np.array(steps), "timestep": np.array(asked)})["step"].tolist() == steps
    assert runner.run({"step": np.zeros(0, np.int64), "timestep": np.zeros(0)})["step"].tolist() == []  # an empty batch


@pytest.mark.parametrize("step", [0, 3])
def test_a_timestep_that_is_no_number_is_of_no_schedule(step):
    runner = schedule.with_steps(Echo(), GRAPH, None)
    for value in (np.nan, np.inf, -np.inf):
        with pytest.raises(UserError, match=f"timestep {value:g} at step {step}"):
            runner.run({"step": np.array([step]), "timestep": np.array([value])})
    for nearest in (False, True):
        with pytest.raises(UserError, match="timestep nan is no number"):
            schedule.steps_at(GRAPH, [900.0, np.nan], nearest=nearest)
        with pytest.raises(UserError, match="timestep inf is no number"):
            schedule.steps_of(GRAPH, [900.0, np.inf], nearest=nearest)


def test_a_step_that_is_no_whole_number_is_an_error():
    runner = schedule.with_steps(Echo(), GRAPH, None)
    with pytest.raises(UserError, match="`step` is float64"):
        runner.run(fed([0, 3]) | {"step": np.array([0.0, 3.0])})


def test_feeds_without_a_step_are_an_error():
    with pytest.raises(UserError, match="hold no `step`"):
        schedule.with_steps(Echo(), GRAPH, None).run({"x": np.zeros(1)})


def test_a_graph_that_wants_the_tables_row_is_given_it(tmp_path):
    table = np.arange(8, dtype=np.float32).reshape(4, 2)
    np.save(tmp_path / schedule.FILE, table)
    engine = SimpleNamespace(file=lambda name: tmp_path / name)
    runner = schedule.with_steps(Echo(), GRAPH | {"step_input": "row"}, engine)
    assert runner.run(fed([3, 1]))[schedule.ROW].tolist() == table[[3, 1]].tolist()


def test_what_is_checked_on_the_host_is_told_where_it_lies_elsewhere():
    class Far:
        dtype = "int64"

        def __dlpack__(self, **_):
            raise BufferError("a tensor of another device")

        def __dlpack_device__(self):
            return (2, 0)

    class Near(Echo):
        def run_dlpack(self, feeds):
            return dict(feeds)

        def refit(self, model):
            return f"refitted with {model}"

    runner = schedule.with_steps(Near(), GRAPH, None)
    with pytest.raises(UserError, match="`step` and `timestep` are checked on the host") as caught:
        runner.run_dlpack(fed([0]) | {"step": Far()})
    assert caught.value.fix.startswith("feed these two from the CPU")
    assert runner.refit("other.onnx") == "refitted with other.onnx"
    with pytest.raises(AttributeError):
        runner.fly()
