"""Points that a resumed training measures again."""

import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow.text import bits_per_byte
from bdh_mlflow.tracking import (
    journal,
)
from bdh_mlflow.tracking.records import Points
from bdh_mlflow.tracking.run import RemoteRun
from tests.conftest import history
from tests.tracking.tracked import HURRY, TrackedRun


def test_replayed_points_are_compared_and_not_logged_twice(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    for step in (1, 2, 3):
        tracked.tracker.metrics({"train/loss": float(step), "perf/step_ms": 5.0}, step)
    tracked.directory.make()
    tracked.close("KILLED")
    again = TrackedRun(tmp_path, path=tracked.directory.path, number=2)
    for step, loss in ((2, 2.0), (3, 3.5), (4, 4.0)):
        again.tracker.metrics({"train/loss": loss, "perf/step_ms": 7.0}, step)
    again.close()
    run_id = tracked.run_id
    assert history(store, run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(store, run_id, "perf/step_ms") == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 7.0)]
    assert history(store, run_id, "resume/replay_max_abs_diff") == [(2, 0.0), (3, 0.5)]
    assert again.notes == ["step 3: train/loss was 3.0 before the interruption and is 3.5 now"]


def test_mean_over_another_span_is_no_difference(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.losses(1, 2)
    tracked.directory.make()
    tracked.close("KILLED")
    again = TrackedRun(tmp_path, path=tracked.directory.path, number=2, audit=["val/loss"])
    again.losses(2, of=lambda step: 9.0)
    again.close()
    assert again.notes == []
    assert history(store, tracked.run_id, "resume/replay_max_abs_diff") == [(2, 0.0)]


def test_replayed_evaluation_of_a_checkpoint_is_there_once_though_files_are_quicker_than_points(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.silence()
    tracked.directory.make()
    tracked.evaluate(1, 2.0)
    tracked.kill()
    time.sleep(0.01)  # of another time stamp
    log = RemoteRun.log

    def late(self: RemoteRun, batch: list[journal.Entry]) -> None:
        time.sleep(0.5 if isinstance(batch[0].record, Points) else 0.0)
        log(self, batch)

    monkeypatch.setattr(RemoteRun, "log", late)
    again = TrackedRun(tmp_path, path=tracked.directory.path, patience=replace(HURRY, database_exit_s=30.0), number=2)
    again.save(1, 2.0)
    assert again.close() == 0
    for key, value in (("val/loss", 2.0), ("val/bpb", bits_per_byte(2.0, 1.0))):
        assert history(store, run_id, key) == [(1, value)]
    (model,) = store.search_logged_models([store.get_run(run_id).info.experiment_id], f"source_run_id = '{run_id}'")
    assert {(m.key, m.value) for m in model.metrics or []} == {("val/loss", 2.0), ("val/bpb", bits_per_byte(2.0, 1.0))}
