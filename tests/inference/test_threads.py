"""Tests threads that read ahead and write behind."""

import threading
import time

import pytest

from dense_jax.inference import threads


def test_items_are_the_same_and_only_so_many_are_made_ahead():
    made = []

    def numbers():
        for number in range(20):
            made.append(number)
            yield number

    received = []
    for number in threads.ahead(numbers(), 3):
        received.append(number)
        time.sleep(0.001)
        assert number < len(made) <= number + 1 + 3
    assert received == list(range(20))
    assert list(threads.ahead(iter([]), 3)) == []


def test_an_error_is_raised_after_the_items_before_it():
    def broken():
        yield 1
        raise OSError("disk")

    items = threads.ahead(broken(), 4)
    assert next(items) == 1
    with pytest.raises(OSError, match="disk"):
        next(items)


def test_the_thread_ends_with_its_reader():
    before = threading.active_count()
    items = threads.ahead(iter(range(10**9)), 4)
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before


def test_the_calls_of_a_lane_run_in_order_and_those_of_two_at_once():
    done = []
    meet = threading.Barrier(2, timeout=20)

    def call(lane, number):
        if number == 0:
            meet.wait()  # for the other lane
        time.sleep(0.001 * (5 - number % 5))
        done.append((lane, number))

    with threads.lanes(2) as submit:
        for number in range(20):
            for lane in range(2):
                submit(lane, call, lane, number)
    for lane in range(2):
        assert [number for other, number in done if other == lane] == list(range(20))


def test_submit_waits_while_too_many_calls_are_pending():
    release = threading.Event()
    waiting = 0

    def submit_all():
        nonlocal waiting
        with threads.lanes(2) as submit:
            for number in range(50):
                submit(number, release.wait, 20)
                waiting += 1

    thread = threading.Thread(target=submit_all)
    thread.start()
    time.sleep(0.2)
    assert waiting == 4
    release.set()
    thread.join()
    assert waiting == 50


@pytest.mark.parametrize("more", [0, 100])
def test_an_error_of_a_call_is_raised_whatever_comes_after_it(more):
    def fail():
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), threads.lanes(1) as submit:
        submit(0, fail)
        for _ in range(more):
            submit(0, time.sleep, 0)
