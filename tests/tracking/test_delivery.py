"""What a tracker records, as MLflow has it afterwards."""

import json
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos import databricks_pb2

from bdh_mlflow.errors import TrackingError
from bdh_mlflow.text import Sample
from bdh_mlflow.tracking import (
    journal,
    segments,
    sync,
)
from bdh_mlflow.tracking.artifacts import Artifacts
from bdh_mlflow.tracking.delivery import Delivery
from bdh_mlflow.tracking.records import Points
from bdh_mlflow.tracking.run import RemoteRun
from bdh_mlflow.tracking.tracker import DatasetFacts, Tracker
from tests.conftest import history, thread_sender, wait_for
from tests.tracking.tracked import HURRY, TrackedRun, quiet, segment


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


def flaky(monkeypatch: pytest.MonkeyPatch, owner: type, name: str, errors: list[Exception]) -> None:
    """The next calls of a method fail with these errors, one each."""
    real, left = getattr(owner, name), iter(errors)

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if error := next(left, None):
            raise error
        return real(self, *args, **kwargs)

    monkeypatch.setattr(owner, name, wrapped)


def test_outage_delays_points_and_loses_none(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    flaky(
        monkeypatch, MlflowClient, "log_batch", [MlflowException("API request failed: connection refused by http://me:secret@host/api")] * 3
    )
    tracked.losses(*range(50))
    assert tracked.close() == 0
    assert history(store, run_id, "train/loss") == [(s, float(s)) for s in range(50)]
    assert [note.partition(" does not")[0] for note in tracked.notes] == [f"tracking: {store.tracking_uri}", "tracking: delivering again"]
    assert "secret" not in "".join(tracked.notes)


def test_request_that_fails_once_is_repeated_without_a_word(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tracked = TrackedRun(tmp_path)
    run_id = tracked.run_id
    flaky(monkeypatch, MlflowClient, "log_batch", [MlflowException("API request failed: the remote end closed the connection")])
    tracked.losses(1)
    assert tracked.close() == 0
    assert history(store, run_id, "train/loss") == [(1, 1.0)]
    assert tracked.notes == []


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
    real, refusals = Artifacts.put_text, iter([refusal, refusal])

    def picky(self: Artifacts, text: str, path: str) -> None:
        if path == "large.txt" and (error := next(refusals, None)):
            raise error
        real(self, text, path)

    monkeypatch.setattr(Artifacts, "put_text", picky)
    tracked.tracker.text("large", "large.txt")
    time.sleep(0.3)
    tracked.tracker.text("small", "small.txt")
    assert tracked.close() == 1
    assert "large.txt was refused and stays here" in tracked.notes[0]
    assert {f.path for f in store.list_artifacts(run_id)} >= {"small.txt", segments.FILE_NAME}
    assert "large.txt" not in {f.path for f in store.list_artifacts(run_id)}
    assert sync.sync(tracked.directory.folder, None, quiet, HURRY).left == 0
    assert "large.txt" in {f.path for f in store.list_artifacts(run_id)}


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
    wait_for(lambda: "bdh.latest_checkpoint" in store.get_run(run_id).data.tags and len(history(store, run_id, "train/loss")) == 3, 10)
    assert history(store, run_id, "train/loss") == [(1, 1.0), (2, 2.0), (3, 3.0)]  # while it trains
    assert store.get_run(run_id).info.status == "RUNNING"
    assert again.close() == 0
    assert store.get_run(run_id).info.status == "FINISHED"


def orphaned(tracked: TrackedRun, uri: str, appender: int) -> threading.Thread:
    """A delivery as a sender makes it once its trainer has closed its pipe without a word."""
    tracked.silence()
    delivery = Delivery(tracked.directory.folder, uri, lambda message: None, HURRY, appender)
    delivery.close(orphaned=True)
    thread = threading.Thread(target=delivery.run)
    thread.start()
    return thread


def test_process_that_is_killed_and_keeps_its_lock_for_a_while_was_killed(store: MlflowClient, tmp_path: Path) -> None:
    """An ending process closes its pipes before its locks, one with GPUs seconds before: the run stayed RUNNING."""
    tracked = TrackedRun(tmp_path, pid=7)
    run_id = tracked.run_id
    tracked.losses(1, 2)
    delivery = orphaned(tracked, store.tracking_uri, 7)
    delivery.join(1)
    assert delivery.is_alive(), "it waits"
    assert store.get_run(run_id).info.status == "RUNNING"
    tracked.directory.close()
    delivery.join(60)
    run = store.get_run(run_id)
    assert (run.info.status, run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_step"]) == ("KILLED", "killed", "2")


def test_delivery_of_a_killed_process_makes_way_for_the_one_that_goes_on(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path, pid=7)
    run_id = tracked.run_id
    tracked.losses(1)
    of_another = orphaned(tracked, store.tracking_uri, 6)  # the one that goes on is here when it looks
    of_another.join(10)
    assert not of_another.is_alive()
    delivery = orphaned(tracked, store.tracking_uri, 7)
    again = Tracker(lambda: tracked.directory.folder, store.tracking_uri, segment(number=2, pid=8), quiet, thread_sender)
    delivery.join(10)
    assert not delivery.is_alive()
    identity = again.wait(15)
    assert identity is not None
    assert (identity.run_id, store.get_run(run_id).info.status) == (run_id, "RUNNING")
    assert again.close("FINISHED", {}, 2) == 0
    tracked.directory.close()


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


def test_one_bad_tag_does_not_spoil_the_others_of_its_record(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    tracked.tracker.tags({"good": "1", "no % name": "2", "also good": "3"})
    assert tracked.close() == 0
    tags = store.get_run(tracked.run_id).data.tags
    assert (tags["good"], tags["also good"]) == ("1", "3")
    assert [note.partition(" (")[0] for note in tracked.notes] == ["tracking: tags no % name was refused for good"]


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


def test_segments_that_were_refused_first_do_not_replace_what_came_later(
    store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = requests.Response()
    answer.status_code = 403
    flaky(monkeypatch, Artifacts, "put_text", [requests.HTTPError("403", response=answer)] * 2)  # with its neighbours, and alone
    tracked = TrackedRun(tmp_path)
    tracked.losses(1)
    assert tracked.close() == 0
    rows = json.loads(Path(store.download_artifacts(tracked.run_id, segments.FILE_NAME, str(tmp_path))).read_text())
    assert [row["reason"] for row in rows] == ["finished"]
    assert any("segment was refused" in note for note in tracked.notes)


def test_text_that_no_store_takes_is_made_storable_at_the_door(store: MlflowClient, tmp_path: Path) -> None:
    """A name with bytes that are not UTF-8 was taken for an outage: everything behind it waited for ever."""
    tracked = TrackedRun(tmp_path, user="m\udce9", host="h\0")
    tracked.tracker.tags({"bdh.command": "train --config caf\udce9.yaml", "long": "x" * 9000})
    tracked.tracker.params({"dataset.parquet_dir": "/data/caf\udce9", "nul": "a\0b"})
    tracked.tracker.text("caf\udce9\n", "config.yaml")
    tracked.tracker.samples([Sample("\udce9", "\0")], 1)
    tracked.losses(1, 2)
    run_id = tracked.run_id
    assert (tracked.close(), tracked.notes) == (0, [])
    run = store.get_run(run_id)
    assert run.data.tags["bdh.command"] == "train --config caf\\xe9.yaml"
    assert run.data.tags["long"] == "x" * 7978 + "... (9,000 characters)"
    assert run.data.params == {"dataset.parquet_dir": "/data/caf\\xe9", "nul": "a\u2400b"}
    assert [step for step, _ in history(store, run_id, "train/loss")] == [1, 2]
    assert run.info.status == "FINISHED"


def test_record_of_an_earlier_version_that_no_store_takes_is_lost_alone(store: MlflowClient, tmp_path: Path) -> None:
    tracked = TrackedRun(tmp_path)
    with (tracked.directory.folder / journal.FILE_NAME).open("a") as file:
        file.write(json.dumps({"kind": "tags", "at_ms": 1, "tags": {"good": "yes", "bad": "caf\udce9"}}) + "\n")
    tracked.losses(1, 2)
    run_id = tracked.run_id
    assert tracked.close() == 0
    assert [note for note in tracked.notes if "tags bad was refused for good" in note] == tracked.notes
    assert {key: value for key, value in store.get_run(run_id).data.tags.items() if key in ("good", "bad")} == {"good": "yes"}
    assert [step for step, _ in history(store, run_id, "train/loss")] == [1, 2]


def test_artifact_root_that_cannot_exist_holds_up_nothing_else_and_is_told_once(store: MlflowClient, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    store.create_experiment("bdh", artifact_location=str(tmp_path / "file" / "artifacts"))
    tracked = TrackedRun(tmp_path)
    for step in (1, 2):
        tracked.tracker.text("t", f"samples/step_{step}.txt")
        tracked.save(step, 1.0)
    tracked.losses(1, 2)
    run_id = tracked.run_id
    assert tracked.close() > 0, "the files wait for `sync`"
    assert [note for note in tracked.notes if "was refused and stays here, `sync` offers it again" in note] == tracked.notes[:-1]
    assert len(tracked.notes) < 7, "a reason is told once"
    assert "files were refused and stay here: " in tracked.notes[-1]
    run = store.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert [step for step, _ in history(store, run_id, "train/loss")] == [1, 2]
    (tmp_path / "file").unlink()
    done = sync.sync(tracked.directory.folder, None, quiet, HURRY)
    assert done.left == 0, done
    assert store.get_run(run_id).data.tags["bdh.latest_checkpoint"].endswith("checkpoint_2.pt")


def test_user_who_may_not_create_runs_is_told_so(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Any, *given: Any, **named: Any) -> None:
        raise MlflowException("Permission denied", error_code=databricks_pb2.PERMISSION_DENIED)

    monkeypatch.setattr(MlflowClient, "create_run", denied)
    tracked = TrackedRun(tmp_path)
    with pytest.raises(TrackingError, match=r"this user may not create runs in experiment bdh of sqlite.*: Permission denied"):
        tracked.tracker.wait(10)
    tracked.kill()


def test_run_that_another_training_has_taken_meanwhile_is_left_to_it(store: MlflowClient, tmp_path: Path, monkeypatch: Any) -> None:
    """Two trainings were started with one MLFLOW_RUN_ID while the server was down: neither was refused at its start."""
    run_id = store.create_run(store.create_experiment("bdh")).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    for training in ("a" * 32, "b" * 32):
        tracked = TrackedRun(tmp_path, training=training)
        tracked.losses(1, 2)
        assert (tracked.run_id == run_id) == (training == "a" * 32)
        assert tracked.close() == 0
    assert [step for step, _ in history(store, run_id, "train/loss")] == [1, 2]
