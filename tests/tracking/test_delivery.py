"""What a tracker records, as MLflow has it afterwards."""

import contextlib
import json
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.text import Sample, bits_per_byte
from bdh_mlflow.tracking import (
    journal,
    mirror,
    segments,
    sync,
    tracker,
)
from bdh_mlflow.tracking.records import Points
from bdh_mlflow.tracking.run import RemoteRun
from bdh_mlflow.tracking.store import connect, probe_store
from bdh_mlflow.tracking.tracker import DatasetFacts
from tests.conftest import history
from tests.tracking.tracked import HURRY, TrackedRun, entries, quiet, segment

CONFIG = TrackingConfig()


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


def test_everything_told_arrives(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracker = tracked.tracker
    tracker.params({"training.seed": 1, "training.debug": False, "tracking.run_name": None, "model.dropout": 0.1})
    tracker.tags({"a": "1", "b": "http://me:secret@host"})
    tracker.text("hello", "samples/step_1.txt")
    tracker.dataset(DatasetFacts(name="text", digest="d" * 32, folder="/data", profile={"num_rows": 3}, context="training"))
    for step in range(5):
        tracker.metrics({"train/loss": 5.0 - step, "optim/lr": 0.1}, step)
    run_id = tracked.run_id
    assert tracked.close() == 0
    run = store.get_run(run_id)
    assert run.data.params == {"training.seed": "1", "training.debug": "false", "tracking.run_name": "null", "model.dropout": "0.1"}
    assert {k: run.data.tags[k] for k in ("a", "b", "bdh.stop_reason")} == {
        "a": "1",
        "b": "http://me:***@host",
        "bdh.stop_reason": "finished",
    }
    assert history(store, run_id, "train/loss") == [(s, 5.0 - s) for s in range(5)]
    assert [f.path for f in store.list_artifacts(run_id, "samples")] == ["samples/step_1.txt"]
    assert run.inputs is not None
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest, dataset.tags[0].value) == ("text", "d" * 32, "training")
    assert run.info.status == "FINISHED"
    assert tracked.notes == []
    assert "secret" not in (tracked.directory.folder / journal.FILE_NAME).read_text()


