"""How a signal, or a study that prunes a trial, ends a training run after the update at hand."""

import contextlib
import signal
from dataclasses import dataclass
from types import FrameType

from bdh_mlflow.host import ENDING_SIGNALS


@dataclass(frozen=True)
class StopReason:
    """Why a training run was stopped, where no signal did it: `pruned`."""

    name: str


@dataclass
class _Process:
    """What concerns all trainings of this process.   first: signal that came.   begun: see `StopRequest`."""

    first: signal.Signals | None = None
    begun: bool = False


class StopRequest:
    """Whether the run is to end, by a signal or by `ask`; the loop looks between updates.

    begun: whether there is a run to end properly. Before that, nothing could be saved, and a signal ends the program where it is. A
    second signal changes nothing: Ctrl-C under `mlflow run` arrives as SIGINT and then SIGTERM, and the second must not interrupt the
    save.
    """

    def __init__(self, begun: bool = False) -> None:
        self._process = _Process(begun=begun)
        self._reason: StopReason | None = None

    def for_one(self) -> "StopRequest":
        """For one training of several: a signal ends all of them, a reason this one alone, however late it comes."""
        one = StopRequest()
        one._process = self._process
        return one

    @property
    def received(self) -> signal.Signals | StopReason | None:
        """The first signal, else the first other reason; None until there is one."""
        return self._process.first or self._reason

    @property
    def begun(self) -> bool:
        """See above."""
        return self._process.begun

    @begun.setter
    def begun(self, value: bool) -> None:
        self._process.begun = value

    def install(self) -> None:
        """Handle ENDING_SIGNALS from now on; a SIGHUP that is ignored stays so, which is what nohup means."""
        for number in ENDING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(OSError):  # a sandbox may forbid some
                    signal.signal(number, self.handle)

    def ask(self, reason: str) -> None:
        """End after this update, as after a signal; a reason already received stays."""
        self._reason = self._reason or StopReason(reason)

    @property
    def number(self) -> int:
        """For other processes: of the signal, -1 for another reason, 0 while there is none."""
        if self._process.first:
            return int(self._process.first)
        return -1 if self._reason else 0

    def agree(self, number: int) -> None:
        """Another process of this training was asked to stop, see `number`."""
        if number > 0:
            self._process.first = self._process.first or signal.Signals(number)
        else:
            self.ask("stopped")

    def handle(self, number: int, frame: FrameType | None) -> None:
        """What a signal does.   Raises KeyboardInterrupt for the first one if the run has not begun."""
        is_first = self._process.first is None
        self._process.first = self._process.first or signal.Signals(number)
        if is_first and not self.begun:
            raise KeyboardInterrupt
