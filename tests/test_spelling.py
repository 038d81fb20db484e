"""Tests the texts for people."""

import math

import pytest

from dense_jax import spelling

DURATIONS = {
    0.04: "0.0 s",
    4.21: "4.2 s",
    9.96: "10 s",
    59.4: "59 s",
    59.6: "1 min 0 s",
    185: "3 min 5 s",
    3599.7: "1 h 0 min",
    7859: "2 h 10 min",
    360_000: "100 h 0 min",
}


@pytest.mark.parametrize("seconds", DURATIONS)
def test_a_duration_has_its_two_largest_units(seconds):
    assert spelling.duration(float(seconds)) == DURATIONS[seconds]


def test_scores_are_in_percent_and_speeds_in_images():
    assert spelling.percent(0.4125) == "41.2 %" and spelling.percent(1.0) == "100.0 %"
    assert spelling.percent(math.nan) == "no score"
    assert spelling.speed(1234.56) == "1,234.6 images/s"
