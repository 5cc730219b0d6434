"""Delivery after a training run has ended."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking import (
    mirror,
    run,
    segments,
    sync,
)
from bdh_mlflow.tracking.artifacts import Artifacts
from tests.conftest import history
from tests.tracking.tracked import HURRY, TrackedRun, quiet

IMPATIENT = replace(HURRY, database_exit_s=0.3)


def test_second_sync_delivers_nothing(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.losses(1, 2)
    run_id = tracked.run_id
    tracked.save(2, 1.0)
    tracked.kill()
    first = sync.sync(tracked.directory.path, None, quiet, HURRY)
    assert first.left == 0
    run = store.get_run(run_id)
    assert (run.info.status, run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_step"]) == ("KILLED", "killed", "2")
    assert sync.sync(tracked.directory.path, None, quiet, HURRY).words.startswith("0 records delivered, 0 left, 0 refused")
    assert store.get_run(run_id).to_dictionary() == run.to_dictionary()


def test_sync_leaves_a_running_training_alone(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.losses(1)
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).words == "its training is running, and delivers by itself"
    tracked.close()


def test_what_a_dead_server_did_not_take_is_counted_kept_and_delivered_by_sync(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path, patience=IMPATIENT)
    run_id = tracked.run_id

    def dead(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("refused")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "log_batch", dead)
        broken.setattr(Artifacts, "put_text", dead)
        tracked.losses(1, 2)
        assert tracked.close() >= 3
    assert store.get_run(run_id).info.status == "RUNNING"
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
    assert history(store, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert store.get_run(run_id).info.status == "FINISHED"


def test_sync_without_the_credentials_says_what_to_set(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path, tracking_uri="http://me:***@host")
    tracked.kill()
    with pytest.raises(TrackingError, match=r"was to go to http://me:\*\*\*@host: set MLFLOW_TRACKING_URI"):
        sync.sync(tracked.directory.folder, None, quiet, HURRY)
    assert sync.sync(tracked.directory.folder, store.tracking_uri, quiet, HURRY).left == 0


@pytest.mark.slow  # an upload that takes longer than the patience
def test_large_file_is_waited_for_as_long_as_the_store_answers(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path)
    assert tracked.run_id
    tracked.silence()
    saved = tracked.save(1)
    tracked.kill()
    real = mirror.link_or_copy

    def slow(source: Path, target: Path) -> None:
        time.sleep(1.5)
        real(source, target)

    monkeypatch.setattr(mirror, "link_or_copy", slow)
    assert sync.sync(tracked.directory.path, None, quiet, replace(HURRY, database_exit_s=0.3, probe_s=0.05)).left == 0
    assert store.get_run(tracked.run_id).data.tags["bdh.latest_checkpoint"] == saved.manifest.artifact_path


def test_leftovers_that_go_to_another_store_are_a_run_there_and_not_lost(store: MlflowClient, empty_store: Path, tmp_path: Path) -> None:
    shutil.copy(empty_store, tmp_path / "other.db")
    tracked = TrackedRun(tmp_path)
    assert tracked.run_id
    tracked.losses(1, 2)
    tracked.kill()
    other = f"sqlite:///{tmp_path / 'other.db'}"
    assert sync.sync(tracked.directory.folder, other, quiet, HURRY).left == 0
    elsewhere = MlflowClient(other)
    experiment = elsewhere.get_experiment_by_name("bdh")
    assert experiment is not None
    (run,) = elsewhere.search_runs([experiment.experiment_id])
    assert history(elsewhere, run.info.run_id, "train/loss") == [(1, 1.0), (2, 2.0)]  # the whole, also what the first store has
    assert run.info.status == "KILLED"


def test_late_sync_of_one_machine_leaves_the_run_that_another_has_gone_on_with(store: MlflowClient, tmp_path: Path) -> None:
    first = TrackedRun(tmp_path / "a")
    run_id = first.run_id
    first.losses(1)
    time.sleep(0.3)
    first.losses(2, 3)
    first.kill()
    second = TrackedRun(tmp_path / "b", number=2, continues=run_id, host="b")
    assert second.run_id == run_id
    second.losses(2, 3, 4)
    time.sleep(0.3)
    assert sync.sync(first.directory.folder, None, quiet, HURRY).left == 0
    run = store.get_run(run_id)
    assert (run.info.status, run.data.tags["bdh.segment"]) == ("RUNNING", "2")
    assert "bdh.stop_reason" not in run.data.tags
    assert second.close() == 0
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in (1, 2, 3, 4)]
    rows = json.loads(Path(store.download_artifacts(run_id, segments.FILE_NAME, str(tmp_path))).read_text())
    assert [row["segment"] for row in rows] == [1, 2]


def test_sync_from_inside_a_run_directory_deletes_nothing(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.save(1)
    tracked.close()
    renamed = tracked.directory.path.rename(tmp_path / "best_run")
    monkeypatch.chdir(renamed)
    assert sync.sync(Path(), None, quiet, HURRY).left == 0
    assert (renamed / "checkpoint_1.pt").is_file()


def test_checkpoint_of_a_directory_that_was_moved_is_mirrored_from_where_it_is(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    saved = tracked.save(1)
    tracked.kill()
    moved = tracked.directory.path.rename(tmp_path / tracked.directory.path.name)
    assert sync.sync(moved, None, quiet, HURRY).left == 0
    assert store.get_run(run_id).data.tags["bdh.latest_checkpoint"] == saved.manifest.artifact_path


def test_end_that_the_store_was_not_told_is_left_to_do(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.silence()
    tracked.losses(1)
    tracked.kill()

    def dead(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("refused")

    with monkeypatch.context() as broken:
        broken.setattr(run, "set_run", dead)
        assert sync.sync(tracked.directory.folder, None, quiet, IMPATIENT).left == 1
    assert tracked.directory.folder.is_dir()
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
    assert store.get_run(run_id).info.status == "KILLED"
    assert not tracked.directory.folder.exists()


def test_points_of_a_deleted_run_wait_until_it_is_restored(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.silence()
    tracked.losses(1)
    tracked.kill()
    store.delete_run(run_id)
    notes: list[str] = []
    assert sync.sync(tracked.directory.folder, None, notes.append, HURRY).left > 0
    assert any(f"mlflow runs restore --run-id {run_id}" in note for note in notes)
    store.restore_run(run_id)
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
    experiment = store.get_experiment_by_name("bdh")
    assert experiment is not None
    assert len(store.search_runs([experiment.experiment_id])) == 1
