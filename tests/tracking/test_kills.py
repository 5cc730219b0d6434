"""Trainers, senders and servers as real processes that are killed, stopped or never there: no point is lost, no training run stops."""

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from bdh_mlflow import checkpoint
from bdh_mlflow.config import TrackingConfig
from bdh_mlflow.tracking import (
    journal,
    sync,
)
from bdh_mlflow.tracking.mirrored import MirrorReader
from bdh_mlflow.tracking.records import Points
from scripts.servers import Server, serving
from tests.conftest import history, run_cli, wait_for
from tests.tracking.tracked import entries, quiet

pytestmark = pytest.mark.slow
LIMIT_S = 60


@dataclass
class Program:
    """`bdh-mlflow train` as a process, with its sender as another."""

    process: subprocess.Popen[str]

    def end(self) -> str:
        return self.process.communicate(timeout=LIMIT_S)[0]

    def senders(self) -> list[int]:
        """Process ids; each thread has the children that it started."""
        lists = [path.read_text() for path in Path(f"/proc/{self.process.pid}/task").glob("*/children")]
        return [
            int(pid) for line in lists for pid in line.split() if "bdh_mlflow.tracking.sender" in Path(f"/proc/{pid}/cmdline").read_text()
        ]

    def kill_all(self) -> None:
        """The trainer and its sender, as a power switch would."""
        for pid in (*self.senders(), self.process.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.communicate()


def program(tiny: Path, *settings: str, resume: str = "none") -> Program:
    words = [w for s in settings for w in ("--set", s)]
    command = [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(tiny), "--resume", resume, *words]
    return Program(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))


