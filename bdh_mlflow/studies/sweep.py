"""A search for good settings: trainings as trials of one Optuna study, pruned by validation loss, resumable.

Every trial is a whole training of this package, one after the other, and its MLflow run is a child of one parent run. The study is a
journal file under the checkpoint directory; it stores the parent run and the settings of every trial. A trial that was interrupted
continues from its last checkpoint when the sweep is started again.
"""

import contextlib
import json
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_PARENT_RUN_ID
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from bdh_mlflow import checkpoint
from bdh_mlflow.config import Config, in_full
from bdh_mlflow.errors import BdhError, ConfigError, InputError, TrackingError
from bdh_mlflow.files import first_line, reason_of, try_lock
from bdh_mlflow.redact import masked
from bdh_mlflow.studies.space import Space
from bdh_mlflow.tracking import store
from bdh_mlflow.tracking.sender_process import SubprocessSender
from bdh_mlflow.tracking.tracker import MakeSender
from bdh_mlflow.training import processes, start
from bdh_mlflow.training.problems import problems
from bdh_mlflow.training.stop import StopRequest
from bdh_mlflow.training.trainer import Progress

FOLDER = "sweeps"
JOURNAL = "study.log"
METRIC = "val/loss"
PRUNED = "pruned"
REPLACES = "replaces"  # attribute of a trial that continues an interrupted one: the number of that one
STARTUP_TRIALS = 4  # drawn at random, and none pruned, before sampler and pruner have something to go by
ENDED = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)
Display = Callable[[int], AbstractContextManager[Progress]]
"""Opens what shows the progress of training for so many steps."""


@dataclass(frozen=True)
class Controls:
    """What connects a sweep to its caller.

    stop: ends it.   display: shows each training run.   note: prints a line.   make_sender: starts the sender of each trial.
    size: processes that train a trial together.
    """

    stop: StopRequest
    display: Display
    note: Callable[[str], None]
    make_sender: MakeSender = SubprocessSender
    size: int = 1


@dataclass(frozen=True)
class SweepResult:
    """How a sweep stands.

    counts: trials by state.   best: number, validation loss and varied settings of the best trial, None before one is complete.   journal:
    the file of the study.   stopped: name of the signal that ended it early.
    """

    parent_run_id: str
    experiment: str
    counts: dict[str, int]
    best: tuple[int, float, dict[str, Any]] | None
    journal: Path
    stopped: str | None


def sweep(config: Config, space: Space, trials: int, controls: Controls) -> SweepResult:
    """Run trials until `trials` of them have ended, counting those of earlier calls.   Raises a BdhError for what affects all of them.

    config: settings of all trials, before those of `space`.
    """
    base = _replaced(config, space.settings)
    if base.dataset.val_fraction == 0:
        raise ConfigError(f"dataset.val_fraction: 0; trials are judged by {METRIC}, which needs validation text")
    folder = Path(base.training.checkpoint_dir) / FOLDER / space.study
    with _only_sweep(folder) as alone:
        if alone:  # the lock of optuna's that a kill has left would be waited for
            (folder / f"{JOURNAL}.lock").unlink(missing_ok=True)
        study = _open_study(space, folder, base.training.seed, controls.note)
        client = store.connect(base.tracking)
        parent, experiment = _parent_run(client, study, space, base)
        tags = {**base.tracking.tags, MLFLOW_PARENT_RUN_ID: parent}
        base = base.replaced({"tracking.experiment": experiment, "tracking.tags": tags})
        runner = _Trials(study, space, base, folder, controls)
        ended = "FAILED"
        try:
            runner.requeue_interrupted()
            while sum(_counts(study).values()) < trials and not controls.stop.received:
                runner.run_next()
                _report(lambda: _log_results(client, parent, study), controls.note)
            ended = "FINISHED" if _counts(study)["complete"] or _counts(study)["pruned"] else "FAILED"
        finally:
            stopped = controls.stop.received.name if controls.stop.received else None
            _report(lambda: client.set_terminated(parent, "KILLED" if stopped else ended), controls.note)
        counts = _counts(study)
        best = (study.best_trial.number, float(study.best_value), dict(study.best_params)) if counts["complete"] else None
        return SweepResult(parent, experiment, counts, best, folder / JOURNAL, stopped)


def _report(act: Callable[[], object], note: Callable[[str], None]) -> None:
    """Write to the parent run. A store that does not answer now does not end the study: all of it is written again after the next trial."""
    try:
        with store.reported("the sweep's run cannot be written"):
            act()
    except TrackingError as error:
        note(str(error))


