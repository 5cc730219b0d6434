"""Runs that the code before the rebuild (a152983) has left: resumed, delivered and compared by the code of today.

tests/resources/version1 holds a run directory for each number format, all trained for six steps with a tracking server that was never
there, and one whose training was killed. Losses are compared with a tolerance, because dropout masks are drawn otherwise since then.
"""

import shutil
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient

from bdh_mlflow import host
from bdh_mlflow.tracking.records import Points
from tests.conftest import history, only_run, run_cli
from tests.tracking.tracked import entries

VERSION_1 = Path(__file__).parents[1] / "resources" / "version1"
RUNS = sorted(path.parent for path in VERSION_1.glob("*/run_*/checkpoint_3.pt"))


@pytest.fixture(autouse=True)
def _without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "compiler", lambda: None)  # compiling the 4-bit optimizer takes half a minute
    shutil.copytree(VERSION_1 / "text", "text")


def left_behind(name: str) -> Path:
    """A copy of a run directory among the checkpoints here."""
    (found,) = (VERSION_1 / name).glob("run_*")
    return Path(shutil.copytree(found, Path("checkpoints") / found.name))


def losses(folder: Path) -> dict[int, float]:
    found = (entry.record for entry in entries(folder))
    return {record.step: record.values["train/loss"] for record in found if isinstance(record, Points) and "train/loss" in record.values}


FORMATS = [run.parent.name for run in RUNS if run.parent.name != "killed"]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "plain" else pytest.mark.slow) for name in FORMATS],  # the other number formats
)
def test_checkpoint_resumes_and_its_journal_is_delivered(store: MlflowClient, name: str) -> None:
    folder = left_behind(name)
    before = losses(folder)
    for later in folder.glob("checkpoint_6.*"):
        later.unlink()
    config = folder / "config.yaml"
    settings = "--set", f"tracking.tracking_uri={store.tracking_uri}", "--set", "training.checkpoint_dir=checkpoints"
    done = run_cli("train", "--config", str(config), "--resume", str(folder), *settings)
    assert done.exit_code == 0, done.output
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.segment"], run.data.metrics.get("tracker/lost", 0)) == ("FINISHED", "2", 0)
    points = history(store, run.info.run_id, "train/loss")
    assert [step for step, _ in points] == [1, 2, 3, 4, 5, 6]
    assert dict(points) == before
    replayed = [value for _, value in history(store, run.info.run_id, "resume/replay_max_abs_diff")]
    assert max(replayed) < 0.1  # other dropout masks
    assert "format 1: from here on dropout masks are drawn, and gradients summed, otherwise" in done.output
    state = torch.load(folder / "checkpoint_6.pt", weights_only=True)
    assert state["format"] == 3
    assert state["loss"] == pytest.approx(before[6], rel=2e-2)
    assert run.data.tags["bdh.latest_checkpoint"].endswith("checkpoint_6.pt")


@pytest.mark.slow  # what a run of before looks like in a report
def test_journal_is_synced_and_the_run_compared(store: MlflowClient) -> None:
    folder = left_behind("plain")
    synced = run_cli("sync", str(folder), "--tracking-uri", store.tracking_uri)
    assert synced.exit_code == 0, synced.output
    run = only_run(store)
    assert run.info.status == "FINISHED"
    assert dict(history(store, run.info.run_id, "train/loss")) == losses(folder)
    folder_of_run = f"checkpoints/{folder.name}"
    mirrored = {Path(f.path).name for f in store.list_artifacts(run.info.run_id, folder_of_run)}
    assert mirrored >= {"checkpoint_3.pt", "checkpoint_3.json", "checkpoint_6.pt", "checkpoint_6.json", "config.yaml"}
    Path("here.yaml").write_text("tracking: {}\n")  # the store that MLFLOW_TRACKING_URI names
    assert run_cli("compare", run.info.run_id, "--config", "here.yaml", "--no-log").exit_code == 0
    assert "train/loss" in Path("compare.html").read_text()
    assert "0 records left" in run_cli("sync", str(folder), "--tracking-uri", store.tracking_uri).output


def test_run_that_was_killed_is_ended_by_sync(store: MlflowClient) -> None:
    folder = left_behind("killed")
    assert run_cli("sync", str(folder), "--tracking-uri", store.tracking_uri).exit_code == 0
    run = only_run(store)
    assert (run.info.status, run.data.tags["bdh.stop_reason"]) == ("KILLED", "killed")
    assert dict(history(store, run.info.run_id, "train/loss")) == losses(folder)
