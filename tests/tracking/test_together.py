"""Requests side by side: all are done, no more at once than allowed, and the first error in their order is told."""

import threading
import time

import pytest

from bdh_mlflow.tracking.together import together


def test_all_are_done_with_no_more_at_once_than_allowed() -> None:
    lock, running, most, done = threading.Lock(), [0], [0], []

    def act(number: int) -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1
            done.append(number)

    together(*[lambda number=number: act(number) for number in range(9)], at_once=3)  # type: ignore[misc]
    assert (sorted(done), most[0]) == (list(range(9)), 3)


def test_first_error_in_order_is_raised_after_all_have_ended() -> None:
    ended = []

    def late() -> None:
        time.sleep(0.05)
        ended.append("late")
        raise ValueError("first in order")

    def early() -> None:
        raise KeyError("first in time")

    with pytest.raises(ValueError, match="first in order"):
        together(late, early)
    assert ended == ["late"]


def test_one_at_a_time_stays_in_this_thread_and_stops_at_an_error() -> None:
    seen = []

    def fails() -> None:
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        together(lambda: seen.append(threading.current_thread()), fails, lambda: seen.append(None), at_once=1)
    assert seen == [threading.current_thread()]