@contextlib.contextmanager
def _only_sweep(folder: Path) -> Iterator[bool]:
    """One process runs a study at a time.   Yields False on a file system without locks.

    Raises InputError if another process does, or if the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written: {reason_of(error)}") from None
    try:
        locked = try_lock(lock)
        if locked is False:
            raise InputError(f"{folder}: another process runs this study; wait for it, or give this one another name")
        yield bool(locked)
    finally:
        os.close(lock)


def _open_study(space: Space, folder: Path, seed: int, note: Callable[[str], None]) -> optuna.Study:
    """The study in `folder`, new or from earlier calls.   Raises InputError if it searches another space."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    file = folder / JOURNAL
    _mend(file, note)
    try:
        storage = JournalStorage(JournalFileBackend(str(file)))
        study = optuna.create_study(study_name=space.study, storage=storage, direction="minimize", load_if_exists=True)
    except Exception as error:  # whatever a record that is not optuna's makes it raise
        raise InputError(f"{file}: not a journal of this study ({type(error).__name__}: {first_line(error)}); remove {folder}") from error
    known = len(study.get_trials(deepcopy=False))
    study.sampler = optuna.samplers.TPESampler(n_startup_trials=STARTUP_TRIALS, seed=(seed + known) % 2**32)
    study.pruner = optuna.pruners.MedianPruner(n_startup_trials=STARTUP_TRIALS)
    searched = json.dumps(space.model_dump(), sort_keys=True)
    if study.user_attrs.setdefault("space", searched) != searched:
        raise InputError(f"study {space.study}: {folder} holds one with another space; give this one another name, or remove that folder")
    study.set_user_attr("space", searched)
    if known:
        note(f"study {space.study} continues after {known} trials")
    return study


def _mend(file: Path, note: Callable[[str], None]) -> None:
    """Take away what a kill left of its last record.   Raises InputError for a record that is damaged otherwise."""
    if not file.exists():
        return
    content = file.read_bytes()
    intact = content[: content.rfind(b"\n") + 1]
    if len(intact) < len(content):
        os.truncate(file, len(intact))
        note(f"{file}: its last record was cut short by a kill and is dropped")
    for number, line in enumerate(intact.splitlines(), start=1):
        try:
            json.loads(line)
        except ValueError:
            raise InputError(f"{file}, line {number}: damaged; restore it, or remove {file.parent} for a new study") from None


def _parent_run(client: MlflowClient, study: optuna.Study, space: Space, base: Config) -> tuple[str, str]:
    """The parent run's id and its experiment: the run of earlier calls, else the one that `mlflow run` has made, else a new one."""
    wrapper = os.environ.pop("MLFLOW_RUN_ID", None)  # trials make runs of their own
    known = study.user_attrs.get("parent")
    with store.reported("the sweep's run cannot be created"):
        own = store.wrapper_run(client, wrapper, known) if wrapper else None
        run = (store.find_run(client, known) if known else None) or own
        if run is None:
            run = client.create_run(store.make_experiment(client, base.tracking.experiment), run_name=f"sweep {space.study}")
        run_id = str(run.info.run_id)
        if wrapper and wrapper != run_id:
            client.set_tag(wrapper, MLFLOW_PARENT_RUN_ID, run_id)
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "bdh.sweep", space.study)
        client.log_text(run_id, yaml.safe_dump(space.model_dump(exclude_defaults=True), sort_keys=False), "sweep/space.yaml")
        experiment = str(client.get_experiment(run.info.experiment_id).name)
    study.set_user_attr("parent", run_id)
    return run_id, experiment


def _counts(study: optuna.Study) -> dict[str, int]:
    """Ended trials by state; an interrupted trial, which Optuna calls failed, counts only as the one that continues it."""
    trials = study.get_trials(deepcopy=False)
    counts = {state.name.lower(): sum(t.state is state for t in trials) for state in ENDED}
    counts["fail"] -= sum(REPLACES in t.user_attrs for t in trials)
    return counts


