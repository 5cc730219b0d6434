"""The run as MLflow has it afterwards."""

import time
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bdh_mlflow import journal, tracking
from bdh_mlflow.checkpoint import Provenance, RunDirectory
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking import MlflowTracker
from tests.conftest import history
from tests.test_checkpoint import AT, state

CONFIG = TrackingConfig()


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "GATHER_S", 0.01)
    monkeypatch.setattr(tracking, "FIRST_RETRY_S", 0.01)
    monkeypatch.setattr(tracking, "LAST_RETRY_S", 0.02)


def started(store: MlflowClient, **options: Any) -> tuple[MlflowTracker, list[str]]:
    notes: list[str] = []
    client = tracking.connect(CONFIG)
    identity = tracking.attach(client, CONFIG, options.pop("continues", None))
    return MlflowTracker(client, identity, **{"mirror": True, "keep": None, "note": notes.append, **options}), notes


def test_new_run_is_made_in_the_named_experiment(store: MlflowClient) -> None:
    identity = tracking.attach(tracking.connect(CONFIG), TrackingConfig(experiment="mine", run_name="first"), None)
    run = store.get_run(identity.run_id)
    assert store.get_experiment(run.info.experiment_id).name == "mine"
    assert (run.info.run_name, run.info.status, identity.segment, identity.continued) == ("first", "RUNNING", 1, False)


