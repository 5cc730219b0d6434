"""The sender as a process: it runs our code and MLflow's, and nothing that happens to lie about."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow import host
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.errors import TrackingError
from bdh_mlflow.tracking.sender_process import SubprocessSender, prepared, probe_by
from bdh_mlflow.tracking.store import probe_store
from bdh_mlflow.tracking.tracker import Tracker
from tests.conftest import history, wait_for
from tests.tracking.tracked import TrackedRun, segment

USERS_FILES = ("mlflow", "random", "queue", "requests", "numpy", "json", "bdh_mlflow", "sitecustomize")


@pytest.mark.slow  # a real process: it is its start that would run the files
def test_files_of_the_user_in_the_current_folder_are_not_run(store: MlflowClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in USERS_FILES:
        Path(f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\nraise SystemExit(1)\n")
    (tmp_path / "journal").mkdir()
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    tracker = Tracker(lambda: tmp_path / "journal", store.tracking_uri, segment(), pytest.fail, SubprocessSender)
    tracker.metrics({"train/loss": 1.0}, 1)
    identity = tracker.wait(60)
    assert identity is not None
    assert tracker.close("FINISHED", {}, 1) == 0
    assert history(store, identity.run_id, "train/loss") == [(1, 1.0)]
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


@pytest.mark.slow  # real processes, whose answers replace those of this one
def test_prepared_process_makes_the_first_request_to_the_store(store: MlflowClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it says is what `probe_store` says here; a run, a refusal with its words, and a process that dies before it says anything."""
    tracking = TrackingConfig()
    run_id = store.create_run(store.create_experiment("bdh"), tags={"bdh.training": "t", "bdh.segment": "3"}).info.run_id
    with prepared() as senders:
        status = probe_by(senders, tracking, run_id)
    assert status == probe_store(tracking, run_id)
    assert status.reachable
    assert status.run is not None
    assert (status.run.segment, status.run.tags["bdh.training"]) == (3, "t")
    store.delete_experiment(store.get_run(run_id).info.experiment_id)
    with prepared() as senders, pytest.raises(TrackingError) as refused:
        probe_by(senders, tracking, None)
    with pytest.raises(TrackingError) as here:
        probe_store(tracking, None)
    assert str(refused.value) == str(here.value)
    monkeypatch.setattr(host, "python_module", lambda *words: [sys.executable, "-c", "print('{}'); print(3); print('no')"])
    with prepared() as senders, pytest.raises(TrackingError, match="experiment bdh is deleted"):
        probe_by(senders, tracking, None)


@pytest.mark.slow  # a real process, for what its standard input tells it
@pytest.mark.parametrize("last_words", ["", "closed\n"], ids=["killed", "closed"])
def test_a_trainer_that_ends_without_a_word_is_waited_for(store: MlflowClient, tmp_path: Path, last_words: str) -> None:
    tracked = TrackedRun(tmp_path, pid=7)
    run_id = tracked.run_id
    tracked.silence()
    tracked.losses(1)
    sender = subprocess.Popen(host.python_module("bdh_mlflow.tracking.sender"), stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert sender.stdin is not None
    sender.stdin.write(json.dumps({"folder": str(tracked.directory.folder), "uri": store.tracking_uri, "pid": 7}) + "\n" + last_words)
    sender.stdin.close()
    if not last_words:
        wait_for(lambda: history(store, run_id, "train/loss"))
        with pytest.raises(subprocess.TimeoutExpired):  # though it has nothing left to deliver
            sender.wait(1)
        tracked.directory.close()  # as by a process that has given back the memory of its GPUs
    assert sender.wait(60) == 0
    assert store.get_run(run_id).info.status == ("RUNNING" if last_words else "KILLED")


@pytest.mark.slow  # two trainings in processes of their own: what they import is the question
def test_training_imports_neither_mlflow_nor_the_compiler(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    """A start takes half as long without; it is the sender that has them."""
    code = (
        "import sys; from bdh_mlflow import host; from bdh_mlflow.cli.main import main\n"
        "heavy = ('mlflow', 'sqlalchemy', 'torch._inductor.compile_fx')\n"
        "host.leave = lambda code: (print('imported', [name for name in heavy if name in sys.modules]), sys.exit(code))\n"
        "main()"
    )
    settings = ["--set", "tracking.log_system_metrics=false", "--set", "low_precision.use_4bit=true"]
    for more in ([], ["--resume", "latest", "--set", "training.max_iters=9"]):
        words = [sys.executable, "-c", code, "train", "--config", str(tiny), *settings, *more]
        done = subprocess.run(words, cwd=tmp_path, env=os.environ, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "imported []" in done.stdout
        assert "MLflow run" in done.stdout
    assert len(store.search_runs([e.experiment_id for e in store.search_experiments()])) == 1
