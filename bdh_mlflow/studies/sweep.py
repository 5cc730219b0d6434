"""A search for good settings: trainings as trials of one Optuna study, children of one MLflow run, pruned on val/loss, resumable.

The study is a journal file under the checkpoint directory; it knows the parent run and what every trial was given. A trial that an
interruption cut off goes on, from its last checkpoint, when the sweep is started again. Trials are whole trainings of this package, one
after the other. Knows how to build none of it: `start` does.
"""

import json
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config
from bdh_mlflow.errors import ConfigError, InputError, NonFiniteError
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.sender import SubprocessSender
from bdh_mlflow.tracking.tracker import MakeSender
from bdh_mlflow.training import build, start
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.trainer import Progress

FOLDER = "sweeps"
METRIC = "val/loss"
PRUNED = "pruned"
REPLACES = "replaces"
STARTUP_TRIALS = 4  # finished before the first is pruned or the sampler learns; before that they are drawn at random
Watching = Callable[[int], AbstractContextManager[Progress]]
COUNTED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class Choice(BaseModel):
    """What one setting may be: one of `choices`, or a number from `low` to `high` (by `step`, or on a `log` scale)."""

    model_config = ConfigDict(extra="forbid")
    choices: list[Any] | None = None
    low: int | float | None = None
    high: int | float | None = None
    step: int | float | None = None
    log: bool = False

    @model_validator(mode="after")
    def _one_way(self) -> "Choice":
        if (self.choices is None) == (self.low is None or self.high is None):
            raise ValueError("needs choices, or low and high")
        if self.choices is not None and (not self.choices or self.low is not None or self.high is not None):
            raise ValueError("needs choices (at least one), or low and high, not both")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"low {self.low} is above high {self.high}")
        if self.log and (self.step is not None or (self.low or 0) <= 0):
            raise ValueError("a log scale needs low above 0 and no step")
        return self

    def suggest(self, trial: optuna.Trial, key: str) -> Any:
        """Its value in a trial."""
        if self.choices is not None:
            return trial.suggest_categorical(key, self.choices)
        assert self.low is not None
        assert self.high is not None
        if isinstance(self.low, int) and isinstance(self.high, int):
            return trial.suggest_int(key, self.low, self.high, step=int(self.step or 1), log=self.log)
        return trial.suggest_float(key, float(self.low), float(self.high), step=self.step, log=self.log)

    def extremes(self) -> list[Any]:
        """Values to check beforehand."""
        return self.choices if self.choices is not None else [self.low, self.high]


class Space(BaseModel):
    """A sweep: its name, what is searched, and settings that all its trials share."""

    model_config = ConfigDict(extra="forbid")
    study: str = Field(pattern=r"^[\w.-]+$")
    parameters: dict[str, Choice] = Field(min_length=1)
    settings: dict[str, Any] = Field(default_factory=dict)

    @classmethod
    def from_yaml(cls, path: str) -> "Space":
        """Read and check a file.   Raises ConfigError with every problem."""
        try:
            return cls.model_validate(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ConfigError(f"{path}: no such file (looked in {Path.cwd()})") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as a YAML file: {error}") from None
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors()]
            raise ConfigError("\n  ".join([f"{path}: {len(lines)} problem{'s' if len(lines) > 1 else ''}", *lines])) from None


@dataclass(frozen=True)
class Swept:
    """How a sweep stands.   best: number, value and settings of its best trial.   stopped: the signal that ended it early."""

    parent_run_id: str
    counts: dict[str, int]
    best: tuple[int, float, dict[str, Any]] | None
    journal: Path
    stopped: str | None