def test_journal_of_an_earlier_version_keeps_its_sample(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    with (tracked.directory.folder / journal.FILE_NAME).open("a") as file:
        row = {"step": 1, "prompt": "a", "written": "b"}
        file.write(json.dumps({"kind": "text", "at_ms": 1, "artifact": "samples/step_1.txt", "text": "t", "row": row}) + "\n")
    tracked.tracker.samples([Sample("c", "d"), Sample("e", "f")], 2)
    run_id = tracked.run_id
    tracked.close()
    table = json.loads(Path(store.download_artifacts(run_id, "samples.json")).read_text())
    assert table == {"columns": ["step", "prompt", "written"], "data": [[1, "a", "b"], [2, "c", "d"], [2, "e", "f"]]}


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_status_at_the_end_is_the_one_given(store: MlflowClient, tmp_path: Path, status: str) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.close(status)
    assert store.get_run(run_id).info.status == status


def test_params_that_mlflow_run_has_logged_are_left_alone(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    store.log_param(tracked.run_id, "training.learning_rate", "3e-4")
    tracked.tracker.params({"training.learning_rate": 0.0003, "training.seed": 1})
    assert tracked.close() == 0
    assert store.get_run(tracked.run_id).data.params == {"training.learning_rate": "3e-4", "training.seed": "1"}
    assert tracked.notes == []


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


def test_points_that_a_killed_process_did_not_send_are_delivered_by_the_next(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.silence()
    tracked.losses(1, 2)
    tracked.directory.make()
    tracked.kill()
    with (tracked.directory.path / journal.FILE_NAME).open("a") as file:
        file.write('{"kind":"points","at_ms":1003,"values":{"train/loss":3.0},"step":3}\n{"kind":"points","at_ms":5,"val')
    again = TrackedRun(tmp_path, path=tracked.directory.path, number=2)
    again.losses(2, 3, 4)
    assert again.close() == 0
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in (1, 2, 3, 4)]
    assert [m.timestamp for m in store.get_metric_history(run_id, "train/loss") if m.step == 3] == [1003]
    assert again.notes == []


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
    for key, value in (("val/loss", 2.0), ("val/bpb", bits_per_byte(2.0))):
        assert history(store, run_id, key) == [(1, value)]
    (model,) = store.search_logged_models([store.get_run(run_id).info.experiment_id], f"source_run_id = '{run_id}'")
    assert {(m.key, m.value) for m in model.metrics or []} == {("val/loss", 2.0), ("val/bpb", bits_per_byte(2.0))}


def test_batch_that_was_sent_but_not_acknowledged_is_there_once(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.losses(*range(1, 20))
    tracked.directory.make()
    tracked.close()
    acknowledged = tracked.directory.path / journal.STATE_NAME
    kept = json.loads(acknowledged.read_text())
    acknowledged.write_text(json.dumps({**kept, "points": 0, "files": 0, "segment": 0}))
    assert sync.sync(tracked.directory.path, None, quiet, HURRY).left == 0
    assert history(store, kept["run_id"], "train/loss") == [(s, float(s)) for s in range(1, 20)]


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


def flaky(monkeypatch: pytest.MonkeyPatch, name: str, errors: list[Exception]) -> None:
    """The next calls of a client's method fail with these errors, one each."""
    real, left = getattr(MlflowClient, name), iter(errors)

    def wrapped(self: MlflowClient, *args: Any, **kwargs: Any) -> Any:
        if error := next(left, None):
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, name, wrapped)


def test_outage_delays_points_and_loses_none(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    flaky(monkeypatch, "log_batch", [MlflowException("API request failed: connection refused by http://me:secret@host/api")] * 3)
    tracked.losses(*range(50))
    assert tracked.close() == 0
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in range(50)]
    assert [note.partition(" does not")[0] for note in tracked.notes] == [f"tracking: {store.tracking_uri}", "tracking: delivering again"]
    assert "secret" not in "".join(tracked.notes)


def test_one_bad_point_does_not_spoil_its_neighbours(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.losses(1)
    tracked.tracker.metrics({"no % name": 1.0}, 2)
    tracked.losses(3)
    assert tracked.close() == 0
    assert history(store, tracked.run_id, "train/loss") == [(1, 1.0), (3, 3.0)]
    (note,) = tracked.notes
    assert note.startswith("tracking: no % name at step 2 was refused for good (")
    assert (journal.delivered(tracked.directory.folder) or journal.Delivered()).lost == 1


def test_refused_upload_does_not_hold_up_others_and_is_offered_again(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path)
    answer = requests.Response()
    answer.status_code = 413
    refusal = requests.HTTPError("413 Request Entity Too Large", response=answer)
    run_id = tracked.run_id
    time.sleep(0.3)  # segments.json is there
    real, refusals = MlflowClient.log_text, iter([refusal, refusal])

    def picky(self: MlflowClient, run_id: str, text: str, artifact: str) -> None:
        if artifact == "large.txt" and (error := next(refusals, None)):
            raise error
        real(self, run_id, text, artifact)

    monkeypatch.setattr(MlflowClient, "log_text", picky)
    tracked.tracker.text("large", "large.txt")
    time.sleep(0.3)
    tracked.tracker.text("small", "small.txt")
    assert tracked.close() == 1
    assert "large.txt was refused and stays here" in tracked.notes[0]
    assert {f.path for f in store.list_artifacts(run_id)} >= {"small.txt", segments.FILE_NAME}
    assert "large.txt" not in {f.path for f in store.list_artifacts(run_id)}
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
    assert "large.txt" in {f.path for f in store.list_artifacts(run_id)}


def test_what_a_dead_server_did_not_take_is_counted_kept_and_delivered_by_sync(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id

    def dead(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("refused")

    with monkeypatch.context() as broken:
        for name in ("log_batch", "set_terminated", "log_text"):
            broken.setattr(MlflowClient, name, dead)
        tracked.losses(1, 2)
        started = time.monotonic()
        assert tracked.close() >= 3
        assert time.monotonic() - started < 5
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


@pytest.mark.slow  # a sender that hangs for ever, waited for
def test_call_returns_at_once_though_nobody_answers(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No time is asserted: a call that waited for delivery would never return here."""

    def never(self: RemoteRun, *args: Any) -> None:
        time.sleep(3600)

    monkeypatch.setattr(RemoteRun, "attach", never)
    tracked = TrackedRun(tmp_path)
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


def test_unusable_store_is_an_error_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:secret@127.0.0.1:9")
    with pytest.raises(TrackingError, match=r"http://me:\*\*\*@127.0.0.1:9 cannot be used") as caught:
        connect(CONFIG)
    assert "secret" not in str(caught.value)
    assert not probe_store(CONFIG, None).reachable


def test_database_that_cannot_be_opened_is_refused_at_the_door(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(TrackingError, match="cannot be used"):
        probe_store(TrackingConfig(tracking_uri=f"sqlite:///{tmp_path}/file/m.db"), None)


def test_experiment_whose_artifacts_only_a_server_can_store_is_refused(store: MlflowClient) -> None:
    store.create_experiment("bdh", artifact_location="mlflow-artifacts:/1")
    with pytest.raises(TrackingError, match="made by an MLflow server, which alone can store its artifacts"):
        probe_store(CONFIG, None)


def test_deleted_experiment_is_refused_with_the_command_that_restores_it(store: MlflowClient) -> None:
    experiment = store.create_experiment("bdh")
    store.delete_experiment(experiment)
    with pytest.raises(TrackingError, match=f"mlflow experiments restore -x {experiment}"):
        probe_store(CONFIG, None)


def test_tracking_uri_that_mlflow_run_does_not_use_is_refused(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    with pytest.raises(TrackingError, match="Set MLFLOW_TRACKING_URI=http://elsewhere instead"):
        connect(TrackingConfig(tracking_uri="http://elsewhere"))


def broken_off(tracked: TrackedRun) -> None:
    """The trainer ends with its last word in the journal, but nothing of it is delivered."""
    tracked.silence()
    assert tracked.close("KILLED") > 0


def test_resume_after_an_end_that_was_not_delivered_goes_on_live(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.losses(1, 2)
    tracked.directory.make()
    broken_off(tracked)
    again = TrackedRun(tmp_path, path=tracked.directory.path, number=2)
    assert again.run_id == run_id
    again.losses(3)
    again.save(3)
    end = time.monotonic() + 10
    while (
        not ("bdh.latest_checkpoint" in store.get_run(run_id).data.tags and len(history(store, run_id, "train/loss")) == 3)
        and time.monotonic() < end
    ):
        time.sleep(0.02)
    assert history(store, run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]  # while it trains
    assert store.get_run(run_id).info.status == "RUNNING"
    assert again.close() == 0
    assert store.get_run(run_id).info.status == "FINISHED"


@pytest.mark.slow  # a race at exit, waited for
def test_word_of_success_that_comes_after_patience_is_over_is_not_acknowledged(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(threading.enumerate())  # of earlier tests, which may never end
    tracked = TrackedRun(tmp_path, patience=replace(HURRY, database_exit_s=0.1, probe_s=3600))
    assert tracked.run_id
    go_on = threading.Event()
    monkeypatch.setattr(RemoteRun, "log", lambda *args: go_on.wait(10))
    tracked.losses(1)
    assert tracked.close() > 0
    before = journal.delivered(tracked.directory.folder)
    go_on.set()
    for thread in set(threading.enumerate()) - others:
        if thread.name in ("points", "files"):
            thread.join(10)
    assert journal.delivered(tracked.directory.folder) == before


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


def test_one_bad_tag_does_not_spoil_the_others_of_its_record(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.tracker.tags({"good": "1", "no % name": "2", "also good": "3"})
    assert tracked.close() == 0
    tags = store.get_run(tracked.run_id).data.tags
    assert (tags["good"], tags["also good"]) == ("1", "3")
    assert [note.partition(" (")[0] for note in tracked.notes] == ["tracking: tags no % name was refused for good"]


def test_refusal_after_training_has_begun_is_said_and_everything_is_kept(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.delete_experiment(store.create_experiment("bdh"))
    tracked = TrackedRun(tmp_path)
    with contextlib.suppress(TrackingError):
        tracked.tracker.wait(0)  # the training has begun
    tracked.losses(1)
    assert tracked.close() > 0
    assert any("is deleted; restore it" in note and "everything is kept" in note for note in tracked.notes)
    experiment = store.get_experiment_by_name("bdh")
    assert experiment is not None
    store.restore_experiment(experiment.experiment_id)
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0


def test_what_the_next_process_appends_while_the_old_sender_ends_is_not_acknowledged_by_it(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.losses(1)
    tracked.directory.make()
    real = journal.JournalReader.is_training

    def meanwhile(self: journal.JournalReader) -> bool:
        if threading.current_thread().name == "points":  # about to mark the run killed
            again.append(segment(number=2))
            again.append(Points(values={"train/loss": 2.0}, step=2))
        return real(self)

    again = journal.Journal(tracked.directory.path)
    monkeypatch.setattr(journal.JournalReader, "is_training", meanwhile)
    tracked.sender.close()
    tracked.directory.close()
    monkeypatch.undo()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.tracking_uri)
    again.close()
    assert history(store, run_id, "train/loss") == [(1, 1.0)]
    assert sync.sync(tracked.directory.path, None, quiet, HURRY).left == 0
    assert history(store, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]
    assert store.get_run(run_id).data.tags["bdh.segment"] == "2"


def test_end_that_the_store_was_not_told_is_left_to_do(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    tracked.silence()
    tracked.losses(1)
    tracked.kill()

    def dead(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("refused")

    with monkeypatch.context() as broken:
        broken.setattr(MlflowClient, "set_terminated", dead)
        assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 1
    assert tracked.directory.folder.is_dir()
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
    assert store.get_run(run_id).info.status == "KILLED"
    assert not tracked.directory.folder.exists()


def test_experiment_name_that_the_store_refuses_ends_the_start_and_keeps_the_journal_whole(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, experiment="x" * 600)
    with pytest.raises(TrackingError, match="500"):
        tracked.tracker.wait(10)
    assert tracked.close() > 0
    assert (journal.delivered(tracked.directory.folder) or journal.Delivered()).points == 0


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


def test_segments_that_were_refused_first_do_not_replace_what_came_later(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = requests.Response()
    answer.status_code = 403
    flaky(monkeypatch, "log_text", [requests.HTTPError("403", response=answer)])
    tracked = TrackedRun(tmp_path)
    tracked.losses(1)
    assert tracked.close() == 0
    rows = json.loads(Path(store.download_artifacts(tracked.run_id, segments.FILE_NAME, str(tmp_path))).read_text())
    assert [row["reason"] for row in rows] == ["finished"]
    assert any("segment was refused" in note for note in tracked.notes)
