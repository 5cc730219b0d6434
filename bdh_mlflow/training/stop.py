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
class StopRequest:
    """Whether the run is to end, by a signal or by `ask`; the loop looks between updates.

    received: the first signal, else the first other reason; None until there is one.   begun: whether there is a run to end properly.
    Before that, nothing could be saved, and a signal ends the program where it is. A second signal changes nothing: Ctrl-C under
    `mlflow run` arrives as SIGINT and then SIGTERM, and the second must not interrupt the save.
    """

    received: signal.Signals | StopReason | None = None
    begun: bool = False

    def install(self) -> None:
        """Handle ENDING_SIGNALS from now on; a SIGHUP that is ignored stays so, which is what nohup means."""
        for number in ENDING_SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                with contextlib.suppress(OSError):  # a sandbox may forbid some
                    signal.signal(number, self.handle)

    def ask(self, reason: str) -> None:
        """End after this update, as after a signal; a reason already received stays."""
        self.received = self.received or StopReason(reason)

    @property
    def number(self) -> int:
        """For other processes: of the signal, -1 for another reason, 0 while there is none."""
        if self.received is None:
            return 0
        return int(self.received) if isinstance(self.received, signal.Signals) else -1

    def agree(self, number: int) -> None:
        """Another process of this training was asked to stop, see `number`."""
        self.received = self.received or (signal.Signals(number) if number > 0 else StopReason("stopped"))

    def handle(self, number: int, frame: FrameType | None) -> None:
        """What a signal does.   Raises KeyboardInterrupt for the first one if the run has not begun."""
        first = self.received is None
        if not isinstance(self.received, signal.Signals):
            self.received = signal.Signals(number)
        if first and not self.begun:
            raise KeyboardInterrupt