def sweep(
    config_path: str,
    space: Space,
    trials: int,
    overrides: Sequence[str],
    watching: Watching,
    stop: StopRequest,
    note: Callable[[str], None],
    make_sender: MakeSender = SubprocessSender,
) -> Swept:
    """Run trials until `trials` of them have ended, counting those of earlier starts.   Raises a BdhError for what stops all of them.

    watching: opens what shows a training of so many steps.
    """
    shared = [*overrides, *_settings(space.settings)]
    base = Config.from_yaml(config_path, shared, checks=(build.problems,))
    if base.dataset.val_fraction == 0:
        raise ConfigError(f"dataset.val_fraction: 0; trials are judged by {METRIC}, which needs validation text")
    for key, choice in space.parameters.items():
        for value in choice.extremes():
            Config.from_yaml(config_path, [*shared, *_settings({key: value})], checks=(build.problems,))
    folder = Path(base.training.checkpoint_dir) / FOLDER / space.study
    study = _study(space, folder, base.training.seed, note)
    client = store.connect(base.tracking)
    parent, experiment = _parent(client, study, space, base)
    try:
        _take_up(study, note)
        while _ended(study) < trials:
            settings = [*shared, f"tracking.experiment={experiment}", f"tracking.tags.mlflow.parentRunId={parent}"]
            _trial(study, space, config_path, settings, folder, watching, stop, note, make_sender)
            _show(client, parent, study)
            if stop.received:
                break
    finally:
        stopped = stop.received.name if stop.received else None
        client.set_terminated(parent, "KILLED" if stopped else "FINISHED")
    replaced = sum(REPLACES in t.user_attrs for t in study.trials)
    counts = {state.name.lower(): sum(t.state is state for t in study.trials) for state in COUNTED}
    counts["fail"] -= replaced
    best = (study.best_trial.number, float(study.best_value), dict(study.best_params)) if counts["complete"] else None
    return Swept(parent, counts, best, folder / "study.log", stopped)


def _study(space: Space, folder: Path, seed: int, note: Callable[[str], None]) -> optuna.Study:
    folder.mkdir(parents=True, exist_ok=True)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    study = optuna.create_study(study_name=space.study, storage=storage, direction="minimize", load_if_exists=True)
    done = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=(seed + done) % 2**32)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    asked = json.dumps(space.model_dump(), sort_keys=True)
    if study.user_attrs.setdefault("space", asked) != asked:
        raise InputError(f"study {space.study}: {folder} holds one with another space; give this one another name, or remove that folder")
    study.set_user_attr("space", asked)
    if done:
        note(f"study {space.study} goes on: {done} trials so far")
    return study


def _parent(client: MlflowClient, study: optuna.Study, space: Space, base: Config) -> tuple[str, str]:
    """The run above all trials, and its experiment: the study's from before, else the one that `mlflow run` has made, else a new one."""
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)  # trials make runs of their own
    known = study.user_attrs.get("parent")
    with store.reported("the sweep's run cannot be made"):
        run = (store.find_run(client, known) if known else None) or (store.find_run(client, wrapper) if wrapper else None)
        if run is None:
            name = base.tracking.experiment
            experiment_id = store.experiment_of(client, name) or client.create_experiment(name)
            run = client.create_run(experiment_id, run_name=f"sweep {space.study}")
        run_id = str(run.info.run_id)
        if wrapper and wrapper != run_id:
            client.set_tag(wrapper, "mlflow.parentRunId", run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "bdh.sweep", space.study)
        client.log_text(run_id, yaml.safe_dump(space.model_dump(exclude_defaults=True), sort_keys=False), "sweep/space.yaml")
        experiment = str(client.get_experiment(run.info.experiment_id).name)
    study.set_user_attr("parent", run_id)
    return run_id, experiment


def _take_up(study: optuna.Study, note: Callable[[str], None]) -> None:
    """Trials that an interruption cut off are given again, with the folder of what they have."""
    for cut_off in study.get_trials(states=(TrialState.RUNNING,)):
        study.tell(cut_off.number, state=TrialState.FAIL)
        seen = {str(step): value for step, value in cut_off.intermediate_values.items()}
        attributes = {REPLACES: cut_off.number, "folder": cut_off.user_attrs.get("folder"), "seen": seen}
        study.enqueue_trial(cut_off.params, user_attrs=attributes)
        note(f"trial {cut_off.number} was cut off; it goes on as trial {len(study.get_trials(deepcopy=False)) - 1}")


def _ended(study: optuna.Study) -> int:
    """Trials that have come to an end, those that others replace not counted."""
    known = study.get_trials(deepcopy=False)
    return sum(t.state in COUNTED for t in known) - sum(REPLACES in t.user_attrs for t in known)


