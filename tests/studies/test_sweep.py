"""A study of real, tiny trainings: children of one run, pruned, interrupted and continued."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlflow
import optuna
import pytest
import yaml
from mlflow import MlflowClient

from bdh_mlflow.cli import console
from bdh_mlflow.errors import ConfigError, DataError, NonFiniteError
from bdh_mlflow.studies import study as study_of
from bdh_mlflow.studies import sweep as sweep_of
from bdh_mlflow.studies.space import Space
from bdh_mlflow.text import Evaluation
from bdh_mlflow.training import start
from bdh_mlflow.training.parts import Ending, Progress
from bdh_mlflow.training.stop import StopRequest
from tests.conftest import run_cli
from tests.training.test_endings import wait_until

SPACE: dict[str, Any] = {
    "study": "tiny",
    "parameters": {"training.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "model.n_layer": {"low": 1, "high": 2}},
    "settings": {"training.max_iters": 6, "training.test_freq": 2, "training.checkpoint_freq": 2},
}


def written(tmp_path: Path, **changes: Any) -> str:
    path = tmp_path / "space.yaml"
    path.write_text(yaml.safe_dump({**SPACE, **changes}))
    return str(path)


def swept(tiny: Path, tmp_path: Path, trials: int, **changes: Any) -> Any:
    return run_cli("sweep", "--config", str(tiny), "--space", written(tmp_path, **changes), "--trials", str(trials))


def children(store: MlflowClient) -> list[Any]:
    runs = store.search_runs([store.get_experiment_by_name("bdh").experiment_id], order_by=["attributes.start_time ASC"])
    return [run for run in runs if "mlflow.parentRunId" in run.data.tags]


def parent(store: MlflowClient) -> Any:
    (run,) = store.search_runs([store.get_experiment_by_name("bdh").experiment_id], "tags.`bdh.sweep` = 'tiny'")
    return run


@pytest.mark.slow
def test_trials_are_children_of_one_run_that_shows_the_best_settings(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    result = swept(tiny, tmp_path, 3)
    assert result.exit_code == 0, result.output
    assert "3 complete, 0 pruned, 0 fail" in result.output
    assert [run.info.run_name for run in children(store)] == ["trial 0", "trial 1", "trial 2"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children(store)} == {parent(store).info.run_id}
    assert len({run.data.params["training.learning_rate"] for run in children(store)}) == 3
    best = min(children(store), key=lambda run: run.data.metrics["val/loss"])
    assert parent(store).data.tags["best.training.learning_rate"] == best.data.params["training.learning_rate"]
    assert parent(store).info.status == "FINISHED"
    assert f"--set training.learning_rate={best.data.params['training.learning_rate']}" in result.output
    files = {f.path for f in store.list_artifacts(parent(store).info.run_id, "sweep")}
    assert files == {f"sweep/{name}" for name in ("space.yaml", "trials.json", "importance.png", "parallel_coordinates.png")}
    again = swept(tiny, tmp_path, 4)
    assert "study tiny continues after 3 trials" in again.output
    assert len(children(store)) == 4
    table = mlflow.artifacts.load_dict(f"{parent(store).info.artifact_uri}/sweep/trials.json")
    assert [row[0] for row in table["data"]] == [0, 1, 2, 3]


@pytest.mark.slow
def test_hopeless_trial_is_pruned_and_diverged_one_has_failed(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optuna.Trial, "should_prune", lambda self: self.number == 1)
    real = start.train

    def diverging(config: Any, *rest: Any, **named: Any) -> Any:
        if config.tracking.run_name == "trial 2":
            raise NonFiniteError("update 1: loss nan")
        return real(config, *rest, **named)

    monkeypatch.setattr(start, "train", diverging)
    result = swept(tiny, tmp_path, 4)
    assert result.exit_code == 0, result.output
    assert "2 complete, 1 pruned, 1 fail" in result.output
    pruned = children(store)[1]
    assert (pruned.info.status, pruned.data.tags["bdh.stop_reason"], pruned.data.tags["bdh.stop_step"]) == ("KILLED", "pruned", "2")
    assert children(store)[2].info.run_name == "trial 3"


@pytest.mark.slow
def test_killed_sweep_continues_the_interrupted_trial(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    long = {"training.max_iters": 100_000, "training.test_freq": 50, "training.checkpoint_freq": 50}
    space = written(tmp_path, settings=long)
    command = [sys.executable, "-m", "bdh_mlflow", "sweep", "--config", str(tiny), "--space", space, "--trials", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    folder = Path("checkpoints/sweeps/tiny/trial_0")
    wait_until(lambda: list(folder.glob("run_*/checkpoint_100.json")), process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    steps = max(int(p.stem.split("_")[1]) for p in folder.glob("run_*/checkpoint_*.json"))
    study = Path("checkpoints/sweeps/tiny/study.log")
    text_of = study.read_text()
    study.write_text(text_of.replace("100000", str(steps + 20)))  # the same space, with an end in sight
    result = swept(tiny, tmp_path, 2, settings={**long, "training.max_iters": steps + 20})
    assert result.exit_code == 0, result.output
    assert "trial 0 was interrupted; it is queued again" in result.output
    assert "2 complete, 0 pruned, 0 fail" in result.output
    assert len(list(folder.glob("run_*"))) == 1
    assert len(children(store)) == 2, "the interrupted trial continued in its own run"


@pytest.mark.slow
def test_signal_ends_a_sweep_after_a_checkpoint(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = console.PlainLines.point

    def interrupting(self: Any, values: Any, step: int) -> None:
        real(self, values, step)
        if step == 2 and "val/loss" in values:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(console.PlainLines, "point", interrupting)
    result = swept(tiny, tmp_path, 2)
    assert result.exit_code == 143, result.output
    assert parent(store).info.status == "KILLED"
    monkeypatch.setattr(console.PlainLines, "point", real)
    again = swept(tiny, tmp_path, 1)
    assert "trial 0 was interrupted" in again.output
    (run,) = children(store)
    assert run.info.status == "FINISHED"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parameters": {"training.lerning_rate": {"low": 0, "high": 1}}}, "did you mean `learning_rate`?"),
        ({"parameters": {"model.dropout": {"low": 0.0, "high": 1.5}}}, "model.dropout: found 1.5"),
        ({"parameters": {"model.dropout": {"low": 0.5, "high": 0.1}}}, "model.dropout: low 0.5 is above high 0.1"),
        ({"parameters": {"model.dropout": {"low": 0.5}}}, "needs choices, or low and high"),
        ({"parameters": {"model.dropout": {"low": 0, "high": 1, "log": True}}}, "a log scale needs low above 0"),
        ({"parameters": {}}, "parameters: Dictionary should have at least 1 item"),
        ({"study": "a/b"}, "study: String should match pattern"),
        ({"settings": {"training.max_iter": 3}}, "tiny.yaml: 1 problem\n  training.max_iter: unknown key; did you mean `max_iters`?"),
        ({"settings": {"dataset.val_fraction": 0}}, "dataset.val_fraction: 0; trials are judged by val/loss"),
        ({"tries": 3}, "tries: Extra inputs are not permitted"),
        ({"study": ".."}, "study: String should match pattern"),
        ({"parameters": {"training.batch_size": {"low": 1, "high": 4, "step": 0.5}}}, "step 0.5 between whole numbers"),
        ({"parameters": {"training.batch_size": {"low": 1, "high": 4, "step": -1}}}, "step -1; accepted: above 0"),
        ({"parameters": {"training.batch_size": {"low": 1.0, "high": 4.0}}}, "training.batch_size: found 2.1457; accepted: whole number"),
        ({"parameters": {"training.batch_size": {"low": 1, "high": 4, "step": 9}}}, "at most high - low (3)"),
        ({"parameters": {"model.dropout": {"low": 0.0, "high": 0.5, "step": 1e-320}}}, "makes more than 1,000,000,000 values"),
        ({"parameters": {"training.seed": {"low": True, "high": 4}}}, "true and false are not numbers"),
        ({"parameters": {"model.dropout": {"low": 0.0, "high": float("inf")}}}, "should be a finite number"),
        ({"parameters": {"model.dropout": {"choices": [0.1, 0.2, 0.1]}}}, "choice 0.1 is given twice"),
        ({"parameters": {"training.debug": {"choices": [True, 1]}}}, "choice 1 is given twice"),
        ({"parameters": {"model.dropout": {"choices": [[0.1]]}}}, "not one of text, finite numbers"),
        ({"parameters": {"model.dropout": {"choices": [0.1], "step": 1}}}, "not both"),
        ({"parameters": {"training.checkpoint_dir": {"choices": ["a", "b"]}}}, "training.checkpoint_dir: is the same for all trials"),
        ({"parameters": {"tracking.experiment": {"choices": ["a", "b"]}}}, "tracking.experiment: is the same for all trials"),
        ({"parameters": {"tokenizer.path": {"choices": ["a", "b"]}}}, "tokenizer.path: trials are judged by val/loss, in nats per token"),
        ({"settings": {"model.n_layer": 1}}, "settings.model.n_layer: is among the parameters as well"),
    ],
)
def test_faulty_space_is_refused_before_anything_is_made(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    result = swept(tiny, tmp_path, 1, **changes)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not Path("checkpoints").exists()
    assert store.get_experiment_by_name("bdh") is None


@pytest.mark.slow  # a refusal, after two trials
def test_other_space_under_the_same_name_is_refused(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path) -> None:
    assert swept(tiny, tmp_path, 1).exit_code == 0
    result = swept(tiny, tmp_path, 2, parameters={"model.dropout": {"choices": [0.0, 0.1]}})
    assert result.exit_code == 2
    assert "holds one with another space; give this one another name" in result.output


def test_shipped_space_is_valid() -> None:
    space = Space.from_yaml(str(Path(__file__).parents[2] / "configs/sweep.yaml"))
    assert space.parameters


def test_space_files_are_read_as_configurations_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        Space.from_yaml("absent.yaml")
    path = tmp_path / "space.yaml"
    path.write_text("- study\n")
    with pytest.raises(ConfigError, match="expected study, storage, parameters, settings, found"):
        Space.from_yaml(str(path))
    path.write_text("study: a\nstudy: b\n")
    with pytest.raises(ConfigError, match=r"space.yaml, line 2, column 1: not valid YAML: key `study` is given twice"):
        Space.from_yaml(str(path))


@pytest.mark.slow  # some trainings: a combination cannot be trained, and the study goes on past it, also when it is called again
def test_trial_that_cannot_be_trained_has_failed_and_the_next_one_begins(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path
) -> None:
    settings = {**SPACE["settings"], "model.mlp_internal_dim_multiplier": 1}
    grid = {"model.n_head": {"choices": [1, 2]}, "model.n_embd": {"choices": [16, 18]}}  # 1 * 18 is no multiple of 2 * 2
    said = ""
    for trials in (5, 6):
        result = swept(tiny, tmp_path, trials, parameters=grid, settings=settings)
        assert result.exit_code == 0, result.output
        said += result.output
    assert "1 * n_embd 18 is not a multiple of 2 * n_head 2" in said
    assert parent(store).info.status == "FINISHED"
    states = [row[1] for row in mlflow.artifacts.load_dict(f"{parent(store).info.artifact_uri}/sweep/trials.json")["data"]]
    assert len(states) == 6
    assert {"complete", "fail"} <= set(states)


@pytest.mark.parametrize("error", [DataError("the text is too short"), RuntimeError("out of memory"), MemoryError(), OSError("disk full")])
def test_sweep_of_which_no_trial_can_be_trained_has_failed(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def failing(*given: Any, **named: Any) -> Any:
        raise error

    monkeypatch.setattr(start, "train", failing)
    result = swept(tiny, tmp_path, 2)
    assert result.exit_code == 1, result.output
    assert "0 complete, 0 pruned, 2 fail" in result.output
    assert f"trial 1 failed: {'' if isinstance(error, DataError) else type(error).__name__ + ': '}{error}" in result.output
    assert parent(store).info.status == "FAILED"


@pytest.mark.parametrize("how", ["stopped", "finished", "failed"])
def test_sweep_goes_on_after_a_trial_that_another_process_has_taken_up(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    calls = list[str]()

    @contextlib.contextmanager
    def holding(self: study_of.FileWorkers, number: int, lost: Callable[[], None]) -> Iterator[None]:
        yield
        if number == 0:
            lost()  # the thread of the heartbeat looked a moment too late

    def train(config: Any, progress: Progress, stop: StopRequest, **named: Any) -> Any:
        calls.append(config.tracking.run_name)
        if len(calls) == 1:
            with study_of.opened(Space.model_validate(SPACE), Path("checkpoints/sweeps/tiny"), print) as kept:
                study_of.interrupt(kept.study, kept.workers, 0)
            if how == "failed":
                raise DataError("the folder is another's now")
            if how == "stopped":
                stop.ask(sweep_of.TAKEN_UP)
        assert stop.received is None or len(calls) == 1
        progress.point({"val/loss": 2.0}, 2)
        reason = stop.received.name if how == "stopped" and stop.received else "finished"
        return SimpleNamespace(ending=Ending(reason, 2, Evaluation(2, 2.0, 0), ()))

    monkeypatch.setattr(study_of.FileWorkers, "holding", holding)
    monkeypatch.setattr(start, "train", train)
    result = swept(tiny, tmp_path, 2)
    assert result.exit_code == 0, result.output
    assert calls == ["trial 0", "trial 0", "trial 1"]
    assert "2 complete, 0 pruned, 0 fail" in result.output
    assert ("was taken up by another process" in result.output) == (how != "failed")
    assert parent(store).info.status == "FINISHED"


def test_sweep_that_ends_by_an_error_has_failed(store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, monkeypatch: Any) -> None:
    def broken(*given: Any, **named: Any) -> Any:
        raise KeyError("a fault of ours")

    monkeypatch.setattr(optuna.Study, "ask", broken)
    with pytest.raises(KeyError):
        swept(tiny, tmp_path, 1)
    assert parent(store).info.status == "FAILED"


@pytest.mark.parametrize(
    ("left", "message"),
    [
        (b'{"op_code": 0, "worker', "its last record was cut short by a kill and is dropped"),
        (b"garbage\n", "study.log, line 1: damaged; restore it, or remove"),
        (b'{"op_code": 99}\n', "not a journal of this study"),
        (b"null\n", "not a journal of this study"),
        (b"\xff\xfe\n", "study.log, line 1: damaged"),
    ],
)
def test_journal_of_a_study_that_is_torn_is_mended_or_named(
    store: MlflowClient, text: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, left: bytes, message: str
) -> None:
    def failing(*given: Any, **named: Any) -> Any:
        raise DataError("nothing is trained here")

    monkeypatch.setattr(start, "train", failing)
    folder = tmp_path / "checkpoints" / "sweeps" / "tiny"
    folder.mkdir(parents=True)
    (folder / "study.log").write_bytes(left)
    (folder / "study.log.lock").symlink_to("left by a kill")
    result = swept(tiny, tmp_path, 1)
    assert message in result.output
    assert result.exit_code == (1 if "cut short" in message else 2)
