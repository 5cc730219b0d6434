"""Means between two points of the training metrics."""

from typing import Any


class Interval:
    """Losses and speed since the last point that closed an interval.

    An update that float16 overflow skipped counts for speed and not for the loss.   epoch: passes over the data so far.
    """

    def __init__(self) -> None:
        self.epoch = 0.0
        self.reset()

    def reset(self) -> None:
        """Begin the next interval."""
        self._loss_sum, self._losses = 0.0, 0
        self._elapsed_s, self._attempts, self._tokens = 0.0, 0, 0

    def add_attempt(self, tokens: int, elapsed_s: float) -> None:
        """An update was computed, whether or not it was applied."""
        self._elapsed_s += elapsed_s
        self._attempts += 1
        self._tokens += tokens

    def add_loss(self, loss: float) -> None:
        """An update was applied."""
        self._loss_sum += loss
        self._losses += 1

    @property
    def loss(self) -> float:
        """Mean loss of its updates, nats per token."""
        return self._loss_sum / max(1, self._losses)

    @property
    def tokens_per_s(self) -> float:
        """Tokens of training text per second."""
        return self._tokens / max(self._elapsed_s, 1e-9)

    @property
    def step_ms(self) -> float:
        """Mean duration of an update."""
        return 1e3 * self._elapsed_s / max(1, self._attempts)

    def state_dict(self) -> dict[str, Any]:
        """What the next point depends on; durations are not carried over."""
        return {"loss_sum": self._loss_sum, "loss_count": self._losses, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._loss_sum, self._losses, self.epoch = state["loss_sum"], state["loss_count"], state["epoch"]