def test_training_begins_and_ends_without_a_server_and_sync_delivers_the_whole(
    empty_store: Path, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        server.signal(signal.SIGKILL)
        output = program(tiny, "tracking.log_system_metrics=true").end()
        assert f"MLflow: {server.uri} does not answer; training goes on" in output
        assert "Finished at step 6" in output
        (folder,) = checkpoint.list_all(Path("checkpoints"))
        assert f"Deliver: bdh-mlflow sync {folder}" in output
        again = program(tiny, "training.max_iters=9", resume="latest").end()  # goes on without having had a run id
        assert "Finished at step 9" in again
        down = run_cli("sync", str(folder))
        assert down.exit_code == 1
        assert "records left; try again" in down.output
        server.start()
        up = run_cli("sync", str(folder))
        assert up.exit_code == 0, up.output
        second = run_cli("sync", "--config", str(tiny))
        assert f"{folder}: 0 records delivered, 0 left" in second.output
        experiment = server.client.get_experiment_by_name("bdh")
        assert experiment is not None
        (run,) = server.client.search_runs([experiment.experiment_id])
        assert [s for s, _ in history(server.client, run.info.run_id, "train/loss")] == list(range(1, 10))
        assert (run.info.status, run.data.tags["bdh.stop_step"], run.data.tags["bdh.segment"]) == ("FINISHED", "9", "2")
        assert run.data.params["training.max_iters"] == "6"
        assert run.data.tags["bdh.latest_checkpoint"].endswith("checkpoint_9.pt")
        verified = run_cli("checkpoints", "verify", run.info.run_id, "--config", str(tiny))
        assert "3 intact, 0 damaged" in verified.output


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_end_without_a_server_is_not_held_up_and_a_signal_still_saves(
    empty_store: Path, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    """That it ends at all is asserted; how soon is measured by benchmarks/tracking.py."""
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        trained = program(tiny, "training.max_iters=1000000", "training.checkpoint_freq=1000000", "training.test_freq=1000000")
        wait_for(lambda: losses_on(server))
        server.signal(how)
        trained.process.terminate()
        output = trained.end()
        assert trained.process.returncode == 143, output
        assert "Deliver: bdh-mlflow sync" in output
        (folder,) = checkpoint.list_all(Path("checkpoints"))
        newest, _ = checkpoint.newest(folder)
        assert newest is not None
        assert f"Stopped by SIGTERM at step {newest.manifest.step}" in output
        server.signal(signal.SIGCONT) if how == signal.SIGSTOP else server.start()
        assert sync.sync(folder, None, quiet).left == 0
        run = the_run(server)
        assert run.info.status == "KILLED"
        assert [s for s, _ in history(server.client, run.info.run_id, "train/loss")] == list(range(1, newest.manifest.step + 1))


def the_run(server: Server) -> Any:
    experiment = server.client.get_experiment_by_name("bdh")
    runs = server.client.search_runs([experiment.experiment_id]) if experiment else []
    assert len(runs) < 2
    return runs[0] if runs else None


def losses_on(server: Server) -> list[tuple[int, float]]:
    run = the_run(server)
    return history(server.client, run.info.run_id, "train/loss") if run else []


def test_kills_of_everything_with_the_server_down_half_of_the_time_lose_nothing(
    empty_store: Path, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few kills here; benchmarks/outages.py makes twenty at random moments."""
    settings = ("training.max_iters=1000000", "training.checkpoint_freq=25", "training.test_freq=1000000")
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        for number, down in enumerate((False, True)):
            if down:
                server.signal(signal.SIGKILL)
            trained = program(tiny, *settings, resume="latest" if number else "none")
            reached = 60 * (number + 1)
            wait_for(
                lambda reached=reached: any(
                    (d / f"checkpoint_{reached // 25 * 25}.json").is_file() for d in checkpoint.list_all(Path("checkpoints"))
                )
            )
            trained.kill_all()
        server.start()
        (folder,) = checkpoint.list_all(Path("checkpoints"))
        assert sync.sync(folder, None, quiet).left == 0
        journalled = {
            (key, entry.record.step)
            for entry in entries(folder)
            if isinstance(entry.record, Points)
            for key in entry.record.values
            if not key.startswith(("by_tokens/", "system/", "tracker/"))
        }
        run = the_run(server)
        there = Counter(
            (key, m.step)
            for key in run.data.metrics
            if not key.startswith(("by_tokens/", "system/", "tracker/"))
            for m in server.client.get_metric_history(run.info.run_id, key)
        )
        assert {point for point, times in there.items() if times > 1} == set()
        assert journalled <= set(there)
        assert {key for key, _ in set(there) - journalled} <= {"resume/replay_max_abs_diff", "ckpt/upload_s"}
        assert (run.info.status, run.data.tags["bdh.stop_reason"]) == ("KILLED", "killed")
        assert {m.value for m in server.client.get_metric_history(run.info.run_id, "resume/replay_max_abs_diff")} <= {0.0}
        rows = json.loads(Path(server.client.download_artifacts(run.info.run_id, "segments.json", str(tmp_path))).read_text())
        assert [row["reason"] for row in rows] == ["killed", "killed"]


def test_sender_outlives_a_killed_trainer_and_ends_the_run(
    empty_store: Path, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    client = MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
    trained = program(tiny, "training.max_iters=1000000", "training.checkpoint_freq=1000000", "training.test_freq=1000000")
    wait_for(lambda: (e := client.get_experiment_by_name("bdh")) and (r := client.search_runs([e.experiment_id])) and r[0].data.metrics)
    trained.process.kill()
    trained.process.communicate()
    (folder,) = checkpoint.pending(Path("checkpoints"))
    tracked = max(e.record.step for e in entries(folder) if isinstance(e.record, Points))
    experiment = client.get_experiment_by_name("bdh")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    wait_for(lambda: client.get_run(run.info.run_id).info.status == "KILLED")
    assert [s for s, _ in history(client, run.info.run_id, "train/loss")] == list(range(1, tracked + 1))
    assert run_cli("sync", str(folder)).exit_code == 0
    assert checkpoint.pending(Path("checkpoints")) == []


def test_sender_that_is_killed_is_replaced(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    trained = program(tiny, "training.max_iters=1000000", "training.checkpoint_freq=1000000", "training.test_freq=1000000")
    wait_for(lambda: (e := store.get_experiment_by_name("bdh")) and (r := store.search_runs([e.experiment_id])) and r[0].data.metrics)
    (sender,) = trained.senders()
    os.kill(sender, signal.SIGKILL)
    wait_for(lambda: any(pid != sender for pid in trained.senders()))
    trained.process.terminate()
    output = trained.end()
    assert trained.process.returncode == 143, output
    assert "wait for the tracking server" not in output
    (folder,) = checkpoint.list_all(Path("checkpoints"))
    state = journal.delivered(folder)
    assert state is not None
    assert state.points == state.files == (folder / journal.FILE_NAME).stat().st_size
    tracking = TrackingConfig()
    assert len(MirrorReader(tracking).search(state.run_id, best=False)) == 1
