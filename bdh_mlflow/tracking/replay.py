"""Points of a resumed training that MLflow has already: compared with what is there instead of being logged twice."""

import functools
from collections.abc import Callable

from mlflow import MlflowClient
from mlflow.entities import Metric, Run

from bdh_mlflow.tracking.records import Points
from bdh_mlflow.tracking.together import together

AUDIT = "resume/replay_max_abs_diff"
SHARED_STEPS = ("by_tokens/", "tracker/", "ckpt/")  # several points may share a step: they say nothing of whether one was replayed


class Replay:
    """Tells new points from those of steps that an earlier segment has logged.

    load: gets the points that the run has, when they are first needed; None for a run that has none.   audited: metrics that a replayed
    step must give again to the bit.   note: called with a line for the first difference, and for each larger one.
    """

    def __init__(self, load: Callable[[], dict[tuple[str, int], Metric]] | None, audited: list[str], note: Callable[[str], None]) -> None:
        self._load, self._audited, self._note = load, audited, note
        self._logged: dict[tuple[str, int], Metric] | None = None if load else {}
        self._largest = 0.0

    def new_points(self, points: Points, at_ms: int) -> list[Metric]:
        """What is to be logged.   Raises whatever the store does on the first call."""
        if self._logged is None:
            assert self._load is not None
            self._logged = self._load()
        logged, new, replayed = self._logged, dict[str, float](), False
        for key, value in points.values.items():
            before = logged.get((key, points.step))
            if before is None:
                new[key] = value
            elif before.timestamp != at_ms:  # else it was sent before and not acknowledged
                replayed = replayed or not key.startswith(SHARED_STEPS)
                if key in self._audited:
                    self._compare(key, points.step, before.value, value)
        audit = AUDIT, points.step
        if replayed and self._audited and (audit not in logged or logged[audit].timestamp == at_ms):
            logged.setdefault(audit, Metric(AUDIT, self._largest, at_ms, points.step))
            new[AUDIT] = logged[audit].value  # as it was first: the value is part of what tells points apart
        return [Metric(key, value, at_ms, points.step) for key, value in new.items()]

    def _compare(self, key: str, step: int, before: float, now: float) -> None:
        difference = abs(before - now)
        if difference > self._largest:
            self._note(f"step {step}: {key} was {before!r} before the interruption and is {now!r} now")
            self._largest = difference


def points_of(client: MlflowClient, run: Run, at_once: int) -> dict[tuple[str, int], Metric]:
    """Points of a run by metric and step; system metrics are counted on, not replayed.   at_once: requests at a time."""
    found: dict[tuple[str, int], Metric] = {}

    def take(key: str) -> None:
        found.update({(key, m.step): m for m in client.get_metric_history(run.info.run_id, key)})

    together(*[functools.partial(take, key) for key in run.data.metrics if not key.startswith("system/")], at_once=at_once)
    return found
