"""Signals, as a training run takes them."""

import signal

import pytest

from bdh_mlflow.training.stop import StopRequest


def test_second_signal_does_not_cut_off_the_save() -> None:
    stop = StopRequest(begun=True)
    stop.handle(signal.SIGINT, None)
    stop.handle(signal.SIGTERM, None)
    assert stop.received is signal.SIGINT


def test_signal_before_the_loop_ends_the_program_where_it_is() -> None:
    stop = StopRequest()
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGTERM, None)
    assert stop.received is signal.SIGTERM