def _trial(
    study: optuna.Study,
    space: Space,
    config_path: str,
    settings: Sequence[str],
    folder: Path,
    watching: Watching,
    stop: StopRequest,
    note: Callable[[str], None],
    make_sender: MakeSender,
) -> None:
    trial = study.ask()
    given = {key: choice.suggest(trial, key) for key, choice in space.parameters.items()}
    own = Path(trial.user_attrs.get("folder") or folder / f"trial_{trial.number}")
    trial.set_user_attr("folder", str(own))
    for step, value in trial.user_attrs.get("seen", {}).items():
        trial.report(value, int(step))
    run_dirs = [d for d in checkpoint.list_all(own) if checkpoint.list_run(d).checkpoints]
    more = [*_settings(given), f"training.checkpoint_dir={own}", f"tracking.run_name=trial {trial.number}"]
    more += [f"training.resume_from_checkpoint={run_dirs[-1]}"] if run_dirs else []
    config = Config.from_yaml(config_path, [*settings, *more], checks=(build.problems,))
    note(f"trial {trial.number}: {', '.join(f'{key} {value}' for key, value in given.items())}")
    try:
        with watching(config.training.max_iters) as progress:
            outcome = start.train(config, _Judge(progress, trial, stop), stop, make_sender=make_sender)
    except NonFiniteError as error:
        note(f"trial {trial.number}: {error}")
        study.tell(trial, state=TrialState.FAIL)
        return
    if outcome.ending.reason == PRUNED:
        stop.received = None
        study.tell(trial, state=TrialState.PRUNED)
        note(f"trial {trial.number}: pruned at step {outcome.ending.step}")
    elif outcome.ending.reason == "finished":
        assert outcome.ending.val_loss is not None, "the last step is evaluated"
        study.tell(trial, outcome.ending.val_loss)
        note(f"trial {trial.number}: {METRIC} {outcome.ending.val_loss:.4f}")


class _Judge:
    """Passes progress on; hands evaluations to the trial and asks the training to end when they are hopeless."""

    def __init__(self, progress: Progress, trial: optuna.Trial, stop: StopRequest) -> None:
        self._progress, self._trial, self._stop = progress, trial, stop

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        self._progress.advance(step, loss, tokens_per_s)

    def point(self, values: Mapping[str, float], step: int) -> None:
        self._progress.point(values, step)
        if METRIC in values:
            self._trial.report(values[METRIC], step)
            if self._trial.should_prune() and not self._stop.received:
                self._stop.ask(PRUNED)

    def note(self, text: str) -> None:
        self._progress.note(text)


def _show(client: MlflowClient, parent: str, study: optuna.Study) -> None:
    """Best so far, the table of trials and two pictures, on the parent."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    with store.reported("the sweep's run cannot be written"):
        rows = [_row(t) for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}
        client.log_text(parent, json.dumps(table), "sweep/trials.json")
        client.set_tag(parent, "mlflow.loggedArtifacts", json.dumps([{"path": "sweep/trials.json", "type": "table"}]))
        if not complete:
            return
        client.log_metric(parent, f"best/{METRIC}", study.best_value, step=len(rows))
        for key, value in study.best_params.items():
            client.set_tag(parent, f"best.{key}", str(value))
        if len(complete) < 2 or len({t.value for t in complete}) < 2:
            return
        for name, plot in (("importance", "plot_param_importances"), ("parallel_coordinates", "plot_parallel_coordinate")):
            client.log_figure(parent, _figure(plot, study), f"sweep/{name}.png")


def _figure(plot: str, study: optuna.Study) -> Figure:
    import matplotlib

    matplotlib.use("agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "experimental", and fonts
        axes = getattr(optuna.visualization.matplotlib, plot)(study)
    figure: Figure = axes.figure
    figure.set_size_inches(10, 5)
    return figure


def _row(t: FrozenTrial) -> dict[str, Any]:
    value = t.value if t.state is TrialState.COMPLETE else None
    return {"trial": t.number, "state": t.state.name.lower(), METRIC: value, "steps": t.last_step, **t.params}


def _settings(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]
