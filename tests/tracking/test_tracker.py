"""What a training loop sees of its tracker."""

import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bdh_mlflow.tracking import (
    sync,
    tracker,
)
from bdh_mlflow.tracking.records import Points
from bdh_mlflow.tracking.run import RemoteRun
from tests.tracking.tracked import HURRY, TrackedRun, entries, quiet


@pytest.mark.slow  # a sender that hangs for ever, waited for
def test_call_returns_at_once_though_nobody_answers(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is asserted: a call that waited for delivery would never return here."""

    def never(self: RemoteRun, *args: Any) -> None:
        time.sleep(3600)

    monkeypatch.setattr(RemoteRun, "attach", never)
    tracked = TrackedRun(tmp_path, patience=replace(HURRY, database_exit_s=0.5, probe_s=0.1, request_s=1.0))  # the store answers probes
    tracked.losses(*range(100))
    assert len([e for e in entries(tracked.directory.folder) if isinstance(e.record, Points)]) >= 100
    assert tracked.close() > 100
    tracked.directory.discard()


def test_tracking_tells_what_it_costs(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "SELF_INTERVAL_S", 0.0)
    tracked = TrackedRun(tmp_path)
    tracked.losses(1, 2)
    tracked.close()
    run = store.get_run(tracked.run_id)
    assert run.data.metrics["tracker/lost"] == 0
    assert 0 < run.data.metrics["tracker/enqueue_us"] < 1e6
    assert run.data.metrics["tracker/backlog"] >= 0


def test_refusal_after_training_has_begun_is_said_and_everything_is_kept(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.delete_experiment(store.create_experiment("bdh"))
    real, begun = MlflowClient.get_experiment_by_name, threading.Event()

    def late(self: MlflowClient, name: str) -> Any:
        begun.wait(10)
        return real(self, name)

    monkeypatch.setattr(MlflowClient, "get_experiment_by_name", late)
    tracked = TrackedRun(tmp_path)
    assert tracked.tracker.wait(0) is None  # the store has not answered: training begins
    begun.set()
    tracked.losses(1)
    assert tracked.close() > 0
    assert any("is deleted; restore it" in note and "everything is kept" in note for note in tracked.notes)
    experiment = store.get_experiment_by_name("bdh")
    assert experiment is not None
    store.restore_experiment(experiment.experiment_id)
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
