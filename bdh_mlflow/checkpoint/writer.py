"""Checkpoints: a file is either a whole step or it is not a checkpoint.

A step is written to `checkpoint_500.pt.partial`, synced and renamed; then its manifest `checkpoint_500.json` (bytes, sha256, step) the
same way. The manifest is the commit: readers list only files it vouches for, so a kill during a save costs that save alone. Files are
opened with `weights_only=True`: tensors and plain values, never code. Knows nothing of MLflow; `tracking` mirrors finished files.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from bdh_mlflow.checkpoint.files import State, Throttle
from bdh_mlflow.text import Evaluation

if TYPE_CHECKING:  # imported where a file is opened: who only lists and sends files is spared it
    pass
WRITER_NICENESS = 10
IDLE_RATIO = 3  # seconds that a writer beside the loop rests for each second of writing: the two share caches, memory and cores


class BackgroundWriter:
    """Writes states behind the caller, one at a time, and not faster than the loop beside it can bear.

    write: what is done with a state and its val loss, with the rest to take between pieces; its errors are raised by the next call here.
    `save` waits for the one before it and then only for a copy, so there are never more than two states in memory, the living one and its
    copy.
    """

    def __init__(self, write: Callable[[State, Evaluation | None, Throttle], None]) -> None:
        self._write = write
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._awaited = threading.Event()

    def save(self, state: State, evaluation: Evaluation | None) -> None:
        """Copy `state` and return.   Raises the SaveError of the write before, if that failed."""
        self.finish()
        copy = _copied(state)
        self._awaited.clear()
        self._thread = threading.Thread(target=self._run, args=(copy, evaluation), name="checkpoint")
        self._thread.start()

    def check(self) -> None:
        """Raises the error of a write that failed, once."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def finish(self) -> None:
        """Wait until everything is written.   Raises the error of a write that failed."""
        if self._thread is not None:
            self._awaited.set()  # nobody is held up by rests
            self._thread.join()
            self._thread = None
        self.check()

    def _run(self, state: State, evaluation: Evaluation | None) -> None:
        if sys.platform == "linux":  # where a thread has a niceness of its own; the loop comes first
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), WRITER_NICENESS)
        try:
            self._write(state, evaluation, lambda worked_s: self._awaited.wait(IDLE_RATIO * worked_s))
        except Exception as error:  # whatever it is, it is raised where somebody listens
            self._error = error


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
