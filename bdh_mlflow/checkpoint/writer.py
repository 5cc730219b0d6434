"""Checkpoints written in the background: a training loop waits for a copy of the state in memory and for nothing else."""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

from bdh_mlflow.checkpoint.files import State, Throttle
from bdh_mlflow.text import Evaluation

WRITER_NICENESS = 10
IDLE_RATIO = 3  # seconds of waiting for each second of writing: writer and training share caches, memory and cores


class Background:
    """Does work on files in a thread, one piece at a time, throttled so that the training keeps its speed.

    What a piece of work raises is raised by the next call here.
    """

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._awaited = threading.Event()

    def start(self, work: Callable[[Throttle], None]) -> None:
        """Begin, once nothing else is under way.   work: called with what to call after each part of it.   Raises as `finish`."""
        self.finish()
        self._awaited.clear()
        self._thread = threading.Thread(target=self._run, args=(work,), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises the error of work that failed, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until everything is done.   Raises the error of work that failed."""
        if self._thread is not None:
            self._awaited.set()  # nobody waits for throttled work
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, work: Callable[[Throttle], None]) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own; the loop comes first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            work(lambda worked_s: self._awaited.wait(IDLE_RATIO * worked_s))
        except Exception as error:  # raised by the next call of check, start or finish
            self._error = error


class BackgroundWriter(Background):
    """Writes states.   write: called with a state, its evaluation and what to call between pieces.

    `save` waits for the write before it and then only for a copy, so at most two states are in memory, the live one and its copy.
    """

    def __init__(self, write: Callable[[State, Evaluation | None, Throttle], None]) -> None:
        super().__init__()
        self._write = write

    def save(self, state: State, evaluation: Evaluation | None) -> None:
        """Copy `state` and return.   Raises the SaveError of the write before, if that failed."""
        self.finish()
        copy = _copied(state)
        self.start(lambda throttle: self._write(copy, evaluation, throttle))


def _copied(state: Any) -> Any:
    """The same nested state in memory of its own, on the CPU."""
    import torch

    if isinstance(state, torch.Tensor):
        return state.detach().clone() if state.device.type == "cpu" else state.detach().to("cpu")
    if isinstance(state, Mapping):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(_copied(value) for value in state)
    return state
