"""Tests the prediction of the time that a training will take."""

import pytest
from ml_collections import ConfigDict

from dense_jax.training import pace


@pytest.fixture
def clock(monkeypatch):
    """Replaces the clock. Returns a function that lets it run for some seconds."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def run(seconds):
        now[0] += seconds

    return run


@pytest.mark.parametrize("num_steps", [20, 23])
@pytest.mark.parametrize("eval_every", [1, 5, 30])
def test_the_time_left_has_all_steps_and_evaluations_to_come(num_steps, eval_every, clock):
    """Steps take 2 s and evaluations 7 s: the time left at each step is the time that passes."""
    config = ConfigDict({"num_steps": num_steps, "eval_every": eval_every, "batch_size": 4})
    timer, told, ended = pace.Pace(config), {}, {}
    elapsed = 0
    for step in range(1, num_steps + 1):
        clock(2)
        elapsed += 2
        timer.end_step()
        told[step], ended[step] = timer.text(step), elapsed
        if pace.is_due(step, config):
            timer.pause()
            clock(7)
            elapsed += 7
            timer.add_evaluation(7.0, 7.0)
            timer.end_step()  # the next step is dispatched, so that only its own time counts
    assert told[1] == ""  # the first step also waits for its data
    due = [step for step in range(1, num_steps + 1) if pace.is_due(step, config)]
    assert timer.images_per_second == 2.0
    assert timer.evaluation_share == pytest.approx(7 * len(due) / elapsed)
    for step in range(2, num_steps + 1):
        left = elapsed - ended[step]
        if step > due[0]:
            expected = pace.duration(float(left))
        else:
            num_left = f"{len(due)} evaluation{'s' if len(due) > 1 else ''}"
            expected = f"{pace.duration(2.0 * (num_steps - step))} + {num_left}"
        assert told[step] == f"2.0 images/s, ETA {expected}"


def test_a_pause_is_no_step(clock):
    timer = pace.Pace(ConfigDict({"num_steps": 9, "eval_every": 9, "batch_size": 1}))
    for seconds in (1, 2, 2):
        clock(seconds)
        timer.end_step()
    timer.pause()
    clock(1000)
    timer.end_step()
    assert timer.images_per_second == 0.5
