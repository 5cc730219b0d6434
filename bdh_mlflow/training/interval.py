"""Means between two points of the training metrics."""

from collections.abc import Sequence
from typing import Any

from bdh_mlflow.distributed import Report


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
        self._compute_s: list[float] = []
        self._data_s: list[float] = []

    def add_attempt(self, tokens: int, elapsed_s: float, reports: Sequence[Report]) -> None:
        """An update was computed, whether or not it was applied.   tokens: of all processes.   reports: of each."""
        self._elapsed_s += elapsed_s
        self._attempts += 1
        self._tokens += tokens
        if not self._compute_s:
            self._compute_s, self._data_s = [0.0] * len(reports), [0.0] * len(reports)
        for rank, report in enumerate(reports):
            self._compute_s[rank] += report.compute_s
            self._data_s[rank] += report.data_s

    def add_loss(self, loss: float) -> None:
        """An update was applied."""
        self._loss_sum += loss
        self._losses += 1

    def metrics(self, peak_tokens_per_s: float) -> dict[str, float]:
        """What the interval has to tell, means over its updates.   peak_tokens_per_s: 100 % of perf/mfu_pct.

        train/loss: nats per token.   perf/tokens_per_s: of training text, of all processes.   perf/step_ms: from one update to the next,
        without evaluations and saves.   perf/data_wait_ms: waiting for data, of the process that waited longest.   With several processes
        perf/step_ms_min, _mean and _max: computing, of the fastest, of all, and of the slowest, which is perf/slowest_rank.
        """
        each_ms, own = 1e3 / max(1, self._attempts), self._compute_s
        tokens_per_s = self._tokens / max(self._elapsed_s, 1e-9)
        found = {
            "train/loss": self._loss_sum / max(1, self._losses),
            "perf/tokens_per_s": tokens_per_s,
            "perf/mfu_pct": 100 * tokens_per_s / peak_tokens_per_s,
            "perf/step_ms": each_ms * self._elapsed_s,
            "perf/data_wait_ms": each_ms * max(self._data_s, default=0.0),
            "progress/epoch": self.epoch,
        }
        if len(own) > 1:
            found |= {"perf/step_ms_min": each_ms * min(own), "perf/step_ms_mean": each_ms * sum(own) / len(own)}
            found |= {"perf/step_ms_max": each_ms * max(own), "perf/slowest_rank": own.index(max(own))}
        return found

    def state_dict(self) -> dict[str, Any]:
        """What the next point depends on; durations are not carried over."""
        return {"loss_sum": self._loss_sum, "loss_count": self._losses, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        self._loss_sum, self._losses, self.epoch = state["loss_sum"], state["loss_count"], state["epoch"]
