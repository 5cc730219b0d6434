"""A study that several processes work on: exactly the wanted trials, whoever dies, freezes or restarts meanwhile."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from mlflow import MlflowClient
from optuna.trial import TrialState

from bdh_mlflow.errors import InputError, TrackingError
from bdh_mlflow.studies import study as study_of
from bdh_mlflow.studies.space import Space
from bdh_mlflow.studies.study import SURPLUS, counted, is_outage, is_surplus, opened, patiently
from scripts.team import Team, TeamServer
from tests.conftest import run_cli, wait_for
from tests.stores import needs_stores

SPACE = {
    "study": "together",
    "parameters": {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "model.n_layer": {"low": 1, "high": 2}},
    "settings": {"training.max_iters": 1200, "training.test_freq": 300, "training.checkpoint_freq": 150, "training.log_freq": 10},
}
HASTY = "from bdh_mlflow.studies import study; study.HEARTBEAT_S, study.GRACE_S = 1, 6; from bdh_mlflow.cli.main import main; main()"
TRIALS = 4  # all drawn at random: what is drawn depends on the seed and the trial alone
LIMIT_S = 150


def space(**changes: Any) -> Space:
    return Space.model_validate({**SPACE, **changes})


class Worker:
    """A sweep as a process, with a checkpoint directory of its own, as on a machine of its own."""

    def __init__(self, tiny: Path, tmp_path: Path, name: str) -> None:
        command = [sys.executable, "-c", HASTY, "sweep", "--config", str(tiny), "--space", str(tmp_path / "space.yaml")]
        command += ["--trials", str(TRIALS), "--set", f"training.checkpoint_dir={tmp_path / name}", "--set", "model.dropout=0"]
        self.log = tmp_path / f"{name}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def said(self) -> str:
        return self.log.read_text()

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process.pid, number)

    def end(self) -> int:
        return self.process.wait(LIMIT_S)


@pytest.mark.slow  # real trainings
def test_second_sweep_on_a_study_joins_it(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(yaml.safe_dump({**SPACE, "settings": {"training.max_iters": 60, "training.test_freq": 30}}))
    command = [sys.executable, "-m", "bdh_mlflow", "sweep", "--config", str(tiny), "--space", "space.yaml", "--trials", "3"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    said = [process.communicate(timeout=LIMIT_S)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all("3 complete, 0 pruned, 0 fail" in words for words in said), said
    check_runs(store, 3)


def check_runs(store: MlflowClient, trials: int) -> dict[str, float]:
    """One parent, a run for each trial.   Returns the loss of each."""
    runs = store.search_runs([store.get_experiment_by_name("bdh").experiment_id])
    parents = [run for run in runs if "bdh.sweep" in run.data.tags]
    children = {run.info.run_name: run for run in runs if "mlflow.parentRunId" in run.data.tags}
    assert len(parents) == 1
    assert parents[0].info.status == "FINISHED"
    assert sorted(children) == [f"trial {number}" for number in range(trials)]
    assert len(runs) == trials + 1
    assert {run.info.status for run in children.values()} == {"FINISHED"}
    return {name: run.data.metrics["val/loss"] for name, run in children.items()}


class TestTeam:
    pytestmark = needs_stores

    def test_machines_that_die_freeze_or_lose_the_database_leave_exactly_the_wanted_trials(
        self, stores: Team, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        server = TeamServer(stores)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        client = MlflowClient(server.uri)
        (tmp_path / "space.yaml").write_text(yaml.safe_dump({**SPACE, "storage": stores.postgres.uri("optuna")}))
        workers = [Worker(tiny, tmp_path, f"machine-{number}") for number in range(3)]
        dying, freezing, _ = workers

        def outputs() -> list[str]:
            return [worker.said() for worker in workers]

        try:
            wait_for(lambda: mirrored_of(client, tmp_path / "machine-0"), LIMIT_S, outputs)
            dying.signal(signal.SIGKILL)
            wait_for(lambda: mirrored_of(client, tmp_path / "machine-1"), LIMIT_S, outputs)
            freezing.signal(signal.SIGSTOP)
            stores.postgres.signal(signal.SIGKILL)
            stores.postgres.start()
            assert workers[2].end() == 0, workers[2].said()
            freezing.signal(signal.SIGCONT)
            assert freezing.end() == 0, freezing.said()
        finally:
            for worker in workers:
                worker.process.kill()
            server_losses = check_runs(client, TRIALS) if workers[2].process.returncode == 0 else {}
            server.stop()
        said = workers[2].said()
        assert said.count("was interrupted; it is queued again") + freezing.said().count("was interrupted; it is queued again") >= 2, said
        assert "was taken up by another process" in freezing.said()
        assert f"{TRIALS} complete, 0 pruned, 0 fail" in said
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'alone.db'}")
        (tmp_path / "alone.yaml").write_text(yaml.safe_dump(SPACE))
        same = ("--config", str(tiny), "--space", str(tmp_path / "alone.yaml"), "--trials", str(TRIALS), "--set", "model.dropout=0")
        alone = run_cli("sweep", *same)
        assert alone.exit_code == 0
        assert check_runs(MlflowClient(f"sqlite:///{tmp_path / 'alone.db'}"), TRIALS) == server_losses  # to the bit

    def test_database_that_is_not_there_or_refuses_is_named_at_the_start(self, stores: Team, tmp_path: Path) -> None:
        for uri, words in (
            (stores.postgres.uri("optuna", password="wrong-one"), "password authentication failed"),
            ("postgresql+psycopg2://a:b@127.0.0.1:1/x", r"pip install 'bdh-mlflow\[postgres\]'"),
        ):
            with pytest.raises(TrackingError, match=words) as refused, opened(space(storage=uri), tmp_path / "s", print):
                pass
            assert "wrong-one" not in str(refused.value)


def mirrored_of(client: MlflowClient, folder: Path) -> bool:
    """Whether a trial that was trained in a folder has a checkpoint among its artifacts and is not near its end."""
    saved = [int(path.stem.partition("_")[2]) for path in folder.rglob("checkpoint_*.pt")]
    experiment = client.get_experiment_by_name("bdh")
    if not saved or experiment is None:
        return False
    names = {path.parent.name for path in folder.rglob("checkpoint_*.pt")}
    runs = client.search_runs([experiment.experiment_id], "attributes.status = 'RUNNING'")
    return any(run.data.tags.get("bdh.run_dir") in names and "bdh.latest_checkpoint" in run.data.tags for run in runs)


def test_storage_that_is_no_database_is_refused() -> None:
    for uri in ("http://host:5000", "study.log", "s3://bucket/x"):
        with pytest.raises(ValueError, match="storage"):
            space(storage=uri)


def test_trials_beyond_the_wanted_ones_are_surplus_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    with opened(space(), tmp_path / "s", print) as kept:
        trials = [kept.study.ask() for _ in range(4)]
        assert [is_surplus(kept.study, trial.number, 2) for trial in trials] == [False, False, True, True]
        trials[2].set_user_attr(SURPLUS, True)
        kept.study.tell(trials[2], state=TrialState.FAIL)
        assert [trial.number for trial in counted(kept.study)] == [0, 1, 3]
        assert is_surplus(kept.study, 3, 3) is False


def test_trial_of_a_process_that_is_gone_is_queued_once_and_counts_once(tmp_path: Path) -> None:
    notes = list[str]()
    with opened(space(), tmp_path / "s", notes.append) as kept:
        study, workers = kept.study, kept.workers
        first, second = study.ask(), study.ask()
        first.suggest_float("training.learning_rate", 1e-4, 1e-1, log=True)
        first.report(3.0, 300)
        with workers.holding(second.number, lambda: None):
            for _ in range(2):
                study_of.requeue_left(study, workers, notes.append)
        assert [trial.state for trial in counted(study)] == [TrialState.WAITING, TrialState.RUNNING]
        assert notes == ["trial 0 was interrupted; it is queued again"]
        again, place = study_of.ask(study, seed=1)
        assert (again.number, place, again.user_attrs["seen"]) == (2, 0, {"300": 3.0})
        assert again.suggest_float("training.learning_rate", 1e-4, 1e-1, log=True) == first.params["training.learning_rate"]
        study.enqueue_trial({}, user_attrs={study_of.REPLACES: 0})  # by a process that looked at the same moment
        assert is_surplus(study, 3, 2)
        assert not is_surplus(study, 2, 2)


def test_study_of_another_space_is_refused_and_one_elsewhere_is_the_same(tmp_path: Path) -> None:
    with opened(space(), tmp_path / "s", print):
        pass
    with pytest.raises(InputError, match="another space"), opened(space(settings={}), tmp_path / "s", print):
        pass


def test_database_that_does_not_answer_is_asked_again_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study_of, "FIRST_PAUSE_S", 0.001)
    notes, failures = list[str](), [UnboundLocalError("session"), optuna.exceptions.StorageInternalError("down")]

    def act() -> str:
        if failures:
            raise failures.pop(0)
        return "done"

    assert patiently(act, notes.append) == "done"
    assert [note.partition(" (")[0] for note in notes] == ["the study's database does not answer", "the study's database answers again"]
    failures[:] = [UnboundLocalError("session")] * 9
    with pytest.raises(TrackingError, match="does not answer"):
        patiently(act, notes.append, patience_s=0.0)
    failures[:] = [KeyError("no such study")]  # type: ignore[list-item]
    assert not is_outage(failures[0])
    with pytest.raises(KeyError):
        patiently(act, notes.append)