def test_run_of_mlflow_run_is_used_as_it_is(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    wrapper = store.create_run(store.create_experiment("theirs")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    identity = tracking.attach(tracking.connect(CONFIG), CONFIG, None)
    assert (identity.run_id, identity.experiment) == (wrapper, "theirs")
    assert store.get_experiment_by_name("bdh") is None


def test_resumed_run_goes_on_and_the_wrapper_becomes_its_child(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, _ = started(store)
    tracker.tags({"bdh.segment": "1"})
    tracker.close("KILLED", {})
    original = tracker.identity.run_id
    wrapper = store.create_run(tracker.identity.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", wrapper)
    identity = tracking.attach(tracking.connect(CONFIG), CONFIG, original)
    assert (identity.run_id, identity.segment, identity.continued) == (original, 2, True)
    child = store.get_run(wrapper)
    assert (child.info.run_name, child.data.tags["mlflow.parentRunId"]) == ("segment 2", original)
    assert store.get_run(original).info.status == "RUNNING"
    third = store.create_run(tracker.identity.experiment_id).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", third)
    tracking.attach(tracking.connect(CONFIG), CONFIG, original)
    assert [store.get_run(r).info.status for r in (wrapper, third)] == ["KILLED", "RUNNING"]  # the second was killed hard


def test_run_of_another_server_begins_a_new_one(store: MlflowClient) -> None:
    identity = tracking.attach(tracking.connect(CONFIG), CONFIG, "0" * 32)
    assert (identity.continued, identity.segment) == (False, 1)


def test_everything_told_arrives(store: MlflowClient, tmp_path: Path) -> None:
    tracker, notes = started(store)
    run_id = tracker.identity.run_id
    tracker.params({"training.seed": 1, "training.debug": False, "tracking.run_name": None, "model.dropout": 0.1})
    tracker.tags({"a": "1", "b": "2"})
    tracker.text("hello", "samples/step_1.txt")
    tracker.dataset("text", "d" * 32, "/data", {"num_rows": 3}, "training")
    for step in range(5):
        tracker.metrics({"train/loss": 5.0 - step, "optim/lr": 0.1}, step)
    assert tracker.close("FINISHED", {"bdh.stop_reason": "finished"}) == 0
    run = store.get_run(run_id)
    assert run.data.params == {"training.seed": "1", "training.debug": "false", "tracking.run_name": "null", "model.dropout": "0.1"}
    assert {k: run.data.tags[k] for k in ("a", "b", "bdh.stop_reason")} == {"a": "1", "b": "2", "bdh.stop_reason": "finished"}
    assert history(store, run_id, "train/loss") == [(s, 5.0 - s) for s in range(5)]
    assert [f.path for f in store.list_artifacts(run_id, "samples")] == ["samples/step_1.txt"]
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("text", "d" * 32, "training")
    assert run.info.status == "FINISHED"
    assert notes == []


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_status_at_the_end_is_the_one_given(store: MlflowClient, status: str) -> None:
    tracker, _ = started(store)
    tracker.close(status, {})
    assert store.get_run(tracker.identity.run_id).info.status == status


def test_params_that_mlflow_run_has_logged_are_left_alone(store: MlflowClient) -> None:
    tracker, notes = started(store)
    store.log_param(tracker.identity.run_id, "training.learning_rate", "3e-4")
    tracker.params({"training.learning_rate": 0.0003, "training.seed": 1})
    assert tracker.close("FINISHED", {}) == 0
    assert store.get_run(tracker.identity.run_id).data.params == {"training.learning_rate": "3e-4", "training.seed": "1"}
    assert notes == []


def test_replayed_points_are_compared_and_not_logged_twice(store: MlflowClient) -> None:
    tracker, _ = started(store)
    for step in (1, 2, 3):
        tracker.metrics({"train/loss": float(step), "perf/step_ms": 5.0}, step)
    tracker.close("KILLED", {})
    run_id = tracker.identity.run_id
    again, notes = started(store, continues=run_id)
    for step, loss in ((2, 2.0), (3, 3.5), (4, 4.0)):
        again.metrics({"train/loss": loss, "perf/step_ms": 7.0}, step)
    again.close("FINISHED", {})
    assert history(store, run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert history(store, run_id, "perf/step_ms") == [(1, 5.0), (2, 5.0), (3, 5.0), (4, 7.0)]
    assert history(store, run_id, "resume/replay_max_abs_diff") == [(2, 0.0), (3, 0.5)]
    assert notes == ["step 3: train/loss was 3.0 before the interruption and is 3.5 now"]


def test_points_that_a_killed_process_did_not_send_are_delivered_by_the_next(store: MlflowClient, tmp_path: Path) -> None:
    tracker, _ = started(store)
    run_id = tracker.identity.run_id
    for step in (1, 2):
        tracker.metrics({"train/loss": float(step)}, step)
    tracker.close("RUNNING", {})
    journalled = journal.Journal()
    for step in (1, 2, 3, 4):
        journalled.append({"train/loss": float(step), "optim/lr": 0.1}, step, 1_000 + step)
    journalled.keep_in(tmp_path)
    journalled.close()
    with (tmp_path / journal.FILE_NAME).open("a") as file:
        file.write('{"at_ms": 5, "step": 5, "val')  # killed in the middle of a line
    again, notes = started(store, continues=run_id, run_dir=tmp_path)
    again.keep_journal_in(tmp_path)
    again.metrics({"train/loss": 4.0}, 4)
    again.metrics({"train/loss": 5.0}, 5)
    again.close("FINISHED", {})
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in (1, 2, 3, 4, 5)]
    assert history(store, run_id, "optim/lr") == [(s, 0.1) for s in (1, 2, 3, 4)]
    assert [m.timestamp for m in store.get_metric_history(run_id, "train/loss") if m.step == 3] == [1_003]
    assert [r.step for r in journal.read(tmp_path) if "train/loss" in r.values] == [1, 2, 3, 4, 5]
    assert notes == []


def test_mirrored_checkpoint_is_verified_before_it_is_called_the_latest(store: MlflowClient, tmp_path: Path) -> None:
    tracker, _ = started(store)
    run_id = tracker.identity.run_id
    provenance = Provenance(run_id, 1, None, False, "c", "d", {})
    directory = RunDirectory.new(tmp_path / "checkpoints", "seed: 1\n", AT)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0)):
        tracker.checkpoint(directory.save(state(step), provenance, loss))
    tracker.close("FINISHED", {})
    folder = f"checkpoints/{directory.path.name}"
    tags = store.get_run(run_id).data.tags
    assert tags["bdh.run_dir"] == directory.path.name
    assert tags["bdh.latest_checkpoint"] == f"{folder}/checkpoint_3.pt"
    assert tags["bdh.best_checkpoint"] == f"{folder}/checkpoint_2.pt"
    mirrored = Path(store.download_artifacts(run_id, folder, str(tmp_path)))
    for file in directory.path.iterdir():
        assert (mirrored / file.name).read_bytes() == file.read_bytes()


def test_retention_prunes_both_sides_by_one_rule(store: MlflowClient, tmp_path: Path) -> None:
    tracker, notes = started(store, keep=1)
    run_id = tracker.identity.run_id
    provenance = Provenance(run_id, 1, None, False, "c", "d", {})
    directory = RunDirectory.new(tmp_path / "checkpoints", "", AT)
    for step, loss in ((1, 2.0), (2, 1.0), (3, 3.0), (4, 3.0)):
        tracker.checkpoint(directory.save(state(step), provenance, loss))
    tracker.close("FINISHED", {})
    left = sorted(p.name for p in directory.path.iterdir())
    mirrored = sorted(Path(f.path).name for f in store.list_artifacts(run_id, f"checkpoints/{directory.path.name}"))
    assert notes == []
    assert left == mirrored == ["checkpoint_2.json", "checkpoint_2.pt", "checkpoint_4.json", "checkpoint_4.pt", "config.yaml"]


def test_outage_delays_points_and_loses_none(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    tracker, notes = started(store)
    real, failures = tracker._client.log_batch, iter(range(3))

    def flaky(*args: Any, **kwargs: Any) -> Any:
        if next(failures, None) is not None:
            raise MlflowException("API request failed: connection refused by http://me:secret@host/api")
        return real(*args, **kwargs)

    monkeypatch.setattr(tracker._client, "log_batch", flaky)
    started_at = time.perf_counter()
    for step in range(50):
        tracker.metrics({"train/loss": float(step)}, step)
    assert time.perf_counter() - started_at < 5  # the loop does not wait for the server
    assert tracker.close("FINISHED", {}) == 0
    assert history(store, tracker.identity.run_id, "train/loss") == [(s, float(s)) for s in range(50)]
    assert [note.partition(" does not")[0] for note in notes] == [
        f"tracking: {store.tracking_uri}",
        "tracking: delivering again",
    ]
    assert "secret" not in "".join(notes)


def test_file_that_is_gone_is_named_and_does_not_hold_up_the_rest(store: MlflowClient, tmp_path: Path) -> None:
    tracker, notes = started(store)
    directory = RunDirectory.new(tmp_path / "checkpoints", "", AT)
    saved = directory.save(state(1), Provenance(tracker.identity.run_id, 1, None, False, "c", "d", {}), None)
    saved.path.unlink()
    tracker.checkpoint(saved)
    tracker.metrics({"train/loss": 1.0}, 1)
    assert tracker.close("FINISHED", {}) == 1
    assert history(store, tracker.identity.run_id, "train/loss") == [(1, 1.0)]
    assert [n for n in notes if f"not delivered: {saved.manifest.artifact_path}" in n]
    directory.close()


def test_what_a_dead_server_did_not_take_is_counted_and_named(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "PATIENCE_AT_EXIT_S", 0.05)
    tracker, notes = started(store)

    def dead(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("refused")

    for name in ("log_batch", "set_terminated"):
        monkeypatch.setattr(tracker._client, name, dead)
    tracker.metrics({"train/loss": 1.0}, 1)
    assert tracker.close("FINISHED", {}) == 3
    assert [n for n in notes if "not delivered" in n] == [
        "tracking: not delivered: 1 points (refused)",
        "tracking: not delivered: tags (refused)",
        "tracking: not delivered: status FINISHED (refused)",
    ]


def test_unusable_store_is_an_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://me:\*\*\*@127.0.0.1:9 cannot be used") as caught:
        tracking.connect(CONFIG)
    assert "secret" not in str(caught.value)


def test_experiment_whose_artifacts_only_a_server_can_store_is_refused(store: MlflowClient) -> None:
    store.create_experiment("bdh", artifact_location="mlflow-artifacts:/1")
    with pytest.raises(TrackingError, match="made by an MLflow server, which alone can store its artifacts"):
        tracking.attach(tracking.connect(CONFIG), CONFIG, None)


def test_deleted_experiment_is_refused_with_the_command_that_restores_it(store: MlflowClient) -> None:
    experiment = store.create_experiment("bdh")
    store.delete_experiment(experiment)
    with pytest.raises(TrackingError, match=f"mlflow experiments restore -x {experiment}"):
        tracking.attach(tracking.connect(CONFIG), CONFIG, None)


def test_tracking_uri_that_mlflow_run_does_not_use_is_refused(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="Set MLFLOW_TRACKING_URI=http://elsewhere instead"):
        tracking.connect(TrackingConfig(tracking_uri="http://elsewhere"))


def test_passwords_are_masked_wherever_they_stand() -> None:
    assert tracking.masked("see s3://k:pw@h/x and https://u:p%40q@h ok") == "see s3://k:***@h/x and https://u:***@h ok"
    assert tracking.masked("no uri: a@b") == "no uri: a@b"
