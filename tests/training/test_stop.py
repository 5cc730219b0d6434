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


def test_a_closed_terminal_and_a_schedulers_warning_end_it_like_sigterm() -> None:
    for number in (signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU):
        stop = StopRequest(begun=True)
        stop.install()
        signal.raise_signal(number)
        assert stop.received is number


def test_under_nohup_a_closed_terminal_ends_nothing() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest(begun=True)
    stop.install()
    signal.raise_signal(signal.SIGHUP)
    assert stop.received is None


def test_a_reason_ends_one_training_of_several_and_a_signal_all_of_them() -> None:
    stop = StopRequest()
    first, second = stop.for_one(), stop.for_one()
    first.begun = True
    first.ask("pruned")
    first.ask("taken up")
    assert first.received is not None
    assert (first.received.name, first.number, second.received, stop.received) == ("pruned", -1, None, None)
    stop.handle(signal.SIGTERM, None)  # raises nothing: a training has begun
    assert (first.received, second.number, stop.received) == (signal.SIGTERM, int(signal.SIGTERM), signal.SIGTERM)