@dataclass(frozen=True)
class _Trials:
    """Runs the trials of a study.   base: settings of all of them.   folder: holds the checkpoint directory of each."""

    study: optuna.Study
    space: Space
    base: Config
    folder: Path
    controls: Controls

    def requeue_interrupted(self) -> None:
        """Queue each interrupted trial again, with its settings, its evaluations and the folder of its checkpoints."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            self.study.tell(trial.number, state=TrialState.FAIL)
            evaluations = {str(step): value for step, value in trial.intermediate_values.items()}
            attributes = {REPLACES: trial.number, "folder": trial.user_attrs.get("folder"), "seen": evaluations}
            self.study.enqueue_trial(trial.params, user_attrs=attributes)
            self.controls.note(
                f"trial {trial.number} was interrupted; it continues as trial {len(self.study.get_trials(deepcopy=False)) - 1}"
            )

    def run_next(self) -> None:
        """Train the next trial and give its result to the study; a trial that a signal stopped stays unfinished."""
        trial = self.study.ask()
        try:
            varied = {key: choice.suggest(trial, key) for key, choice in self.space.parameters.items()}
            self.controls.note(f"trial {trial.number}: {', '.join(f'{key} {value}' for key, value in varied.items())}")
            config = self._config(trial, varied)
            with processes.started(self.controls.size) as world, self.controls.display(config.training.max_iters) as progress:
                judged = _PruningProgress(progress, trial, self.controls.stop)
                outcome = start.train(config, judged, self.controls.stop, make_sender=self.controls.make_sender, world=world)
        # Settings that do not go together, data that do not fit, memory that does not suffice: the next trial may.
        except Exception as error:
            self._failed(trial, error)
            return
        if outcome.ending.reason == PRUNED:
            self.controls.stop.received = None
            self.study.tell(trial, state=TrialState.PRUNED)
            self.controls.note(f"trial {trial.number}: pruned at step {outcome.ending.step}")
        elif outcome.ending.reason == "finished":
            assert outcome.ending.val_loss is not None, "the last step is evaluated"
            self.study.tell(trial, outcome.ending.val_loss)
            self.controls.note(f"trial {trial.number}: {METRIC} {outcome.ending.val_loss:.4f}")

    def _failed(self, trial: optuna.Trial, error: Exception) -> None:
        """Tell the study and the user; what is no error of this package is kept whole in a file for whoever looks for the reason."""
        said = first_line(error)
        if not isinstance(error, BdhError):
            file = self.folder / f"trial_{trial.number}.error.txt"
            with contextlib.suppress(OSError):
                file.write_text(masked("".join(traceback.format_exception(error))), encoding="utf-8")
            said = f"{type(error).__name__}: {said} (see {file})"
        elif isinstance(error, ConfigError):
            said = masked(str(error))  # the reasons are in its further lines
        self.controls.note(f"trial {trial.number} failed: {said}")
        self.study.tell(trial, state=TrialState.FAIL)

    def _config(self, trial: optuna.Trial, varied: Mapping[str, Any]) -> Config:
        """The configuration of a trial; one that was interrupted gets its evaluations back and resumes from its own folder."""
        folder = Path(trial.user_attrs.get("folder") or self.folder / f"trial_{trial.number}")
        trial.set_user_attr("folder", str(folder))
        for step, value in trial.user_attrs.get("seen", {}).items():
            trial.report(value, int(step))
        own: dict[str, Any] = {**varied, "training.checkpoint_dir": str(folder), "tracking.run_name": f"trial {trial.number}"}
        if run_dirs := checkpoint.by_last_save(folder):
            own["training.resume_from_checkpoint"] = str(run_dirs[0])
        return _replaced(self.base, own)


class _PruningProgress:
    """Passes progress on; reports each evaluation to the trial and ends the training when the pruner says so."""

    def __init__(self, progress: Progress, trial: optuna.Trial, stop: StopRequest) -> None:
        self._progress, self._trial, self._stop = progress, trial, stop

    def advance(self, step: int, loss: float, tokens_per_s: float) -> None:
        self._progress.advance(step, loss, tokens_per_s)

    def point(self, values: Mapping[str, float], step: int) -> None:
        self._progress.point(values, step)
        if METRIC in values:
            self._trial.report(values[METRIC], step)  # finite: the trainer ends at another one
            if self._trial.should_prune() and not self._stop.received:
                self._stop.ask(PRUNED)

    def note(self, text: str) -> None:
        self._progress.note(text)


def _log_results(client: MlflowClient, parent: str, study: optuna.Study) -> None:
    """Log the best trial so far, the table of trials and two plots to the parent run."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    rows = [_row(t) for t in study.get_trials(deepcopy=False) if t.state.is_finished()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = {"columns": columns, "data": [[row.get(key) for key in columns] for row in rows]}
    client.log_text(parent, json.dumps(table), "sweep/trials.json")
    client.set_tag(parent, MLFLOW_LOGGED_ARTIFACTS, json.dumps([{"path": "sweep/trials.json", "type": "table"}]))
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
        warnings.simplefilter("ignore")  # that the plots are experimental, and missing fonts
        axes = getattr(optuna.visualization.matplotlib, plot)(study)
    figure: Figure = axes.figure
    figure.set_size_inches(10, 5)
    return figure


def _row(t: FrozenTrial) -> dict[str, Any]:
    value = t.value if t.state is TrialState.COMPLETE else None
    return {"trial": t.number, "state": t.state.name.lower(), METRIC: value, "steps": t.last_step, **t.params}


def _replaced(config: Config, values: Mapping[str, Any]) -> Config:
    """The configuration with other values under dotted keys, also checked against this machine.   Raises ConfigError."""
    return Config.from_dict(config.replaced(in_full(values)).to_dict(), checks=(problems,), origin="settings")
