"""Whole processes: real `mlflow run`, real signals, a real server."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import ViewType

from bdh_mlflow import checkpoint
from scripts.servers import serving
from tests.conftest import history

pytestmark = pytest.mark.slow
PROJECT = Path(__file__).parents[2]
MLFLOW = [sys.executable, "-m", "mlflow"]
LONG = ("training.max_iters=100000", "training.checkpoint_freq=20", "training.test_freq=50")
PATIENCE_S = 120


@pytest.fixture(autouse=True)
def _path(monkeypatch: pytest.MonkeyPatch) -> None:
    """`mlflow run --env-manager local` takes `python` from PATH."""
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


def settings_of(tmp_path: Path, *settings: str) -> list[str]:
    return [f"dataset.parquet_dir={tmp_path / 'text'}", f"training.checkpoint_dir={tmp_path / 'checkpoints'}", *settings]


def project_run(tiny: Path, tmp_path: Path, *settings: str, resume: str = "none") -> subprocess.Popen[str]:
    words = [w for s in (f"config={tiny}", f"resume={resume}", *settings_of(tmp_path, *settings)) for w in ("-P", s)]
    command = [*MLFLOW, "run", str(PROJECT), "--env-manager", "local", "--experiment-name", "bdh", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def direct_run(tiny: Path, tmp_path: Path, *settings: str) -> subprocess.Popen[str]:
    words = [w for s in settings_of(tmp_path, *settings) for w in ("--set", s)]
    command = [sys.executable, "-m", "bdh_mlflow", "train", "--config", str(tiny), *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)


def wait_until(found: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        if value := found():
            return value
        if process.poll() is not None:
            pytest.fail(f"ended early with {process.returncode}:\n{process.communicate()[0]}")
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"nothing in {PATIENCE_S} s:\n{process.communicate()[0]}")


def saved(step: int) -> Callable[[], Path | None]:
    """The run directory, once it holds a whole checkpoint of that step."""

    def look() -> Path | None:
        found = [d for d in checkpoint.list_all(Path("checkpoints")) if (d / f"checkpoint_{step}.json").is_file()]
        return found[0] if found else None

    return look


def all_runs(store: MlflowClient) -> list[Any]:
    return list(store.search_runs([e.experiment_id for e in store.search_experiments()], run_view_type=ViewType.ALL))


def top_level(store: MlflowClient) -> list[Any]:
    return [run for run in all_runs(store) if "mlflow.parentRunId" not in run.data.tags]


def latest_step(store: MlflowClient, run_id: str) -> int:
    """Of the newest checkpoint that the run says is mirrored; 0 before the first."""
    tag = store.get_run(run_id).data.tags.get("bdh.latest_checkpoint", "_0.pt")
    return int(tag.rpartition("_")[2].removesuffix(".pt"))


@pytest.mark.parametrize("mirrored_only", [False, True], ids=["here", "mirrored only"])
def test_killed_run_goes_on_as_one_run_with_the_whole_curve(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, mirrored_only: bool
) -> None:
    process = project_run(tiny, tmp_path, *LONG)
    directory = wait_until(saved(40), process)
    mirrored = f"checkpoints/{directory.name}/checkpoint_40.pt"
    (run,) = top_level(store)
    wait_until(lambda: latest_step(store, run.info.run_id) >= 40, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    if mirrored_only:
        shutil.rmtree("checkpoints")
    end = project_run(tiny, tmp_path, *LONG[1:], "training.max_iters=90", resume=f"runs:/{run.info.run_id}/{mirrored}")
    output, _ = end.communicate(timeout=PATIENCE_S)
    assert end.returncode == 0, output
    (only,) = top_level(store)
    assert only.info.run_id == run.info.run_id
    assert only.info.status == "FINISHED"
    (child,) = [r for r in all_runs(store) if r.info.run_id != run.info.run_id]
    assert (child.info.run_name, child.info.status) == ("segment 2", "FINISHED")
    steps = [step for step, _ in history(store, run.info.run_id, "train/loss")]
    assert len(steps) == len(set(steps)), "a step was logged twice"
    assert set(range(1, 91)) <= set(steps)
    replayed = history(store, run.info.run_id, "resume/replay_max_abs_diff")
    assert {value for _, value in replayed} <= {0.0}
    assert [d.name for d in checkpoint.list_all(Path("checkpoints"))] == [directory.name]


@pytest.mark.parametrize(("number", "times", "code"), [(signal.SIGTERM, 1, 143), (signal.SIGINT, 2, 130)], ids=["SIGTERM", "SIGINT twice"])
def test_signal_ends_with_a_checkpoint_a_true_status_and_its_code(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, number: signal.Signals, times: int, code: int
) -> None:
    process = direct_run(tiny, tmp_path, *LONG)
    directory = wait_until(saved(20), process)
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.01)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == code, output
    (run,) = top_level(store)
    newest, passed_over = checkpoint.newest(directory)
    assert newest is not None
    assert passed_over == []
    last_step = max(step for step, _ in history(store, run.info.run_id, "train/loss"))
    assert newest.manifest.step == last_step
    assert run.info.status == "KILLED"
    assert (run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_step"]) == (number.name, str(last_step))
    assert run.data.tags["bdh.latest_checkpoint"].endswith(f"checkpoint_{last_step}.pt")
    assert f"Stopped by {number.name} at step {last_step}" in output
    assert "--resume " in output


def test_ctrl_c_under_mlflow_run_saves_and_tells_why(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    """The terminal sends SIGINT to the whole group, and `mlflow run` SIGTERM after it."""
    process = project_run(tiny, tmp_path, *LONG)
    directory = wait_until(saved(20), process)
    os.killpg(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1, output
    (run,) = top_level(store)
    newest, _ = checkpoint.newest(directory)
    assert newest is not None
    assert run.info.status == "FAILED"  # what `mlflow run` makes of every end but success
    assert (run.data.tags["bdh.stop_reason"], run.data.tags["bdh.stop_step"]) == ("SIGINT", str(newest.manifest.step))


def test_run_killed_before_its_first_checkpoint_has_no_directory(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    process = direct_run(tiny, tmp_path, "training.max_iters=1000000", "training.checkpoint_freq=1000000")
    wait_until(lambda: top_level(store) and history(store, top_level(store)[0].info.run_id, "train/loss"), process)
    process.kill()
    process.communicate()
    assert checkpoint.list_all(Path("checkpoints")) == []


def test_two_runs_started_in_one_second_have_two_directories(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    processes = [direct_run(tiny, tmp_path) for _ in range(2)]
    outputs = [p.communicate(timeout=PATIENCE_S)[0] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], outputs
    directories = checkpoint.list_all(Path("checkpoints"))
    assert len(directories) == 2
    assert {r.data.tags["bdh.run_dir"] for r in top_level(store)} == {d.name for d in directories}


def test_failing_run_under_mlflow_run_is_failed_with_the_message(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    process = project_run(tiny, tmp_path, "training.batch_size=many")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert 'training.batch_size: found the text "many"; accepted: whole number >= 1' in output
    assert [run.info.status for run in all_runs(store)] == ["FAILED"]


@pytest.fixture
def server(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowClient]:
    with serving(empty_store, tmp_path / "server") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        yield server.client


def test_run_and_resume_through_a_server_without_the_local_files(server: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    process = project_run(tiny, tmp_path, "training.max_iters=3")
    output, _ = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 0, output
    (run,) = top_level(server)
    assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
    assert f"Look:    {server.tracking_uri}/#/experiments/{run.info.experiment_id}/runs/{run.info.run_id}" in output
    shutil.rmtree("checkpoints")
    again = project_run(tiny, tmp_path, resume=f"{run.info.artifact_uri}/{run.data.tags['bdh.latest_checkpoint']}")
    output, _ = again.communicate(timeout=PATIENCE_S)
    assert again.returncode == 0, output
    (run,) = top_level(server)
    assert [step for step, _ in history(server, run.info.run_id, "train/loss")] == [1, 2, 3, 4, 5, 6]
    assert run.info.status == "FINISHED"
    mirror = f"checkpoints/{run.data.tags['bdh.run_dir']}"
    assert {Path(f.path).name for f in server.list_artifacts(run.info.run_id, mirror)} >= {"checkpoint_3.pt", "checkpoint_6.pt"}
