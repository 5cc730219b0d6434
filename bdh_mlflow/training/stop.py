"""The loop: accumulate, guard, update, and then whatever it is time for.

Parts are handed in and described here by small protocols: the trainer builds nothing and knows neither the model, the data, MLflow nor
the disk. `step` counts completed optimizer updates. Everything that changes while it runs is in `state_dict`, taken only between updates.
"""

import signal
from dataclasses import dataclass
from types import FrameType


@dataclass(frozen=True)
class StopReason:
    """A reason to end that is no signal: `pruned`."""

    name: str


@dataclass
class StopRequest:
    """Whether a signal or somebody asked the run to end; the loop looks between batches.

    Until the run has begun there is nothing to save, so the signal ends the program where it is. Later signals change nothing: Ctrl-C
    under `mlflow run` arrives as SIGINT and then SIGTERM, and the second must not cut off the save.
    """

    received: signal.Signals | StopReason | None = None
    begun: bool = False

    def install(self) -> None:
        """Handle SIGINT and SIGTERM from now on."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def ask(self, reason: str) -> None:
        """End after this step, as after a signal; one that has come counts more."""
        self.received = self.received or StopReason(reason)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self.received is None
        if not isinstance(self.received, signal.Signals):
            self.received = signal.Signals(number)
        if first and not self.begun:
            raise KeyboardInterrupt
