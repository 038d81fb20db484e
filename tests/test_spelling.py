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


def test_scores_have_three_digits_and_speeds_images():
    assert spelling.decimal(0.41251) == "0.413" and spelling.decimal(1.0) == "1.000"
    assert spelling.decimal(0.0) == "0.000" and spelling.decimal(0.00034) == "0.0003"
    assert spelling.decimal(math.nan) == "no score"
    assert spelling.speed(1234.56) == "1,234.6 images/s"
