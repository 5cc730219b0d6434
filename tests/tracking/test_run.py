"""The MLflow run that training logs to."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking import (
    journal,
)
from tests.tracking.tracked import TrackedRun


def test_new_run_is_made_in_the_named_experiment(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, experiment="mine", run_name="first")
    run = store.get_run(tracked.run_id)
    assert store.get_experiment(run.info.experiment_id).name == "mine"
    assert (run.info.run_name, run.info.status, run.data.tags["bdh.segment"]) == ("first", "RUNNING", "1")
    assert tracked.close() == 0


def test_run_of_mlflow_run_is_used_as_it_is(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = store.create_run(store.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    tracked = TrackedRun(tmp_path)
    assert tracked.run_id == wrapper
    assert tracked.tracker.identity is not None
    assert (tracked.tracker.identity.experiment, tracked.tracker.identity.continued) == ("theirs", False)
    assert store.get_experiment_by_name("bdh") is None
    tracked.close()


def test_resumed_run_goes_on_and_the_wrapper_becomes_its_child(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path)
    original = tracked.run_id
    tracked.close("KILLED")
    experiment_id = store.get_run(original).info.experiment_id
    wrappers = []
    for number in (2, 3):
        wrappers.append(store.create_run(experiment_id).info.run_id)
        monkeypatch.setenv("MLFLOW_RUN_ID", wrappers[-1])
        again = TrackedRun(tmp_path, number=number, continues=original)
        assert again.run_id == original
        assert again.tracker.identity is not None
        assert again.tracker.identity.continued
        child = store.get_run(wrappers[-1])
        assert (child.info.run_name, child.data.tags["mlflow.parentRunId"]) == (f"segment {number}", original)
        assert store.get_run(original).info.status == "RUNNING"
        again.close("KILLED")
    assert [store.get_run(r).info.status for r in wrappers] == [
        "KILLED",
        "RUNNING",
    ]  # the first was killed hard; `mlflow run` ends the last


def test_run_of_another_server_begins_a_new_one(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, continues="0" * 32, number=2)
    assert tracked.run_id != "0" * 32
    tracked.close()


def test_run_is_made_once_though_the_answer_was_lost(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, lost = MlflowClient.create_run, iter([True, True])

    def silent(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        run = real(self, *args, **kwargs)
        if next(lost, False):
            raise ConnectionError("reset by peer")
        return run

    monkeypatch.setattr(MlflowClient, "create_run", silent)
    tracked = TrackedRun(tmp_path)
    assert tracked.run_id
    tracked.close()
    experiment = store.get_experiment_by_name("bdh")
    assert experiment is not None
    assert len(store.search_runs([experiment.experiment_id])) == 1


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_status_at_the_end_is_the_one_given(store: MlflowClient, tmp_path: Path, status: str) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.close(status)
    assert store.get_run(run_id).info.status == status


def test_params_that_mlflow_run_has_logged_are_left_alone(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = store.create_run(store.create_experiment("theirs")).info.run_id
    store.log_param(wrapper, "training.learning_rate", "3e-4")
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    tracked = TrackedRun(tmp_path)
    tracked.tracker.params({"training.learning_rate": 0.0003, "training.seed": 1})
    assert tracked.close() == 0
    assert store.get_run(tracked.run_id).data.params == {"training.learning_rate": "3e-4", "training.seed": "1"}
    assert tracked.notes == []


def test_experiment_name_that_the_store_refuses_ends_the_start_and_keeps_the_journal_whole(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, experiment="x" * 600)
    with pytest.raises(TrackingError, match="500"):
        tracked.tracker.wait(10)
    assert tracked.close() > 0
    assert (journal.delivered(tracked.directory.folder) or journal.Delivered()).points == 0
