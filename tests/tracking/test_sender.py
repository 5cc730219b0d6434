"""The sender as a process: it runs our code and MLflow's, and nothing that happens to lie about."""

from pathlib import Path

import pytest
from mlflow import MlflowClient

from bdh_mlflow.tracking.sender_process import SubprocessSender
from bdh_mlflow.tracking.tracker import Tracker
from tests.conftest import history
from tests.tracking.tracked import segment

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
