"""The rows of segments.json."""

import json
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow.tracking import (
    segments,
)
from tests.tracking.tracked import TrackedRun


def test_segments_tell_who_worked_on_the_run_and_how_each_ended(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, host="first")
    tracked.losses(1, 2, 3)
    tracked.directory.make()
    run_id = tracked.run_id
    tracked.kill()
    later = int(time.time() * 1000) + 5000
    again = TrackedRun(tmp_path, path=tracked.directory.path, number=2, host="second", first_step=2, started_at_ms=later)
    again.losses(3, 4)
    again.close()
    rows = json.loads(Path(store.download_artifacts(run_id, segments.FILE_NAME, str(tmp_path))).read_text())
    picked = [(r["segment"], r["host"], r["first_step"], r["last_step"], r["reason"]) for r in rows]
    assert picked == [(1, "first", 0, 3, "killed"), (2, "second", 2, 4, "finished")]
    assert rows[1]["downtime_s"] == pytest.approx(5, abs=2)
    assert "mlflow_run" in rows[0]


def test_segments_of_another_machine_are_kept(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, host="elsewhere")
    run_id = tracked.run_id
    tracked.close("KILLED")
    here = TrackedRun(tmp_path / "here", number=2, continues=run_id, host="here")
    here.close()
    rows = json.loads(Path(store.download_artifacts(run_id, segments.FILE_NAME, str(tmp_path))).read_text())
    assert [(r["segment"], r["host"]) for r in rows] == [(1, "elsewhere"), (2, "here")]
